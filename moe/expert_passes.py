"""The experts' forward and backward on one chunk of rows, for layers whose backward is written by hand.

The same arithmetic as `moe.experts.GroupedExperts`: grouped products on a GPU in bf16, else one expert after the other.

Dimensions: R rows, M model, H hidden, L experts of this rank; W = H, or 2 H with SwiGLU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe import ops
from moe.experts import GROUPED_DTYPE, outer_per_expert, per_expert
from moe.system import Activation


class ExpertRows(NamedTuple):
    """Rows of each expert.

    Attributes:
        rows: of each of L experts, zeros allowed.
        ends_L: [L] int32 on the rows' device, the row behind each expert's last.
    """

    rows: list[int]
    ends_L: Tensor


class Gradients(NamedTuple):
    """What the backward gives.

    Attributes:
        rows_RM: [R, M], of the rows.
        w_in, w_out: [L, W, M] and [L, M, H], in the dtype of the rows; None where there is no row.
    """

    rows_RM: Tensor
    w_in: Tensor | None
    w_out: Tensor | None


def experts_forward(
    rows_RM: Tensor, w_in: Tensor, w_out: Tensor, expert_rows: ExpertRows, activation: Activation
) -> tuple[Tensor, Tensor]:
    """Run each expert on its rows; not differentiable.

    Args:
        rows_RM: [R, M], sorted by expert.
        w_in, w_out: [L, W, M] and [L, M, H], in the rows' dtype.
        expert_rows: of each expert; they sum to R.
        activation: which.

    Returns:
        outputs [R, M], and what goes into the activation, [R, W], for the backward.
    """
    if not len(rows_RM):
        return rows_RM, rows_RM.new_empty(0, w_in.shape[1])
    if _grouped(rows_RM):
        hidden = F.grouped_mm(rows_RM, w_in.mT, offs=expert_rows.ends_L)
        active = ops.kernels().activate(hidden, expert_rows.ends_L, activation == "swiglu")
        return F.grouped_mm(active, w_out.mT, offs=expert_rows.ends_L), hidden
    hidden = per_expert(rows_RM, w_in, expert_rows.rows)
    return per_expert(_activated(hidden, activation), w_out, expert_rows.rows), hidden


def experts_backward(
    grad_RM: Tensor,
    rows_RM: Tensor,
    hidden: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    expert_rows: ExpertRows,
    activation: Activation,
) -> Gradients:
    """Gradients from those of the outputs; overwrites `hidden`.

    Args:
        grad_RM: [R, M], of the outputs.
        rows_RM, w_in, w_out, expert_rows, activation: what the forward was given, or such rows of it.
        hidden: [R, W], what it returned for them.
    """
    if not len(grad_RM):
        return Gradients(grad_RM, None, None)
    if _grouped(grad_RM):
        ends_L = expert_rows.ends_L
        active = F.grouped_mm(grad_RM, w_out, offs=ends_L)
        ops.kernels().activate_backward_(hidden, active, ends_L, activation == "swiglu")
        grad_out = F.grouped_mm(grad_RM.t(), active, offs=ends_L)
        del active
        grad_in = F.grouped_mm(hidden.t(), rows_RM, offs=ends_L)
        return Gradients(F.grouped_mm(hidden, w_in, offs=ends_L), grad_in, grad_out)
    grad_out = outer_per_expert(grad_RM, _activated(hidden, activation), expert_rows.rows)
    grad_hidden = _activation_gradient(per_expert(grad_RM, w_out.mT, expert_rows.rows), hidden, activation)
    grad_in = outer_per_expert(grad_hidden, rows_RM, expert_rows.rows)
    return Gradients(per_expert(grad_hidden, w_in.mT, expert_rows.rows), grad_in, grad_out)


def _grouped(rows_RM: Tensor) -> bool:
    return ops.is_fast(rows_RM) and rows_RM.dtype == GROUPED_DTYPE


def _activated(hidden: Tensor, activation: Activation) -> Tensor:
    if activation == "gelu":
        return F.gelu(hidden)
    left, right = hidden.chunk(2, -1)
    return F.silu(left) * right


def _activation_gradient(grad: Tensor, hidden: Tensor, activation: Activation) -> Tensor:
    """Of what goes into the activation, [R, W], from that of what comes out, [R, H]."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad, hidden)
    left, right = hidden.chunk(2, -1)
    return torch.cat([torch.ops.aten.silu_backward(grad * right, left), grad * F.silu(left)], dim=-1)
