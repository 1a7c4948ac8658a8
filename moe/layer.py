"""The native MoE layer: gate, dispatcher and experts in a row. Methods replace one or two of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from moe import ops
from moe.dispatch import AllToAllDispatcher, Dispatcher
from moe.experts import GroupedExperts, product_path
from moe.gate import TopKGate
from moe.mesh import Mesh
from moe.peer_dispatch import PeerDispatcher
from moe.peers import peers_reach_each_other
from moe.placement import Placement
from moe.system import ExpertView, LayerSpec, MoELayer, MoEOutput


def default_dispatcher(spec: LayerSpec, mesh: Mesh) -> Dispatcher:
    """Through shared memory where the ranks are GPUs of one node, else by all-to-all-v."""
    if ops.HAS_TRITON and spec.num_experts <= ops.MOST_EXPERTS and peers_reach_each_other(mesh):
        return PeerDispatcher(mesh, spec)
    return AllToAllDispatcher(mesh, spec.num_experts)


class NativeMoE(MoELayer):
    """Expert parallelism from the suite's own parts.

    Args:
        spec: what to compute.
        mesh: where; E is spread over its expert-parallel group, contiguously.
        gate, dispatcher, experts: replacements of the default parts.
        moves_experts: whether experts can change places; the layer then has a `placement`.
    """

    def __init__(
        self,
        spec: LayerSpec,
        mesh: Mesh,
        gate: TopKGate | None = None,
        dispatcher: Dispatcher | None = None,
        experts: GroupedExperts | None = None,
        moves_experts: bool = False,
    ) -> None:
        super().__init__(spec, mesh)
        self.gate = gate or TopKGate(spec, mesh.device)
        self.dispatcher = dispatcher or default_dispatcher(spec, mesh)
        self.experts = experts or GroupedExperts(spec, mesh.local_experts(spec.num_experts), mesh.device)
        self.placement = Placement(spec.num_experts, mesh.device) if moves_experts else None

    def forward(self, x_TM: Tensor) -> MoEOutput:
        """Route this rank's tokens [T, M]."""
        routing = self.gate(x_TM)
        placed = routing if self.placement is None else self.placement.place(routing, remember=self.training)
        rows_RM, plan = self.dispatcher.dispatch(x_TM, placed)
        rows_RM = self.experts(rows_RM, plan.expert_rows, plan.expert_ends, plan.row_weights)
        y_TM = self.dispatcher.combine(rows_RM, plan, routing.weights_TK)
        return MoEOutput(y_TM, routing.aux_loss, routing.counts_E, routing.num_dropped, routing.expert_ids_TK)

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
        """How tokens travel and how experts multiply, such as `shared memory; grouped_mm on sm_90`."""
        return f"{self.dispatcher.path}; {product_path(self.experts.w_in, self.spec.dtype)}"

    def expert_views(self) -> list[ExpertView]:
        """Views into the grouped weights."""
        return self.experts.views()

    @property
    def expert_of_slot(self) -> list[int] | None:
        """Of the placement, if there is one."""
        return None if self.placement is None else self.placement.expert_of_slot

    def restore_placement(self, expert_of_slot: list[int] | None) -> None:
        """Take those places; without any, or if they are for another number of experts, each expert's first one."""
        if self.placement is not None:
            home = range(self.spec.num_experts)
            self.set_placement(expert_of_slot if expert_of_slot and len(expert_of_slot) == len(home) else home)

    def set_placement(self, expert_of_slot: Sequence[int]) -> None:
        """Say which expert is in which slot, without moving anything (see `moe.migration.migrate`)."""
        assert self.placement is not None, "experts of this layer stay where they are"
        self.placement.set(expert_of_slot)
        local = self.mesh.local_experts(self.spec.num_experts)
        self.experts.experts = expert_of_slot[local.start : local.stop]

    def stage_modules(self) -> tuple[nn.Module, ...]:
        """Gate and grouped experts."""
        return self.gate, self.experts
