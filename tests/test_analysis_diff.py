"""Two folders of results, cell by cell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.diff import diff, main
from analysis.diff_cells import ALIKE, DIFFERS, UNKNOWN, Measured, compared
from analysis.errors import ResultsError
from tests.analysis_results import LABELS, layer_rows, write_parquet, write_run, write_samples

Rows = list[dict[str, object]]


def write_layer(
    folder: Path, rows: Rows, commit: str = "aaa", gpu: str = "NVIDIA H100", kind: str = "measured"
) -> Path:
    """A layer benchmark with its manifest."""
    write_parquet(folder / "samples.parquet", pd.DataFrame(rows), LABELS | {"kind": kind})
    manifest = {"git": {"commit": commit}, "hardware": {"gpus": [gpu]}, "versions": {"torch": "2.11.0"}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def cell(table: pd.DataFrame, metric: str, system: str = "flat (native)", place: str = "s, uniform") -> pd.Series:
    """One row of a diff."""
    return table[(table["metric"] == metric) & (table["system"] == system) & (table["place"] == place)].squeeze()


def test_a_slower_cell_differs_and_a_noisy_one_does_not(tmp_path: Path) -> None:
    one = write_layer(tmp_path / "one", [*layer_rows("flat", "s", 0.050), *layer_rows("tutel", "s", 0.08)])
    other = write_layer(tmp_path / "other", [*layer_rows("flat", "s", 0.060), *layer_rows("tutel", "s", 0.0801)])
    table, notes = diff(one, other)
    slower = cell(table, "step_time")
    assert slower["verdict"] == DIFFERS
    assert slower["low"] <= slower["ratio"] <= slower["high"]
    assert slower["ratio"] == pytest.approx(1.2)
    assert cell(table, "step_time", "tutel (native)")["verdict"] == ALIKE
    assert notes == []


def test_what_is_not_alike_and_what_only_one_has_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused = layer_rows("tutel", "s", status="refused: too many experts")
    one = write_layer(tmp_path / "one", [*layer_rows("flat", "s"), *layer_rows("tutel", "s")])
    other = write_layer(tmp_path / "other", [*layer_rows("flat", "s"), *refused], "bbb", "NVIDIA H200")
    _, notes = diff(one, other)
    told = "\n".join(notes)
    assert "commit: aaa in A, bbb in B" in told
    assert "GPUs: ['NVIDIA H100'] in A, ['NVIDIA H200'] in B" in told
    assert "only in A: tutel (native) under s, uniform" in told
    assert "without numbers in B: s, uniform: tutel (native): refused: too many experts" in told
    assert main([str(one), str(other), "--write", str(tmp_path / "diff.csv")]) == 0
    assert "commit: aaa in A, bbb in B" in capsys.readouterr().out
    assert set(pd.read_csv(tmp_path / "diff.csv")["verdict"]) == {ALIKE}


@pytest.mark.parametrize(
    ("first", "second", "verdict", "why"),
    [
        (Measured((1.0, 1.1, 1.2), "s"), Measured((1.5, 1.6, 1.3), "s"), DIFFERS, ""),
        (Measured((1.0, 1.1, 1.4), "s"), Measured((1.5, 1.6, 1.3), "s"), ALIKE, ""),
        (Measured((5.0,), "B"), Measured((5.5,), "B"), UNKNOWN, "one value"),
        (Measured((5.0, 6.0), "B", (0, 1)), Measured((5.5, 6.6), "B", (0, 1)), DIFFERS, ""),
        (Measured((5.0, 6.0), "B", (0, 1)), Measured((5.5, 5.4), "B", (0, 1)), ALIKE, ""),
        (Measured((5.0, 6.0), "B", (0, 1)), Measured((6.0, 9.0), "B", (1, 2)), UNKNOWN, "one seed"),
        (Measured((5.0,), "B", (0,)), Measured((5.0,), "B", (3,)), ALIKE, "the same"),
        (Measured((5.0,), "B", (0,)), Measured((6.0,), "B", (3,)), UNKNOWN, "no seed in common"),
        (Measured((1.2,), "x", computed=True), Measured((1.3,), "x", computed=True), DIFFERS, "computed"),
        (Measured((1.0, np.nan), "s"), Measured((1.0, 1.0), "s"), UNKNOWN, "not a number"),
        (Measured((1.0,), "s"), Measured((1.0,), "ms"), UNKNOWN, "in s and in ms"),
        (Measured((0.0,), "copies"), Measured((3.0,), "copies"), UNKNOWN, "no ratio to what is not positive"),
    ],
)
def test_what_a_cell_can_tell(first: Measured, second: Measured, verdict: str, why: str) -> None:
    assert compared(first, second)[1:] == (verdict, why)


def write_compare(root: Path, change: Callable[[pd.DataFrame], pd.DataFrame] = lambda table: table) -> Path:
    """A comparison of two systems and seeds."""
    runs = [write_run(root, system, seed, change=change) for system in ("flat", "deepspeed") for seed in (0, 1)]
    write_samples(root, ["flat", "deepspeed"])
    (root / "compare").mkdir()
    index = {"runs": [f"../{run.name}" for run in runs], "samples": "../samples", "baseline": "flat"}
    (root / "compare" / "compare.json").write_text(json.dumps(index))
    return root


def test_losses_are_paired_by_seed_and_half_written_runs_are_told(tmp_path: Path) -> None:
    def worse(table: pd.DataFrame) -> pd.DataFrame:
        return table.assign(value=table["value"].where(table["metric"] != "val_loss", 1.01 * table["value"]))

    one, other = write_compare(tmp_path / "one"), write_compare(tmp_path / "other", worse)
    table, _ = diff(one, other)
    loss = cell(table, "val_loss", place="")
    assert (loss["verdict"], loss["ratio"]) == (DIFFERS, pytest.approx(1.01))
    assert cell(table, "tokens_per_s", place="")["verdict"] == ALIKE
    broken = next(other.glob("deepspeed-*-s1-*")) / "metrics.parquet"
    broken.write_bytes(broken.read_bytes()[:400])
    _, notes = diff(one, other)
    assert any(note.startswith("without numbers in B: deepspeed (upstream): corrupt (seed 1)") for note in notes)


def test_computed_tables_are_compared_row_by_row(tmp_path: Path) -> None:
    for name, ours in (("one", 1.2), ("other", 1.3)):
        rows = pd.DataFrame({"quantity": ["a", "b"], "testbed": ["A", "A"], "costs": ["c", "c"], "paper": [1.1, None]})
        (tmp_path / name).mkdir()
        rows.assign(ours=[ours, 2.0], unit="x", kind="simulated", source="s").to_csv(
            tmp_path / name / "table5.csv", index=False
        )
    table, _ = diff(tmp_path / "one", tmp_path / "other")
    assert list(table["verdict"]) == [DIFFERS, ALIKE]
    assert table["ratio"].iloc[0] == pytest.approx(1.3 / 1.2)


def test_what_can_not_be_put_side_by_side_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_layer(tmp_path / "one", layer_rows("flat", "s"))
    with pytest.raises(ResultsError, match="no cell in common"):
        diff(one, write_layer(tmp_path / "other", layer_rows("flat", "t")))
    with pytest.raises(ResultsError, match="measured in .* and simulated in"):
        diff(one, write_layer(tmp_path / "simulated", layer_rows("flat", "s"), kind="simulated"))
    with pytest.raises(ResultsError, match="stands there twice"):
        diff(one, write_layer(tmp_path / "twice", [*layer_rows("flat", "s"), *layer_rows("flat", "s")]))
    (tmp_path / "empty").mkdir()
    assert main([str(one), str(tmp_path / "empty")]) == 2
    assert "no finished results there" in capsys.readouterr().err
    assert main([str(one), str(tmp_path / "nowhere")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
