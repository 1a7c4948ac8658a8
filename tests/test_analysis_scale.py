"""Many runs fit into memory, and runs that still write or were cut off are skipped and listed, at any time."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from analysis.errors import ResultsError
from analysis.figures.found import look_into
from analysis.files import files_under
from analysis.load import load_run
from analysis.report.routing import viewer_data
from analysis.report.runs import entries
from experiments.results import MetricRow, RunDir
from tests import topology_results
from tests.analysis_results import write_run, write_samples
from tests.many_runs import METRICS, read_elsewhere, write_runs

MOST_MIB = 2 * 1024
"""That a thousand runs of two thousand steps may take."""


def test_a_thousand_runs_would_fit_into_two_gibibytes(tmp_path: Path) -> None:
    runs, steps = 40, 2000
    write_runs(tmp_path, runs, steps)
    told = read_elsewhere(tmp_path)
    assert told["rows"] == runs * steps * len(METRICS)
    mib_per_run = (told["peak_mib"] - told["before_mib"]) / runs
    assert mib_per_run > 0
    assert told["before_mib"] + 1000 * mib_per_run < MOST_MIB


def cut(path: Path, keep: float) -> None:
    """Leave the first part of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("file", ["metrics.parquet", "samples.parquet", "status.json", "manifest.json"])
def test_a_file_that_is_half_there_is_skipped_and_listed(tmp_path: Path, file: str, keep: float) -> None:
    whole = topology_results.write_comparison(tmp_path / "whole")
    half = write_samples(tmp_path) if file == "samples.parquet" else write_run(tmp_path, "deepspeed", 0)
    cut(half / file, keep)
    found = look_into([tmp_path])
    assert [one.path for one in found.comparisons] == [whole]
    (told,) = found.skipped
    assert told.startswith(f"{half}: corrupt: ")
    assert file in told
    runs, refused = entries(tmp_path)
    assert refused == []
    (odd,) = (entry for entry in runs if entry.status != "done")
    assert odd.name == half.name
    assert file in odd.reason


def test_a_half_written_routing_or_index_is_told(tmp_path: Path) -> None:
    folder = topology_results.write_comparison(tmp_path / "first")
    topology_results.write_comparison(tmp_path / "second")
    cut(folder / "compare.json", 0.5)
    found = look_into([tmp_path])
    assert [one.name for one in found.comparisons if one.run_dirs] == ["second"]
    assert f"{folder / 'compare.json'}: must be a JSON object" in found.refused[0]
    run = next((tmp_path / "first").glob("ta_moe-*-s0-*"))
    cut(run / "routing.npz", 0.5)
    _, missing = viewer_data(entries(tmp_path)[0])
    (told,) = missing
    assert told.startswith(f"{run.name}/routing.npz: can't be read")


def test_a_folder_that_vanishes_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    topology_results.write_comparison(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_20"
    checkpoint.mkdir(parents=True)
    scan = os.scandir

    def scan_late(path: str | int) -> object:
        if path == str(checkpoint):  # listed in its parent, removed by its run
            checkpoint.rmdir()
        return scan(path)

    monkeypatch.setattr(os, "scandir", scan_late)
    assert len(look_into([tmp_path]).comparisons) == 1
    assert not checkpoint.exists()


def rewrite(run: RunDir, turns: int) -> None:
    """Write a run again and again as training does, a checkpoint that comes and goes included."""
    run.create({"system": {"name": "flat"}, "seed": 0}, [])
    footer = {"run_id": run.path.name, "system": "flat", "seed": 0, "implementation": "native", "kind": "measured"}
    footer |= {"cluster": "local_2x2", "emulation": ""}
    run.write_manifest({"run_id": run.path.name, "seed": 0})
    for turn in range(turns):
        rows = [MetricRow(step, "loss", "", 1.0, "nats/token") for step in range(turn + 1)]
        run.write_metrics(rows, footer)
        draft = run.checkpoints / f"step_{turn}"
        draft.mkdir()
        (draft / "shard").write_bytes(b"x")
        shutil.rmtree(draft)
        run.set_status("running", step=turn + 1)
    run.set_status("done", step=turns)


def statuses(folder: Path) -> dict[str, str]:
    """What there is to read right now, by name; nothing of it may raise."""
    runs, refused = entries(folder)
    assert refused == []
    with suppress(ResultsError):  # that nothing is finished yet
        look_into([folder])
    return {entry.name: entry.status for entry in runs}


def test_runs_are_read_while_they_write(tmp_path: Path) -> None:
    runs = [RunDir(tmp_path / name) for name in ("first", "second")]
    seen: set[str] = set()
    with ThreadPoolExecutor(2) as writers:
        writing = [writers.submit(rewrite, run, 60) for run in runs]
        while not all(one.done() for one in writing):
            seen |= set(statuses(tmp_path).values())
        for one in writing:
            one.result()
    assert seen <= {"missing", "running", "done"}  # never a half-written file
    assert statuses(tmp_path) == {"first": "done", "second": "done"}
    assert len(load_run(tmp_path / "first").metrics) == 60


def test_files_are_listed_in_order(tmp_path: Path) -> None:
    for name in ("b/x", "a/y", "a/c/z"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in files_under(tmp_path)] == ["a/c/z", "a/y", "b/x"]
