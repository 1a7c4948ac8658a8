"""Token dispatch with capacities that are known beforehand: nothing is exchanged but rows, padded to the capacities.

What DeepSpeed-MoE does with one capacity for all; here every pair of a source rank and an expert may have its own.

Dimensions: T tokens of this rank, K choices, M model, P ranks of the group, E experts, L experts a rank, S copies kept,
C slots this rank sends, R slots it receives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe import ops
from moe.collectives import all_to_all_v
from moe.dispatch import Dispatcher, expand, permute, weighted_sum
from moe.gate import Routing
from moe.mesh import Mesh


class _Spread(torch.autograd.Function):
    """Rows [S, M] to the slots that they take among [C, M] zeros; backward every row finds its slot's gradient."""

    @staticmethod
    def forward(ctx: Any, rows_SM: Tensor, slots_S: Tensor, num_slots: int) -> Tensor:
        ctx.save_for_backward(slots_S)
        return rows_SM.new_zeros(num_slots, rows_SM.shape[1]).index_copy_(0, slots_S, rows_SM)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slots_S,) = ctx.saved_tensors
        return ops.gather_rows(grads[0].contiguous(), slots_S), None, None


class _Collect(torch.autograd.Function):
    """Slots [C, M] to the rows [S, M] that are filled; the backward leaves zeros in the others."""

    @staticmethod
    def forward(ctx: Any, slots_CM: Tensor, slots_S: Tensor) -> Tensor:
        ctx.save_for_backward(slots_S)
        ctx.num_slots = len(slots_CM)
        return ops.gather_rows(slots_CM.contiguous(), slots_S)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (slots_S,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.num_slots, grads[0].shape[1]).index_copy_(0, slots_S, grads[0]), None


def spread(rows_SM: Tensor, slots_S: Tensor, num_slots: int) -> Tensor:
    """Rows [S, M] to their slots among [C, M] zeros; differentiable.

    Args:
        rows_SM: [S, M].
        slots_S: [S] int64, each slot once at most.
        num_slots: C.
    """
    return _Spread.apply(rows_SM, slots_S, num_slots)


def collect(slots_CM: Tensor, slots_S: Tensor) -> Tensor:
    """Slots [C, M] to the filled rows [S, M], the mirror of `spread`; differentiable."""
    return _Collect.apply(slots_CM, slots_S)


@dataclass(frozen=True)
class Layout:
    """What the capacities alone determine.

    Attributes:
        send_slots, receive_slots: slots to and from each rank.
        first_slot_E: [E] int64, where an expert's slots begin among those sent.
        expert_order, expert_inverse: [R] int64, arrival order -> expert-major order and back.
        expert_rows: slots of each of this rank's experts.
        expert_ends: [L] int32, the row behind each expert's last.
    """

    send_slots: list[int]
    receive_slots: list[int]
    first_slot_E: Tensor
    expert_order: Tensor
    expert_inverse: Tensor
    expert_rows: list[int]
    expert_ends: Tensor


@dataclass(frozen=True)
class StaticPlan:
    """Where the copies of one layer call travel.

    Attributes:
        layout: as above.
        order: [S] int64, kept copy, sorted by expert -> flat copy t * K + k.
        inverse_TK: [T, K] int64, its inverse; S where the copy is dropped.
        slots_S: [S] int64, the slot of each kept copy.
        row_weights: None: `combine` applies the weights.
    """

    layout: Layout
    order: Tensor
    inverse_TK: Tensor
    slots_S: Tensor
    row_weights: None = None

    @property
    def expert_rows(self) -> list[int]:
        """As `DispatchPlan`."""
        return self.layout.expert_rows

    @property
    def expert_ends(self) -> Tensor:
        """As `DispatchPlan`."""
        return self.layout.expert_ends


class StaticDispatcher(Dispatcher):
    """Dispatch and combine in slots. Every rank must have as many tokens.

    Args:
        mesh: its expert-parallel group is used.
        num_experts: E, over the group.
        capacities: from T to the slots [P, E] that each rank has for each expert; the same on all ranks. The gate must
            keep no more copies of this rank than its row says.
    """

    path = "all-to-all-v of static capacities"

    def __init__(self, mesh: Mesh, num_experts: int, capacities: Callable[[int], Tensor]) -> None:
        self.mesh, self.num_experts, self.capacities = mesh, num_experts, capacities
        self._layouts: dict[int, Layout] = {}

    def dispatch(self, x_TM: Tensor, routing: Routing) -> tuple[Tensor, StaticPlan]:
        """As `Dispatcher.dispatch`."""
        plan = self._plan(routing)
        copies_SM = expand(x_TM, plan.order, plan.inverse_TK)
        slots_CM = spread(copies_SM, plan.slots_S, sum(plan.layout.send_slots))
        layout = plan.layout
        rows_RM = all_to_all_v(slots_CM, layout.receive_slots, layout.send_slots, self.mesh.ep_group)
        return permute(rows_RM, layout.expert_order, layout.expert_inverse), plan

    def combine(self, rows_RM: Tensor, plan: StaticPlan, weights_TK: Tensor) -> Tensor:
        """As `Dispatcher.combine`."""
        layout = plan.layout
        rows_RM = permute(rows_RM, layout.expert_inverse, layout.expert_order)
        slots_CM = all_to_all_v(rows_RM, layout.send_slots, layout.receive_slots, self.mesh.ep_group)
        return weighted_sum(collect(slots_CM, plan.slots_S), weights_TK, plan.order, plan.inverse_TK)

    def _plan(self, routing: Routing) -> StaticPlan:
        ids_TK, num_experts = routing.expert_ids_TK, self.num_experts
        layout = self._layout(len(ids_TK))
        chosen = ids_TK.flatten()
        if routing.kept_TK is not None:
            chosen = torch.where(routing.kept_TK.flatten(), chosen, num_experts)
        counts_E = ops.count_choices(chosen, num_experts + 1)[:num_experts]
        order, inverse = ops.sort_by_expert(chosen, num_experts, int(counts_E.sum()))
        shift_E = layout.first_slot_E - (counts_E.cumsum(0) - counts_E)
        slots_S = torch.arange(len(order), device=chosen.device) + shift_E[chosen[order]]
        return StaticPlan(layout, order, inverse.view_as(ids_TK), slots_S)

    def _layout(self, num_tokens: int) -> Layout:
        if num_tokens not in self._layouts:
            self._layouts[num_tokens] = self._laid_out(self.capacities(num_tokens))
        return self._layouts[num_tokens]

    def _laid_out(self, capacities_PE: Tensor) -> Layout:
        mesh, device = self.mesh, self.mesh.device
        capacities_PE = capacities_PE.to(device="cpu", dtype=torch.int64)
        mine_E = capacities_PE[mesh.ep_rank]
        experts = mesh.local_experts(self.num_experts)
        arriving_PL = capacities_PE[:, experts.start : experts.stop]
        local_expert = torch.arange(len(experts)).repeat(mesh.ep_size).repeat_interleave(arriving_PL.flatten())
        expert_order = torch.argsort(local_expert, stable=True)
        rows_L = arriving_PL.sum(0)
        return Layout(
            mine_E.view(mesh.ep_size, -1).sum(1).tolist(),
            arriving_PL.sum(1).tolist(),
            (mine_E.cumsum(0) - mine_E).to(device),
            expert_order.to(device),
            ops.inverse_of(expert_order, len(expert_order)).to(device),
            rows_L.tolist(),
            rows_L.cumsum(0).to(device=device, dtype=torch.int32),
        )
