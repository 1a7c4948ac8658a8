"""Topology figures and tables: numbers reckoned by hand, and whatever is missing told in a sentence."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.compare import read_index
from analysis.comparison import Comparison, compare
from analysis.errors import ResultsError
from analysis.load import load_run
from analysis.pair_costs import communication_s, innermost_group, level_indices, levels_of, pair_costs, row_bytes
from analysis.plots.communication import communication_figure
from analysis.plots.dispatch import dispatch_figure
from analysis.plots.locality import inside, locality, locality_figure
from analysis.plots.loss_time import loss_time_figure, losses_in_time
from analysis.routing import by_rank, load_routing
from analysis.style import suite_style
from analysis.topology import FIGURES, load_routings, main, told_steps
from analysis.topology_table import COLUMNS, format_model, model_table
from tests.analysis_results import write_parquet
from tests.test_analysis_figures import all_text, extent, texts
from tests.topology_results import (
    EMULATION,
    LABELS,
    LEVELS,
    NO_COSTS,
    STEPS,
    dispatch_counts,
    target_shares,
    write_comparison,
    write_run,
)

SYSTEMS = ("flat", "ta_moe", "deepspeed")


def comparison_of(folder: Path, baseline: str | None = None) -> Comparison:
    """The comparison in a folder."""
    run_dirs, samples_dir, indexed = read_index(folder)
    return compare(run_dirs, samples_dir, baseline or indexed)


def table_of(folder: Path, baseline: str | None = None) -> pd.DataFrame:
    """model.csv's rows by system."""
    comparison = comparison_of(folder, baseline)
    return model_table(comparison, load_routings(comparison)[0]).set_index("system")


def text_of(folder: Path) -> str:
    """model.csv for a terminal."""
    comparison = comparison_of(folder)
    routings, _ = load_routings(comparison)
    return format_model(model_table(comparison, routings), comparison, told_steps(routings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison in which everything is there."""
    return write_comparison(tmp_path_factory.mktemp("outputs"), SYSTEMS)


@pytest.fixture(scope="module")
def table(folder: Path) -> pd.DataFrame:
    """Its model.csv by system."""
    return table_of(folder)


def test_the_slowest_pair_is_reckoned_by_hand(folder: Path, table: pd.DataFrame) -> None:
    # flat: every pair 25 copies x 40 B = 1000 B; over the network 2 ms + 4e-6 s/B x 1000 B = 6 ms, in the node 2 ms.
    # ta_moe: 15 copies, 600 B over the network: 4.4 ms; 30 copies, 1200 B in the node: 2.2 ms. 4 exchanges x 2 layers.
    assert table.loc["flat", "modelled_communication_s"] == pytest.approx(4 * 2 * 6e-3)
    assert table.loc["ta_moe", "modelled_communication_s"] == pytest.approx(4 * 2 * 4.4e-3)
    # measured: dispatch and combine, forward and backward: 2 x (10 + 15) ms
    assert table.loc["flat", "measured_communication_s"] == pytest.approx(0.05)
    assert table.loc["ta_moe", "communication_error"] == pytest.approx(0.0352 / 0.05 - 1)


def test_the_step_ratio_is_predicted_from_the_baselines_rest(table: pd.DataFrame) -> None:
    row = table.loc["ta_moe"]
    assert row["measured_step_ratio"] == pytest.approx(0.9)
    assert row["modelled_step_ratio"] == pytest.approx((0.1 - 0.048 + 0.0352) / 0.1)
    assert row["step_ratio_error"] == pytest.approx(0.872 / 0.9 - 1)
    assert row["measured_step_ratio_low"] <= row["measured_step_ratio"] <= row["measured_step_ratio_high"]
    assert table.loc["flat", ["measured_step_ratio", "modelled_step_ratio", "step_ratio_error"]].tolist() == [1, 1, 0]


def test_losses_are_compared_seed_by_seed_at_the_last_common_step(table: pd.DataFrame) -> None:
    row = table.loc["ta_moe"]  # 2.02 over 2.0 and 4.08 over 4.0
    assert row["val_loss_step"] == STEPS
    assert row["val_loss"] == pytest.approx((2.02 + 4.08) / 2)
    assert row[["val_loss_ratio", "val_loss_ratio_low", "val_loss_ratio_high"]].tolist() == pytest.approx(
        [1.015, 1.01, 1.02]
    )
    assert row["val_loss_ratio_seeds"] == "0: 1.010000; 1: 1.020000"


def test_bytes_that_the_model_does_not_know_are_told(table: pd.DataFrame) -> None:
    # 4 ranks x 75 copies x 40 B x 4 exchanges x 2 layers; deepspeed's samples say twice as much
    assert table["modelled_bytes"].to_dict() == {"flat": 96000, "ta_moe": 76800, "deepspeed": 96000}
    assert table["measured_bytes"].to_dict() == {"flat": 96000, "ta_moe": 76800, "deepspeed": 192000}
    assert table.loc["flat", "status"] == table.loc["ta_moe", "status"] == "ok"
    assert "sends 2.00 times the bytes that the model counts" in table.loc["deepspeed", "status"]


def test_only_the_last_tenth_of_the_steps_counts(folder: Path) -> None:
    routing = load_routing(load_run(next(folder.parent.glob("ta_moe-toy-s0-*"))))
    assert routing.last_steps == (18, 19)
    assert routing.shares_WW[0].tolist() == pytest.approx([0.4, 0.3, 0.15, 0.15])
    assert routing.shares_WW[3].tolist() == pytest.approx([0.15, 0.15, 0.3, 0.4])
    assert routing.target_WW == pytest.approx(routing.shares_WW)
    assert (by_rank(dispatch_counts("flat"), 4).sum(axis=-1) == 100).all()


def test_one_heavy_pair_makes_the_time(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path, "flat", 0))
    copies_SLWW = np.zeros((1, 1, 4, 4))
    copies_SLWW[0, 0, 1, 0] = 1000  # in a node, one way only: 1 ms + 1e-6 x 40000 B = 41 ms; the others' alpha is 2 ms
    costs = pair_costs(run)
    assert communication_s(costs, copies_SLWW, row_bytes(run)) == pytest.approx(4 * 41e-3)
    # Several steps are averaged, layers added up.
    both = np.concatenate([copies_SLWW, np.zeros_like(copies_SLWW)])
    assert communication_s(costs, both, 40) == pytest.approx(4 * (41e-3 + 2e-3) / 2)
    assert communication_s(costs, np.tile(copies_SLWW, (1, 3, 1, 1)), 40) == pytest.approx(3 * 4 * 41e-3)
    with pytest.raises(ResultsError, match="of 8 ranks, but the cluster's levels make 4"):
        communication_s(costs, np.zeros((1, 1, 8, 8)), 40)


def test_a_rank_copies_to_itself_for_free_unless_the_cluster_says_what_it_costs(tmp_path: Path) -> None:
    copies_SLWW = np.eye(4)[None, None] * 1000
    free = pair_costs(load_run(write_run(tmp_path / "free", "flat", 0)))
    assert communication_s(free, copies_SLWW, 40) == pytest.approx(4 * 2e-3)  # the network's alpha
    copy = {"alpha_s": 1e-3, "beta_s_per_byte": 1e-6}
    told = pair_costs(load_run(write_run(tmp_path / "told", "flat", 0, local_copy=copy)))
    assert communication_s(told, copies_SLWW, 40) == pytest.approx(4 * 41e-3)


def test_levels_of_pairs_and_groups(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path, "flat", 0))
    assert level_indices(levels_of(run)).tolist() == [[0, 1, 2, 2], [1, 0, 2, 2], [2, 2, 0, 1], [2, 2, 1, 0]]
    assert innermost_group(levels_of(run)) == (2, ["self", "node"])
    single = [LEVELS[0] | {"fanout": 1}, LEVELS[1] | {"fanout": 3}]
    lone = levels_of(load_run(write_run(tmp_path / "lone", "flat", 0, levels=single)))
    assert innermost_group(lone) == (1, ["self"])
    assert level_indices(lone).tolist() == [[0, 2, 2], [2, 0, 2], [2, 2, 0]]


def test_locality_is_self_and_the_first_level(folder: Path) -> None:
    shares = locality(comparison_of(folder))
    own = shares[(shares["system"] == "ta_moe") & (shares["seed"] == 1)].set_index("step")["value"]
    assert own[0] == pytest.approx(0.5)
    assert own[STEPS - 1] == pytest.approx(0.7)
    assert inside(by_rank(target_shares(), 4), 2) == pytest.approx(0.7)


@pytest.mark.parametrize("log_every", [1, 3, 5])
def test_time_is_cumulated_over_all_steps(tmp_path: Path, log_every: int) -> None:
    losses = losses_in_time(comparison_of(write_comparison(tmp_path, ("flat", "ta_moe"), log_every=log_every)))
    own = losses[(losses["system"] == "ta_moe") & (losses["seed"] == 0)].set_index("step")["seconds"]
    last_logged = STEPS // log_every * log_every  # behind it, no time is known
    assert own.to_dict() == pytest.approx({0: 0, 10: 0.9, 20: 0.09 * last_logged})


def test_everything_is_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder)]) == 0
    told = capsys.readouterr().out
    assert "35.2" in told and "0.872" in told and "1.0150 [1.0100, 1.0200]" in told
    for name in FIGURES:
        assert (folder / f"{name}.png").stat().st_size > 8_000
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    csv = pd.read_csv(folder / "model.csv")
    assert list(csv.columns) == COLUMNS
    assert csv.set_index("system").loc["ta_moe", "modelled_communication_s"] == pytest.approx(0.0352)


def test_another_baseline_can_be_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table_of(folder, "deepspeed").loc["flat", "measured_step_ratio"] == pytest.approx(0.5)
    assert main([str(folder), "--baseline", "tutel"]) == 2
    assert "baseline=tutel" in capsys.readouterr().err
    assert main([str(folder.parent)]) == 2
    assert "Fix: run `python -m experiments.compare` first" in capsys.readouterr().err


def test_a_cluster_without_costs_leaves_the_columns_empty_and_says_why(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path, levels=NO_COSTS)
    row = table_of(folder).loc["ta_moe"]
    modelled = ["modelled_communication_s", "communication_error", "modelled_step_ratio", "step_ratio_error"]
    assert row[modelled].isna().all()
    assert row["measured_step_ratio"] == pytest.approx(0.9)
    assert "level node and network has no alpha_s and beta_s_per_byte" in row["status"]
    assert "python -m experiments.comm write_to=" in row["status"]
    assert "flat, ta_moe: cluster toy_2x2: level node and network has no alpha_s" in text_of(folder)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({}, "there is no such file"),
        ({"steps": np.arange(2), "expert_counts": np.zeros((2, 1, 8), int)}, "lacks dispatch_counts (an older run)"),
        ({"steps": np.arange(3), "dispatch_counts": np.zeros((2, 1, 4, 8), int)}, "[2, 1, 4, 8] beside 3 steps"),
        ({"steps": np.arange(2), "dispatch_counts": np.zeros((2, 1, 4, 6), int)}, "6 experts on 4 ranks"),
    ],
)
def test_counts_that_are_missing_are_told(tmp_path: Path, arrays: dict[str, np.ndarray], sentence: str) -> None:
    folder = write_comparison(tmp_path, arrays=arrays)
    comparison = comparison_of(folder)
    routings, notes = load_routings(comparison)
    assert len(notes) == 4
    assert all(sentence in note for note in notes)
    table = model_table(comparison, routings)
    assert table["modelled_communication_s"].isna().all()
    assert set(table["status"]) == {"no dispatch counts, so nothing is modelled"}


@pytest.mark.parametrize("target", [target_shares()[:, :4], target_shares() * 2])
def test_a_target_that_is_none_is_told_and_left_out(tmp_path: Path, target: np.ndarray) -> None:
    arrays = {"steps": np.arange(STEPS), "dispatch_counts": dispatch_counts("ta_moe"), "target_shares": target}
    routing = load_routing(load_run(write_run(tmp_path, "ta_moe", 0, arrays=arrays)))
    assert routing.target_WW is None
    assert "target_shares" in routing.flaw


def test_copies_follow_experts_that_moved(tmp_path: Path) -> None:
    """In slot s is expert 7 - s: what was for the last rank's experts is for the first rank."""
    counts = dispatch_counts("ta_moe")
    places = np.broadcast_to(np.arange(7, -1, -1, dtype=np.int16), (*counts.shape[:2], 8))
    arrays = {"steps": np.arange(STEPS), "dispatch_counts": counts}
    still = load_routing(load_run(write_run(tmp_path / "still", "flat", 0, arrays=arrays)))
    moved = load_routing(load_run(write_run(tmp_path / "moved", "flat", 0, arrays=arrays | {"expert_of_slot": places})))
    np.testing.assert_array_equal(moved.copies_SLWW, still.copies_SLWW[..., ::-1])
    with pytest.raises(ResultsError, match="expert_of_slot is"):
        load_routing(load_run(write_run(tmp_path / "cut", "flat", 0, arrays=arrays | {"expert_of_slot": places[:1]})))
    with pytest.raises(ResultsError, match="experts have replicas"):
        load_routing(load_run(write_run(tmp_path / "many", "flat", 0, arrays=arrays | {"replica_counts": places})))


def test_a_corrupt_file_is_told(tmp_path: Path) -> None:
    run = write_run(tmp_path, "flat", 0)
    (run / "routing.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(ResultsError, match="can't be read"):
        load_routing(load_run(run))


def test_without_precision_or_samples_the_rest_stands(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path, model={"model_dim": None})
    index = json.loads((folder / "compare.json").read_text())
    (folder / "compare.json").write_text(json.dumps(index | {"samples": None}))
    row = table_of(folder).loc["ta_moe"]
    assert row["val_loss_ratio"] == pytest.approx(1.015)
    assert row[["measured_communication_s", "measured_step_ratio", "modelled_communication_s"]].isna().all()
    assert "model.model_dim=None" in row["status"]
    assert "nothing was timed" in row["status"]


def test_a_system_that_sends_no_tokens_is_not_modelled(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path)
    file = tmp_path / "samples" / "samples.parquet"
    samples = pd.read_parquet(file)
    sent = (samples["system"] == "ta_moe") & samples["part"].isin(["node/alltoall", "network/alltoall"])
    write_parquet(file, samples[~sent], LABELS)
    row = table_of(folder).loc["ta_moe"]
    assert row["measured_bytes"] == 0
    assert np.isnan(row["modelled_communication_s"])
    assert "sends no tokens by all-to-all" in row["status"]


def test_a_model_longer_than_the_step_predicts_nothing(tmp_path: Path) -> None:
    slow = [level | {"alpha_s": 1.0} for level in LEVELS]
    row = table_of(write_comparison(tmp_path, levels=slow)).loc["ta_moe"]
    assert np.isnan(row["modelled_step_ratio"])
    assert "longer than its measured step" in row["status"]


def drawn(folder: Path) -> dict[str, Figure]:
    """All figures of a comparison, laid out."""
    comparison = comparison_of(folder)
    routings, _ = load_routings(comparison)
    with suite_style():
        figures = {
            "dispatch": dispatch_figure(comparison, routings),
            "locality": locality_figure(comparison, routings),
            "loss_time": loss_time_figure(comparison),
            "communication": communication_figure(comparison),
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
    """Figures of runs without anything that they draw."""
    folder = write_comparison(tmp_path_factory.mktemp("bare"), arrays={})
    for run in folder.parent.glob("*-toy-*"):
        rows = pd.read_parquet(run / "metrics.parquet")
        system, _, rest = run.name.partition("-toy-s")
        footer = {
            "run_id": run.name,
            "system": system,
            "seed": int(rest[0]),
            "implementation": "native",
        }  # no samples either
        write_parquet(run / "metrics.parquet", rows[rows["metric"] == "loss"], footer | LABELS)
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


def test_what_can_not_be_drawn_is_told(bare_figures: dict[str, Figure]) -> None:
    assert "no run has dispatch counts" in all_text(bare_figures["dispatch"])
    assert "no run recorded the metric routed_share" in all_text(bare_figures["locality"])
    assert "no validation loss" in all_text(bare_figures["loss_time"])
    assert all_text(bare_figures["communication"]).count("nothing was timed") == 2


def test_heat_maps_say_what_was_measured_and_what_was_modelled(figures: dict[str, Figure]) -> None:
    panels: list[Any] = [axes for axes in figures["dispatch"].axes if axes.images]
    assert [axes.get_title(loc="left") for axes in panels] == [
        *("flat\n(native)", "ta_moe\n(native)", "deepspeed\n(upstream)", "ta_moe\n(target)")
    ]
    assert [axes.get_title(loc="right") for axes in panels] == ["measured"] * 3 + ["modelled"]
    assert {axes.images[0].get_clim() for axes in panels} == {(0.0, 0.4)}
    assert panels[1].images[0].get_array()[0].tolist() == pytest.approx([0.4, 0.3, 0.15, 0.15])
    assert "flat, ta_moe, deepspeed: seed 0, steps 18 to 19." in all_text(figures["dispatch"])
    assert "Target of ta_moe: the shares that the run aimed at" in all_text(figures["dispatch"])
    assert "first seed only" in all_text(figures["dispatch"])


def test_every_seed_is_a_line(figures: dict[str, Figure]) -> None:
    near = [line for line in figures["locality"].axes[0].lines if np.size(line.get_xdata()) == STEPS]
    assert len(near) == 3 * 3  # two seeds and their mean
    for axes in figures["loss_time"].axes:
        assert len([line for line in axes.lines if isinstance(line, Line2D)]) == 3 * 2
    assert "even dispatch (modelled)" in all_text(figures["locality"])


def test_bars_are_communication_then_computation(figures: dict[str, Figure]) -> None:
    bars: list[Any] = list(figures["communication"].axes[0].patches[:2])
    assert [bar.get_width() for bar in bars] == pytest.approx([50, 14])  # 2 x (10 + 15) and 2 x (2 + 5) ms
    assert bars[1].get_x() == pytest.approx(50)
    assert "50.0 + 14.0" in all_text(figures["communication"])
