"""The MoE layer whose experts have replicas in slots over all ranks of the run. Methods say what fills the slots, what
trains them, and when they change.

Dimensions: T tokens of a rank, M model, E experts, J slots of all ranks.
"""

from __future__ import annotations

import dataclasses

import torch.distributed as dist
from torch import Tensor, nn

from moe.experts import GroupedExperts, product_path
from moe.gate import Routing
from moe.layer import default_dispatcher
from moe.mesh import Mesh
from moe.replica_gate import ReplicaGate
from moe.replica_table import Drop, Table
from moe.system import ExpertView, LayerSpec, MoELayer, MoEOutput


class ReplicatedMoE(MoELayer):
    """Experts in slots over all ranks, whatever the run's expert-parallel groups are.

    Args:
        spec: what to compute.
        mesh: where.
        table: which expert is in which slot.
        experts: in this rank's slots.
        drop: rule of the capacity.

    Attributes:
        table: which expert is in which slot now.
    """

    table: Table
    experts: GroupedExperts

    def __init__(self, spec: LayerSpec, mesh: Mesh, table: Table, experts: GroupedExperts, drop: Drop) -> None:
        super().__init__(spec, mesh)
        self.table = table
        self.gate = ReplicaGate(spec, mesh, table, drop)
        self.experts = experts
        self.dispatcher = default_dispatcher(dataclasses.replace(spec, num_experts=table.num_slots), _mesh_of_all(mesh))

    def forward(self, x_TM: Tensor) -> MoEOutput:
        """Route this rank's tokens [T, M]."""
        routing = self.gate(x_TM)
        self.learn(routing)
        rows_RM, plan = self.dispatcher.dispatch(x_TM, self.gate.placed(routing))
        rows_RM = self.experts(rows_RM, plan.expert_rows, plan.expert_ends, plan.row_weights)
        y_TM = self.dispatcher.combine(rows_RM, plan, routing.weights_TK)
        return MoEOutput(y_TM, routing.aux_loss, routing.counts_E, routing.num_dropped, routing.expert_ids_TK)

    def learn(self, routing: Routing) -> None:
        """Note what decides the next placement, if anything does."""

    @property
    def gate_weight(self) -> nn.Parameter:
        """[E, M]."""
        return self.gate.weight

    @property
    def workspace_bytes(self) -> int:
        """Of the dispatcher."""
        return self.dispatcher.workspace_bytes

    @property
    def path(self) -> str:
        """How many slots there are, how tokens travel and how experts multiply."""
        products = product_path(self.experts.w_in, self.spec.dtype)
        return f"{len(self.experts.experts)} slots a rank; {self.dispatcher.path}; {products}"

    def expert_views(self) -> list[ExpertView]:
        """Of this rank's slots."""
        return self.experts.views()

    def stage_modules(self) -> tuple[nn.Module, ...]:
        """Gate and slots."""
        return self.gate, self.experts

    @property
    def replicas_E(self) -> list[int]:
        """[E], of the step that comes."""
        return list(self.table.counts)

    @property
    def expert_of_slot(self) -> list[int]:
        """[J], for checkpoints."""
        return self.table.expert_of_slot


def _mesh_of_all(mesh: Mesh) -> Mesh:
    """The mesh whose expert-parallel group is all ranks; the other group is not to be used."""
    if mesh.ep_size == mesh.world_size:
        return mesh
    world = dist.group.WORLD
    assert world is not None
    return dataclasses.replace(mesh, ep_size=mesh.world_size, ep_group=world)
