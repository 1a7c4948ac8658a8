"""The notebooks run as they are: on the published results, and on what a comparison of one's own leaves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jupytext
import papermill
import pytest

from experiments import bench_run, cells, compare
from tests.analysis_results import write_run
from tests.tiny import ONE_RANK, run_ranks_here, tiny

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "analysis" / "notebooks").glob("*.py"))}
PICTURE = "data:image/png"
PUBLISHED: dict[str, tuple[int, tuple[str, ...]]] = {
    "01_quickstart": (4, ("netns_2x2_ta_moe, measured on 2 cores", "ta_moe synchronised (native)")),
    "02_ta_moe": (5, ("reproduced", "modelled_communication_s")),
    "03_hiermoe": (5, ("reproduced", "table_iv", "levels")),
    "04_swiftmoe": (4, ("28.5 %", "partly", "netns_2x2_swiftmoe")),
    "05_fsmoe": (6, ("simulated", "speed-up of fsmoe over")),
    "06_compare_your_cluster": (0, ("NVIDIA H200", "step_time", "only in A")),
}
"""How many pictures each shows at least, and words among its outputs."""

OWN: dict[str, tuple[int, tuple[str, ...]]] = {
    "01_quickstart": (4, ("interrupted: power", "flat (native)", "reference (native)")),
    "02_ta_moe": (0, ("not tested here", "experiment=ta_moe_netns", "No run of TA-MoE here")),
    "03_hiermoe": (0, ("not tested here", "Nothing of HierMoE here yet")),
    "04_swiftmoe": (0, ("not tested here", "Nothing of SwiftMoE here yet")),
    "05_fsmoe": (0, ("not tested here", "Nothing of FSMoE here yet", "experiments.simulate")),
    "06_compare_your_cluster": (0, ("tokens_per_s", "only in A: deepspeed (upstream)")),
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """What `make compare` leaves, of one rank and a few steps, and two runs of no use beside it."""
    folder = tmp_path_factory.mktemp("outputs")
    steps = ["trainer.max_steps=3", "trainer.warmup_steps=1", "timing.rounds=2", "timing.warmup=1"]
    command = tiny(folder, text, ONE_RANK, *steps, "systems=[flat,reference]", "seeds=[0]")
    with pytest.MonkeyPatch.context() as patch:
        for module in (cells, bench_run):
            patch.setattr(module, "run_ranks", run_ranks_here)
        patch.setattr(sys, "argv", ["compare", *command])
        compare.main()
    write_run(folder, "fairscale", 0, "interrupted", "power")
    (write_run(folder, "deepspeed", 0) / "metrics.parquet").write_bytes(b"PAR1")
    return folder


def executed(notebook: Path, folder: Path, **parameters: Any) -> tuple[int, str]:
    """Convert a notebook and run it in a kernel of its own: (how many pictures its outputs show, the rest of them)."""
    source, out = folder / f"{notebook.stem}.ipynb", folder / f"{notebook.stem}-run.ipynb"
    jupytext.write(jupytext.read(notebook), source)
    run = papermill.execute_notebook(source, out, parameters, cwd=ROOT, progress_bar=False, start_timeout=120)
    outputs = [one for cell in run.cells for one in cell.get("outputs", ())]
    shown = [one.get("data", {}) for one in outputs]
    told = [one.get("text", "") for one in outputs] + [
        data.get("text/html", data.get("text/plain", "")) for data in shown
    ]
    pictures = sum("image/png" in data for data in shown) + "".join(told).count(PICTURE)
    return pictures, "\n".join(told)


def expect(found: tuple[int, str], expected: tuple[int, tuple[str, ...]]) -> None:
    """At least so many pictures, and these words."""
    assert found[0] >= expected[0]
    assert [words for words in expected[1] if words not in found[1]] == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs_on_the_published_results(name: str, tmp_path: Path) -> None:
    expect(executed(NOTEBOOKS[name], tmp_path), PUBLISHED[name])


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs_on_a_comparison_of_one_s_own(name: str, outputs: Path, tmp_path: Path) -> None:
    if name == "06_compare_your_cluster":
        parameters: dict[str, Any] = {"theirs": "local_2x2", "yours": str(outputs)}
    elif name == "01_quickstart":
        parameters = {"results": str(outputs), "name": ""}
    else:
        parameters = {"results": str(outputs), "names": []}
    expect(executed(NOTEBOOKS[name], tmp_path, **parameters), OWN[name])


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_a_pair_with_one_cell_of_parameters(name: str) -> None:
    notebook = jupytext.read(NOTEBOOKS[name])
    assert notebook.metadata["jupytext"]["formats"] == "ipynb,py:percent"
    assert sum("parameters" in cell.metadata.get("tags", ()) for cell in notebook.cells) == 1
    assert notebook.cells[0].cell_type == "markdown"
    # Synchronising the pair leaves the file as it is.
    assert jupytext.writes(notebook, fmt="py:percent") == NOTEBOOKS[name].read_text()
