"""Throughput over numbers of experts and gates: the ratios of several comparisons, in one table and figure."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.errors import ResultsError
from analysis.plots.speedups import speedups_figure
from analysis.speedups import COLUMNS, main, write_speedups
from analysis.style import suite_style
from tests.test_analysis_figures import all_text, extent, texts
from tests.topology_results import write_comparison


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Comparisons of three sizes, the first without ta_moe; out of order."""
    root = tmp_path_factory.mktemp("sizes")
    sizes = {"few": (8, 2, ("deepspeed", "flat")), "more": (16, 2, ("deepspeed", "flat", "ta_moe"))}
    sizes["one_choice"] = (16, 1, ("deepspeed", "flat", "ta_moe"))
    return [
        write_comparison(root / name, systems, model={"num_experts": experts, "top_k": top_k})
        for name, (experts, top_k, systems) in sizes.items()
    ]


def test_ratios_are_those_of_each_comparison(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder) for folder in folders]) == 0
    assert "Switch (top-1)" in capsys.readouterr().out
    table = pd.read_csv(folders[0] / "speedups.csv")
    assert list(table.columns) == COLUMNS
    cells = table.set_index(["top_k", "num_experts", "system"])["ratio"]
    assert list(dict.fromkeys(cells.index.droplevel("system"))) == [(1, 16), (2, 8), (2, 16)]
    assert cells[1, 16, "flat"] == pytest.approx(2.0)  # 0.2 s over 0.1 s
    assert cells[2, 16, "ta_moe"] == pytest.approx(0.2 / 0.09)
    assert cells[2, 8, "deepspeed"] == 1
    assert dict(zip(table["top_k"], table["gate"], strict=True)) == {1: "Switch", 2: "GShard"}
    assert (folders[0] / "speedups.png").stat().st_size > 8_000


def test_the_figure_can_be_read_and_tells_what_is_missing() -> None:
    rows = [
        ("8 experts\nGShard, top-2", "flat", 1.3, "ok"),
        ("8 experts\nGShard, top-2", "ta_moe", float("nan"), "oom: out of memory on rank 3"),
        ("16 experts\nGShard, top-2", "ta_moe", 1.6, "ok"),
    ]
    table = pd.DataFrame(rows, columns=["group", "system", "ratio", "status"])
    table = table.assign(low=table["ratio"] - 0.1, high=table["ratio"] + 0.1, label=table["system"] + " (native)")
    with suite_style():
        figure = speedups_figure(table, "deepspeed (upstream)", "measured", "Somewhere.")
        figure.draw_without_rendering()
    told = all_text(figure)
    assert "ta_moe in 8 experts, GShard, top-2 (oom: out of memory on rank 3)" in told
    assert "flat in 16 experts, GShard, top-2 (not part of the comparison)" in told
    assert "ratio to deepspeed (upstream)" in told
    boxes = [(text.get_text(), extent(text, figure)) for text in texts(figure)]
    assert not [(one, other) for (one, a), (other, b) in combinations(boxes, 2) if a.overlaps(b)]
    assert all(figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1 for _, box in boxes)


def test_many_cases_are_rows_of_marks_with_a_mean_a_system() -> None:
    rows = [
        (f"{kind} B{index} L2048 M4096 H16384\nuniform", system, ratio * 2 ** (index % 2), "ok")
        for kind in ("simple", "mixtral")
        for index in range(27)
        for system, ratio in (("flat", 0.8), ("tutel", 1.5))
    ]
    rows[7] = (*rows[7][:2], float("nan"), "oom: out of memory on rank 3")
    table = pd.DataFrame(rows, columns=["group", "system", "ratio", "status"])
    table = table.assign(low=table["ratio"] - 0.1, high=table["ratio"] + 0.1, label=table["system"] + " (native)")
    with suite_style():
        figure = speedups_figure(table, "deepspeed (upstream)", "measured", "Somewhere.")
        figure.draw_without_rendering()
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_yticklabels()][:2] == [
        "simple B0 L2048 M4096 H16384",
        "simple B1 L2048 M4096 H16384",
    ]
    marks = [np.size(line.get_xdata()) for line in axes.get_lines()]
    assert sorted(mark for mark in marks if mark > 2) == [53, 54]
    assert figure.get_figheight() < 10, "a page"
    told = all_text(figure)
    assert f"flat (native), mean {0.8 * 2 ** (25 / 53):.3g}" in told, "without the case that tutel lacks"
    assert "tutel in simple B3 L2048 M4096 H16384, uniform (oom: out of memory on rank 3)" in told
    boxes = [(text.get_text(), extent(text, figure)) for text in texts(figure)]
    assert not [(one, other) for (one, a), (other, b) in combinations(boxes, 2) if a.overlaps(b)]
    assert all(figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1 for _, box in boxes)


def test_what_does_not_belong_together_is_an_error(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ResultsError, match=r"both have num_experts=8, top_k=2. Fix: name one"):
        write_speedups([folders[0], folders[0]])
    with pytest.raises(ResultsError, match="must agree on model.top_k and model.num_experts"):
        write_speedups([write_comparison(tmp_path, ("deepspeed", "flat"), model={"top_k": None})])
    other = write_comparison(tmp_path / "a", ("deepspeed",), levels=[{"name": "node", "fanout": 8}])
    with pytest.raises(ResultsError, match="mixes different values of ranks: 4 gloo ranks"):
        write_speedups([folders[2], other])
    assert main([str(folders[0]), "--baseline", "tutel"]) == 2
    assert "baseline=tutel" in capsys.readouterr().err
