"""The roofline figure, from the table that FasterMoE's predictor makes."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.plots.roofline import roofline_figure
from analysis.roofline import main, read_roofline
from analysis.style import suite_style
from baselines.fastermoe_predictor import CURVES, Point, roofline_rows
from tests.test_analysis_figures import all_text, extent, texts

POINTS = [
    Point("flat", 0.4, 21e12, "measured"),
    Point("fastermoe", 0.9, 55e12, "measured"),
    Point("fastermoe", 0.9, 61e12, "modelled"),
]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table of three points."""
    pd.DataFrame(roofline_rows(POINTS, 400e12)).to_csv(tmp_path / "roofline.csv", index=False)
    return tmp_path / "roofline.csv"


def test_points_and_curves_are_drawn_where_the_table_says(table: Path) -> None:
    with suite_style():
        figure = roofline_figure(read_roofline(table), "On two made-up GPUs.")
        figure.draw_without_rendering()
    (axes,) = figure.axes
    curves = [line for line in axes.lines if np.size(line.get_xdata()) > 1]
    points = [line for line in axes.lines if np.size(line.get_xdata()) == 1]
    assert len(curves) == len(CURVES)
    assert len({str(line.get_linestyle()) + str(line.get_color()) for line in curves}) > 2
    drawn = np.array([line.get_xydata() for line in points]).reshape(-1, 2)
    np.testing.assert_allclose(drawn, [(0.4, 21), (0.9, 55), (0.9, 61)])
    assert [line.get_markerfacecolor() == "none" for line in points] == [False, False, True]
    text = all_text(figure)
    for told in (
        "flat",
        "fastermoe",
        "ideal (5)",
        "semi-ideal, 3 : 4",
        "measured and modelled",
        "throughput of one rank, TFLOP/s",
    ):
        assert told in text
    boxes = [extent(item, figure) for item in texts(figure)]
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def test_systems_of_equal_ratios_do_not_hide_each_other() -> None:
    near = [Point(name, 0.4, 21e12, kind) for name in ("flat", "tutel") for kind in ("measured", "modelled")]
    with suite_style():
        figure = roofline_figure(pd.DataFrame(roofline_rows(near, 400e12)), "")
    points = [line for line in figure.axes[0].lines if np.size(line.get_xdata()) == 1]
    points.sort(key=lambda line: line.get_zorder())  # the order in which they are drawn
    sizes = [line.get_markersize() for line in points]
    assert [line.get_markerfacecolor() == "none" for line in points] == [True, True, False, False]
    assert sizes[0] > sizes[1] and sizes[2] > sizes[3] and sizes[0] > sizes[2] and sizes[1] > sizes[3]
    assert "Sizes of markers only keep systems apart" in all_text(figure)


def test_the_command_line_writes_both_files(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(table), "--where", "On two made-up GPUs."]) == 0
    assert table.with_suffix(".png").stat().st_size > 20_000
    assert table.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    assert "roofline.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("ratio", 0.0, "ratio=0.0 in row 1 has no place on a logarithmic axis"),
        ("flops_per_s", float("inf"), "flops_per_s=inf in row 1"),
        ("what", "line", "what=line in row 1. Fix: use curve or point"),
        ("kind", "guessed", "kind=guessed in row 1"),
    ],
)
def test_a_row_that_cannot_be_drawn_is_an_error(
    table: Path, column: str, value: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pd.read_csv(table)
    rows.loc[1, column] = value
    rows.to_csv(table, index=False)
    assert main([str(table)]) == 2
    assert message in capsys.readouterr().err


def test_a_table_that_is_none_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere.csv")]) == 2
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert main([str(tmp_path / "other.csv")]) == 2
    told = capsys.readouterr().err
    assert "not a readable CSV" in told
    assert "it has no column what, name, kind" in told
