"""Tutel's two-dimensional hierarchical all-to-all (Hwang et al., MLSys 2023) from the suite's own parts: every expert
padded to equally many slots, exchanged inside nodes and between them. The parts stand beside, in
baselines/tutel_2dh_*.py.

Upstream's own is `tutel` with `use_2dh`; this one also runs on CPUs, overlaps on any cluster, and takes either order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from baselines.fastermoe_schedule import StepExperts
from baselines.tutel_2dh_exchange import node_size
from baselines.tutel_2dh_slots import SlotSchedule
from moe.exchange_costs import Counts, Exchange, chained
from moe.experts import GroupedExperts, product_path
from moe.gate import TopKGate
from moe.layer_simulation import LayerModel, RoutedLayer, fixed_degree
from moe.mesh import Mesh
from moe.system import ExpertView, LayerSpec, MoELayer, MoEOutput, System


class Options(BaseModel):
    """Options of conf/system/tutel_2dh.yaml.

    Args:
        order: `intra_first`, the paper's; `inter_first`, that of upstream's code where nothing overlaps.
        overlap_degree: parts that the slots are cut into, to overlap the exchange between nodes with the experts; 1
            overlaps nothing.
    """

    model_config = ConfigDict(extra="forbid")
    order: Literal["intra_first", "inter_first"] = "intra_first"
    overlap_degree: int = Field(default=1, ge=1, le=32)


class TwoDimensionalMoE(MoELayer):
    """Gate, then the schedule with the experts inside it.

    Where parts overlap, `dispatch` ends when the first one is here, `experts` covers all that is sent while experts
    compute, and `combine` begins when the last expert is done.

    Args:
        spec: what to compute.
        mesh: where; E is spread over its expert-parallel group, contiguously.
        options: of the system.
    """

    def __init__(self, spec: LayerSpec, mesh: Mesh, options: Options) -> None:
        super().__init__(spec, mesh)
        self.options = options
        self.gate = TopKGate(spec, mesh.device)
        self.experts = GroupedExperts(spec, mesh.local_experts(spec.num_experts), mesh.device)
        self.parts = nn.ModuleList(StepExperts(self.experts) for _ in range(options.overlap_degree))
        self.schedule = SlotSchedule(spec, mesh, options.order == "intra_first", options.overlap_degree)

    def forward(self, x_TM: Tensor) -> MoEOutput:
        """Route this rank's tokens [T, M]; T equal on all ranks where a capacity factor is set."""
        routing = self.gate(x_TM)
        y_TM = self.schedule(x_TM, routing, list(self.parts))
        return MoEOutput(y_TM, routing.aux_loss, routing.counts_E, routing.num_dropped, routing.expert_ids_TK)

    @property
    def gate_weight(self) -> nn.Parameter:
        """[E, M]."""
        return self.gate.weight

    @property
    def path(self) -> str:
        """How padded slots travel, in which order and how many parts, and how experts multiply."""
        nodes, parts = self.schedule.nodes, self.options.overlap_degree
        order = "inside first" if self.options.order == "intra_first" else "between first"
        travel = (
            "linear all-to-all on one level"
            if nodes.inside is None
            else f"2DH all-to-all, {nodes.num_nodes} nodes of {nodes.node_size}, {order}"
        )
        overlap = f"{parts} parts that overlap" if parts > 1 else "blocking"
        return f"{travel}, {overlap}; {product_path(self.experts.w_in, self.spec.dtype)}"

    def expert_views(self) -> list[ExpertView]:
        """Views into the grouped weights."""
        return self.experts.views()

    def stage_modules(self) -> tuple[nn.Module, ...]:
        """The gate, and the experts of every part."""
        return self.gate, *self.parts


def two_dimensional(layer: RoutedLayer, counts_PE: Counts) -> Exchange:
    """The exchange inside nodes of what goes to equal places of all nodes, then that between them, as one.

    Args:
        layer: with the costs of its cluster's levels.
        counts_PE: [P, E], copies of each rank for each expert, padding included.
    """
    rows_PP, size = layer.rows_between(counts_PE), node_size(layer.cluster, layer.num_ranks)
    if size == layer.num_ranks:
        return layer.exchange(rows_PP)
    num_nodes, crossed = layer.num_ranks // size, layer.cluster.crossed_levels
    rows_NGNG = rows_PP.reshape(num_nodes, size, num_nodes, size)
    inside_NGG, between_NGN = rows_NGNG.sum(2), rows_NGNG.sum(1).transpose(0, 2, 1)
    inside = inside_NGG * (1 - np.eye(size, dtype=np.int64))
    between = between_NGN * (1 - np.eye(num_nodes, dtype=np.int64))[:, None, :]
    busiest = [max(int(rows.sum(axis).max()) for axis in axes) for rows, axes in ((inside, (1, 2)), (between, (0, 2)))]
    inner = next(level for level in reversed(crossed) if layer.cluster.group_size(level) == size)
    far = max((layer.at_level(level, busiest[1]) for level in crossed if level > inner), key=lambda far: far.seconds)
    return chained(layer.at_level(inner, busiest[0]), far)


class TutelTwoDimensional(System):
    """Tutel's 2DH, restated."""

    name = "tutel_2dh"
    implementation = "native"
    summary = "Tutel's hierarchical all-to-all: inside nodes, then between them; experts padded to equal capacity"
    Options = Options

    def simulated_layer(self, layer: RoutedLayer) -> LayerModel:
        """Padded experts over two exchanges; parts that overlap as FSMoE's do on one link."""
        model = layer.model(layer.padded_PE, exchange=two_dimensional(layer, layer.padded_PE))
        return replace(model, planner=fixed_degree(self.options.overlap_degree))

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """The layer. Collective over all ranks of the run.

        Raises:
            Refused: the ranks that share experts are no whole nodes.
        """
        return TwoDimensionalMoE(spec, mesh, self.options)
