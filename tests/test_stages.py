"""The stage clock, on a layer whose parts take known times on a clock that only they move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe import stages
from moe.stages import STAGES, StageClock
from moe.step_parts import PARTS, step_part
from moe.system import ExpertView, LayerSpec, MoELayer, MoEOutput
from tests.lone import lone_mesh


class FakeTime:
    """Stands in for the module `time`."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class _Spend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: FakeTime, forward_s: float) -> Tensor:
        ctx.clock, ctx.backward_s = clock, 10 * forward_s
        clock.now += forward_s
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.clock.now += ctx.backward_s
        return grads[0], None, None


class Part(nn.Module):
    """Takes so many seconds forward and ten times as many backward."""

    def __init__(self, clock: FakeTime, seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds
        self.scale = nn.Parameter(torch.ones(()))

    def spend(self, x: Tensor) -> Tensor:
        return _Spend.apply(x * self.scale, self.clock, self.seconds)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.spend(x)


class Gate(Part):
    """Returns weights and a loss; the loss takes 0.25 s more, and backward it comes before the weights."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.spend(x)
        return weights, _Spend.apply(weights.mean(), self.clock, 0.25)


class Timed(MoELayer):
    """Gate 1.25 s, dispatch 2 s, two experts 3 s and 0.5 s, combine 4 s."""

    def __init__(self, clock: FakeTime) -> None:
        super().__init__(LayerSpec(4, 4, 2, 1), lone_mesh())
        self.gate, self.dispatch, self.combine = Gate(clock, 1.0), Part(clock, 2.0), Part(clock, 4.0)
        self.experts = nn.ModuleList([Part(clock, 3.0), Part(clock, 0.5)])

    def forward(self, x_TM: Tensor) -> MoEOutput:
        weights, aux_loss = self.gate(x_TM)
        first, second = self.dispatch(x_TM).chunk(2)
        rows = torch.cat([self.experts[0](first), self.experts[1](second)])
        y_TM = self.combine(rows * weights)
        return MoEOutput(y_TM, aux_loss, torch.zeros(2), torch.zeros(()), None)

    @property
    def gate_weight(self) -> nn.Parameter:
        return self.gate.scale

    def expert_views(self) -> list[ExpertView]:
        return []

    def stage_modules(self) -> tuple[nn.Module, ...]:
        return self.gate, *self.experts


FORWARD = {"forward/gate": 1.25, "forward/dispatch": 2.0, "forward/experts": 3.5, "forward/combine": 4.0}
BACKWARD = {"backward/gate": 12.5, "backward/dispatch": 20.0, "backward/experts": 35.0, "backward/combine": 40.0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(stages, "time", fake)
    return fake


def step(layers: list[Timed], clock: FakeTime) -> None:
    """Forward and backward through the layers in a row; 7 s pass outside of them, before and between."""
    x = torch.ones(4, 4, requires_grad=True)
    aux_loss = torch.zeros(())
    for layer in layers:
        clock.now += 7
        x, aux, *_ = layer(x)
        aux_loss = aux_loss + aux
    clock.now += 7
    (x.sum() + aux_loss).backward()


def test_every_stage_gets_its_own_time(clock: FakeTime) -> None:
    layer = Timed(clock)
    stage_clock = StageClock([layer])
    with stage_clock.timed():
        step([layer], clock)
    assert stage_clock.stage_times_s() == FORWARD | BACKWARD
    assert [key.split("/")[1] for key in FORWARD] == list(STAGES)


def test_layers_are_summed_and_the_last_block_counts(clock: FakeTime) -> None:
    layers = [Timed(clock), Timed(clock)]
    stage_clock = StageClock([*layers])
    for _ in range(2):
        with stage_clock.timed():
            step(layers, clock)
        assert stage_clock.stage_times_s() == {stage: 2 * time for stage, time in (FORWARD | BACKWARD).items()}


def test_without_a_backward_its_stages_are_zero(clock: FakeTime) -> None:
    layer = Timed(clock)
    stage_clock = StageClock([layer])
    with stage_clock.timed(), torch.no_grad():
        layer(torch.ones(4, 4))
    assert stage_clock.stage_times_s() == FORWARD | dict.fromkeys(BACKWARD, 0.0)


def test_parts_of_a_step_are_summed_while_a_clock_runs(clock: FakeTime) -> None:
    stage_clock = StageClock([])

    @step_part("migration")
    def move(seconds: float) -> float:
        clock.now += seconds
        return seconds

    move(5)
    with stage_clock.timed():
        with step_part("optimizer"):
            clock.now += 1
        clock.now += 7
        for _ in range(2):
            assert move(3) == 3
    move(5)
    assert stage_clock.part_times_s() == dict.fromkeys(PARTS, 0.0) | {"optimizer": 1.0, "migration": 6.0}
    with stage_clock.timed(), step_part("weights"):
        clock.now += 2
    assert stage_clock.part_times_s() == dict.fromkeys(PARTS, 0.0) | {"weights": 2.0}, "of the last block alone"


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(AssertionError, match="lunch is none of"):
        step_part("lunch").__enter__()


def test_no_hook_is_left_behind(clock: FakeTime) -> None:
    layer = Timed(clock)
    stage_clock = StageClock([layer])

    def fail_inside() -> None:
        with stage_clock.timed():
            step([layer], clock)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())
    step([layer], clock)
    assert stage_clock.stage_times_s() == FORWARD | BACKWARD, "marks made outside of the block"
