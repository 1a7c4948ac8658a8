"""Reduces dense gradients in slices while backward goes on: in the middle of the mixtures of experts, beside the dense
parts, and what is left in the end, as a plan says (`moe.schedules.StepPlan`).

The dense gradients are one row of numbers in the order in which backward makes them: what follows the last MoE layer,
then what lies between two layers (with the gate of the second), ..., and what precedes the first. A slice is a part of
that row which exists when it is sent. Parameters are taken to be used in the order of the model's modules; a gradient
that comes after its slice was sent is an error, not a wrong sum.

Dimensions: N layers, F numbers of all dense gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.mesh import Mesh
from moe.pipelined_layer import PipelinedMoE
from moe.schedules import INTER, StepPlan
from moe.simulator import Task
from moe.step_planning import Dense, Fixed, Planner, StepPlanning
from moe.streams import now
from moe.sync import GradientSync

PLANNED_AFTER = 3
"""Steps after which slices are planned: the first ones compile kernels, and their dense parts take longer."""

Part = tuple[int, int]
"""Of the row of gradients: from, to."""


@dataclass(frozen=True)
class LayerSlices:
    """Parts that are sent during the backward of a layer: between its last dispatch and its first combine, and beside
    the dense part that follows."""

    moe: tuple[Part, ...] = ()
    dense: tuple[Part, ...] = ()


def cut_slices(plan: StepPlan, existing: Sequence[int], element_bytes: int) -> list[LayerSlices]:
    """The slices of a plan as parts of the row, each beginning where the one before ends.

    Pieces that fill gaps (`StepPlan.filler_bytes`) are sent one beside the experts of each layer, and all others that
    there are beside its dense part: ours, as which gap is free when is not known before.

    Args:
        plan: bytes by layer.
        existing: numbers of the row that there are when the backward of each layer begins.
        element_bytes: of one number.

    Returns:
        By layer, in the order of the forward pass. A slice that reaches for more than there is ends where that ends.
    """
    slices = [LayerSlices()] * len(existing)
    sent = 0

    def part(size_bytes: float, there: int) -> tuple[Part, ...]:
        nonlocal sent
        first, sent = sent, max(sent, min(there, sent + int(size_bytes // element_bytes)))
        return ((first, sent),) if sent > first else ()

    for index in range(len(existing) - 1, -1, -1):
        there = existing[index]
        if plan.filler_bytes is None:
            moe = part(plan.layers[index].moe_bytes, there)
            dense = part(plan.layers[index].dense_bytes, there)
        else:
            moe, dense = part(plan.filler_bytes, there), ()
            while piece := part(plan.filler_bytes, there):
                dense += piece
        slices[index] = LayerSlices(moe, dense)
    return slices


class _Row:
    """The dense gradients in the order in which backward makes them.

    Args:
        model: whose modules' order is that of their use.
        layers: its N MoE layers, in order.
        dense: the parameters.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], dense: Sequence[nn.Parameter]) -> None:
        between = _between(model, layers, dense)
        self.parameters = [parameter for gap in between[::-1] for parameter in gap[::-1]]
        assert len({parameter.dtype for parameter in dense}) <= 1, "one row holds numbers of one type"
        ends = list(accumulate(parameter.numel() for parameter in self.parameters))
        self.parts = list(zip([0, *ends], ends, strict=False))
        sizes = [sum(parameter.numel() for parameter in gap) for gap in between]
        self.gap_sizes, self.behind = sizes[:-1], sizes[-1]
        self.existing = [sum(sizes[index + 1 :]) for index in range(len(layers))]
        self.numbers: Tensor | None = None
        self.num_copied = 0

    @property
    def element_bytes(self) -> int:
        """Of one number."""
        return self.parameters[0].element_size() if self.parameters else 1

    def copied_to(self, end: int) -> Tensor:
        """[F], in which the gradients of all parameters that begin before `end` stand now."""
        if self.numbers is None:
            self.numbers = self.parameters[0].new_empty(self.parts[-1][1], requires_grad=False)
        places, grads = [], []
        while self.num_copied < len(self.parts) and self.parts[self.num_copied][0] < end:
            first, last = self.parts[self.num_copied]
            grad = self.parameters[self.num_copied].grad
            if grad is None:  # unused in this step on this rank
                self.numbers[first:last].zero_()
            else:
                places.append(self.numbers[first:last])
                grads.append(grad.reshape(-1))
            self.num_copied += 1
        if places:
            torch._foreach_copy_(places, grads)
        return self.numbers

    def give_back(self) -> None:
        """Every gradient from the row."""
        assert self.numbers is not None
        for parameter, (first, last) in zip(self.parameters, self.parts, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(self.numbers[first:last].view_as(parameter))
        self.num_copied = 0


def _between(model: nn.Module, layers: Sequence[nn.Module], dense: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """N + 1 lists: parameters before each layer, its own among them, and behind the last."""
    waiting = {id(parameter): parameter for parameter in dense}
    found: list[list[nn.Parameter]] = [[]]
    for module in model.modules():
        inner = any(module is layer for layer in layers)
        for parameter in module.parameters(recurse=inner):
            if waiting.pop(id(parameter), None) is not None:
                found[-1].append(parameter)
        if inner:
            found.append([])
    assert not waiting, "a parameter of no module of the model"
    return found


class SlicedSync(GradientSync):
    """Sends slices of the dense gradients during backward, the rest of them and the experts' in the end.

    Args:
        model: all its parameters with a gradient are reduced.
        layers: its MoE layers, in order; each is told what to send when.
        mesh: groups of the run.
        planner: makes the plan.
        fixed: degrees that were given.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[PipelinedMoE], mesh: Mesh, planner: Planner, fixed: Fixed
    ) -> None:
        super().__init__(model, [parameter for layer in layers for parameter in layer.sharded_parameters()], mesh)
        self.row = _Row(model, layers, self.dense)
        self.planning = StepPlanning(layers, planner, fixed)
        self.slices: list[LayerSlices] | None = None
        self._first, self.runner = layers[0], layers[0].runner
        self._layers = [_LayerBackward(self, index) for index in range(len(layers))]
        for layer, during in zip(layers, self._layers, strict=True):
            layer.take_part(self.planning, during)
        for index, parameter in enumerate(self.row.parameters):
            parameter.register_post_accumulate_grad_hook(self._in_time(index))
        self._num_steps, self._num_sent = 0, 0
        self._works: list[dist.Work] = []

    def send(self, parts: Sequence[Part]) -> dist.Work | None:
        """Start the all-reduce of some parts, the next ones of the row. Collective."""
        work = None
        for first, last in parts:
            assert first == self._num_sent, "a second backward before the gradients of the first were reduced"
            numbers = self.row.copied_to(last)
            work = dist.all_reduce(numbers[first:last], async_op=self.runner.asynchronous)
            self._num_sent = last
            if work is not None:
                self._works.append(work)
        return work

    def reduce_dense(self) -> None:
        """The rest of the dense gradients. Collective."""
        if self._num_sent:
            self._finish()
        else:
            super().reduce_dense()
        self._first.write_trace()
        self._num_steps += 1
        if self.slices is None and self._num_steps >= PLANNED_AFTER and all(layer.timed for layer in self._layers):
            self._plan()

    def _finish(self) -> None:
        numbers = self.row.copied_to(self.row.parts[-1][1])
        if self._num_sent < len(numbers):
            # Behind the slices, on their stream: two collectives of one group must not pass each other.
            self.runner.beside(_task(len(self._layers)), lambda _chunk: self.send([(self._num_sent, len(numbers))]))
        for work in self._works:
            work.wait()
        self.runner.join()
        numbers.div_(self.mesh.world_size)
        self.row.give_back()
        self._works, self._num_sent = [], 0

    def _plan(self) -> None:
        seconds = [layer.dense_s() for layer in self._layers]
        size = self.row.element_bytes
        gradient_bytes = tuple(float(size * numbers) for numbers in self.row.gap_sizes)
        plan = self.planning.plan_slices(Dense(tuple(seconds), gradient_bytes, float(size * self.row.behind)))
        self.slices = cut_slices(plan, self.row.existing, size)
        layers = zip(plan.layers, self.slices, strict=True)
        sent = (replace(layer, moe_bytes=float(size * _length(cut.moe))) for layer, cut in layers)
        self.planning.plan = StepPlan(tuple(sent), one_link=plan.one_link)

    def _in_time(self, index: int) -> Any:
        def hook(parameter: Tensor) -> None:
            late = index < self.row.num_copied
            assert not late, f"the gradient of a parameter of shape {tuple(parameter.shape)} came after it was sent"

        return hook


class _LayerBackward:
    """What a layer tells in its backward, and is told to send.

    Args:
        sync: that all layers share.
        index: of the layer.
    """

    def __init__(self, sync: SlicedSync, index: int) -> None:
        self.sync, self.index = sync, index
        self._began: Any = None
        self._ended: Any = None
        self._on_cuda = sync.mesh.device.type == "cuda"

    @property
    def timed(self) -> bool:
        """Whether a backward of this layer has been."""
        return self._ended is not None

    @property
    def slices(self) -> LayerSlices:
        """Of this layer; none before there is a plan."""
        return self.sync.slices[self.index] if self.sync.slices else LayerSlices()

    def begins(self) -> None:
        """The layer's backward begins."""
        if self.sync.slices is None:
            self._began = now(self._on_cuda)

    def slice(self, _chunk: int) -> dist.Work | None:
        """Send the slice beside the experts."""
        return self.sync.send(self.slices.moe)

    def ended(self) -> None:
        """The layer's backward has been issued."""
        if self.sync.slices is None:
            self._ended = now(self._on_cuda)
        elif self.slices.dense:
            self.sync.runner.beside(_task(self.index), lambda _chunk: self.sync.send(self.slices.dense))

    def dense_s(self) -> float:
        """Seconds from the end of this layer's backward to the begin of the next one's, the layer before it; until now
        for the first layer."""
        following = self.sync._layers[self.index - 1]._began if self.index else now(self._on_cuda)
        if not self._on_cuda:
            return max(0.0, float(following - self._ended))
        torch.cuda.synchronize()
        return max(0.0, float(self._ended.elapsed_time(following)) / 1e3)


def _task(layer: int) -> Task:
    return Task("all_reduce", INTER, "all_reduce", 0.0, layer=layer, backward=True)


def _length(parts: Sequence[Part]) -> int:
    return sum(last - first for first, last in parts)
