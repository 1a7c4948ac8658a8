"""SwiftMoE's comparison from the command line to its table and figures: five systems, a few steps, one rank."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

import analysis.compare
from analysis.errors import ResultsError
from analysis.load import load_run
from analysis.popularity import load_popularity
from analysis.swiftmoe import FIGURES, write_swiftmoe
from analysis.target_loss import main as target_main
from experiments import bench_run, cells, compare
from experiments.cli import CONF
from experiments.config import run_id
from tests.tiny import ONE_RANK, run_ranks_here, tiny, tiny_config

STEPS, WINDOW = 12, 2
MODEL = ["model.moe_every=1", "model.num_layers=2", "model.top_k=1", "model.capacity_factor=1.0"]
FEW_STEPS = [f"trainer.max_steps={STEPS}", f"trainer.checkpoint_every={STEPS}", "timing.rounds=1"]
SYSTEMS = (
    "systems=[deepspeed_static,{name: flexmoe, label: flexmoe 100, interval: 100, slots_per_rank: 16},"
    "{name: flexmoe, label: flexmoe 4, interval: 4, balanced: 1.0, slots_per_rank: 16},"
    "{name: swiftmoe, slots_per_rank: 16}]"
)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """The output folder of the comparison, with the target loss stated."""
    folder = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("loss_figure", "throughput_figure", "bytes_figure", "stages_figure", "save"):
            patch.setattr(analysis.compare, name, lambda *_arguments: None)
        for module in (cells, bench_run):
            patch.setattr(module, "run_ranks", run_ranks_here)
        more = [*MODEL, *FEW_STEPS, SYSTEMS, "seeds=[0]", "trainer.lr=0.02", "trainer.target_loss=5.5", ONE_RANK]
        patch.setattr(sys, "argv", ["compare", *tiny(folder, text, *more)])
        compare.main()
    return folder


@pytest.fixture(scope="module")
def table(outputs: Path) -> pd.DataFrame:
    """swiftmoe.csv by system."""
    return write_swiftmoe(outputs / "compare", window=WINDOW).table.set_index("system")


def test_every_system_has_every_number(outputs: Path, table: pd.DataFrame) -> None:
    assert set(table["status"]) == {"ok"} and set(table["target_loss"]) == {5.5}
    assert table["survival"].between(0.2, 1).all()
    assert table["target_steps"].between(WINDOW, STEPS).all()
    numbers = ["target_s", "target_timed_s", "step_s", "forward_s", "dropped_ratio", "target_steps_ratio"]
    assert (table[numbers] > 0).all(axis=None)
    assert table["extra_share"].gt(0).to_dict() == {name: name == "swiftmoe" for name in table.index}
    assert table["moving_ratio"].gt(0).to_dict() == {name: name == "flexmoe 4" for name in table.index}
    for name in FIGURES:
        assert (outputs / "compare" / f"{name}.png").stat().st_size


def test_slots_follow_popularity_as_each_system_says(outputs: Path) -> None:
    changes = {}
    for path in outputs.glob("*-s0-*"):
        run = load_run(path)
        popularity = load_popularity(run)
        slots_SLE = popularity.replicas_SLE
        if slots_SLE is None:
            slots_SLE = np.ones_like(popularity.copies_SLE)
        changes[run.system] = (np.flatnonzero((np.diff(slots_SLE, axis=0) != 0).any(axis=(1, 2))) + 1).tolist()
    assert changes["deepspeed_static"] == changes["flexmoe 100"] == []
    assert set(changes["flexmoe 4"]) <= {4, 8} and changes["flexmoe 4"]
    assert 1 in changes["swiftmoe"] and len(changes["swiftmoe"]) > STEPS // 2


def test_a_target_from_a_pilot_is_refused_where_the_pilot_is_one_of_the_runs(
    outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = shutil.copytree(outputs, tmp_path / "outputs", ignore=shutil.ignore_patterns("checkpoints"))
    pilot = next(outputs.glob("deepspeed_static-*-s0-*"))
    assert target_main([str(pilot)]) == 2
    assert "it has not logged 20 losses" in capsys.readouterr().err
    metrics = load_run(pilot).metrics
    losses = metrics[metrics["metric"] == "loss"].sort_values("step")["value"]
    own = float(losses.iloc[8 - WINDOW : 8].mean())  # after two thirds of the steps
    for path in outputs.glob("*-s0-*"):
        config = yaml.safe_load((path / "config.yaml").read_text())
        config["trainer"]["target_loss"] = own
        (path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ResultsError, match="is what deepspeed_static seed 0 has here after two thirds of its steps"):
        write_swiftmoe(outputs / "compare", window=WINDOW)


def test_a_run_with_another_target_is_another_run(tmp_path: Path, text: Path) -> None:
    """So that none goes on, or counts as done, under a target that was stated later."""
    targets = ("null", "4.0", "4.1")
    assert len({run_id(tiny_config(tmp_path, text, f"trainer.target_loss={target}")) for target in targets}) == 3


@pytest.mark.parametrize("name", ["netns", "gpu"])
def test_a_timing_round_pair_holds_the_moves_of_a_hundred_steps(name: str) -> None:
    """Else the times of FlexMoE's variants would hold other shares of their moves than training does."""
    config = yaml.safe_load((CONF / "experiment" / f"swiftmoe_{name}.yaml").read_text())
    intervals = [system["interval"] for system in config["systems"] if "interval" in system]
    assert intervals == [100, 50, 10]
    timing = config["timing"]
    assert timing["rounds"] % 2 == 0 and all(2 * timing["steps_per_round"] % interval == 0 for interval in intervals)
    assert config["trainer"]["max_steps"] >= 3 * max(intervals) + 1, "the last decision must show in the loss"
