"""FlexMoE (Nie et al., SIGMOD 2023, arXiv 2304.03946) as SYMI emulates it (arXiv 2504.19925, section 5): every so many
steps, popular experts get replicas and unpopular ones lose theirs, whose optimizer state moves with them.

FlexMoE's code is not public. The policies stand in flexmoe_policy.py and flexmoe_popularity.py, which tell what is
whose; none of FlexMoE's own figures can be claimed from them. Slots, routing and drop rules are those of SwiftMoE
(moe/replica_*.py), so that the two differ in what SYMI says they do: every slot has its own weights and moments in the
run's optimizer, placements change every `interval` steps, and a change sends weights and moments
(flexmoe_migration.py). Replicas train alike: their gradients are summed (flexmoe_sync.py).

Dimensions: M model, E experts, N ranks, L slots of a rank, J = N L slots in all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from baselines.fastermoe import NET_BYTES_PER_S
from baselines.flexmoe_migration import move_replicas
from baselines.flexmoe_policy import BALANCED, MOST_SHIFTS, Copies, Costs, expert_of_slot, plan, slots_of
from baselines.flexmoe_popularity import plan_by_popularity
from baselines.flexmoe_sync import ReplicaSync
from moe.costs import pair_costs
from moe.exchange_costs import ring_cost
from moe.experts import GroupedExperts
from moe.gate import Routing
from moe.layer_simulation import Extra, LayerModel, RoutedLayer
from moe.mesh import Mesh
from moe.replica_layer import ReplicatedMoE
from moe.replica_table import ReplicaTable, SlotOptions, cyclic_table
from moe.step_parts import step_part
from moe.sync import GradientSync
from moe.system import LayerSpec, MoELayer, System, moe_layers
from moe.topology import Cluster


class Options(SlotOptions):
    """Options of conf/system/flexmoe.yaml, beside those of `SlotOptions`.

    Args:
        interval: steps between two decisions, each by the copies of the steps since the last one; SYMI compares 10, 50
            and 100.
        policy: `popularity` evens out copies per slot, which is what a capacity drops by, as SYMI's emulation does;
            `time` takes the moves that make a step faster by the cost model, FlexMoE's way, which sees nothing to gain
            where every rank holds every expert.
        balanced: largest over mean load up to which nothing is done; of ranks (`time`) or of slots (`popularity`).
        most_shifts: replicas that a layer shifts at a time; null: ten for `time` (as a re-implementation of it has), as
            many as it takes for `popularity` (as SYMI tells).
        flops_per_s: of a rank, for the cost model; FasterMoE's default.
        net_bytes_per_s: between any two ranks, likewise; null: from the cluster's costs, 6.25e9 where it has none.
    """

    interval: int = Field(default=10, ge=1)
    policy: Literal["time", "popularity"] = "popularity"
    balanced: float = Field(default=BALANCED, ge=1, allow_inf_nan=False)
    most_shifts: int | None = Field(default=None, ge=1, examples=[10])
    flops_per_s: float = Field(default=11.5e12, gt=0, allow_inf_nan=False)
    net_bytes_per_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)


def costs_of(options: Options, spec: LayerSpec, cluster: Cluster) -> Costs:
    """What the cost model reckons with: the same on every rank.

    Args:
        options: of the system.
        spec: of the layer; its gradients are float32.
        cluster: of the run.
    """
    num_weights = sum(rows * columns for rows, columns in spec.expert_shapes.values())
    if options.net_bytes_per_s is not None:
        bytes_per_s_NN = np.full((cluster.world_size,) * 2, options.net_bytes_per_s)
    else:
        beta_NN = pair_costs(cluster, range(cluster.world_size))[1]
        known_NN = np.nan_to_num(beta_NN, nan=0.0) > 0
        bytes_per_s_NN = 1 / np.where(known_NN, beta_NN, 1 / NET_BYTES_PER_S)
    return Costs(
        rows_per_s=options.flops_per_s / (2 * num_weights),
        row_bytes=spec.model_dim * torch.empty(0, dtype=spec.dtype).element_size(),
        expert_bytes=4 * num_weights,
        bytes_per_s_NN=bytes_per_s_NN,
    )


class FlexMoELayer(ReplicatedMoE):
    """Slots that are trained in place.

    Args:
        spec: what to compute.
        mesh: where.
        options: of the system; no fewer slots than experts.

    Attributes:
        copies_E: [E] int64, this rank's copies of each expert in the passes with gradients since the last decision.
        passes: how many these are.
    """

    table: ReplicaTable
    copies_E: Tensor
    passes: int

    def __init__(self, spec: LayerSpec, mesh: Mesh, options: Options) -> None:
        table = cyclic_table(spec.num_experts, mesh.world_size, options.slots(spec.num_experts, mesh.world_size))
        experts = GroupedExperts(spec, table.on_rank(mesh.rank), mesh.device)
        super().__init__(spec, mesh, table, experts, options.drop)
        self.costs = costs_of(options, spec, mesh.cluster)
        self.forget()

    def learn(self, routing: Routing) -> None:
        """How popular experts are, from a pass with gradients."""
        if torch.is_grad_enabled():
            self.copies_E = self.copies_E + routing.counts_E
            self.passes += 1

    def forget(self) -> None:
        """Begin to count anew."""
        self.copies_E = torch.zeros(self.spec.num_experts, dtype=torch.int64, device=self.mesh.device)
        self.passes = 0

    def planning_state(self) -> Any:
        """Every rank's copies since the last decision, and of how many passes they are."""
        copies = [torch.empty_like(self.copies_E) for _ in range(self.mesh.world_size)]
        dist.all_gather(copies, self.copies_E)
        return {"copies": torch.stack(copies).tolist(), "passes": self.passes}

    def restore_planning(self, state: Any) -> None:
        """Go on counting where that state was, if it is of as many ranks."""
        if state is not None and len(state["copies"]) == self.mesh.world_size:
            self.copies_E = torch.tensor(state["copies"][self.mesh.rank], device=self.mesh.device)
            self.passes = state["passes"]

    def use(self, table: ReplicaTable) -> None:
        """Say which expert is in which slot, without moving anything."""
        self.table = table
        self.gate.use(table)
        self.experts.experts = table.on_rank(self.mesh.rank)

    @step_part("scheduler")
    def planned(self, copies_NE: Copies, options: Options) -> list[int]:
        """The next expert_of_slot [J], by the copies of each rank in one step."""
        table = self.table
        slots_EN = slots_of(table.expert_of_slot, table.num_experts, table.slots_per_rank)
        if options.policy == "time":
            most = options.most_shifts or MOST_SHIFTS
            decided = plan(slots_EN, copies_NE, self.costs, table.slots_per_rank, options.balanced, most)
        else:
            most = options.most_shifts or table.num_slots
            decided = plan_by_popularity(slots_EN, copies_NE, options.balanced, most)
        return expert_of_slot(decided.slots_EN, table.expert_of_slot, table.slots_per_rank)

    def restore_placement(self, expert_of_slot: list[int] | None) -> None:
        """Take a checkpoint's table where it fits, else the first one; weights are to be loaded next."""
        table = cyclic_table(self.spec.num_experts, self.mesh.world_size, self.table.slots_per_rank)
        experts = set(range(self.spec.num_experts))
        if expert_of_slot and len(expert_of_slot) == table.num_slots and set(expert_of_slot) == experts:
            table = table.moved(expert_of_slot)
        self.use(table)
        self.forget()


class FlexMoE(System):
    """FlexMoE's kind of replicas, as a baseline of SwiftMoE."""

    name = "flexmoe"
    implementation = "native"
    summary = "FlexMoE's kind: replicas follow popularity every few steps, their optimizer state moving along"
    Options = Options

    def refusals(self, spec: LayerSpec, cluster: Cluster) -> list[str]:
        """Fewer slots than experts."""
        refusals: list[str] = self.options.refusals("FlexMoE", spec, cluster)
        return refusals

    def expert_copies(self, num_experts: int, num_ranks: int) -> float:
        """Slots over experts."""
        return float(self.options.slots(num_experts, num_ranks) * num_ranks / num_experts)

    def simulated_layer(self, layer: RoutedLayer) -> LayerModel:
        """Replicas as one decision makes them of this very routing, by popularity whichever the policy; behind backward
        the sum of gradients over replicas. The move itself, one in `interval` steps, is left out."""
        num_ranks, num_experts = layer.num_ranks, layer.spec.num_experts
        slots = self.options.slots(num_experts, num_ranks)
        table = cyclic_table(num_experts, num_ranks, slots)
        before_EN = slots_of(table.expert_of_slot, num_experts, slots)
        most = self.options.most_shifts or table.num_slots
        slots_EN = plan_by_popularity(before_EN, layer.counts_PE, self.options.balanced, most).slots_EN
        held = int((slots_EN > 0).sum(0).max())
        extras = (Extra("replica_gradients", ring_cost(layer.cluster), 8.0 * held * layer.expert_weights),)
        model = layer.model(layer.counts_PE, layer.spread(slots_EN))
        return dataclasses.replace(model, extras=extras if num_ranks > 1 else ())

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """The layer."""
        return FlexMoELayer(spec, mesh, self.options)

    def gradient_sync(self, model: nn.Module, mesh: Mesh) -> GradientSync:
        """Of replicas."""
        return ReplicaSync(model, _flex_layers(model), mesh)

    def after_step(self, model: nn.Module, optimizer: Optimizer, steps_done: int) -> None:
        """Every `interval` steps, decide and move; rank 0 decides, so that rounding can't tell ranks apart."""
        layers = _flex_layers(model)
        if steps_done % self.options.interval or not layers or not layers[0].passes:
            return
        mesh = layers[0].mesh
        copies_ZNE = _copies_of_all_ranks(layers, mesh)
        planned_ZJ = torch.tensor([layer.table.expert_of_slot for layer in layers], device=mesh.device)
        if mesh.rank == 0:
            planned = [
                layer.planned(copies_NE, self.options)
                for layer, copies_NE in zip(layers, copies_ZNE.cpu().numpy(), strict=True)
            ]
            planned_ZJ.copy_(torch.tensor(planned))
        if mesh.world_size > 1:
            dist.broadcast(planned_ZJ, 0)
        replace(
            layers,
            [layer.table.moved(experts) for layer, experts in zip(layers, planned_ZJ.tolist(), strict=True)],
            optimizer,
        )
        for layer in layers:
            layer.forget()


def replace(layers: Sequence[FlexMoELayer], tables: Sequence[ReplicaTable], optimizer: Optimizer) -> int:
    """Go over to new tables, layer by layer. Collective.

    Args:
        layers: of a model, in order.
        tables: of each; of the layers' sizes, and the same on all ranks.
        optimizer: of their slots.

    Returns:
        Bytes that this rank sent.
    """
    sent_bytes = 0
    for layer, table in zip(layers, tables, strict=True):
        if table != layer.table:
            sent_bytes += move_replicas(layer.experts, layer.table, table, layer.mesh.rank, optimizer)
            layer.use(table)
    return sent_bytes


@step_part("popularity")
def _copies_of_all_ranks(layers: Sequence[FlexMoELayer], mesh: Mesh) -> Tensor:
    """[layers, N, E] int64, the mean of the passes since the last decision, rounded up: who had any is not lost."""
    copies_ZE = torch.stack([-(-layer.copies_E // max(1, layer.passes)) for layer in layers])
    if mesh.world_size == 1:
        return copies_ZE.unsqueeze(1)
    parts = [torch.empty_like(copies_ZE) for _ in range(mesh.world_size)]
    dist.all_gather(parts, copies_ZE)
    return torch.stack(parts, dim=1)


def _flex_layers(model: nn.Module) -> list[FlexMoELayer]:
    return [layer for layer in moe_layers(model) if isinstance(layer, FlexMoELayer)]
