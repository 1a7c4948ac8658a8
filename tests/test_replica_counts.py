"""How many slots each expert had in a step: what runs record of systems with replicas, and of those without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from baselines.flat import Flat
from experiments import callbacks
from experiments.callbacks import Recorder
from experiments.cells import run_cells
from experiments.results import RunDir
from moe.layer import NativeMoE
from tests.test_swiftmoe_scheduler import literally
from tests.tiny import Configure, before_recording, train


def replicas_after(steps_done: int) -> list[int]:
    """Of four experts."""
    return [1 + steps_done, 1, 1, 2]


@pytest.fixture
def replicating(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes flat's layers tell replicas that change between steps, as SwiftMoE's do, from some number of steps on."""
    done = 0

    def after_step(_system: Any, _model: Any, _optimizer: Any, steps_done: int) -> None:
        nonlocal done
        done = steps_done

    def begin(steps_done: int) -> None:
        nonlocal done
        done = steps_done
        monkeypatch.setattr(Flat, "after_step", after_step)
        monkeypatch.setattr(NativeMoE, "replicas_E", property(lambda _layer: replicas_after(done)))

    return begin


def recorded(run_dir: RunDir) -> dict[int, list[list[int]]]:
    """Replicas [layers][E] by step."""
    routing = run_dir.read_routing()
    assert routing is not None and routing["replica_counts"].dtype == np.int16
    return dict(zip(routing["steps"].tolist(), routing["replica_counts"].tolist(), strict=True))


def test_replicas_are_those_of_the_step_not_of_the_next(config: Configure, replicating: Callable[[int], None]) -> None:
    replicating(0)
    run_dir = train(config())
    assert recorded(run_dir) == {step: [replicas_after(step)] * 2 for step in range(6)}
    metrics = {row.metric for row in run_dir.read_metrics()}
    assert "routed_share" not in metrics, "the counts do not say which replica took a copy"


def test_replicas_stay_beside_their_counts(
    config: Configure, replicating: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    replicating(0)
    monkeypatch.setattr(callbacks, "MAX_COUNTS_BYTES", 3 * 2 * 4 * 4)  # three steps of two layers of four int32
    assert recorded(train(config())) == {step: [replicas_after(step)] * 2 for step in (3, 5)}
    thrice = recorded(train(config("trainer.log_every=3", "trainer.checkpoint_every=3")))
    assert thrice == {step: [replicas_after(step)] * 2 for step in (2, 5)}


def test_a_resumed_run_keeps_the_replicas_of_its_earlier_start(
    config: Configure, replicating: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    replicating(0)

    def fail_in_step_5(_recorder: Recorder, done: int) -> None:
        if done == 5:
            raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        before_recording(patch, fail_in_step_5)
        (failure,) = run_cells([config()], [])
    assert "out of luck" in str(failure.error)
    replicating(4)  # what a system restores from its checkpoint
    assert recorded(train(config())) == {step: [replicas_after(step)] * 2 for step in range(6)}


def test_a_swiftmoe_run_records_the_replicas_that_its_tokens_called_for(config: Configure) -> None:
    """Each step's by what all tokens of the step before it chose: the scheduler's rule, seen in the files of a run."""
    run_dir = train(
        config(
            "system=swiftmoe",
            "system.slots_per_rank=16",
            "model.top_k=1",
            "model.capacity_factor=1.0",
            "trainer.max_steps=8",
        )
    )
    routing = run_dir.read_routing()
    assert routing is not None
    copies_SLE, replicas_SLE = routing["dispatch_counts"].sum(2), routing["replica_counts"]
    assert replicas_SLE.shape == (8, 2, 4)
    assert replicas_SLE[0].tolist() == [[4] * 4] * 2
    for step in range(7):
        expected = [list(literally(copies.tolist(), 16)) for copies in copies_SLE[step]]
        assert replicas_SLE[step + 1].tolist() == expected
    assert len({str(table) for table in replicas_SLE.tolist()}) > 4, "replicas move"


def test_replicas_that_are_told_of_some_steps_only_are_an_error(
    config: Configure, replicating: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    replicating(0)
    told = iter([None, None])

    def seldom(_layer: NativeMoE) -> list[int] | None:
        return next(told, replicas_after(0))

    monkeypatch.setattr(NativeMoE, "replicas_E", property(seldom))
    (failure,) = run_cells([config()], [])
    assert "replica_counts is told of 1 steps of 2" in str(failure.error)


def test_without_replicas_none_are_recorded(config: Configure) -> None:
    routing = train(config()).read_routing()
    assert routing is not None and "replica_counts" not in routing
