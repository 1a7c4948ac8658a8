"""The native MoE layer: gate, dispatcher and experts in a row. Methods replace one or two of them."""

from __future__ import annotations

from torch import Tensor, nn

from moe.dispatch import AllToAllDispatcher
from moe.experts import GroupedExperts
from moe.gate import TopKGate
from moe.mesh import Mesh
from moe.system import ExpertView, LayerSpec, MoELayer, MoEOutput


class NativeMoE(MoELayer):
    """Expert parallelism from the suite's own parts.

    Args:
        spec: what to compute.
        mesh: where; E is spread over its expert-parallel group, contiguously.
        gate, dispatcher: replacements of the default parts.
    """

    def __init__(
        self, spec: LayerSpec, mesh: Mesh, gate: TopKGate | None = None, dispatcher: AllToAllDispatcher | None = None
    ) -> None:
        super().__init__(spec, mesh)
        self.gate = gate or TopKGate(spec, mesh.device)
        self.dispatcher = dispatcher or AllToAllDispatcher(mesh, spec.num_experts)
        self.experts = GroupedExperts(spec, mesh.local_experts(spec.num_experts), mesh.device)

    def forward(self, x_TM: Tensor) -> MoEOutput:
        """Route this rank's tokens [T, M]."""
        routing = self.gate(x_TM)
        rows_RM, plan = self.dispatcher.dispatch(x_TM, routing)
        rows_RM = self.experts(rows_RM, plan.expert_rows)
        y_TM = self.dispatcher.combine(rows_RM, plan, routing.weights_TK)
        dropped = routing.counts_E.sum() - sum(plan.send_rows)
        return MoEOutput(y_TM, routing.aux_loss, routing.counts_E, dropped, routing.expert_ids_TK)

    @property
    def gate_weight(self) -> nn.Parameter:
        """[E, M]."""
        return self.gate.weight

    def expert_views(self) -> list[ExpertView]:
        """Views into the grouped weights."""
        return self.experts.views()

    def stage_modules(self) -> tuple[nn.Module, ...]:
        """Gate and grouped experts."""
        return self.gate, self.experts
