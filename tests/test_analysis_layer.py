"""The table and the figure of a layer benchmark, from samples that the test makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.errors import ResultsError
from analysis.layer import COLUMNS, format_table, main, write_layer
from tests.analysis_results import status_row, write_samples


def two_shapes(table: pd.DataFrame) -> pd.DataFrame:
    """One seed; a second shape that takes twice as long, and a system that refused it."""
    table = table[table["seed"] == 0]
    small = table.assign(shape="small")
    large = table[table["system"] != "fairscale"].assign(shape="large")
    times = large["metric"].isin(["step_time", "stage_time"])
    large = large.assign(value=large["value"].where(~times, 2 * large["value"]))
    refusal = pd.DataFrame(status_row("fairscale", 0, "refused: float32 only.")).assign(shape="large")
    return pd.concat([small, large, refusal], ignore_index=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Samples of three systems and two shapes, every time exact."""
    return write_samples(tmp_path, ["flat", "deepspeed", "fairscale"], change=two_shapes, noise=0.0)


def test_every_number_comes_from_the_samples(folder: Path) -> None:
    summary = write_layer(folder, baseline="flat")
    samples = pd.read_parquet(folder / "samples.parquet")
    assert list(summary.columns) == COLUMNS
    assert list(pd.read_csv(folder / "summary.csv").columns) == COLUMNS
    rows = summary.set_index(["shape", "system", "metric"])
    for shape in ("small", "large"):
        own = samples[(samples["shape"] == shape) & (samples["metric"] == "step_time")]
        median = own.groupby("system")["value"].median()
        assert rows.loc[(shape, "deepspeed", "step_time"), "value"] == median["deepspeed"]
        ratio = rows.loc[(shape, "deepspeed", "step_time_ratio")]
        assert ratio["value"] == pytest.approx(median["flat"] / median["deepspeed"])
        assert ratio["low"] <= ratio["value"] <= ratio["high"]
    slower = rows.loc[("large", "flat", "step_time"), "value"] / rows.loc[("small", "flat", "step_time"), "value"]
    assert slower == pytest.approx(2)


def test_a_refused_system_is_a_row_with_its_reason(folder: Path) -> None:
    summary = write_layer(folder, baseline="flat")
    refused = summary[(summary["shape"] == "large") & (summary["system"] == "fairscale")]
    assert list(refused["metric"]) == ["run"]
    assert refused["status"].item() == "refused: float32 only."
    assert np.isnan(refused["value"].item())
    assert "refused: float32 only." in format_table(summary)
    assert "refused: float32 only." in (folder / "summary.md").read_text()


def test_the_figure_is_drawn(folder: Path) -> None:
    write_layer(folder, baseline="flat")
    assert (folder / "stages.png").stat().st_size > 10_000
    assert (folder / "stages.pdf").read_bytes().startswith(b"%PDF")


def test_of_many_shapes_each_system_s_speed_is_drawn(tmp_path: Path) -> None:
    def shapes(table: pd.DataFrame) -> pd.DataFrame:
        return pd.concat([table[table["seed"] == 0].assign(shape=f"shape {index}") for index in range(17)])

    folder = write_samples(tmp_path, ["flat", "deepspeed"], change=shapes)
    write_layer(folder, baseline="flat")
    assert (folder / "step_time.png").stat().st_size > 10_000
    assert not (folder / "stages.png").exists()


def test_no_samples_is_an_error_with_a_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ResultsError, match="run `python -m experiments.layer` first"):
        write_layer(tmp_path, baseline="flat")
    assert main([str(tmp_path)]) == 2
    assert "experiments.layer" in capsys.readouterr().err


def test_the_command_line_makes_it_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder)]) == 0
    assert "deepspeed (upstream)" in capsys.readouterr().out
    assert (folder / "summary.csv").exists()
