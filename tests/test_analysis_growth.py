"""Growth with a layer's sizes, from samples that the test makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.errors import ResultsError
from analysis.growth import AXES, COLUMNS, main, series_of, write_growth
from experiments.cli import compose
from tests.analysis_results import LABELS, layer_rows, write_manifest, write_parquet

BASE = {"tokens_per_rank": 8192, "num_experts": 64, "top_k": 4, "model_dim": 2048, "hidden_dim": 1024}
SIZES = {
    "base": BASE,
    **{f"tokens={size}": BASE | {"tokens_per_rank": size} for size in (1024, 2048, 4096, 16384, 32768, 65536)},
    **{f"experts={size}": BASE | {"num_experts": size} for size in (8, 16, 32, 128, 256)},
    **{f"top_k={size}": BASE | {"top_k": size} for size in (1, 2, 8)},
}


def seconds(sizes: dict[str, int]) -> float:
    """In proportion to the routed rows above a fixed cost; with more than 128 experts half as much again."""
    rows = sizes["tokens_per_rank"] * sizes["top_k"]
    return (1e-3 + 2e-7 * rows) * (1.5 if sizes["num_experts"] > 128 else 1.0)


def published(folder: Path, sizes: dict[str, dict[str, int]] | None = SIZES, out: str = "tokens=65536") -> Path:
    """A folder that holds samples.parquet and manifest.json alone; one shape ran out of memory."""
    rows = []
    for shape, own in SIZES.items():
        if shape == out:
            rows += layer_rows("flat", shape, status="oom: tried to allocate 2 GiB")
        else:
            rows += layer_rows("flat", shape, seconds(own), floor_s=0.6 * seconds(own | {"num_experts": 8}))
    footer: dict[str, Any] = LABELS | ({} if sizes is None else {"shapes": sizes})
    write_parquet(folder / "samples.parquet", pd.DataFrame(rows), footer)
    write_manifest(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Growth written once."""
    folder = published(tmp_path_factory.mktemp("growth"))
    write_growth(folder)
    return folder


def test_a_row_for_every_point_of_every_axis(folder: Path) -> None:
    table = pd.read_csv(folder / "growth.csv")
    assert list(table.columns) == COLUMNS
    values = {axis: list(own["value"]) for axis, own in table.groupby("axis", sort=False)}
    assert values == {
        "tokens_per_rank": [1024, 2048, 4096, 8192, 16384, 32768, 65536],
        "num_experts": [8, 16, 32, 64, 128, 256],
        "top_k": [1, 2, 4, 8],
    }
    row = table[table["shape"] == "tokens=2048"].iloc[0]
    assert row["time_s"] == pytest.approx(seconds(SIZES["tokens=2048"]), rel=0.02)
    assert row["time_low_s"] <= row["time_s"] <= row["time_high_s"]
    assert row["time_over_floor"] == pytest.approx(row["time_s"] / row["floor_s"])
    assert row["work_ratio"] == 2
    before = table[table["shape"] == "tokens=1024"].iloc[0]
    assert row["time_ratio"] == pytest.approx(row["time_s"] / before["time_s"])


def test_only_what_grows_faster_than_its_work_is_a_step(folder: Path) -> None:
    table = pd.read_csv(folder / "growth.csv")
    assert list(table[table["step"]]["shape"]) == ["experts=256"]
    assert table[table["step"]]["work_ratio"].item() == 1


def test_a_point_without_a_time_is_a_row_with_its_reason(folder: Path) -> None:
    row = pd.read_csv(folder / "growth.csv").set_index("shape").loc["tokens=65536"]
    assert row["status"] == "oom: tried to allocate 2 GiB"
    assert pd.isna(row["time_s"]) and pd.isna(row["time_ratio"]) and not row["step"]


def test_the_point_after_a_gap_is_held_against_the_one_before_it(tmp_path: Path) -> None:
    table = write_growth(published(tmp_path, out="top_k=2")).set_index("shape")
    assert table.loc["top_k=2", "status"].startswith("oom")
    assert table[table["axis"] == "top_k"].loc["base", "work_ratio"] == 4


def test_the_figure_is_drawn(folder: Path) -> None:
    assert (folder / "growth.png").stat().st_size > 20_000
    assert (folder / "growth.pdf").read_bytes().startswith(b"%PDF")


def test_series_of_unrelated_shapes_are_none() -> None:
    assert series_of({"one": BASE, "two": BASE | {"top_k": 1, "num_experts": 8}}) == {}
    assert series_of({}) == {}
    assert series_of({"a": BASE, "again": BASE, "b": BASE | {"top_k": 2}}) == {"top_k": ["b", "a"]}


def test_the_experiment_varies_every_axis() -> None:
    shapes = compose("layer", ["experiment=native_layer_growth"])["shapes"]
    sizes = {shape["name"]: {key: value for key, value in shape.items() if key != "name"} for shape in shapes}
    found = series_of(sizes)
    assert tuple(found) == AXES
    assert {name for names in found.values() for name in names} == sizes.keys()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [(None, "its footer has no shapes"), ({"base": BASE}, "experiment=native_layer_growth")],
)
def test_samples_without_series_are_an_error_with_a_fix(
    tmp_path: Path, sizes: dict[str, dict[str, int]] | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ResultsError, match=message):
        write_growth(published(tmp_path, sizes))
    assert main([str(tmp_path)]) == 2
    assert "Fix: " in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2


def test_the_command_line_marks_the_steps(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder)]) == 0
    told = capsys.readouterr().out
    assert [line.split(":")[0] for line in told.splitlines() if line.endswith("<- step")] == ["flat, num_experts 256"]
    assert json.loads((folder / "manifest.json").read_text())
