"""experiments.training: what is recorded of a run, and what a start finds of an earlier one.

These runs have this process as their only rank (`tests.tiny`); real ranks are in test_resume.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from baselines.flat import Flat
from experiments import callbacks, cells, strategy
from experiments.callbacks import Recorder
from experiments.cells import run_cells, run_dir_of
from experiments.launch import RankFailure
from experiments.module import LanguageModel
from experiments.optimizer import lr_factor
from experiments.ranks import STOP_FILE
from tests.tiny import (
    Configure,
    before_recording,
    by_step,
    repeatable,
    run_ranks_here,
    train,
)


def test_every_metric_of_a_run(config: Configure) -> None:
    run = config()
    run_dir = train(run)
    rows = run_dir.read_metrics()
    assert len({(row.step, row.metric, row.part) for row in rows}) == len(rows), "a row stands there twice"
    for metric in ("loss", "aux_loss", "dropped_copies", "grad_norm", "learning_rate", "step_time", "tokens_per_s"):
        assert list(by_step(run_dir, metric)) == list(range(6)), metric
    assert list(by_step(run_dir, "val_loss")) == [2, 4, 6]
    assert list(by_step(run_dir, "dropped_copies").values()) == [0.0] * 6
    rates = [run.trainer.lr * lr_factor(step, run.trainer) for step in range(6)]
    assert list(by_step(run_dir, "learning_rate").values()) == rates
    assert rates[:4] == [0.25e-3, 0.5e-3, 0.75e-3, 1e-3]  # four steps of warm-up
    tokens = run.trainer.global_batch_size * run.model.seq_len
    times = by_step(run_dir, "step_time")
    assert by_step(run_dir, "tokens_per_s") == {step: tokens / time_s for step, time_s in times.items()}
    assert by_step(run_dir, "loss")[0] == pytest.approx(np.log(run.model.vocab_size), rel=0.05)
    assert by_step(run_dir, "val_loss")[6] < by_step(run_dir, "loss")[0]


def test_copies_are_recorded_by_rank_and_distance(config: Configure) -> None:
    run_dir = train(config())
    shares = [row.value for row in run_dir.read_metrics() if (row.metric, row.part) == ("routed_share", "self")]
    assert shares == [1.0] * 6, "one rank keeps all"
    routing = run_dir.read_routing()
    assert routing is not None and routing["dispatch_counts"].shape == (6, 2, 1, 4)


def test_counts_that_grow_too_large_are_thinned(config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "MAX_COUNTS_BYTES", 3 * 2 * 4 * 4)  # three steps of two layers of four int32
    routing = train(config()).read_routing()
    assert routing is not None
    assert routing["steps"].tolist() == [3, 5] and len(routing["dispatch_counts"]) == 2


def test_the_system_is_told_after_every_step(config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(Flat, "after_step", lambda _self, _model, _optimizer, steps_done: told.append(steps_done))
    train(config())
    assert told == [1, 2, 3, 4, 5, 6]


def test_the_learning_rate_that_is_recorded_is_the_one_that_was_used(
    config: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[float] = []
    step = LanguageModel.configure_gradient_clipping

    def noted(self: LanguageModel, optimizer: Any, **more: Any) -> None:
        used.extend({group["lr"] for group in optimizer.param_groups})
        step(self, optimizer, **more)

    monkeypatch.setattr(LanguageModel, "configure_gradient_clipping", noted)
    run_dir = train(config())
    assert list(by_step(run_dir, "learning_rate").values()) == used


def test_the_same_config_gives_the_same_numbers_and_another_seed_does_not(config: Configure, tmp_path: Path) -> None:
    first, again, other = config(), config(f"output_dir={tmp_path}/again"), config("seed=1")
    run_cells([first, again, other], [])
    assert repeatable(run_dir_of(first)) == repeatable(run_dir_of(again))
    assert by_step(run_dir_of(first), "loss")[0] != by_step(run_dir_of(other), "loss")[0]


def test_checkpoints_and_validations_between_logged_steps(config: Configure) -> None:
    """A checkpoint may come before anything was logged, and what is logged rarely is what is logged always."""
    always = train(config())
    rarely = train(config("trainer.log_every=4", "trainer.checkpoint_every=3", "trainer.val_every=5"))
    assert list(by_step(rarely, "loss")) == [3, 5]  # the last step is always logged
    assert list(by_step(rarely, "val_loss")) == [5, 6]
    for metric in ("loss", "grad_norm", "learning_rate", "aux_loss"):
        assert by_step(rarely, metric).items() <= by_step(always, metric).items()
    assert by_step(rarely, "val_loss")[6] == by_step(always, "val_loss")[6]
    routing, whole = rarely.read_routing(), always.read_routing()
    assert routing is not None and whole is not None
    assert routing["steps"].tolist() == [3, 5]
    assert (routing["dispatch_counts"] == whole["dispatch_counts"][[3, 5]]).all()


def test_without_checkpoints_everything_else_is_written(config: Configure) -> None:
    straight, without = (
        train(config("trainer.log_every=4")),
        train(config("trainer.log_every=4", "trainer.checkpoint_every=null")),
    )
    assert not without.checkpoints.exists() or not list(without.checkpoints.iterdir())
    assert repeatable(without) == repeatable(straight)
    assert without.read_routing() is not None


def test_what_is_noted_before_a_checkpoint_is_written_with_it(
    config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps are gathered some at a time, and a start from the checkpoint could not make them up."""
    monkeypatch.setattr(callbacks, "GATHER_S", 1e9)  # nothing but a checkpoint hurries
    overrides = ("trainer.log_every=2", "trainer.checkpoint_every=3", "trainer.val_every=4")
    straight, killed = train(config(*overrides)), config(*overrides, f"output_dir={tmp_path}/killed")

    def kill(recorder: Recorder, done: int) -> None:
        if done == 5:
            raise ZeroDivisionError

    with pytest.MonkeyPatch.context() as patch:
        before_recording(patch, kill)
        assert len(run_cells([killed], [])) == 1
    assert list(by_step(run_dir_of(killed), "loss")) == [1]
    assert repeatable(train(killed)) == repeatable(straight)
    assert list(by_step(straight, "loss")) == [1, 3, 5]


def test_what_was_written_beyond_the_last_checkpoint_is_done_again(
    config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the metrics of step 4 were written and before its checkpoint was."""
    straight, killed = train(config()), config(f"output_dir={tmp_path}/killed")
    save = strategy.save_checkpoint

    def kill(path: Path, *more: Any) -> None:
        if path.name == "step_4":
            raise ZeroDivisionError
        save(path, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategy, "save_checkpoint", kill)
        assert len(run_cells([killed], [])) == 1
    run_dir = run_dir_of(killed)
    assert list(by_step(run_dir, "loss")) == [0, 1, 2, 3]
    assert [path.name for path in run_dir.checkpoints.iterdir()] == ["step_2"]
    assert repeatable(train(killed)) == repeatable(straight)
    routing, expected = run_dir.read_routing(), straight.read_routing()
    assert routing is not None and expected is not None
    assert all(np.array_equal(routing[name], array) for name, array in expected.items())


def test_two_checkpoints_are_kept_and_one_of_a_complete_run(config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []
    before_recording(
        monkeypatch, lambda recorder, done: seen.append({path.name for path in recorder.run_dir.checkpoints.iterdir()})
    )
    run_dir = train(config("trainer.checkpoint_every=1"))
    steps = [set(), {"step_1"}, *({f"step_{done - 1}", f"step_{done}"} for done in range(2, 6))]
    assert seen == steps
    assert [path.name for path in run_dir.checkpoints.iterdir()] == ["step_6"]


def test_a_run_that_was_finished_but_not_marked_so(config: Configure) -> None:
    run = config()
    run_dir = train(run)
    before, routing = repeatable(run_dir), run_dir.read_routing()
    run_dir.set_status("running")
    train(run)
    state = run_dir.status()
    assert state is not None and (state.status, state.step) == ("done", 6)
    assert repeatable(run_dir) == before
    again = run_dir.read_routing()
    assert routing is not None and again is not None
    assert all((again[name] == array).all() for name, array in routing.items())


def interrupted(target: str, payload: dict[str, Any], **more: Any) -> Any:
    """`run_ranks_here`, in which a stop ends the run as `experiments.launch` has it."""
    value = run_ranks_here(target, payload, **more)
    if value is None and (more["log_dir"] / STOP_FILE).exists():
        raise RankFailure("interrupted", None, "stopped by SIGINT")
    return value


def test_without_checkpoints_a_stop_saves_one_and_the_end_removes_it(
    config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = "trainer.checkpoint_every=null"
    straight, stopped = train(config(without)), config(without, f"output_dir={tmp_path}/stopped")

    def stop(recorder: Recorder, done: int) -> None:
        if done == 3:
            recorder.info.stop_file.touch()

    with monkeypatch.context() as patch:
        before_recording(patch, stop)
        patch.setattr(cells, "run_ranks", interrupted)
        patch.setattr(callbacks, "GATHER_STEPS", 1)  # ranks agree on a stop when they gather
        with pytest.raises(RankFailure, match="interrupted"):
            run_cells([stopped], [])
    checkpoints = run_dir_of(stopped).checkpoints
    assert [path.name for path in checkpoints.iterdir()] == ["step_3"]
    assert repeatable(train(stopped)) == repeatable(straight)
    assert not list(checkpoints.iterdir())


def test_metrics_are_written_at_validations_where_there_are_no_checkpoints(
    config: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = config("trainer.checkpoint_every=null", "trainer.val_every=2")

    def kill(recorder: Recorder, done: int) -> None:
        if done == 5:
            raise ZeroDivisionError

    before_recording(monkeypatch, kill)
    assert len(run_cells([killed], [])) == 1
    assert list(by_step(run_dir_of(killed), "val_loss")) == [2, 4]


def test_a_stop_at_the_last_step_leaves_that_run_complete_and_ends_the_next_at_its_first(
    config: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(recorder: Recorder, done: int) -> None:
        if recorder.config.seed == 0 and done == 6:
            recorder.info.stop_file.touch()

    before_recording(monkeypatch, stop)
    first, second = config(), config("seed=1")
    monkeypatch.setattr(cells, "run_ranks", interrupted)
    with pytest.raises(RankFailure, match="interrupted"):
        run_cells([first, second], [])
    done, state = run_dir_of(first).status(), run_dir_of(second).status()
    assert done is not None and (done.status, done.reason) == ("done", "")
    assert state is not None and (state.status, state.step) == ("interrupted", 1)
    assert state.reason == "stopped on request; the same command goes on from the last checkpoint"
    monkeypatch.undo()
    monkeypatch.setattr(cells, "run_ranks", run_ranks_here)
    assert list(by_step(train(second), "loss")) == list(range(6))
