"""Token dispatch of plain expert parallelism: counts are exchanged, then exactly the rows that were routed.

Dimensions: T tokens of this rank, K choices, M model, P ranks of the expert-parallel group, L experts a rank,
S copies this rank sends, R copies it receives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe import ops
from moe.chunks import exchange_counts
from moe.collectives import all_to_all_v
from moe.gate import Routing
from moe.mesh import Mesh


class _Permute(torch.autograd.Function):
    """rows[order], where every row occurs once; the backward is the inverse permutation, not a scatter-add."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return ops.gather_rows(rows, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return ops.gather_rows(grads[0].contiguous(), inverse), None, None


class _Expand(torch.autograd.Function):
    """Token rows [T, M] to copies [S, M] in send order; the backward sums a token's kept gradients in choice order."""

    @staticmethod
    def forward(ctx: Any, x_TM: Tensor, order: Tensor, inverse_TK: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_TK)
        return ops.gather_rows(x_TM.contiguous(), order, inverse_TK.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse_TK,) = ctx.saved_tensors
        return ops.sum_copies(grads[0].contiguous(), inverse_TK), None, None


class _WeightedSum(torch.autograd.Function):
    """Copies [S, M] in send order and weights [T, K] to tokens [T, M]; a dropped copy adds nothing."""

    @staticmethod
    def forward(ctx: Any, copies_SM: Tensor, weights_TK: Tensor, order: Tensor, inverse_TK: Tensor) -> Tensor:
        ctx.save_for_backward(copies_SM, weights_TK, order, inverse_TK)
        return ops.sum_copies(copies_SM, inverse_TK, weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        copies_SM, weights_TK, order, inverse_TK = ctx.saved_tensors
        grad_TM = grads[0].contiguous()
        return *ops.weighted_sum_backward(grad_TM, copies_SM, order, inverse_TK, weights_TK), None, None


def permute(rows: Tensor, order: Tensor | None, inverse: Tensor | None) -> Tensor:
    """rows[order], differentiable. `order` holds every row once, `inverse` is its inverse; [R] int64, or None for the
    order that they have."""
    return rows if order is None else _Permute.apply(rows, order, inverse)


def expand(x_TM: Tensor, order: Tensor, inverse_TK: Tensor) -> Tensor:
    """Tokens [T, M] to their kept copies [S, M], differentiable.

    Args:
        x_TM: tokens.
        order: [S] int64, place of a copy -> flat copy t * K + k.
        inverse_TK: [T, K] int64, its inverse; S where the copy is dropped.
    """
    return _Expand.apply(x_TM, order, inverse_TK)


def weighted_sum(copies_SM: Tensor, weights_TK: Tensor, order: Tensor, inverse_TK: Tensor) -> Tensor:
    """Copies [S, M] to the weighted sum of each token's, [T, M]; differentiable, with the arguments of `expand`."""
    return _WeightedSum.apply(copies_SM, weights_TK.contiguous(), order, inverse_TK)


@dataclass(frozen=True)
class DispatchPlan:
    """Where the copies of one layer call travel.

    Attributes:
        order: [S] int64, send position -> flat copy t * K + k, sorted by expert.
        inverse_TK: [T, K] int64, its inverse; S where the copy is dropped.
        send_rows, receive_rows: copies to and from each rank of the group.
        expert_order, expert_inverse: [R] int64, arrival order -> expert-major order and back; None when they agree.
        expert_rows: copies for each of this rank's L experts.
        expert_ends: [L] int32, the row behind each expert's last.
        row_weights: None: `combine` applies the weights.
    """

    order: Tensor
    inverse_TK: Tensor
    send_rows: list[int]
    receive_rows: list[int]
    expert_order: Tensor | None
    expert_inverse: Tensor | None
    expert_rows: list[int]
    expert_ends: Tensor
    row_weights: None = None


class Dispatcher(ABC):
    """Brings tokens to their experts and the experts' rows back; what a method replaces to send them another way.

    Its plan, made by `dispatch` for `combine`, tells the experts their rows: `expert_rows`, `expert_ends` and
    `row_weights` as in `DispatchPlan`.

    Attributes:
        path: for `MoELayer.path`.
    """

    path: str = "own dispatcher"

    @abstractmethod
    def dispatch(self, x_TM: Tensor, routing: Routing) -> tuple[Tensor, Any]:
        """Send every kept copy to its expert's rank. Collective.

        Args:
            x_TM: [T, M] tokens.
            routing: of these tokens.

        Returns:
            rows [R, M] sorted by local expert, and the plan that the experts and `combine` need.
        """

    @abstractmethod
    def combine(self, rows_RM: Tensor, plan: Any, weights_TK: Tensor) -> Tensor:
        """Send the experts' rows back and sum each token's K of them, weighted. Collective.

        Args:
            rows_RM: [R, M], in the order that `dispatch` gave, multiplied by the plan's `row_weights` if it has any.
            plan: what `dispatch` gave.
            weights_TK: [T, K], for plans without `row_weights`.

        Returns:
            [T, M], in the dtype of the rows.
        """

    @property
    def workspace_bytes(self) -> int:
        """As `MoELayer.workspace_bytes`."""
        return 0


class AllToAllDispatcher(Dispatcher):
    """Dispatch and combine by all-to-all-v, what Megatron-LM's `alltoall` token dispatcher does.

    Args:
        mesh: its expert-parallel group is used.
        num_experts: E, over the group.
    """

    path = "all-to-all-v"

    def __init__(self, mesh: Mesh, num_experts: int) -> None:
        self.group = mesh.ep_group
        self.num_experts = num_experts

    def plan(self, routing: Routing) -> DispatchPlan:
        """Exchange the counts and lay out the copies. Collective; waits for the counts on the host."""
        queues = exchange_counts(routing, self.num_experts, self.group)
        whole = queues.chunks(1)
        (rows,), (expert_order, expert_inverse) = whole.rows, whole.orders or (None, None)
        return DispatchPlan(
            queues.order,
            queues.inverse_TK,
            rows.send,
            rows.receive,
            expert_order,
            expert_inverse,
            rows.experts,
            whole.expert_ends[0],
        )

    def dispatch(self, x_TM: Tensor, routing: Routing) -> tuple[Tensor, DispatchPlan]:
        """As `Dispatcher.dispatch`."""
        plan = self.plan(routing)
        copies_SM = expand(x_TM, plan.order, plan.inverse_TK)
        rows_RM = all_to_all_v(copies_SM, plan.receive_rows, plan.send_rows, self.group)
        return permute(rows_RM, plan.expert_order, plan.expert_inverse), plan

    def combine(self, rows_RM: Tensor, plan: DispatchPlan, weights_TK: Tensor) -> Tensor:
        """As `Dispatcher.combine`."""
        rows_RM = permute(rows_RM, plan.expert_inverse, plan.expert_order)
        copies_SM = all_to_all_v(rows_RM, plan.send_rows, plan.receive_rows, self.group)
        return weighted_sum(copies_SM, weights_TK, plan.order, plan.inverse_TK)
