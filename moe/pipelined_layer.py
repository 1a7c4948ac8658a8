"""The MoE layer whose exchange and experts are pipelined, by whatever schedule; see `moe.chunk_pipeline`.

Dimensions: T tokens of this rank, K choices, M model, E experts, S copies this rank sends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe.chunk_pipeline import Call, ExpertPipeline
from moe.chunk_travel import Links
from moe.chunks import Queues, exchange_counts
from moe.costs import AlphaBeta
from moe.dense_order import dense_expand, dense_weighted_sum
from moe.dispatch import expand, weighted_sum
from moe.expert_sharding import ShardedExperts, sharding_of
from moe.experts import GroupedExperts, product_path
from moe.gate import Routing, TopKGate
from moe.layer_simulation import OUTSIDE
from moe.mesh import Mesh
from moe.module_profile import Measuring, Points, Shapes, Timed, costs_of, profile
from moe.pipelined_parts import Backward, Choices, Gate, Schedule, Travel
from moe.schedules import LayerPlan, LayerWork
from moe.step_planning import StepPlanning
from moe.streams import Recorder, TaskRunner
from moe.system import ExpertView, LayerSpec, MoELayer, MoEOutput
from moe.trace import write_trace

_RECORDERS: dict[Path, Recorder] = {}
"""By folder of traces: the layers of a model share a timeline."""


class PipelinedMoE(MoELayer):
    """Gate, then the pipeline with the experts inside it.

    Of the stages of a layer, `dispatch` ends when the first chunk is here, `experts` covers all that is under way while
    experts compute, and `combine` begins when the last one is done: what of the exchanges is exposed.

    Args:
        spec: what to compute.
        mesh: where; E is spread over its expert-parallel group, contiguously.
        schedule: of the system.
        choices: of the user.
        gate: replaces the suite's.

    Attributes:
        planning: gives the layer its plan; shared by the layers of a model where a `SlicedSync` reduces its gradients.
    """

    def __init__(
        self, spec: LayerSpec, mesh: Mesh, schedule: Schedule, choices: Choices, gate: Gate | None = None
    ) -> None:
        super().__init__(spec, mesh)
        self.schedule, self.choices = schedule, choices
        recorder = None if choices.trace is None else _RECORDERS.setdefault(choices.trace, Recorder())
        self.runner = TaskRunner(mesh.device, recorder)
        self.gate: Any = gate or TopKGate(spec, mesh.device)
        self.sharding = sharding_of(mesh, spec.num_experts) if choices.expert_sharding else None
        if self.sharding is None:
            experts = GroupedExperts(spec, mesh.local_experts(spec.num_experts), mesh.device)
            links = Links(mesh.ep_group, None, self.runner.asynchronous)
        else:
            experts = ShardedExperts(spec, self.sharding, mesh.device)
            links = Links(self.sharding.between, self.sharding.node, self.runner.asynchronous)
        self.pipeline = ExpertPipeline(experts, links, schedule.pipeline, self.runner)
        self._whole: list[ExpertView] | None = None  # while a checkpoint is written or read
        self._points: Points = {}
        self.planning = StepPlanning([self], schedule.planner, choices.fixed)
        self.index = 0
        self._backward: Backward | None = None
        self.stage_listeners = []

    def take_part(self, planning: StepPlanning, backward: Backward) -> None:
        """Go by the planning of a whole model, in which this layer stands, and send slices in the backward."""
        self.planning, self._backward = planning, backward
        self.index = next(index for index, layer in enumerate(planning.layers) if layer is self)

    def forward(self, x_TM: Tensor) -> MoEOutput:
        """Route this rank's tokens [T, M]. Collective over all ranks of the run in the first pass, which profiles."""
        if self.index == 0 and self.runner.recorder is not None and torch.is_grad_enabled():
            self.runner.recorder.clear()
        plan = self.planning.layer_plan(self.index, len(x_TM))
        work = self.work(len(x_TM))
        return self.routed(x_TM, plan.degree, lambda copies_SM, queues: self._travel(copies_SM, queues, plan, work))

    def routed(self, x_TM: Tensor, degree: int, travel: Travel) -> MoEOutput:
        """Route tokens [T, M], whose copies travel as told. Collective."""
        routing = self.gate(x_TM)
        return self.output(self.around(x_TM, routing, degree, travel), routing)

    def output(self, y_TM: Tensor, routing: Routing) -> MoEOutput:
        """What the layer returns, from its outputs [T, M]."""
        return MoEOutput(y_TM, routing.aux_loss, routing.counts_E, routing.num_dropped, routing.expert_ids_TK)

    def around(self, rows_NM: Tensor, routing: Routing, degree: int, travel: Travel) -> Tensor:
        """The weighted sum of each row's experts, [N, M]. Collective.

        Args:
            rows_NM: [N, M], tokens, or what a gate makes of them.
            routing: of these rows.
            degree: chunks in which their copies lie.
            travel: what becomes of the copies.
        """
        links = self.pipeline.links
        queues = exchange_counts(routing, self.spec.num_experts, links.group, links.node)
        order, inverse_NK = queues.travel_orders(degree)
        dense = self.choices.dense_order
        copies_SM = travel((dense_expand if dense else expand)(rows_NM, order, inverse_NK), queues)
        return (dense_weighted_sum if dense else weighted_sum)(copies_SM, routing.weights_TK, order, inverse_NK)

    def _travel(self, copies_SM: Tensor, queues: Queues, plan: LayerPlan, work: LayerWork) -> Tensor:
        """Through the experts and back, as planned."""
        call = Call(queues, plan, work, self.index)
        if self._backward is not None:
            call.slice, call.before_backward = self._backward.slice, self._backward.begins
        call.after_backward, call.tell_stage = self._after_backward, self._tell_stage
        y_SM: Tensor = self.pipeline(copies_SM, call)
        return y_SM

    def _tell_stage(self, direction: str, stage: str) -> None:
        for tell in self.stage_listeners or ():
            tell(direction, stage)

    def _after_backward(self) -> None:
        if self._backward is not None:
            self._backward.ended()
        elif self.index == 0:
            self.write_trace()

    def write_trace(self) -> None:
        """Write the timeline of the step, if one is recorded."""
        if self.choices.trace is not None and self.runner.recorder is not None:
            path = self.choices.trace / f"rank{self.mesh.rank}.json"
            write_trace(path, self.runner.recorder.spans(), self.mesh.rank)

    def shapes(self, num_tokens: int) -> Shapes:
        """What is profiled for so many tokens of a rank."""
        spec, links = self.spec, self.pipeline.links
        num_ranks, num_shards = links.group.size(), 1 if links.node is None else links.node.size()
        return Shapes(
            num_tokens,
            max(1, self.gate.most_copies(num_tokens)),
            spec.model_dim,
            spec.hidden_dim // num_shards,
            spec.num_experts // num_ranks,
            spec.activation,
            str(spec.dtype).removeprefix("torch."),
            num_ranks,
            num_shards,
            type(self.gate).__name__,
        )

    def work(self, num_tokens: int) -> LayerWork:
        """As `moe.step_planning.Plannable`: as if routing were even."""
        shapes = self.shapes(num_tokens)
        weights = sum(rows * columns for rows, columns in self.spec.expert_shapes.values())
        sent_bytes = shapes.rows * shapes.model_dim * self.spec.dtype.itemsize
        return LayerWork(
            all_to_all_bytes=sent_bytes,
            shard_bytes=shapes.shards * sent_bytes if shapes.shards > 1 else 0,
            expert_work=shapes.rows * weights,
            expert_calls=2,
            sequence_bytes=0,
            dense_s=0,
            dense_backward_s=0,
            gradient_bytes=0,
        )

    def measured(self, num_tokens: int) -> Points:
        """The profile that `costs` are fitted to. Collective over all ranks."""
        links = self.pipeline.links
        groups = [links.group] if links.node is None else [links.group, links.node]
        outside = partial(self._outside, num_tokens)
        measuring = Measuring(self.mesh, self.shapes(num_tokens), groups, self.pipeline.experts, outside)
        devices = [self.mesh.device] if self.mesh.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # a gate may draw, and training must not depend on what was measured
            self._points = profile(measuring, self.choices.profile)
        return self._points

    @property
    def module_times(self) -> dict[str, list[tuple[float, float]]]:
        """Of the profile, if the plan needed one."""
        return {name: [(point.size, point.seconds) for point in points] for name, points in self._points.items()}

    def _outside(self, num_tokens: int, fraction: float) -> Timed:
        """What is neither exchanged nor in the experts, forward and backward, for a share of so many tokens; sizes are
        bytes of the copies (`moe.layer_simulation.OUTSIDE`)."""
        spec, num_tokens = self.spec, max(1, round(fraction * num_tokens))
        generator = torch.Generator().manual_seed(self.mesh.rank)
        x_TM = torch.randn(num_tokens, spec.model_dim, generator=generator).to(self.mesh.device, spec.dtype)
        x_TM.requires_grad_()
        outputs: list[MoEOutput] = []

        def forward() -> None:
            with torch.enable_grad():
                outputs[:] = [self.routed(x_TM, 1, lambda copies_SM, _queues: copies_SM)]

        def backward() -> None:
            y_TM, wanted = outputs[0].y_TM, [x_TM, *self.gate.parameters()]
            torch.autograd.grad(y_TM, wanted, torch.ones_like(y_TM), retain_graph=True, allow_unused=True)

        forward()
        copies_bytes = float(spec.model_dim * spec.dtype.itemsize * self.gate.most_copies(num_tokens))
        return [(OUTSIDE, copies_bytes, forward), (f"{OUTSIDE}_backward", copies_bytes, backward)]

    def costs(self, num_tokens: int) -> dict[str, AlphaBeta]:
        """As `moe.step_planning.Plannable`."""
        return costs_of(self.measured(num_tokens))

    @property
    def plan(self) -> LayerPlan | None:
        """Of this layer; None before its first forward pass."""
        return None if self.planning.plan is None else self.planning.plan.layers[self.index]

    @property
    def gate_weight(self) -> nn.Parameter:
        """[E, M], or less wide where the gate projects tokens."""
        weight: nn.Parameter = self.gate.weight
        return weight

    def set_gate(self, gate_EM: Tensor) -> None:
        """As the gate takes it."""
        self.gate.load(gate_EM)

    @property
    def path(self) -> str:
        """The schedule, a gate and an order of its own, its degrees once they are chosen, and how experts multiply."""
        plan, gate = self.plan, type(self.gate)
        parts = [self.schedule.name, *([] if gate is TopKGate else [gate.__name__])]
        parts += ["dense order"] if self.choices.dense_order else []
        parts += [] if self.sharding is None else [f"experts cut over {self.sharding.num_shards} ranks"]
        parts += [] if plan is None else [f"chunks {plan.degree} forward", f"{plan.backward_degree} backward"]
        return f"{', '.join(parts)}; {product_path(self.pipeline.experts.w_in, self.spec.dtype)}"

    def expert_views(self) -> list[ExpertView]:
        """Views into the grouped weights; of whole experts for a checkpoint."""
        return self.pipeline.experts.views() if self._whole is None else self._whole

    def sharded_parameters(self) -> list[nn.Parameter]:
        """All experts'."""
        return list(self.pipeline.experts.parameters())

    @contextmanager
    def whole_experts(self, optimizer: torch.optim.Optimizer, loading: bool) -> Iterator[None]:
        """As `MoELayer.whole_experts`: put together where they are cut. Collective."""
        experts = self.pipeline.experts
        if not isinstance(experts, ShardedExperts):
            yield
            return
        try:
            with experts.whole(optimizer, loading) as self._whole:
                yield
        finally:
            self._whole = None

    def stage_modules(self) -> tuple[nn.Module, ...]:
        """The gate and the pipeline."""
        return self.gate, self.pipeline
