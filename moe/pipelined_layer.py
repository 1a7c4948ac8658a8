"""The MoE layer whose exchange and experts are pipelined, by whatever schedule; see `moe.chunk_pipeline`.

Dimensions: T tokens of this rank, K choices, M model, E experts, S copies this rank sends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.chunk_pipeline import Call, ExpertPipeline
from moe.chunk_travel import Links
from moe.chunks import exchange_counts
from moe.costs import AlphaBeta
from moe.dense_order import dense_expand, dense_weighted_sum
from moe.dispatch import expand, weighted_sum
from moe.expert_sharding import ShardedExperts, sharding_of
from moe.experts import GroupedExperts, product_path
from moe.gate import Routing, TopKGate
from moe.mesh import Mesh
from moe.module_profile import Points, Shapes, costs_of, profile
from moe.schedules import LayerPlan, LayerWork, Pipeline
from moe.step_planning import Fixed, Planner, StepPlanning
from moe.streams import Recorder, TaskRunner
from moe.system import ExpertView, LayerSpec, MoELayer, MoEOutput
from moe.trace import write_trace


class Gate(Protocol):
    """What a pipelined layer needs of its gate, a module whose call gives the `Routing` of tokens [T, M]; another thing
    where the layer's class knows how to use it."""

    weight: nn.Parameter

    def __call__(self, x_TM: Tensor) -> Any:
        """Route."""

    def load(self, gate_EM: Tensor) -> None:
        """Take the suite's matrix, [E, M]."""

    def most_copies(self, num_tokens: int) -> int:
        """Copies that a rank sends of so many tokens, at most."""


class Backward(Protocol):
    """What takes part in a layer's backward: slices of gradient are sent in it."""

    def begins(self) -> None:
        """Before the first task."""

    def slice(self, chunk: int) -> dist.Work | None:
        """In the middle, where the layer's plan has a slice."""

    def ended(self) -> None:
        """When the last task is issued."""


@dataclass(frozen=True)
class Schedule:
    """How a system pipelines its layers.

    Args:
        name: in results.
        planner: decides degrees and slices.
        pipeline: writes the tasks of a layer.
        slices: whether dense gradients are reduced in slices during backward.
    """

    name: str
    planner: Planner
    pipeline: Pipeline
    slices: bool = False


@dataclass(frozen=True)
class Choices:
    """What a user may say of a pipelined layer.

    Args:
        fixed: degrees; the plan's where none are given.
        profile: file that keeps measured costs; None keeps them in the process.
        trace: folder for timelines, a file a rank, of the last step; None records none. Recording waits for the GPU.
        dense_order: tokens become copies and copies tokens by matrix products (`moe.dense_order`).
        expert_sharding: experts are spread over nodes and cut over the ranks of each (`moe.expert_sharding`).
    """

    fixed: Fixed = Fixed()
    profile: Path | None = None
    trace: Path | None = None
    dense_order: bool = False
    expert_sharding: bool = False


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
        routing = self.gate(x_TM)
        return self.output(self.through_experts(x_TM, routing, len(x_TM)), routing)

    def output(self, y_TM: Tensor, routing: Routing) -> MoEOutput:
        """What the layer returns, from its outputs [T, M]."""
        return MoEOutput(y_TM, routing.aux_loss, routing.counts_E, routing.num_dropped, routing.expert_ids_TK)

    def through_experts(self, rows_NM: Tensor, routing: Routing, num_tokens: int) -> Tensor:
        """The weighted sum of each row's experts, [N, M]. Collective.

        Args:
            rows_NM: [N, M], tokens, or what a gate makes of them.
            routing: of these rows.
            num_tokens: T, of this rank.
        """
        if self.index == 0 and self.runner.recorder is not None and torch.is_grad_enabled():
            self.runner.recorder.clear()
        plan = self.planning.layer_plan(self.index, num_tokens)
        links = self.pipeline.links
        queues = exchange_counts(routing, self.spec.num_experts, links.group, links.node)
        order, inverse_NK = queues.travel_orders(plan.degree)
        dense = self.choices.dense_order
        copies_SM = (dense_expand if dense else expand)(rows_NM, order, inverse_NK)
        call = Call(queues, plan, self.work(num_tokens), self.index)
        if self._backward is not None:
            call.slice, call.before_backward = self._backward.slice, self._backward.begins
        call.after_backward, call.tell_stage = self._after_backward, self._tell_stage
        copies_SM = self.pipeline(copies_SM, call)
        return (dense_weighted_sum if dense else weighted_sum)(copies_SM, routing.weights_TK, order, inverse_NK)

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
            max(1, self.gate.most_copies(num_tokens)),
            spec.model_dim,
            spec.hidden_dim // num_shards,
            spec.num_experts // num_ranks,
            spec.activation,
            str(spec.dtype).removeprefix("torch."),
            num_ranks,
            num_shards,
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
        return profile(self.mesh, self.shapes(num_tokens), groups, self.pipeline.experts, self.choices.profile)

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
        with experts.whole(optimizer, loading) as self._whole:
            yield
        self._whole = None

    def stage_modules(self) -> tuple[nn.Module, ...]:
        """The gate and the pipeline."""
        return self.gate, self.pipeline
