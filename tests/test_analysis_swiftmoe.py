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
from analysis.plots.latency import latency_figure
from analysis.plots.replicas import COLUMNS as KINDS
from analysis.plots.replicas import ZOOM_STEPS, replicas_figure, rows_of
from analysis.plots.survival import survival_figure
from analysis.plots.target import target_figure
from analysis.popularity import Expert, load_popularities, load_popularity
from analysis.style import suite_style
from analysis.swiftmoe import FIGURES, comparison_of, main
from analysis.swiftmoe_latency import BREAKDOWN, REST, breakdown
from analysis.swiftmoe_numbers import findings_of
from analysis.swiftmoe_table import COLUMNS, format_swiftmoe, swiftmoe_table
from analysis.target_loss import Target, smoothed_losses, when_reached
from analysis.target_loss import main as target_main
from tests.swiftmoe_results import (
    COPIES,
    EMULATION,
    EXPERTS,
    LAYERS,
    RANKS,
    SLOTS,
    STEPS,
    TARGET,
    routing,
    write_comparison,
    write_run,
)
from tests.test_analysis_figures import all_text, extent, texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison in which everything is there."""
    return write_comparison(tmp_path_factory.mktemp("outputs"))


def tabulated(folder: Path, baseline: str | None = None, window: int = 10) -> tuple[pd.DataFrame, str, list[str]]:
    """(swiftmoe.csv's rows, the same for a terminal, notes), without the figures."""
    comparison = comparison_of(folder, baseline)
    found = findings_of(comparison, window)
    table = swiftmoe_table(comparison, found)
    return table, format_swiftmoe(table, comparison, found.target, window), found.notes


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


def test_the_target_is_the_one_that_the_runs_state(table: pd.DataFrame) -> None:
    assert table["target_loss"].tolist() == [TARGET] * 3
    # Seed 0 is there when 5 - 0.02 x (n - 5.5) <= 4.358, n = 38 steps done; seed 1 at 43. Swiftmoe, 0.03: 27 and 31.
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


def test_steps_and_their_parts_are_of_the_interleaved_rounds(folder: Path, table: pd.DataFrame) -> None:
    assert table["step_s"].to_dict() == pytest.approx({"deepspeed": 0.2, "flat": 0.12, "swiftmoe": 0.12})
    assert table.loc["swiftmoe", "step_s_ratio"] == pytest.approx(0.6)
    assert table["forward_s"].tolist() == pytest.approx([0.01] * 3)
    assert table["extra_share"].tolist() == pytest.approx([0, 0, 2 / 120])
    parts = breakdown(comparison_of(folder)).loc["swiftmoe"]
    assert parts["MoE layers, backward"] == pytest.approx(0.026)
    assert parts[[*BREAKDOWN, REST]].sum() == parts["step"] == pytest.approx(0.12)


def test_steps_that_move_replicas_are_told_from_the_others(tmp_path: Path) -> None:
    """Slots change after every tenth step, which takes three times as long; and in a run in which nothing moves."""

    def moving(table: pd.DataFrame) -> pd.DataFrame:
        moves = (table["metric"] == "step_time") & (table["step"] % 10 == 9)
        return table.assign(value=table["value"] * np.where(moves, 3, 1))

    turns = np.arange(STEPS) // 10 % 2
    replicas = np.full((STEPS, LAYERS, EXPERTS), SLOTS // EXPERTS, dtype=np.int16)
    replicas[:, 0, 0] += turns
    replicas[:, 0, 1] -= turns
    arrays = routing("flat") | {"replica_counts": replicas}
    table = table_of(write_comparison(tmp_path, ["deepspeed", "swiftmoe"], arrays=arrays, change=moving))
    assert table["moving_ratio"].tolist() == pytest.approx([3, 3])


def test_where_most_steps_move_replicas_or_none_does_there_is_no_ratio(tmp_path: Path) -> None:
    replicas = np.full((STEPS, LAYERS, EXPERTS), SLOTS // EXPERTS, dtype=np.int16)
    for name, turns in (("none", 0 * np.arange(STEPS)), ("most", np.arange(STEPS) % 2)):
        moved = replicas.copy()
        moved[:, 0, 0] += turns
        moved[:, 0, 1] -= turns
        folder = write_comparison(tmp_path / name, ["swiftmoe"], arrays=routing("flat") | {"replica_counts": moved})
        assert table_of(folder)["moving_ratio"].isna().all()


def test_a_target_that_is_never_reached_is_told_and_makes_no_number(folder: Path, table: pd.DataFrame) -> None:
    row = table.loc["flat"]  # 5 - 0.01 x 54.5 = 4.455 at its end
    assert np.isnan([row[f"{name}{end}"] for name in ("target_steps", "target_s") for end in ("", "_ratio")]).all()
    assert row["seeds"] == "0: not in 60 steps; 1: not in 60 steps"
    assert row["status"] == "target loss: not in 60 steps (seeds 0, 1)"
    _, text, _ = tabulated(folder)
    assert "flat: target loss: not in 60 steps (seeds 0, 1)." in text
    assert "Target loss: 4.358 nats per token, stated in the runs' configuration before they began." in text
    assert "> 60 (0 of 2 seeds)" in text


def test_one_seed_that_never_gets_there_leaves_no_mean_of_the_others(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path, target_loss=4.5)  # flat: seed 0 after 56 steps, seed 1 never
    table, text, _ = tabulated(folder)
    row = table.set_index("system").loc["flat"]
    assert row["seeds"] == "0: 56 steps, 5.60 s; 1: not in 60 steps"
    assert np.isnan(row["target_steps"])
    assert (row["target_reached"], row["target_steps_at_least"]) == ("1 of 2", 58)
    assert row["status"] == "target loss: not in 60 steps (seed 1)"
    assert "> 58 (1 of 2 seeds)" in text


def test_where_the_baseline_never_gets_there_the_rest_stands(tmp_path: Path) -> None:
    table = table_of(write_comparison(tmp_path, target_loss=0.5))
    assert table[["target_steps", "target_steps_ratio", "target_s", "target_timed_s"]].isna().all(axis=None)
    assert table["target_steps_at_least"].tolist() == [60] * 3
    assert "deepspeed did not reach the target loss (seeds 0, 1)" in table.loc["swiftmoe", "status"]
    assert table.loc["swiftmoe", "survival"] == pytest.approx(0.9)


def test_runs_that_state_no_target_have_none(tmp_path: Path) -> None:
    table, text, _ = tabulated(write_comparison(tmp_path, target_loss=None))
    assert table["target_loss"].isna().all() and set(table["status"]) == {"there is no target loss"}
    assert "No target loss: the runs' configuration states no trainer.target_loss." in text


@pytest.mark.parametrize(
    ("loss", "whose"),
    # After 40 steps: 5 - 0.02 x (39 - 4.5) = 4.31 with seed 0, 4.41 with seed 1; swiftmoe 5 - 0.03 x 34.5 = 3.965.
    [(4.31, "deepspeed seed 0"), (4.36, "the mean of deepspeed"), (4.065, "swiftmoe seed 1")],
)
def test_a_target_that_was_taken_from_these_runs_is_refused(tmp_path: Path, loss: float, whose: str) -> None:
    sentence = f"trainer.target_loss={loss} is what {whose} has here after two thirds of its steps: a target is stated"
    with pytest.raises(ResultsError, match=sentence):
        tabulated(write_comparison(tmp_path, target_loss=loss))


def test_runs_that_state_different_targets_are_refused(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path, ["deepspeed", "swiftmoe"])
    config = next(tmp_path.glob("swiftmoe-*-s1-*")) / "config.yaml"
    config.write_text(config.read_text().replace("4.358", "4.4"))
    with pytest.raises(ResultsError, match=r"different trainer.target_loss: 4.358 \(.*\); 4.4 \(.*\). Fix: run all"):
        tabulated(folder)


def test_a_pilot_run_tells_a_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The mean of the last 20 logged losses after 40 steps: 5 - 0.02 x (39 - 9.5).
    assert target_main([str(write_run(tmp_path, "deepspeed", 0))]) == 0
    assert capsys.readouterr().out == "trainer.target_loss=4.410000\n"
    assert target_main([str(tmp_path / "deepspeed-tiny-s0-00000000ff")]) == 2
    assert "tells no target: missing (seed 0): there is no such run folder" in capsys.readouterr().err


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
    reached = when_reached(curves, Target(4.5, "as reckoned"))
    # Logged after 2, 4, ... steps, the mean of two lies one step back: 5 - 0.02 x (n - 2) <= 4.5, n = 28.
    assert (reached["deepspeed", 0].steps, reached["deepspeed", 0].seconds) == (28, pytest.approx(28 * 0.2))


def test_a_run_with_fewer_losses_than_the_window_is_told(tmp_path: Path) -> None:
    table, text, _ = tabulated(write_comparison(tmp_path), window=100)
    assert table["target_steps"].isna().all()
    assert set(table["seeds"]) == {"0: too few logged losses to smooth; 1: too few logged losses to smooth"}
    assert "deepspeed, flat, swiftmoe: target loss: too few logged losses to smooth (seeds 0, 1)." in text
    assert "> 0" not in text


def test_popularity_and_slots_by_step(folder: Path) -> None:
    popularities, notes = load_popularities(comparison_of(folder))
    assert not notes
    followed, static = popularities["swiftmoe", 0], popularities["deepspeed", 0]
    assert followed.routed_copies == RANKS * LAYERS * COPIES
    characters = followed.characters()
    # In layer 1 expert 2 grows, and expert 0 gives up a little more for it than the two others, which are alike.
    assert characters == {"growing": Expert(1, 2), "shrinking": Expert(1, 0), "spiky": Expert(1, 1)}
    assert characters == static.characters()
    most = characters["growing"]
    assert followed.copy_shares_S(most) == pytest.approx((10 + np.arange(STEPS)) / COPIES)
    slots = followed.slot_shares_S(most)
    assert slots[1:].tolist() == ((1 + 4 * (10 + np.arange(STEPS - 1)) // COPIES) / SLOTS).tolist()
    assert set(static.slot_shares_S(most)) == {0.25}


def test_systems_with_replicas_stand_beside_the_baseline(folder: Path) -> None:
    comparison = comparison_of(folder)
    popularities, _ = load_popularities(comparison)
    assert [(row.system, row.seed) for row in rows_of(comparison, popularities)] == [
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
    assert main([str(folder), "--window", "5"]) == 0
    shown = capsys.readouterr().out
    assert "Target loss: 4.358 nats per token" in shown
    assert "Loss: mean of the last 5 logged steps." in shown
    for name in FIGURES:
        assert (folder / f"{name}.png").stat().st_size and (folder / f"{name}.pdf").stat().st_size
    written = pd.read_csv(folder / "swiftmoe.csv")
    assert list(written.columns) == COLUMNS
    assert written["system"].tolist() == ["deepspeed", "flat", "swiftmoe"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--window", "0"], "--window 0: must be a number of logged steps, 1 or more. Fix: --window 20."),
        (["--window", "few"], "--window few"),
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
    found = findings_of(comparison, 10)
    with suite_style():
        figures = {
            "replicas": replicas_figure(comparison, found.popularities),
            "survival": survival_figure(comparison, found.drops.survival),
            "target": target_figure(comparison, found.curves, found.target, 10),
            "latency": latency_figure(comparison, breakdown(comparison), {("swiftmoe", 0): 2.5, ("swiftmoe", 1): 3.5}),
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
    assert "(too few logged losses to smooth)" in all_text(bare_figures["target"])
    assert "not timed" in all_text(bare_figures["latency"])


def test_a_panel_shows_popularity_and_slots_whole_and_in_detail(figures: dict[str, Figure]) -> None:
    panels: list[Any] = figures["replicas"].axes
    assert [axes.get_ylabel() for axes in panels[::4]] == [
        "deepspeed\n(upstream)\nseed 0",
        "swiftmoe\n(native)\nseed 0",
    ]
    assert [axes.get_title(loc="left") for axes in panels[4:]] == list(KINDS)
    assert [axes.texts[0].get_text() for axes in panels[4:]] == [f"layer 1, expert {expert}" for expert in (2, 0, 1, 1)]
    copies, slots = panels[4].lines
    assert copies.get_ydata().tolist() == pytest.approx(((10 + np.arange(STEPS)) / COPIES).tolist())
    assert len(set(slots.get_ydata())) > 1
    assert len(set(panels[0].lines[1].get_ydata())) == 1
    assert [len(axes.lines[0].get_xdata()) for axes in panels] == [STEPS, STEPS, STEPS, ZOOM_STEPS] * 2


def test_the_parts_of_a_step_and_the_moves_are_drawn(figures: dict[str, Figure]) -> None:
    panels: list[Any] = figures["latency"].axes
    left, right = panels
    bars = [bar for bar in left.patches if bar.get_y() > 1.5]  # swiftmoe's, the third row
    assert [bar.get_width() for bar in bars] == pytest.approx([10, 26, 9, 6, 3, 6, 2, 120 - 62])
    assert bars[-1].get_x() + bars[-1].get_width() == pytest.approx(120)
    means = [line.get_xdata() for line in right.lines if line.get_linestyle() == "-" and max(line.get_xdata()) != 1]
    assert [list(ends) for ends in means] == [[3, 3]], "the mean over seeds is 3"


def test_the_target_is_stated_and_marked_where_it_is_reached(figures: dict[str, Figure]) -> None:
    told = all_text(figures["target"])
    assert "Target loss: 4.358 nats per token, stated in the runs' configuration before they began." in told
    assert "The target was not reached by flat seed 0, flat seed 1 (not in 60 steps)." in told
    left: Any = figures["target"].axes[0]
    marked = sorted(float(line.get_xdata()[0]) for line in left.lines if len(line.get_xdata()) == 1)
    assert marked == [27, 31, 38, 43]
    assert len([line for line in left.lines if len(line.get_xdata()) == STEPS - 10 + 1]) == 6
