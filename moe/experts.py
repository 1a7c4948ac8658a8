"""The experts' feed-forward networks: one module for upstream packages, one grouped module for the native layer.

Dimensions: R rows, M model, H hidden, L experts of this rank. No biases (Mixtral, Qwen3, DeepSeek have none).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.system import Activation, ExpertView, LayerSpec

# The operator by which torch.compile reaches oneDNN's fp32 product; torch.mm takes MKL's where there is one.
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class ExpertFFN(nn.Module):
    """One expert, as upstream packages take it: maps [..., M] to [..., M] in the dtype of its input.

    Args:
        spec: of the layer.
        device: of the weights, float32 [H, M] or [M, H] as in `nn.Linear`.
    """

    def __init__(self, spec: LayerSpec, device: torch.device) -> None:
        super().__init__()
        self.activation = spec.activation
        for name, (rows, columns) in spec.expert_shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(columns, rows, device=device)))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., M] -> [..., M]."""
        weights = {name: weight.to(x.dtype) for name, weight in self.named_parameters()}
        return feed_forward(x, weights, self.activation, F.linear)

    def views(self, expert: int) -> list[ExpertView]:
        """Canonical views of this module's matrices, as global expert `expert`."""
        return [ExpertView(expert, name, parameter, Tensor.t) for name, parameter in self.named_parameters()]


class GroupedExperts(nn.Module):
    """All experts of a rank: grouped matrix products on a GPU in bf16, else one expert after the other.

    Args:
        spec: of the layer.
        experts: global ids of this rank's experts.
        device: of the weights: w1 (w3) [L, H, M] and w2 [L, M, H], float32.
    """

    def __init__(self, spec: LayerSpec, experts: range, device: torch.device) -> None:
        super().__init__()
        self.activation = spec.activation
        self.experts = experts
        for name, (rows, columns) in spec.expert_shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(len(experts), columns, rows, device=device)))

    def forward(self, rows_RM: Tensor, expert_rows: list[int]) -> Tensor:
        """Run each expert on its rows.

        Args:
            rows_RM: [R, M], sorted by local expert.
            expert_rows: rows of each expert; zeros allowed; they sum to R.

        Returns:
            [R, M], same order and dtype.
        """
        weights = {name: weight.to(rows_RM.dtype) for name, weight in self.named_parameters()}
        if rows_RM.is_cuda and rows_RM.dtype == torch.bfloat16 and len(rows_RM):
            ends = torch.tensor(expert_rows, device=rows_RM.device).cumsum(0).to(torch.int32)

            def grouped(rows: Tensor, weight: Tensor) -> Tensor:
                return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)

        else:

            def grouped(rows: Tensor, weight: Tensor) -> Tensor:
                return _GroupedLinear.apply(rows, weight, expert_rows)

        return feed_forward(rows_RM, weights, self.activation, grouped)

    def views(self) -> list[ExpertView]:
        """Canonical views, one per expert and matrix."""
        return [
            ExpertView(expert, name, parameter, partial(_canonical, slot))
            for slot, expert in enumerate(self.experts)
            for name, parameter in self.named_parameters()
        ]


class _GroupedLinear(torch.autograd.Function):
    """Rows [R, A] sorted by expert and weights [L, B, A] to [R, B], one expert after the other."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, expert_rows: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.expert_rows = expert_rows
        return _per_expert(rows, weight, expert_rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight = ctx.saved_tensors
        grad_weight = torch.empty_like(weight)
        for grad, part, out in zip(
            grads[0].split(ctx.expert_rows), rows.split(ctx.expert_rows), grad_weight.unbind(), strict=True
        ):
            torch.mm(grad.t(), part, out=out)
        return _per_expert(grads[0], weight.mT, ctx.expert_rows), grad_weight, None


def _per_expert(rows: Tensor, weight: Tensor, expert_rows: list[int]) -> Tensor:
    """Rows [R, A] and weights [L, B, A] to [R, B]."""
    product = rows.new_empty(len(rows), weight.shape[1])
    for part, matrix, out in zip(rows.split(expert_rows), weight.unbind(), product.split(expert_rows), strict=True):
        out.copy_(_linear(part, matrix))
    return product


def _linear(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [R, A] times the transpose of weight [B, A]; on a CPU in fp32 by oneDNN, faster on AMD than MKL."""
    if ONEDNN and not rows.is_cuda and rows.dtype == torch.float32 and len(rows):
        return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
    return F.linear(rows, weight)


def _canonical(slot: int, tensor: Tensor) -> Tensor:
    return tensor[slot].t()


def feed_forward(
    rows: Tensor, weights: dict[str, Tensor], activation: Activation, multiply: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """w2(gelu(w1 rows)), or w2(silu(w1 rows) * (w3 rows)) for `swiglu`.

    Args:
        rows: [..., M].
        weights: by name, in the layout that `multiply` takes.
        activation: which.
        multiply: rows [..., A] and a weight to [..., B].

    Returns:
        [..., M].
    """
    if activation == "gelu":
        return multiply(F.gelu(multiply(rows, weights["w1"])), weights["w2"])
    return multiply(F.silu(multiply(rows, weights["w1"])) * multiply(rows, weights["w3"]), weights["w2"])
