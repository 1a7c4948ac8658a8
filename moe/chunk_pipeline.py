"""A mixture of experts as tasks: copies go out, are computed and come back in chunks, by a schedule's own program.

Forward and backward each are cut into their own number of chunks, and both are scheduled by hand: autograd sees one
function from the copies that this rank sends to the outputs that come back to it.

Dimensions: S copies this rank sends, R rows its experts compute, M model, L experts of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe import ops
from moe.chunk_travel import Links, travel
from moe.chunks import Chunks, Queues
from moe.expert_passes import ExpertRows, experts_backward, experts_forward
from moe.experts import GroupedExperts
from moe.schedules import COMPUTE, LayerPlan, LayerWork, Pipeline
from moe.simulator import MEASURED, Program, Task
from moe.streams import Action, TaskRunner

Tasks = tuple[tuple[Task, ...], tuple[int, ...]]
"""Of a direction, in launch order, and the last one of each chunk."""

_MOST_KEPT = 64
"""Programs of a layer: one for each direction and number of tokens, which in training are a few."""

Slice = Callable[[int], dist.Work | None]
"""Starts the all-reduce of the slice of gradient that a layer's plan puts in the middle of its backward."""


@dataclass
class Call:
    """What one forward and its backward go by.

    Args:
        queues: the copies.
        plan: degrees of both directions.
        work: of the layer, for the schedule.
        layer: its index in the model.
        slice: of the backward, see `Slice`; None where there is none.
        tell_stage: called with direction and stage, as `moe.system.MoELayer.stage_listeners`.
        before_backward, after_backward: called around its tasks.
    """

    queues: Queues
    plan: LayerPlan
    work: LayerWork
    layer: int = 0
    slice: Slice | None = None
    tell_stage: Callable[[str, str], None] = field(default=lambda _direction, _stage: None)
    before_backward: Callable[[], None] = field(default=lambda: None)
    after_backward: Callable[[], None] = field(default=lambda: None)

    def chunks(self, backward: bool) -> Chunks:
        """The cut of a direction."""
        return self.queues.chunks(self.plan.num_chunks(backward))


class ExpertPipeline(nn.Module):
    """Experts, and the travel of copies to them and back.

    Args:
        experts: of this rank.
        links: over which copies travel.
        pipeline: writes the tasks.
        runner: issues them.
    """

    def __init__(self, experts: GroupedExperts, links: Links, pipeline: Pipeline, runner: TaskRunner) -> None:
        super().__init__()
        self.experts, self.links, self.pipeline, self.runner = experts, links, pipeline, runner
        self._written: dict[tuple[int, LayerWork, LayerPlan, bool], Tasks] = {}

    def forward(self, copies_SM: Tensor, call: Call) -> Tensor:
        """Copies [S, M], in the chunks of the forward pass, to their experts' outputs [S, M]. Collective."""
        return _Pipelined.apply(copies_SM, self.experts.w_in, self.experts.w_out, self, call)

    def run(self, call: Call, backward: bool, actions: dict[str, Action]) -> None:
        """Issue the tasks of a direction."""
        experts = actions["experts"]

        def telling(chunk: int) -> dist.Work | None:
            if chunk == 0:
                call.tell_stage(*(("backward", "combine") if backward else ("forward", "dispatch")))
            work = experts(chunk)
            if chunk == call.plan.num_chunks(backward) - 1:
                call.tell_stage("backward" if backward else "forward", "experts")
            return work

        tasks, last = self._tasks(call.layer, call.work, call.plan, backward)
        self.runner.run(tasks, actions | {"experts": telling}, last)

    def _tasks(self, *asked: *tuple[int, LayerWork, LayerPlan, bool]) -> Tasks:
        """Of a layer, its work and plan, in one direction; written when first asked for."""
        if asked not in self._written:
            if len(self._written) == _MOST_KEPT:
                self._written.clear()
            layer, work, plan, backward = asked
            program = Program()
            base = Task("mixture", COMPUTE, MEASURED, 0.0, layer=layer, backward=backward)
            last = self.pipeline(program, base, work, plan)
            self._written[asked] = tuple(program.tasks), last
        return self._written[asked]


@dataclass
class _Kept:
    """What the backward needs of each chunk of the forward: its rows in the order of the experts, [R_i, M], and what
    went into their activation. A chunk that was taken is let go."""

    rows: list[Tensor | None]
    hidden: list[Tensor | None]

    def take(self, chunk: int) -> tuple[Tensor, Tensor]:
        rows_RM, hidden = self.rows[chunk], self.hidden[chunk]
        assert rows_RM is not None and hidden is not None, "a chunk is taken once"
        self.rows[chunk] = self.hidden[chunk] = None
        return rows_RM, hidden

    def cut_anew(self, places: Tensor, chunks: Chunks) -> _Kept:
        """The same rows in other chunks: where each row lies, by its place there."""
        indices = places.split([sum(rows.experts) for rows in chunks.rows])

        def cut(parts: list[Tensor | None]) -> list[Tensor | None]:
            found = [part for part in parts if part is not None]
            whole = found[0] if len(found) == 1 else torch.cat(found)
            parts.clear()
            found.clear()
            return [ops.gather_rows(whole, index) for index in indices]

        return _Kept(cut(self.rows), cut(self.hidden))


class _Sum:
    """Gradient of one parameter over chunks, summed in float32. A few wait, so that one pass sums them."""

    def __init__(self) -> None:
        self._terms: list[Tensor] = []

    def add(self, grad: Tensor | None) -> None:
        if grad is None:
            return
        if len(self._terms) == ops.MOST_TERMS:
            self._terms = [ops.sum_terms(self._terms, torch.float32)]
        self._terms.append(grad)

    def of(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        return ops.sum_terms(self._terms, dtype) if self._terms else torch.zeros_like(parameter, dtype=dtype)


class _Pipelined(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, copies_SM: Tensor, w_in: Tensor, w_out: Tensor, pipeline: ExpertPipeline, call: Call
    ) -> Tensor:
        weights = w_in.to(copies_SM.dtype), w_out.to(copies_SM.dtype)
        chunks, activation = call.chunks(backward=False), pipeline.experts.activation
        kept = _Kept([None] * chunks.degree, [None] * chunks.degree)

        def compute(chunk: int, rows_RM: Tensor, expert_rows: ExpertRows) -> Tensor:
            y_RM, hidden = experts_forward(rows_RM, *weights, expert_rows, activation)
            kept.rows[chunk], kept.hidden[chunk] = rows_RM, hidden
            return y_RM

        direction = travel(pipeline.links, chunks, copies_SM.contiguous(), compute)
        pipeline.run(call, False, direction.actions)
        ctx.save_for_backward(*weights)
        ctx.pipeline, ctx.call, ctx.kept, ctx.weight_dtype = pipeline, call, kept, w_in.dtype
        return direction.back_SM

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        if ctx.kept is None:
            raise RuntimeError("a second backward through the same forward: what it kept was overwritten")
        kept, ctx.kept = ctx.kept, None
        call: Call = ctx.call
        call.before_backward()
        w_in, w_out = ctx.saved_tensors
        chunks, grad_SM = call.chunks(backward=True), grads[0].contiguous()
        moved = call.queues.moved(call.plan.degree, call.plan.backward_degree)
        if moved is not None:
            (to_sent, from_sent), computed = moved
            kept, grad_SM = kept.cut_anew(computed, chunks), ops.gather_rows(grad_SM, to_sent)
        sums, activation = (_Sum(), _Sum()), ctx.pipeline.experts.activation

        def compute(chunk: int, grad_RM: Tensor, expert_rows: ExpertRows) -> Tensor:
            rows_RM, hidden = kept.take(chunk)
            found = experts_backward(grad_RM, rows_RM, hidden, w_in, w_out, expert_rows, activation)
            sums[0].add(found.w_in)
            sums[1].add(found.w_out)
            return found.rows_RM

        direction = travel(ctx.pipeline.links, chunks, grad_SM, compute)
        actions = direction.actions
        if call.slice is not None:
            actions["all_reduce"] = call.slice
        ctx.pipeline.run(call, True, actions)
        call.after_backward()
        back_SM = direction.back_SM if moved is None else ops.gather_rows(direction.back_SM, from_sent)
        return back_SM, sums[0].of(w_in, ctx.weight_dtype), sums[1].of(w_out, ctx.weight_dtype), None, None
