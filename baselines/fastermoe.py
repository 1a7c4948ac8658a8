"""FasterMoE (He et al., PPoPP 2022) from the suite's own parts: shadowed experts, an overlapped pairwise exchange, and,
if asked for, the topology-aware gate. The parts stand beside, in baselines/fastermoe_*.py.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from baselines.fastermoe_gate import NEEDS_COSTS, NEEDS_TOP_2, NEEDS_TWO_EXPERTS, TopologyGate, outgoing_fraction
from baselines.fastermoe_schedule import PairwiseSchedule, ShadowExperts, StepExperts
from baselines.fastermoe_shadow import POLICIES, ShadowCosts
from moe.errors import Refused
from moe.exchange_costs import ring_cost
from moe.experts import GroupedExperts, product_path
from moe.gate import TopKGate
from moe.layer_simulation import LayerModel, RoutedLayer, fixed_degree
from moe.mesh import Mesh
from moe.system import ExpertView, LayerSpec, MoELayer, MoEOutput, System
from moe.topology import Cluster, Level

NET_BYTES_PER_S = 6.25e9
"""W_net where neither the options nor the cluster tell it: FastMoE's default, 50 Gbit/s."""


class Options(BaseModel):
    """Options of conf/system/fastermoe.yaml.

    Args:
        shadowing: `paper` (algorithm 1), `fastmoe` (the rule that FastMoE v1.1 ships) or `none`.
        schedule: `pairwise` (smart scheduling) or `none` (one exchange of all ranks each way, nothing overlapped).
        group_size: g, ranks of a group of the schedule, at most all; null: those of the cluster's innermost level.
        topology_gate: bound the tokens that leave a node; changes the routing, and needs top_k=2.
        outgoing_fraction: of a rank's tokens that may leave; null: W_net / (M W_local) from the cluster's costs. Read
            with `topology_gate` only.
        flops_per_s: P of the shadowing policy; the default is FastMoE's.
        net_bytes_per_s: W_net of the policy, of one rank; null: 1 / beta of the outermost level that the
            expert-parallel group crosses, else 6.25e9.
    """

    model_config = ConfigDict(extra="forbid")
    shadowing: Literal["none", "paper", "fastmoe"] = "paper"
    schedule: Literal["none", "pairwise"] = "pairwise"
    group_size: int | None = Field(default=None, ge=1)
    topology_gate: bool = False
    outgoing_fraction: float | None = Field(default=None, ge=0, le=1)
    flops_per_s: float = Field(default=11.5e12, gt=0, allow_inf_nan=False)
    net_bytes_per_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)


def group_size_of(options: Options, cluster: Cluster, num_ranks: int) -> int:
    """Ranks of a group of the schedule.

    Raises:
        Refused: the options' size does not divide the ranks.
    """
    if options.schedule == "none":
        return num_ranks
    if options.group_size is None:
        return gcd(num_ranks, cluster.group_size(min(1, len(cluster.levels) - 1)))
    size = min(options.group_size, num_ranks)
    if num_ranks % size:
        raise Refused(
            f"FasterMoE's group_size={options.group_size} must divide the {num_ranks} ranks that share experts."
        )
    return size


def shadow_costs(options: Options, spec: LayerSpec, level: Level) -> ShadowCosts:
    """What the policy reckons with: the same on every rank of an expert-parallel group.

    Args:
        options, spec: of the layer.
        level: the outermost one that the group crosses.
    """
    measured = 1 / level.beta_s_per_byte if level.beta_s_per_byte else NET_BYTES_PER_S
    return ShadowCosts(
        spec.model_dim,
        sum(rows * columns for rows, columns in spec.expert_shapes.values()),
        torch.empty(0, dtype=spec.dtype).element_size(),
        options.flops_per_s,
        options.net_bytes_per_s or measured,
    )


class FasterMoELayer(MoELayer):
    """Gate, counts of all ranks, then the schedule with the experts inside it.

    The stages overlap: `dispatch` ends when the first tokens are here, `experts` covers all that is sent while experts
    compute, and `combine` begins when the last expert is done.

    Args:
        spec: what to compute.
        mesh: where; E is spread over its expert-parallel group, contiguously.
        options: of the system.
    """

    def __init__(self, spec: LayerSpec, mesh: Mesh, options: Options) -> None:
        super().__init__(spec, mesh)
        group_size = group_size_of(options, mesh.cluster, mesh.ep_size)
        self.gate = _gate(spec, mesh, options)
        self.experts = GroupedExperts(spec, mesh.local_experts(spec.num_experts), mesh.device)
        self.steps = torch.nn.ModuleList(StepExperts(self.experts) for _ in range(mesh.ep_size // group_size))
        self.shadows = ShadowExperts(self.experts)
        first = mesh.rank - mesh.ep_rank
        level = mesh.cluster.levels[mesh.cluster.level_of(first, first + mesh.ep_size - 1)]
        policy, costs = POLICIES[options.shadowing], shadow_costs(options, spec, level)
        self.schedule = PairwiseSchedule(
            mesh, spec.num_experts, group_size, lambda counts_PE: policy(counts_PE, costs), spec.dtype
        )

    def forward(self, x_TM: torch.Tensor) -> MoEOutput:
        """Route this rank's tokens [T, M]."""
        routing = self.gate(x_TM)
        y_TM = self.schedule(x_TM, routing, self.experts, list(self.steps), self.shadows)
        return MoEOutput(y_TM, routing.aux_loss, routing.counts_E, routing.num_dropped, routing.expert_ids_TK)

    @property
    def gate_weight(self) -> torch.nn.Parameter:
        """[E, M]."""
        return self.gate.weight

    @property
    def path(self) -> str:
        """How tokens travel and how experts multiply."""
        schedule = self.schedule
        products = product_path(self.experts.w_in, self.spec.dtype)
        return f"pairwise exchange, {schedule.num_groups} groups of {schedule.group_size}; {products}"

    def expert_views(self) -> list[ExpertView]:
        """Views into the grouped weights."""
        return self.experts.views()

    def stage_modules(self) -> tuple[torch.nn.Module, ...]:
        """The gate, the experts of every step, and the shadowed ones."""
        return self.gate, *self.steps, self.shadows


def _gate(spec: LayerSpec, mesh: Mesh, options: Options) -> TopKGate:
    if not options.topology_gate:
        return TopKGate(spec, mesh.device)
    fraction = options.outgoing_fraction if options.outgoing_fraction is not None else outgoing_fraction(mesh.cluster)
    if fraction is None:
        raise Refused(NEEDS_COSTS.format(cluster=mesh.cluster.name))
    return TopologyGate(spec, mesh, fraction)


class FasterMoE(System):
    """FasterMoE, restated from the paper."""

    name = "fastermoe"
    implementation = "native"
    summary = "FasterMoE: shadowed experts, pairwise exchange that overlaps with computation"
    Options = Options

    def refusals(self, spec: LayerSpec, cluster: Cluster) -> list[str]:
        """A group size that does not fit, or what the topology gate lacks."""
        options: Options = self.options
        reasons = []
        try:
            group_size_of(options, cluster, cluster.world_size)
        except Refused as refused:
            reasons += refused.reasons
        if options.topology_gate:
            node_size = cluster.group_size(min(1, len(cluster.levels) - 1))
            num_near = spec.num_experts * node_size // cluster.world_size
            if spec.top_k != 2:
                reasons.append(NEEDS_TOP_2.format(top_k=spec.top_k))
            if num_near < 2:
                reasons.append(NEEDS_TWO_EXPERTS.format(found=num_near))
            if options.outgoing_fraction is None and outgoing_fraction(cluster) is None:
                reasons.append(NEEDS_COSTS.format(cluster=cluster.name))
        return reasons

    def simulated_layer(self, layer: RoutedLayer) -> LayerModel:
        """Copies of shadowed experts stay where they are; their weights come before the rest and their gradients go
        behind it, nothing beside them. Groups of the pairwise schedule are chunks that overlap; the topology gate is
        not told apart."""
        options, spec, counts_PE = self.options, layer.spec, layer.counts_PE
        level = layer.cluster.levels[max(layer.cluster.crossed_levels, default=0)]
        costs = shadow_costs(options, spec, level)
        shadowed = POLICIES[options.shadowing](counts_PE, costs)
        sent_PE = counts_PE.copy()
        sent_PE[:, shadowed] = 0
        rows_PP = layer.rows_between(sent_PE) + np.diag(counts_PE[:, shadowed].sum(1))
        num_steps = layer.num_ranks // group_size_of(options, layer.cluster, layer.num_ranks)
        model = replace(layer.model(counts_PE, rows_PP), planner=fixed_degree(num_steps))
        if not shadowed:
            return model
        moved_s = ring_cost(layer.cluster).predict(len(shadowed) * layer.expert_weights * spec.dtype.itemsize)
        dense_s, backward_s = model.work.dense_s + moved_s, model.work.dense_backward_s + moved_s
        return replace(model, work=replace(model.work, dense_s=dense_s, dense_backward_s=backward_s))

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """The layer."""
        return FasterMoELayer(spec, mesh, self.options)
