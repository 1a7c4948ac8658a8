"""Honest timing: candidates take turns in one process group, and the worst rank counts.

Also what is read once per candidate beside its time: peak memory, and the error against the oracle.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe.mesh import Mesh
from moe.stages import StageClock
from moe.system import LayerSpec, MoELayer, System
from moe.weights import load_layer

Step = Callable[[], None]


def interleave(
    steps: Mapping[str, Step],
    rounds: int,
    warmup: int,
    device: torch.device,
    steps_per_round: int = 1,
    after_round: Callable[[], None] = lambda: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, list[float]]:
    """Time candidates in turn, in a new random order every round, so that a drift of the machine meets all alike and
    none always follows the same other. Collective.

    Args:
        steps: what each candidate does; every rank passes the same names in the same order.
        rounds: timed rounds.
        warmup: rounds before them that do not count.
        device: synchronised before and after a candidate's turn when it is a GPU.
        steps_per_round: steps of one turn, without a wait in between: with one, every step begins on an idle GPU.
        after_round: called after each, outside of what is timed.
        stop: asked after that; where it says yes, and it must on all ranks alike, no round follows.

    Returns:
        Seconds of a step in the slowest rank, one per timed round, by name: fewer than `rounds` after a stop.
    """
    names = list(steps)
    seconds = torch.zeros(len(names), rounds, dtype=torch.float64)
    order = random.Random(0)  # the same on every rank
    for turn in range(-warmup, rounds):
        for index in order.sample(range(len(names)), len(names)):
            elapsed = _timed(steps[names[index]], steps_per_round, device)
            if turn >= 0:
                seconds[index, turn] = elapsed
        after_round()
        if stop():
            break
    worst = over_ranks(seconds, dist.ReduceOp.MAX, device)
    return {name: worst[index, : max(0, turn + 1)].tolist() for index, name in enumerate(names)}


def _timed(step: Step, num_steps: int, device: torch.device) -> float:
    synchronise(device)
    dist.barrier()
    start = time.perf_counter()
    for _ in range(num_steps):
        step()
    synchronise(device)
    return (time.perf_counter() - start) / num_steps


def synchronise(device: torch.device) -> None:
    """Wait for a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def over_ranks(values: Tensor, operation: dist.ReduceOp.RedOpType, device: torch.device) -> Tensor:
    """Reduce float64 values over all ranks; returns them on the CPU. Collective."""
    values = values.to(device)
    dist.all_reduce(values, op=operation)
    return values.cpu()


class StageRounds(NamedTuple):
    """Seconds in the slowest rank, one per round.

    Attributes:
        stages: of the layers, by `forward/gate` and so on (see `moe.stages`).
        parts: of the rest of a training step, by name (see `moe.step_parts`); 0 where a system has no such part.
    """

    stages: dict[str, list[float]]
    parts: dict[str, list[float]]


def stage_rounds(step: Step, layers: list[MoELayer], rounds: int, device: torch.device) -> StageRounds:
    """Times of stages and parts, taken apart from the timed rounds, so that the hooks cost those nothing. Collective.

    Args:
        step: a training step, or one of a layer.
        layers: of one system, in that step.
        rounds: how often.
        device: of this rank.
    """
    clock = StageClock(layers)
    stages: list[dict[str, float]] = []
    parts: list[dict[str, float]] = []
    for _ in range(rounds):
        dist.barrier()
        with clock.timed():
            step()
        stages.append(clock.stage_times_s())
        parts.append(clock.part_times_s())
    return StageRounds(_in_slowest_rank(stages, device), _in_slowest_rank(parts, device))


def _in_slowest_rank(taken: list[dict[str, float]], device: torch.device) -> dict[str, list[float]]:
    names = sorted(taken[0])
    table = torch.tensor([[times[name] for times in taken] for name in names], dtype=torch.float64)
    worst = over_ranks(table, dist.ReduceOp.MAX, device)
    return {name: worst[index].tolist() for index, name in enumerate(names)}


def peak_memory_bytes(step: Step, device: torch.device, layers: Sequence[MoELayer] = ()) -> int:
    """Most memory that one step held above what was there before it, in bytes, and what its layers keep elsewhere.

    From the CUDA allocator on a GPU; on a CPU from the allocations and frees that torch's profiler sees, exact but for
    a message that gloo's threads may hold a moment longer. The profiler does not see frees of what was there before: a
    step must not count on them.

    Args:
        step: what to do once.
        device: where it allocates.
        layers: of one shape; the largest `workspace_bytes` of them counts too, since they share it.
    """
    with _nothing_collected():
        peak = _cuda_peak_bytes(step, device) if device.type == "cuda" else _cpu_peak_bytes(step)
    return peak + max((layer.workspace_bytes for layer in layers), default=0)


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Collect what is unreachable, then nothing until the end.

    A step whose autograd graph sits in a reference cycle leaves its memory to Python's collector. Left from the step
    before, it would count as there before this one; collected amid this one, it would make room that others don't have.
    """
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _cuda_peak_bytes(step: Step, device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak_bytes(step: Step) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        step()
    kineto = profile.profiler.kineto_results
    changes = sorted((event.start_ns(), event.nbytes()) for event in kineto.events() if event.name() == "[memory]")
    held = peak = 0
    for _, num_bytes in changes:
        held += num_bytes
        peak = max(peak, held)
    return peak


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected (its own norm where that is 0).

    Infinite where a number is not finite: a NaN would be lost in a maximum over experts and ranks.
    """
    value, expected = value.detach().double(), expected.detach().double()
    distance, scale = float((value - expected).norm()), float(expected.norm())
    if not math.isfinite(distance):
        return math.inf
    return distance / scale if scale > 0 else distance


class Observed:
    """Output and gradients of one forward and backward of a layer, in canonical form. The balance loss counts; of a
    system that has one of its own, `errors` leaves out what it has a part in.

    Args:
        system: that built the layer.
        spec: of the layer; its weights are loaded here.
        mesh: of the run.
        x_TM, grad_TM: tokens of this rank and gradient of the output, [T, M].
        gate_EM: gate matrix instead of the initial one.
    """

    def __init__(
        self, system: System, spec: LayerSpec, mesh: Mesh, x_TM: Tensor, grad_TM: Tensor, gate_EM: Tensor | None = None
    ) -> None:
        layer = system.build_layer(spec, mesh)
        load_layer(layer)
        if gate_EM is not None:
            with torch.no_grad():
                layer.set_gate(gate_EM)
        x_TM = x_TM.to(spec.dtype).detach().requires_grad_()
        output = layer(x_TM)
        ((output.y_TM * grad_TM.to(spec.dtype)).sum() + output.aux_loss).backward()
        system.gradient_sync(layer, mesh).reduce()
        assert x_TM.grad is not None and layer.gate_weight.grad is not None
        self.own_balance_loss, self.own_gate = system.own_balance_loss, system.own_gate
        self.output, self.input_grad, self.gate_grad = output.y_TM.detach(), x_TM.grad, layer.gate_weight.grad
        self.views = {(view.expert, view.name): view for view in layer.expert_views()}
        self.expert_grads = {
            key: view.view(view.parameter.grad) for key, view in self.views.items() if view.parameter.grad is not None
        }

    def errors(self, expected: Observed) -> dict[str, float]:
        """Relative errors by part: output, input_grad, gate_grad, and expert_grad (the worst expert of this rank).
        None of a system whose gate is another one than the oracle's."""
        if self.own_gate:
            return {}
        experts = [
            relative_error(grad, self.views[key].part(expected.expert_grads[key]))
            for key, grad in self.expert_grads.items()
        ]
        if self.own_balance_loss:
            return {"output": relative_error(self.output, expected.output), "expert_grad": max(experts)}
        return {
            "output": relative_error(self.output, expected.output),
            "input_grad": relative_error(self.input_grad, expected.input_grad),
            "gate_grad": relative_error(self.gate_grad, expected.gate_grad),
            "expert_grad": max(experts),
        }
