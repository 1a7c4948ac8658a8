"""The README's table, from samples that the test makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.errors import ResultsError
from analysis.performance import main, performance_block, write_block
from tests.analysis_results import LABELS, Rows, layer_rows, write_manifest, write_parquet

MARKERS = "# Title\n\n<!-- performance:begin -->\n<!-- performance:end -->\n\nAfter.\n"
MEBIBYTE = 2**20


def upstream(system: str, shape: str, seconds: float, mebibytes: float, dropped: int = 0, **more: Any) -> Rows:
    """Samples of an upstream package."""
    return layer_rows(
        system, shape, seconds, implementation="upstream", peak_bytes=mebibytes * MEBIBYTE, dropped=dropped, **more
    )


def published(folder: Path, workload: str = "uniform") -> Path:
    """Two shapes with numbers, one that flat has none of, one that no upstream package has one of."""
    rows = [
        *layer_rows("flat", "small", 0.05, floor_s=0.04, peak_bytes=300 * MEBIBYTE, workload=workload),
        *upstream("tutel 2DH", "small", 0.10, 200, workload=workload),
        *upstream("deepspeed", "small", 0.15, 100, dropped=7, workload=workload),
        *layer_rows("flat", "large", 0.05, floor_s=0.025, peak_bytes=400 * MEBIBYTE, workload=workload),
        *upstream("deepspeed", "large", 0.40, 700, workload=workload),
        *upstream("tutel 2DH", "large", 0.0, 0, status="oom: 2 GiB | more", workload=workload),
        *layer_rows("flat", "broken", status="failed: no such kernel", workload=workload),
        *upstream("deepspeed", "broken", 0.40, 500, workload=workload),
        *upstream("tutel 2DH", "broken", 0.0, 0, status="oom: 2 GiB | more", workload=workload),
        *layer_rows("flat", "alone", 0.05, floor_s=0.04, workload=workload),
    ]
    shapes: dict[str, Any] = {name: {} for name in ("small", "broken", "large", "alone")}
    write_parquet(folder / "samples.parquet", pd.DataFrame(rows), LABELS | {"shapes": shapes})
    write_manifest(folder)
    return folder


def cells(block: str) -> dict[str, list[str]]:
    """Cells of the rows by shape."""
    lines = [line for line in block.splitlines() if line.startswith("| ")]
    found = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0]: row[1:] for row in found}


def number(text: str) -> tuple[float, float, float]:
    """(value, low, high) of `1.2 [1.1, 1.3]`."""
    value, low, high = (
        float(word) for word in text.split(" (")[0].replace("[", "").strip("]").replace(",", "").split()
    )
    return value, low, high


def test_every_cell(tmp_path: Path) -> None:
    rows = cells(performance_block([published(tmp_path / "results" / "a")], tmp_path))
    assert list(rows)[2:] == ["small", "broken", "large", "alone", "geometric mean"]
    assert number(rows["small"][0])[0] == pytest.approx(50, rel=0.02)
    assert float(rows["small"][1]) == pytest.approx(0.8, rel=0.02)
    value, low, high = number(rows["small"][2])
    assert low <= value <= high and value == pytest.approx(2, rel=0.02)
    assert rows["small"][3:] == ["tutel 2DH", "300 MiB", "200 MiB (tutel 2DH)"], "the leaner one drops copies"
    assert rows["large"][3:] == ["deepspeed", "400 MiB", "700 MiB (deepspeed)"]
    mean, low, high = number(rows["geometric mean"][2])
    assert low <= mean <= high
    assert mean == pytest.approx(np.sqrt(number(rows["small"][2])[0] * number(rows["large"][2])[0]), rel=0.01)
    assert rows["geometric mean"][2].endswith("(of 2 of 4 shapes)")
    assert rows["geometric mean"][1].endswith("(of 3 of 4 shapes)")


def test_what_has_no_number_says_why(tmp_path: Path) -> None:
    block = performance_block([published(tmp_path / "a")], tmp_path)
    rows = cells(block)
    assert rows["broken"] == ["failed: no such kernel", "-", "-", "deepspeed", "-", "500 MiB (deepspeed)"]
    assert rows["alone"][2:4] == ["-", "none ran"] and rows["alone"][5] == "none"
    assert "- tutel 2DH has no numbers under large, broken: oom: 2 GiB | more" in block.splitlines()
    assert "- flat has no numbers under broken: failed: no such kernel" in block.splitlines()


def test_a_table_for_every_folder_with_its_machine(tmp_path: Path) -> None:
    folders = [published(tmp_path / "a"), published(tmp_path / "b", "zipf 1.0")]
    heads = [line for line in performance_block(folders, tmp_path).splitlines() if line.startswith("Measured")]
    machine = "2 x NVIDIA H100 80GB HBM3, cluster auto (2 NCCL ranks on one machine), torch 2.11.0"
    assert heads == [
        f"Measured under uniform routing on {machine}; files in [a](a):",
        f"Measured under zipf 1.0 routing on {machine}; files in [b](b):",
    ]


def test_the_readme_is_rewritten_between_its_markers_and_again_the_same(tmp_path: Path) -> None:
    readme, folder = tmp_path / "README.md", published(tmp_path / "results" / "a")
    readme.write_text(MARKERS)
    assert main([str(folder), "--write", str(readme)]) == 0
    written = readme.read_text()
    assert written == f"# Title\n\n{performance_block([folder], tmp_path)}\n\nAfter.\n"
    assert "<!-- performance:begin results/a -->" in written
    write_block(readme, [folder])
    assert readme.read_text() == written


@pytest.mark.parametrize("text", [None, "# Title\n", MARKERS + MARKERS])
def test_a_readme_without_a_place_for_it_is_an_error(tmp_path: Path, text: str | None) -> None:
    readme = tmp_path / "README.md"
    if text is not None:
        readme.write_text(text)
    with pytest.raises(ResultsError, match="Fix: put the two lines where"):
        write_block(readme, [published(tmp_path / "a")])


def test_a_folder_without_samples_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "Fix: name the folder of a layer benchmark" in capsys.readouterr().err
    assert main([str(published(tmp_path / "a"))]) == 0
    assert "geometric mean" in capsys.readouterr().out
