"""Replicas, survival and the target loss: numbers reckoned by hand, and what was never reached told, not counted."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from analysis.errors import ResultsError
from analysis.load import load_run
from analysis.plots.replicas import ZOOM_STEPS, columns_of, replicas_figure
from analysis.plots.survival import survival_figure
from analysis.plots.target import target_figure
from analysis.popularity import Expert, load_popularities, load_popularity
from analysis.style import suite_style
from analysis.swiftmoe import FIGURES, comparison_of, main
from analysis.swiftmoe_table import COLUMNS, drops_of, format_swiftmoe, swiftmoe_table
from analysis.target_loss import WINDOW, smoothed_losses, target_of, when_reached
from tests.swiftmoe_results import COPIES, EMULATION, LAYERS, RANKS, SLOTS, STEPS, routing, write_comparison, write_run
from tests.test_analysis_figures import all_text, extent, texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison in which everything is there."""
    return write_comparison(tmp_path_factory.mktemp("outputs"))


def tabulated(
    folder: Path, baseline: str | None = None, target_loss: float | None = None, window: int = WINDOW
) -> tuple[pd.DataFrame, str, list[str]]:
    """(swiftmoe.csv's rows, the same for a terminal, notes), without the figures."""
    comparison = comparison_of(folder, baseline)
    popularities, notes = load_popularities(comparison)
    curves = smoothed_losses(comparison, window)
    target = target_of(comparison, curves, target_loss)
    table = swiftmoe_table(comparison, drops_of(comparison, popularities), curves, target)
    return table, format_swiftmoe(table, comparison, target, window), notes


def table_of(folder: Path, **options: Any) -> pd.DataFrame:
    """swiftmoe.csv's rows by system."""
    return tabulated(folder, **options)[0].set_index("system")


@pytest.fixture(scope="module")
def table(folder: Path) -> pd.DataFrame:
    """Its swiftmoe.csv by system."""
    return table_of(folder)


def with_range(row: pd.Series, name: str) -> list[float]:
    """A number, the lowest and the highest of the seeds."""
    return row[[name, f"{name}_low", f"{name}_high"]].tolist()


def test_drops_are_counted_against_the_routed_copies(table: pd.DataFrame) -> None:
    assert table["survival"].to_dict() == pytest.approx({"deepspeed": 0.75, "flat": 0.7, "swiftmoe": 0.9})
    assert table["dropped_copies"].to_dict() == {"deepspeed": 200 * 60, "flat": 240 * 60, "swiftmoe": 80 * 60}
    assert table["dropped_ratio"].to_dict() == pytest.approx({"deepspeed": 1, "flat": 1.2, "swiftmoe": 0.4})


def test_the_target_is_what_deepspeed_has_after_two_thirds_of_its_steps(table: pd.DataFrame) -> None:
    # After 40 steps: 5 - 0.02 x (39 - 4.5) = 4.31 with seed 0, 4.41 with seed 1.
    assert table["target_loss"].tolist() == pytest.approx([4.36] * 3)
    # Seed 0 is there when 5 - 0.02 x (n - 5.5) <= 4.36, n = 38 steps done; seed 1 at 43. Swiftmoe, 0.03: 27 and 31.
    assert with_range(table.loc["deepspeed"], "target_steps") == [40.5, 38, 43]
    assert with_range(table.loc["swiftmoe"], "target_steps") == [29, 27, 31]
    low, high = sorted([27 / 38, 31 / 43])
    assert with_range(table.loc["swiftmoe"], "target_steps_ratio") == pytest.approx([(low + high) / 2, low, high])
    assert table.loc["deepspeed", "target_steps_ratio"] == 1


def test_time_is_the_runs_own_or_that_of_the_interleaved_rounds(table: pd.DataFrame) -> None:
    assert with_range(table.loc["deepspeed"], "target_s") == pytest.approx([8.1, 7.6, 8.6])
    assert with_range(table.loc["swiftmoe"], "target_s") == pytest.approx([2.9, 2.7, 3.1])
    assert with_range(table.loc["swiftmoe"], "target_timed_s") == pytest.approx([3.48, 3.24, 3.72])
    assert table.loc["swiftmoe", "target_timed_s_ratio"] == pytest.approx((3.24 / 7.6 + 3.72 / 8.6) / 2)


def test_a_target_that_is_never_reached_is_told_and_makes_no_number(folder: Path, table: pd.DataFrame) -> None:
    row = table.loc["flat"]  # 5 - 0.01 x 54.5 = 4.455 at its end
    assert np.isnan([row[f"{name}{end}"] for name in ("target_steps", "target_s") for end in ("", "_ratio")]).all()
    assert row["seeds"] == "0: not in 60 steps; 1: not in 60 steps"
    assert row["status"] == "target loss: not in 60 steps (seeds 0, 1)"
    _, text, _ = tabulated(folder)
    assert "flat: target loss: not in 60 steps (seeds 0, 1)." in text
    assert "Target loss: 4.360 nats per token, what deepspeed has after 40 of 60 steps" in text


def test_one_seed_that_never_gets_there_leaves_no_mean_of_the_others(folder: Path) -> None:
    table = table_of(folder, target_loss=4.5)  # flat: seed 0 after 56 steps, seed 1 never
    assert table.loc["flat", "seeds"] == "0: 56 steps, 5.60 s; 1: not in 60 steps"
    assert np.isnan(table.loc["flat", "target_steps"])
    assert table.loc["flat", "status"] == "target loss: not in 60 steps (seed 1)"
    unreachable = table_of(folder, target_loss=0.5)
    assert unreachable[["target_steps", "target_steps_ratio", "target_s", "target_timed_s"]].isna().all(axis=None)
    assert "deepspeed did not reach the target loss (seeds 0, 1)" in unreachable.loc["swiftmoe", "status"]
    assert unreachable.loc["swiftmoe", "survival"] == pytest.approx(0.9), "the rest stands"


def test_ratios_are_to_deepspeed_unless_another_is_named(folder: Path, tmp_path: Path) -> None:
    assert comparison_of(folder).baseline == "deepspeed"
    assert comparison_of(folder, "flat").baseline == "flat"
    assert table_of(folder, baseline="flat").loc["swiftmoe", "dropped_ratio"] == pytest.approx(1 / 3)
    assert comparison_of(write_comparison(tmp_path, ["flat", "swiftmoe"])).baseline == "flat"


def test_where_the_baseline_drops_nothing_there_is_no_ratio(tmp_path: Path) -> None:
    def spare(table: pd.DataFrame) -> pd.DataFrame:
        return table.assign(value=table["value"].where(table["metric"] != "dropped_copies", 0.0))

    row = table_of(write_comparison(tmp_path, change=spare)).loc["swiftmoe"]
    assert (row["survival"], row["dropped_copies"]) == (1.0, 0.0)
    assert np.isnan(row["dropped_ratio"])
    assert row["status"] == "deepspeed dropped nothing (seeds 0, 1), so there is no ratio of drops"


def test_steps_that_were_not_logged_count_in_time(tmp_path: Path) -> None:
    comparison = comparison_of(write_comparison(tmp_path, log_every=2))
    curves = smoothed_losses(comparison, window=2)
    reached = when_reached(curves, target_of(comparison, curves, 4.5))
    # Logged after 2, 4, ... steps, the mean of two lies one step back: 5 - 0.02 x (n - 2) <= 4.5, n = 28.
    assert (reached["deepspeed", 0].steps, reached["deepspeed", 0].seconds) == (28, pytest.approx(28 * 0.2))


def test_a_run_with_fewer_losses_than_the_window_is_told(tmp_path: Path) -> None:
    table, text, _ = tabulated(write_comparison(tmp_path), window=100)
    assert table["target_loss"].isna().all()
    assert set(table["status"]) == {"there is no target loss"}
    assert "No target loss: deepspeed has no smoothed loss to take one from." in text


def test_popularity_and_slots_by_step(folder: Path) -> None:
    popularities, notes = load_popularities(comparison_of(folder))
    assert not notes
    followed, static = popularities["swiftmoe", 0], popularities["deepspeed", 0]
    assert followed.routed_copies == RANKS * LAYERS * COPIES
    most = followed.most_variable()
    assert most == static.most_variable() == Expert(1, 2)
    assert followed.copy_shares_S(most) == pytest.approx((10 + np.arange(STEPS)) / COPIES)
    slots = followed.slot_shares_S(most)
    assert slots[1:].tolist() == ((1 + 4 * (10 + np.arange(STEPS - 1)) // COPIES) / SLOTS).tolist()
    assert set(static.slot_shares_S(most)) == {0.25}
    assert followed.most_variable(expert=3) == Expert(1, 3), "in layer 0 it does not vary"
    with pytest.raises(ResultsError, match="--expert 4: the runs have experts 0 to 3"):
        followed.most_variable(expert=4)


def test_systems_with_replicas_stand_beside_the_baseline(folder: Path) -> None:
    comparison = comparison_of(folder)
    popularities, _ = load_popularities(comparison)
    assert [(column.system, column.seed) for column in columns_of(comparison, popularities)] == [
        ("deepspeed", 0),
        ("swiftmoe", 0),
    ]


ARRAYS = routing("swiftmoe")


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({}, "there is no such file"),
        ({"steps": ARRAYS["steps"]}, "lacks dispatch_counts"),
        (ARRAYS | {"steps": np.arange(3)}, "beside 3 steps"),
        (ARRAYS | {"replica_counts": ARRAYS["replica_counts"][:, :, :2]}, r"is [60, 2, 2] with at least 1"),
        (ARRAYS | {"replica_counts": 0 * ARRAYS["replica_counts"]}, "with at least 0"),
    ],
)
def test_counts_that_are_missing_or_wrong_are_told(
    tmp_path: Path, arrays: dict[str, np.ndarray], sentence: str
) -> None:
    folder = write_comparison(tmp_path, arrays=arrays)
    table, _, notes = tabulated(folder)
    assert len(notes) == 6 and all(sentence in note for note in notes)
    assert table["survival"].isna().all()
    assert table["dropped_ratio"].tolist() == pytest.approx([1, 1.2, 0.4]), "for this no counts are needed"
    told = "without routing.npz's counts there is no share of the routed copies"
    assert all(told in status for status in table["status"])


def test_a_corrupt_file_is_told(tmp_path: Path) -> None:
    run = write_run(tmp_path, "flat", 0)
    (run / "routing.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(ResultsError, match="can't be read"):
        load_popularity(load_run(run))


def test_the_command_writes_everything(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), "--target-loss", "4.4", "--expert", "2", "--window", "5"]) == 0
    shown = capsys.readouterr().out
    assert "Target loss: 4.400 nats per token, as given." in shown
    assert "Loss: mean of the last 5 logged steps." in shown
    for name in FIGURES:
        assert (folder / f"{name}.png").stat().st_size and (folder / f"{name}.pdf").stat().st_size
    written = pd.read_csv(folder / "swiftmoe.csv")
    assert list(written.columns) == COLUMNS
    assert written["system"].tolist() == ["deepspeed", "flat", "swiftmoe"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--window", "0"], "--window 0: must be a number of logged steps, 1 or more. Fix: --window 10."),
        (["--window", "few"], "--window few"),
        (["--expert", "-1"], "--expert -1: the runs have experts 0 to 3"),
        (["--baseline", "tutel"], "baseline=tutel: no run and no sample of it"),
    ],
)
def test_bad_arguments_are_told(
    folder: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder), *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_a_folder_without_a_comparison_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "there is no such file" in capsys.readouterr().err


def drawn(folder: Path) -> dict[str, Figure]:
    """All figures of a comparison, laid out."""
    comparison = comparison_of(folder)
    popularities, _ = load_popularities(comparison)
    curves = smoothed_losses(comparison)
    with suite_style():
        figures = {
            "replicas": replicas_figure(comparison, popularities),
            "survival": survival_figure(comparison, drops_of(comparison, popularities).survival),
            "target": target_figure(comparison, curves, target_of(comparison, curves), WINDOW),
        }
        for figure in figures.values():
            figure.draw_without_rendering()
    return figures


@pytest.fixture(scope="module")
def figures(folder: Path) -> dict[str, Figure]:
    """Figures of the whole comparison."""
    return drawn(folder)


@pytest.fixture(scope="module")
def bare_figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Figure]:
    """Figures of runs without anything that they draw: no counts, two logged losses."""

    def bare(table: pd.DataFrame) -> pd.DataFrame:
        return table[(table["metric"] == "loss") & (table["step"] >= STEPS - 2)]

    folder = write_comparison(tmp_path_factory.mktemp("bare"), arrays={}, change=bare)
    index = json.loads((folder / "compare.json").read_text())
    (folder / "compare.json").write_text(json.dumps(index | {"samples": None}))
    return drawn(folder)


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("which", ["figures", "bare_figures"])
def test_no_text_overlaps_or_leaves_the_page(name: str, which: str, request: pytest.FixtureRequest) -> None:
    figure = request.getfixturevalue(which)[name]
    boxes = [(text.get_text(), extent(text, figure)) for text in texts(figure)]
    for text, box in boxes:
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1, f"{text!r} leaves the page"
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1, f"{text!r} leaves the page"
    assert not [(one, other) for (one, a), (other, b) in combinations(boxes, 2) if a.overlaps(b)]
    assert f"toy_2x2: 4 gloo ranks on one machine, {EMULATION}." in all_text(figure)
    assert all(axes.get_title(loc="right") == "measured" for axes in figure.axes)


def test_what_can_not_be_drawn_is_told(bare_figures: dict[str, Figure]) -> None:
    assert "no run has counts" in all_text(bare_figures["replicas"])
    assert "no run has both drops and counts" in all_text(bare_figures["survival"])
    assert "no run has logged enough losses" in all_text(bare_figures["target"])
    assert "No target loss" in all_text(bare_figures["target"])


def test_a_column_shows_popularity_and_slots_whole_and_in_detail(figures: dict[str, Figure]) -> None:
    panels: list[Any] = figures["replicas"].axes
    assert [axes.get_title(loc="left") for axes in panels] == [
        *("deepspeed\n(upstream)", "swiftmoe\n(native)", "layer 1, expert 2", "layer 1, expert 2")
    ]
    copies, slots = panels[1].lines
    assert copies.get_ydata().tolist() == pytest.approx(((10 + np.arange(STEPS)) / COPIES).tolist())
    assert len(set(slots.get_ydata())) > 1
    assert len(set(panels[0].lines[1].get_ydata())) == 1
    assert all(len(line.get_xdata()) == ZOOM_STEPS for axes in panels[2:] for line in axes.lines)


def test_the_target_is_stated_and_marked_where_it_is_reached(figures: dict[str, Figure]) -> None:
    told = all_text(figures["target"])
    assert "Target loss: 4.360 nats per token, what deepspeed has after 40 of 60 steps" in told
    assert "The target was not reached by flat seed 0, flat seed 1 (not in 60 steps)." in told
    left: Any = figures["target"].axes[0]
    marked = sorted(float(line.get_xdata()[0]) for line in left.lines if len(line.get_xdata()) == 1)
    assert marked == [27, 31, 38, 43]
    assert len([line for line in left.lines if len(line.get_xdata()) == STEPS - WINDOW + 1]) == 6
