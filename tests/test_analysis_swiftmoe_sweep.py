"""Comparisons side by side over one key of the model: numbers as of each alone, and mix-ups refused."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from analysis.plots.sweep import sweep_figure
from analysis.style import suite_style
from analysis.swiftmoe_sweep import COLUMNS, format_sweep, main, write_sweep
from tests.swiftmoe_results import TARGET, write_comparison
from tests.test_analysis_figures import all_text, extent, texts

WEIGHTS = (0.0, 1e-5, 1e-2)
SYSTEMS = ["deepspeed", "swiftmoe"]
PLACE = "toy_2x2: 4 gloo ranks on one machine, plain loopback."


def keeping(share: float) -> Any:
    """Changes a run's metrics: only so many of its drops remain."""

    def change(table: pd.DataFrame) -> pd.DataFrame:
        return table.assign(value=table["value"].where(table["metric"] != "dropped_copies", table["value"] * share))

    return change


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A comparison for each weight, of which the larger ones drop less."""
    made = []
    for index, weight in enumerate(WEIGHTS):
        outputs = tmp_path_factory.mktemp("outputs")
        model = {"aux_loss_weight": weight, "capacity_factor": None}
        made.append(write_comparison(outputs, SYSTEMS, model=model, change=keeping(1 - 0.5 * index)))
    return made


@pytest.fixture(scope="module")
def table(folders: list[Path]) -> pd.DataFrame:
    """Of all three, named in no order."""
    return write_sweep("aux_loss_weight", folders[::-1], window=10)


def test_a_row_for_each_value_and_system(folders: list[Path], table: pd.DataFrame) -> None:
    assert list(table.columns) == COLUMNS
    cells = list(zip(table["key_value"], table["system"], strict=True))
    assert cells == [(weight, system) for weight in WEIGHTS for system in SYSTEMS]
    # 200 and 80 of 800 copies, then half of them, then none.
    assert table["survival"].tolist() == pytest.approx([0.75, 0.9, 0.875, 0.95, 1, 1])
    assert table["target_steps"].tolist() == [40.5, 29] * 3
    assert set(table["target_loss"]) == {TARGET}
    assert table["forward_s"].tolist() == pytest.approx([0.01] * 6)
    assert table["dropped_ratio"].tolist()[:4] == pytest.approx([1, 0.4, 1, 0.4])
    assert table["dropped_ratio"].isna().tolist() == [False] * 4 + [True, True]
    # The median round takes what a step of training does, for swiftmoe 1.2 times that.
    assert table["step_s"].tolist() == pytest.approx([0.2, 0.12] * 3)
    written = pd.read_csv(folders[-1] / "sweep.csv")
    assert written["survival"].tolist() == table["survival"].tolist()
    assert (folders[-1] / "sweep.png").stat().st_size and (folders[-1] / "sweep.pdf").stat().st_size


def test_the_table_for_a_terminal(table: pd.DataFrame) -> None:
    text = format_sweep(table)
    assert "steps to 4.358" in text
    assert "  swiftmoe, aux_loss_weight 0.01: deepspeed dropped nothing (seeds 0, 1), so there is no ratio" in text


def laid_out(table: pd.DataFrame) -> Figure:
    """The figure of a table."""
    with suite_style():
        figure = sweep_figure(table, "measured", "Target loss: 4.358 nats per token, as stated.", 10, PLACE)
        figure.draw_without_rendering()
    return figure


def never(table: pd.DataFrame) -> pd.DataFrame:
    """Nothing is known of any system."""
    numbers = [name for name in table.columns if name.startswith(("survival", "target_steps", "step_s"))]
    return table.assign(**dict.fromkeys(numbers, np.nan))


@pytest.mark.parametrize("change", [lambda table: table, never])
def test_no_text_overlaps_or_leaves_the_page(table: pd.DataFrame, change: Any) -> None:
    figure = laid_out(change(table))
    boxes = [(text.get_text(), extent(text, figure)) for text in texts(figure)]
    for text, box in boxes:
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1, f"{text!r} leaves the page"
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1, f"{text!r} leaves the page"
    assert not [(one, other) for (one, a), (other, b) in combinations(boxes, 2) if a.overlaps(b)]
    assert PLACE in all_text(figure) and all_text(figure).count("measured") == len(figure.axes)


def test_every_value_has_a_tick_and_what_has_no_number_is_told(table: pd.DataFrame) -> None:
    figure = laid_out(table)
    assert [axes.get_ylabel() for axes in figure.axes] == ["copies computed, % of those routed", "steps", "ms"]
    for axes in figure.axes:
        assert axes.get_xticks().tolist() == list(WEIGHTS)
        assert axes.get_xlabel() == "weight of the balance loss"
    gone = table.assign(target_steps=table["target_steps"].where(table["key_value"] != 0.0))
    told = all_text(laid_out(gone))
    assert "was never there or did not run: deepspeed at 0, swiftmoe at 0." in told
    assert all_text(laid_out(never(table))).count("no number") == 1


def test_without_a_target_its_panel_is_left_out(table: pd.DataFrame) -> None:
    numbers = [name for name in table.columns if name.startswith("target")]
    figure = laid_out(table.assign(**dict.fromkeys(numbers, np.nan)))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Survival", "Time of a step"]
    assert "No steps to the target" not in all_text(figure)


def test_mixed_up_folders_are_refused(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*arguments: str) -> str:
        assert main([*arguments]) == 2
        return capsys.readouterr().err

    one, other = str(folders[0]), str(folders[1])
    assert "both have model.aux_loss_weight=0. Fix: name one of them." in told("aux_loss_weight", one, other, one)
    other_target = str(write_comparison(tmp_path / "other", SYSTEMS, model={"aux_loss_weight": 1.0}, target_loss=4.4))
    assert "one figure mixes different targets: Target loss: 4.358" in told("aux_loss_weight", one, other_target)
    assert "must agree on model.top_q, a number, and say None. Fix:" in told("top_q", one)
    assert "must agree on model.capacity_factor, a number, and say None" in told("capacity_factor", one)
    assert "there is no such file" in told("aux_loss_weight", str(tmp_path))
