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


def test_without_replicas_none_are_recorded(config: Configure) -> None:
    routing = train(config()).read_routing()
    assert routing is not None and "replica_counts" not in routing
