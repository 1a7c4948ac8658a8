"""Tasks of a training step whose MoE layers are cut into chunks and whose dense gradients are cut into slices.

A layer is an attention (with gate and order) and a mixture of experts, whose experts are cut over the ranks of a node
(expert-sharding parallelism, ESP, as many ranks as tensor parallelism has). Of each of r chunks:

    dispatch (all-to-all between nodes) -> all-gather (in the node) -> experts -> reduce-scatter (in the node)
    -> combine (all-to-all between nodes)

and around them a reduce-scatter and an all-gather of the tensor-parallel sequence. Without ESP (no bytes) the two
collectives in the node are left out. Three resources of one rank that stands for all: `inter`, `intra`, `compute`.

Which degree and which slices is a system's idea (a `StepPlan`), and so may be the order of a pipeline's tasks (a
`Pipeline`); this file turns them into tasks for `moe.simulator`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from moe.simulator import MEASURED, Costs, Program, Task

INTER, INTRA, COMPUTE = "inter", "intra", "compute"
BACKWARD_WORK = 2
"""Of the experts, in forwards: gradients of inputs and of weights."""


@dataclass(frozen=True)
class LayerWork:
    """What one rank does in the forward pass of a layer, before it is cut into chunks.

    Args:
        all_to_all_bytes: each of dispatch and combine.
        shard_bytes: each of the experts' all-gather and reduce-scatter; 0 without ESP.
        expert_work: multiply-adds.
        expert_calls: matrix multiplications: 2 for GELU, 3 for SwiGLU.
        sequence_bytes: each of the tensor-parallel reduce-scatter and all-gather; 0 without.
        dense_s, dense_backward_s: seconds of attention, gate and order.
        gradient_bytes: of its dense parameters, to be all-reduced.
    """

    all_to_all_bytes: float
    shard_bytes: float
    expert_work: float
    expert_calls: int
    sequence_bytes: float
    dense_s: float
    dense_backward_s: float
    gradient_bytes: float


class Part(NamedTuple):
    """Time of one operation of a layer by the number of chunks: alpha + work / r.

    Attributes:
        alpha_s: seconds that every chunk pays.
        work_s: seconds that are shared among the chunks.
    """

    alpha_s: float
    work_s: float

    def scaled(self, factor: float) -> Part:
        """So many times as long."""
        return Part(factor * self.alpha_s, factor * self.work_s)

    def plus(self, other: Part) -> Part:
        """One after the other."""
        return Part(self.alpha_s + other.alpha_s, self.work_s + other.work_s)


@dataclass(frozen=True)
class LayerTimes:
    """What a schedule needs to know of a layer's pipeline in one direction.

    Args:
        all_to_all: of dispatch, and of combine.
        all_gather, reduce_scatter: of the experts' shards; `Part(0, 0)` without ESP.
        experts: of all their matrix multiplications.
    """

    all_to_all: Part
    all_gather: Part
    reduce_scatter: Part
    experts: Part

    def on_one_link(self) -> LayerTimes:
        """The same where collectives in a node wait for those between nodes: one link, whose all-to-alls are longer by
        half of what the other link did."""
        half = self.all_gather.plus(self.reduce_scatter).scaled(0.5)
        return LayerTimes(self.all_to_all.plus(half), Part(0, 0), Part(0, 0), self.experts)


def layer_times(work: LayerWork, costs: Costs, backward: bool = False) -> LayerTimes:
    """Costs of a layer's pipeline; the experts' are doubled in backward, latency too.

    Args:
        work: of the layer.
        costs: of `all_to_all`, `all_gather`, `reduce_scatter` and `gemm`; of `gemm_backward`, if that was measured.
        backward: direction.
    """

    def part(operation: str, amount: float, calls: int = 1) -> Part:
        if not amount:
            return Part(0, 0)
        cost = costs[operation]
        return Part(calls * cost.alpha_s, amount * cost.beta_s_per_byte)

    times = BACKWARD_WORK if backward else 1
    return LayerTimes(
        all_to_all=part("all_to_all", work.all_to_all_bytes),
        all_gather=part("all_gather", work.shard_bytes),
        reduce_scatter=part("reduce_scatter", work.shard_bytes),
        experts=part(gemm_of(costs, backward), times * work.expert_work, times * work.expert_calls),
    )


def gemm_of(costs: Costs, backward: bool) -> str:
    """The operation that the experts' matrix products cost as: backward `gemm_backward` where it was measured."""
    return "gemm_backward" if backward and "gemm_backward" in costs else "gemm"


@dataclass(frozen=True)
class LayerPlan:
    """How one layer runs.

    Args:
        degree, backward_degree: numbers of chunks, >= 1.
        moe_bytes: of gradient, all-reduced in its backward between the last dispatch and the first combine.
        dense_bytes: of gradient, all-reduced beside its dense part's backward.
    """

    degree: int = 1
    backward_degree: int = 1
    moe_bytes: float = 0.0
    dense_bytes: float = 0.0

    def __post_init__(self) -> None:
        assert min(self.degree, self.backward_degree) >= 1, f"a layer in no chunk: {self}"

    def num_chunks(self, backward: bool) -> int:
        """Degree of a direction."""
        return self.backward_degree if backward else self.degree


@dataclass(frozen=True)
class StepPlan:
    """How a step runs.

    Args:
        layers: plans in the order of the forward pass.
        tail_bytes: of gradient, all-reduced in one piece when all backwards have ended.
        filler_bytes: where given, gradients are cut into pieces of at most so many bytes, > 0, which fill gaps of the
            link between nodes as soon as they exist; then no slice and no tail has bytes.
        one_link: collectives in a node, the sequence's too, wait for those between nodes, and the other way round.
    """

    layers: tuple[LayerPlan, ...]
    tail_bytes: float = 0.0
    filler_bytes: float | None = None
    one_link: bool = False

    def __post_init__(self) -> None:
        if self.filler_bytes is not None:
            assert self.filler_bytes > 0, f"pieces of {self.filler_bytes} bytes"
            sliced = self.tail_bytes + sum(plan.moe_bytes + plan.dense_bytes for plan in self.layers)
            assert not sliced, f"gradients are cut into pieces, and {sliced} bytes of them into slices"

    @property
    def in_node(self) -> str:
        """What does the collectives in a node."""
        return INTER if self.one_link else INTRA


Planner = Callable[[Sequence[LayerWork], Costs, float], StepPlan]
"""A system's idea: from the layers in the order of the forward pass, the costs, and bytes of gradient that are there
when backward begins (of a layer before that is not among them)."""

Pipeline = Callable[[Program, Task, LayerWork, LayerPlan], tuple[int, ...]]
"""Launches the chunks of a layer's mixture of experts in one direction, and returns the last task of each. The task
that it is given says which layer, which direction, and what the first ones wait for."""

Builder = Callable[[Sequence[LayerWork], Costs, float], list[Task]]
"""A schedule: from the same as a planner, the tasks of a step."""


def planned(planner: Planner) -> Builder:
    """The schedule of a system that is a plan."""

    def build(layers: Sequence[LayerWork], costs: Costs, carried_bytes: float = 0.0) -> list[Task]:
        return step_tasks(layers, planner(layers, costs, carried_bytes), carried_bytes)

    return build


def step_tasks(
    layers: Sequence[LayerWork], plan: StepPlan, carried_bytes: float = 0.0, pipeline: Pipeline | None = None
) -> list[Task]:
    """Tasks of forward and backward.

    With `carried_bytes` the step is one period of an endless row of layers: gradients of a layer before are there when
    backward begins, and those of its last layer are left to the next period. Backward then begins with the mixture; the
    reduce-scatter before it stands at the end, as the next period's, so that a dense slice finds it beside itself.

    Args:
        layers: in the order of the forward pass.
        plan: of the same number of layers.
        carried_bytes: of gradient that is there when backward begins.
        pipeline: of a mixture of experts; None: `fsmoe_pipeline`.
    """
    assert len(layers) == len(plan.layers), f"{len(layers)} layers, {len(plan.layers)} plans"
    step = _Step(Program(), plan, pipeline or partial(fsmoe_pipeline, in_node=plan.in_node))
    after: tuple[int, ...] = ()
    for index, work in enumerate(layers):
        after = step.forward(index, work, after)
    last = len(layers) - 1
    step.fill(carried_bytes, after, last)
    if not carried_bytes:
        after = step.sequence("reduce_scatter", layers[last], last, True, after)
    for index in range(last, -1, -1):
        after = step.backward(index, layers[index], after)
        if index or not carried_bytes:
            step.fill(layers[index].gradient_bytes, after, index)
        if index or carried_bytes:
            following = index - 1 if index else last
            after = step.sequence("reduce_scatter", layers[following], following, True, after)
    _all_reduce(step.program, plan.tail_bytes, after, 0)
    return step.program.tasks


@dataclass(frozen=True)
class _Step:
    """Writes a step's tasks. Every method takes and returns indices of tasks that the next ones wait for."""

    program: Program
    plan: StepPlan
    pipeline: Pipeline

    def forward(self, index: int, work: LayerWork, after: tuple[int, ...]) -> tuple[int, ...]:
        dense = Task("dense", COMPUTE, MEASURED, work.dense_s, after=after, layer=index)
        after = (self.program.add(dense),)
        after = self.sequence("reduce_scatter", work, index, False, after)
        after = self.mixture(index, work, False, after)
        return self.sequence("all_gather", work, index, False, after)

    def backward(self, index: int, work: LayerWork, after: tuple[int, ...]) -> tuple[int, ...]:
        """From the mixture on; the sequence's reduce-scatter is before it."""
        combined = self.mixture(index, work, True, after)
        after = self.sequence("all_gather", work, index, True, combined)
        # Launched second: on one link the dense part must not wait for the slice that is to run beside it.
        _all_reduce(self.program, self.plan.layers[index].dense_bytes, combined, index)
        dense = Task("dense", COMPUTE, MEASURED, work.dense_backward_s, after=after, layer=index, backward=True)
        return (self.program.add(dense),)

    def sequence(
        self, operation: str, work: LayerWork, index: int, backward: bool, after: tuple[int, ...]
    ) -> tuple[int, ...]:
        """The tensor-parallel collective before or after the experts: each is the other's backward."""
        if not work.sequence_bytes:
            return after
        kind, size = f"sequence_{operation}", work.sequence_bytes
        task = Task(kind, self.plan.in_node, operation, size, after=after, layer=index, backward=backward)
        return (self.program.add(task),)

    def mixture(self, index: int, work: LayerWork, backward: bool, after: tuple[int, ...]) -> tuple[int, ...]:
        base = Task("mixture", COMPUTE, MEASURED, 0.0, after=after, layer=index, backward=backward)
        return self.pipeline(self.program, base, work, self.plan.layers[index])

    def fill(self, size_bytes: float, after: tuple[int, ...], index: int) -> None:
        """Pieces of a gradient for the gaps of the link between nodes, if the plan has such."""
        piece_bytes = self.plan.filler_bytes
        while piece_bytes and size_bytes > 0:
            _all_reduce(self.program, min(piece_bytes, size_bytes), after, index, background=True)
            size_bytes -= piece_bytes


def _all_reduce(
    program: Program, size_bytes: float, after: tuple[int, ...], index: int, background: bool = False
) -> None:
    if size_bytes > 0:
        task = Task("all_reduce", INTER, "all_reduce", size_bytes, after=after, layer=index, backward=True)
        program.add(replace(task, background=background))


def fsmoe_pipeline(
    program: Program, base: Task, work: LayerWork, plan: LayerPlan, in_node: str = INTRA
) -> tuple[int, ...]:
    """Chunks in the order that FSMoE launches (arXiv 2501.10714, figure 2 and released code): all dispatches, the slice
    of gradient, all combines on one link; all gathers, then all scatters on the other.

    Args:
        program, base, work, plan: as of a `Pipeline`.
        in_node: what does the collectives in a node.
    """
    degree, times = plan.num_chunks(base.backward), BACKWARD_WORK if base.backward else 1
    exchange = replace(base, resource=INTER, operation="all_to_all", work=work.all_to_all_bytes / degree)
    shard = replace(base, resource=in_node, work=work.shard_bytes / degree)
    experts = replace(base, kind="experts", operation="gemm", work=times * work.expert_work / degree)
    experts = replace(experts, calls=times * work.expert_calls)
    one_link = in_node == INTER

    def gather(ready: int, chunk: int) -> int:
        if not work.shard_bytes:
            return ready
        return program.add(replace(shard, kind="gather", operation="all_gather", after=(ready,), chunk=chunk))

    # A host that issues all dispatches first need not wait for the first one in order to begin its gather.
    arrived = []
    for chunk in range(degree):
        ready = program.add(replace(exchange, kind="dispatch", chunk=chunk))
        arrived.append(gather(ready, chunk) if one_link else ready)
    if not one_link:
        arrived = [gather(ready, chunk) for chunk, ready in enumerate(arrived)]
    if base.backward:
        _all_reduce(program, plan.moe_bytes, base.after, base.layer)
    computed: list[int] = []
    combined: list[int] = []

    def combine() -> None:
        chunk = len(combined)
        combined.append(program.add(replace(exchange, kind="combine", after=(computed[chunk],), chunk=chunk)))

    for chunk, ready in enumerate(arrived):
        done = program.add(replace(experts, after=(ready,), chunk=chunk))
        if work.shard_bytes:
            scatter = replace(shard, kind="scatter", operation="reduce_scatter", after=(done,), chunk=chunk)
            done = program.add(scatter)
        computed.append(done)
        # Likewise: while a chunk's scatter is under way on a link of its own, the next chunk's experts are issued.
        if one_link or not work.shard_bytes or chunk:
            combine()
    while len(combined) < degree:
        combine()
    return tuple(combined)
