"""What a system's MoE layer does to a given routing, in bytes and multiply-adds: what `moe.simulator` simulates of it.

One rank stands for all, so that of every operation the slowest rank's counts: the fullest queue of an exchange, the
fullest expert's rank. Which copies go where follows from the routing by the system's own rules; how long that takes
follows from alpha and beta of the cluster's levels (`moe.exchange_costs`), or of its all-to-all where it was measured.

Dimensions: P ranks that share a set of experts, T tokens of each, K choices, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.costs import AlphaBeta
from moe.exchange_costs import NOTHING, Counts, Exchange, busiest_by_level, cost_of, first_ranks, outside_of, ring_cost
from moe.schedules import INTER, LayerPlan, LayerWork, Pipeline, Planner, StepPlan, gemm_of, step_tasks
from moe.simulator import Costs, Span, Task, simulate, task_s
from moe.topology import Cluster

if TYPE_CHECKING:  # it has a hook that gets these
    from moe.system import LayerSpec

OUTSIDE = "outside"
"""Operation of all that is not exchanged and not in the experts: gate, sorting, tokens to copies and back, and what the
host needs to launch that. Its size is bytes of the copies; `outside_backward` is its backward."""


class Extra(NamedTuple):
    """Something that a training step does beside the layers.

    Attributes:
        kind: what.
        cost, size_bytes: of it.
    """

    kind: str
    cost: AlphaBeta
    size_bytes: float


@dataclass(frozen=True)
class RoutedLayer:
    """A layer with its routing.

    Args:
        spec: of the layer.
        cluster: of the P ranks that share its experts; with costs on every level of more than one group.
        ids_PTK: [P, T, K], the experts that each rank's tokens choose.
        costs: of `outside`, `outside_backward`, `gemm` and, where it was measured, `gemm_backward`; of `all_to_all`
            among all P ranks, by all bytes that a rank sends, where that was measured; then it stands for the levels'.
        contention: pairs of resources that slow each other, as of `moe.simulator.simulate`.
    """

    spec: LayerSpec
    cluster: Cluster
    ids_PTK: NDArray[np.integer]
    costs: Costs
    contention: Mapping[tuple[str, str], float] = field(default_factory=dict)

    @property
    def num_ranks(self) -> int:
        """P."""
        return self.cluster.world_size

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.ids_PTK.shape[1]

    @property
    def row_bytes(self) -> int:
        """Of a copy."""
        return self.spec.model_dim * self.spec.dtype.itemsize

    @property
    def expert_weights(self) -> int:
        """Numbers of one expert."""
        return sum(rows * columns for rows, columns in self.spec.expert_shapes.values())

    @cached_property
    def counts_PE(self) -> Counts:
        """[P, E], copies of each rank for each expert that are kept under the capacity factor."""
        spec, counts = self.spec, []
        for ids_TK in self.ids_PTK:  # one rank after the other: no matrix of all choices
            counts.append(np.bincount(ids_TK.ravel(), minlength=spec.num_experts))
        counts_PE = np.stack(counts)
        return counts_PE if spec.capacity_factor is None else counts_PE.clip(max=spec.capacity(self.num_tokens))

    @cached_property
    def padded_PE(self) -> Counts:
        """The same, each padded to the fullest, or to the capacity."""
        spec = self.spec
        factor = spec.capacity_factor
        slots = self.counts_PE.max() if factor is None else spec.capacity(self.num_tokens)
        return np.full_like(self.counts_PE, slots)

    def rows_between(self, counts_PE: Counts) -> Counts:
        """[P, P], copies from each rank to each, where experts are spread contiguously."""
        return counts_PE.reshape(self.num_ranks, self.num_ranks, -1).sum(2)

    def spread(self, slots_EP: Counts) -> Counts:
        """[P, P], copies from each rank to each where every expert's are spread evenly over its slots.

        Args:
            slots_EP: [E, P], slots of each expert on each rank.
        """
        share_EP, counts_EP = slots_EP / slots_EP.sum(1, keepdims=True), self.counts_PE.T.astype(np.float64)
        arriving_PP = np.zeros((self.num_ranks, self.num_ranks))
        for expert, rank in np.argwhere(slots_EP):  # few of all pairs
            arriving_PP[rank] += share_EP[expert, rank] * counts_EP[expert]
        rows_PP: Counts = np.rint(arriving_PP.T).astype(np.int64)
        return rows_PP

    def exchange(self, rows_PP: Counts) -> Exchange:
        """The all-to-all of so many rows, [P, P]."""
        if "all_to_all" in self.costs:
            most = max(int(rows_PP.sum(axis).max()) for axis in (0, 1))
            return Exchange(self.costs["all_to_all"], float(most * self.row_bytes))
        busiest_D = busiest_by_level(rows_PP, self.cluster)
        found = [self.at_level(index, busiest_D[index]) for index in self.cluster.crossed_levels]
        return max(found, key=lambda exchange: exchange.seconds, default=NOTHING)

    def at_level(self, level: int, num_rows: int) -> Exchange:
        """So many rows of the busiest rank over one level, by its index."""
        return Exchange(cost_of(self.cluster.levels[level]), float(num_rows * self.row_bytes))

    def block(self, num_ranks: int) -> RoutedLayer:
        """The first ranks, as if only they shared the experts: one block of replicas stands for all.

        Args:
            num_ranks: of a block.
        """
        if num_ranks == self.num_ranks:
            return self
        costs = {name: cost for name, cost in self.costs.items() if name != "all_to_all"}  # that was of all ranks
        return replace(
            self, cluster=first_ranks(self.cluster, num_ranks), ids_PTK=self.ids_PTK[:num_ranks], costs=costs
        )

    def replica_gradients(self, num_ranks: int, copies: float) -> Extra:
        """The all-reduce of the gradients of so many experts of a rank, float32, with the ranks at its place in the
        other blocks.

        Args:
            num_ranks: of a block.
            copies: experts of a rank.
        """
        half = ring_cost(outside_of(self.cluster, num_ranks))
        cost = AlphaBeta(2 * half.alpha_s, 2 * half.beta_s_per_byte)
        return Extra("expert_gradients", cost, 4.0 * copies * self.expert_weights)

    def model(
        self, counts_PE: Counts, rows_PP: Counts | None = None, exchange: Exchange | None = None, most_rows: int = 0
    ) -> LayerModel:
        """What a layer of plain expert parallelism does.

        Args:
            counts_PE: [P, E], copies of each rank for each expert, padding included.
            rows_PP: [P, P], where they go; None: to the contiguous placement of the experts.
            exchange: their way there, and back; None: an all-to-all.
            most_rows: of the rank that computes most; 0: as they go.
        """
        rows_PP = self.rows_between(counts_PE) if rows_PP is None else rows_PP
        exchange = exchange or self.exchange(rows_PP)
        most_rows = most_rows or int(rows_PP.sum(0).max())
        copies_bytes = float(counts_PE.sum(1).max() * self.row_bytes)
        outside = [self.costs[name].predict(copies_bytes) for name in (OUTSIDE, f"{OUTSIDE}_backward")]
        work = LayerWork(
            all_to_all_bytes=exchange.size_bytes,
            shard_bytes=0,
            expert_work=float(most_rows * self.expert_weights),
            expert_calls=2,
            sequence_bytes=0,
            dense_s=outside[0],
            dense_backward_s=outside[1],
            gradient_bytes=0,
        )
        return LayerModel(work, {**self.costs, "all_to_all": exchange.cost}, contention=self.contention)


@dataclass(frozen=True)
class LayerModel:
    """What a system does in a step, by one layer.

    Args:
        work: of the layer.
        costs: of its operations.
        planner: decides degrees and slices; None: one chunk, gradients in the end.
        pipeline: of its chunks; None: FSMoE's order.
        extras: of a training step, for each layer, behind backward.
        contention: as of `RoutedLayer`.
    """

    work: LayerWork
    costs: Costs
    planner: Planner | None = None
    pipeline: Pipeline | None = None
    extras: tuple[Extra, ...] = ()
    contention: Mapping[tuple[str, str], float] = field(default_factory=dict)

    def simulated(self, works: Sequence[LayerWork], extras: Sequence[Extra] = ()) -> list[Span]:
        """The timeline of a step of layers like this one.

        Args:
            works: of each layer, made of `work`.
            extras: of the step, behind those of its layers.
        """
        tasks = step_tasks(works, (self.planner or in_the_end)(works, self.costs, 0.0), pipeline=self.pipeline)
        costs = dict(self.costs)
        for extra in (*self.extras * len(works), *extras):
            costs[extra.kind] = extra.cost
            last = len(tasks) - 1
            tasks.append(Task(extra.kind, INTER, extra.kind, extra.size_bytes, after=(last,), backward=True))

        def seconds(task: Task) -> float:  # pipelines write `gemm` in both directions
            operation = gemm_of(costs, task.backward) if task.operation == "gemm" else task.operation
            return task_s(replace(task, operation=operation), costs)

        return simulate(tasks, seconds, self.contention)


def in_the_end(layers: Sequence[LayerWork], costs: Costs, carried_bytes: float = 0.0) -> StepPlan:
    """Every layer in one chunk, and all gradients in one all-reduce behind backward; a `moe.schedules.Planner`."""
    existing = carried_bytes + sum(work.gradient_bytes for work in layers)
    return StepPlan(tuple(LayerPlan() for _ in layers), tail_bytes=existing, one_link=True)


def fixed_degree(degree: int) -> Planner:
    """Every layer in so many chunks both ways, gradients in the end."""

    def planned(layers: Sequence[LayerWork], costs: Costs, carried_bytes: float = 0.0) -> StepPlan:
        plan = in_the_end(layers, costs, carried_bytes)
        return replace(plan, layers=tuple(LayerPlan(degree, degree) for _ in layers))

    return planned
