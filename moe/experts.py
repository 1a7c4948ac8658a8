"""The experts' feed-forward networks: one module for upstream packages, one grouped module for the native layer.

Dimensions: R rows, M model, H hidden, L experts of this rank. No biases (Mixtral, Qwen3, DeepSeek have none). SwiGLU's
two inner matrices lie in one, w1 above w3, so that the rows are read once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe import ops
from moe.system import Activation, ExpertView, LayerSpec

# The operator by which torch.compile reaches oneDNN's fp32 product; torch.mm takes MKL's where there is one.
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

GROUPED_DTYPE = torch.bfloat16
"""Of the rows that `grouped_mm` takes on a GPU, those of all experts at once."""


def _matrices(spec: LayerSpec, *lead: int, device: torch.device) -> tuple[nn.Parameter, nn.Parameter]:
    """Uninitialised w_in [.., H or 2 H, M] and w_out [.., M, H], float32."""
    width = 2 * spec.hidden_dim if spec.activation == "swiglu" else spec.hidden_dim
    w_in = nn.Parameter(torch.empty(*lead, width, spec.model_dim, device=device))
    return w_in, nn.Parameter(torch.empty(*lead, spec.model_dim, spec.hidden_dim, device=device))


def canonical_views(expert: int, slot: int | None, w_in: nn.Parameter, w_out: nn.Parameter) -> list[ExpertView]:
    """Canonical views of the expert at `slot` of such parameters; None where they hold one expert."""
    hidden_dim = w_out.shape[-1]
    views = [ExpertView(expert, "w1", w_in, partial(_canonical, slot, 0, hidden_dim))]
    views += [ExpertView(expert, "w2", w_out, partial(_canonical, slot, 0, w_out.shape[-2]))]
    if w_in.shape[-2] > hidden_dim:
        views += [ExpertView(expert, "w3", w_in, partial(_canonical, slot, hidden_dim, 2 * hidden_dim))]
    return views


def _canonical(slot: int | None, first: int, last: int, tensor: Tensor) -> Tensor:
    return (tensor if slot is None else tensor[slot])[first:last].t()


def products_are_grouped(rows: Tensor) -> bool:
    """Whether `GroupedExperts` multiplies such rows of all experts at once, which goes by `expert_ends` alone."""
    return ops.is_fast(rows) and rows.dtype == GROUPED_DTYPE


def product_path(weight: Tensor, dtype: torch.dtype) -> str:
    """How `GroupedExperts` multiplies rows of a dtype here. Older GPUs than compute capability 9.0 have no kernel for
    `grouped_mm`: torch loops over the experts inside it."""
    if not (ops.is_fast(weight) and dtype == GROUPED_DTYPE):
        return "expert by expert"
    major, minor = torch.cuda.get_device_capability(weight.device)
    return f"grouped_mm on sm_{major}{minor}{'' if major >= 9 else ', a loop there'}"


class ExpertFFN(nn.Module):
    """One expert, as upstream packages take it: maps [..., M] to [..., M] in the dtype of its input.

    Args:
        spec: of the layer.
        device: of the weights, float32 [H, M] (SwiGLU: [2 H, M]) and [M, H] as in `nn.Linear`.
    """

    def __init__(self, spec: LayerSpec, device: torch.device) -> None:
        super().__init__()
        self.activation = spec.activation
        self.w_in, self.w_out = _matrices(spec, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., M] -> [..., M]."""
        return feed_forward(x, self.w_in.to(x.dtype), self.w_out.to(x.dtype), self.activation, F.linear)

    def views(self, expert: int) -> list[ExpertView]:
        """Canonical views of this module's matrices, as global expert `expert`."""
        return canonical_views(expert, None, self.w_in, self.w_out)


class GroupedExperts(nn.Module):
    """All experts of a rank: grouped matrix products on a GPU in bf16, else one expert after the other.

    Args:
        spec: of the layer.
        experts: global ids of this rank's experts.
        device: of the weights: w_in [L, H, M] (SwiGLU: [L, 2 H, M]) and w_out [L, M, H], float32.
    """

    def __init__(self, spec: LayerSpec, experts: Sequence[int], device: torch.device) -> None:
        super().__init__()
        self.activation = spec.activation
        self.experts = experts
        self.w_in, self.w_out = _matrices(spec, len(experts), device=device)

    def forward(
        self,
        rows_RM: Tensor,
        expert_rows: list[int] | None,
        expert_ends: Tensor | None = None,
        row_weights_R: Tensor | None = None,
    ) -> Tensor:
        """Run each expert on its rows.

        Args:
            rows_RM: [R, M], sorted by local expert.
            expert_rows: rows of each expert; zeros allowed; they sum to R. None where the host does not know them,
                which `products_are_grouped` must hold for; there may be more rows then, of no expert and with any
                result.
            expert_ends: [L] int32 on the rows' device, the row behind each expert's last, where it is known already.
            row_weights_R: [R] float32, differentiable: what each output row is multiplied by; None for ones.

        Returns:
            [R, M], same order and dtype.
        """
        w_in, w_out = self.w_in.to(rows_RM.dtype), self.w_out.to(rows_RM.dtype)
        if products_are_grouped(rows_RM) and len(rows_RM):
            if expert_ends is None:
                expert_ends = torch.tensor(expert_rows, device=rows_RM.device).cumsum(0, dtype=torch.int32)
            return _GroupedFFN.apply(rows_RM, w_in, w_out, row_weights_R, expert_ends, self.activation == "swiglu")
        assert expert_rows is not None, "expert by expert, the host has to know their rows"
        y_RM = feed_forward(
            rows_RM, w_in, w_out, self.activation, lambda rows, weight: _GroupedLinear.apply(rows, weight, expert_rows)
        )
        return y_RM if row_weights_R is None else y_RM * row_weights_R.unsqueeze(1).to(y_RM.dtype)

    def views(self) -> list[ExpertView]:
        """Canonical views, one per expert and matrix."""
        return [
            view
            for slot, expert in enumerate(self.experts)
            for view in canonical_views(expert, slot, self.w_in, self.w_out)
        ]


class CopiedExperts(GroupedExperts):
    """Experts whose weights, in the dtype of the arithmetic, are copies of what is trained elsewhere: no parameters of
    the module.

    Args:
        spec, experts, device: as of `GroupedExperts`.
    """

    def __init__(self, spec: LayerSpec, experts: Sequence[int], device: torch.device) -> None:
        super().__init__(spec, experts, torch.device("meta"))
        for name, shape in [("w_in", self.w_in.shape), ("w_out", self.w_out.shape)]:
            delattr(self, name)
            weight = nn.Parameter(torch.empty(shape, dtype=spec.dtype, device=device))
            object.__setattr__(self, name, weight)  # nn.Module's own would make it a parameter of the module

    def drop_gradients(self) -> None:
        """Forget the gradients of the copies."""
        self.w_in.grad = self.w_out.grad = None


class _GroupedFFN(torch.autograd.Function):
    """All experts' networks on a GPU. Keeps the rows and the hidden values; the activation is computed anew backward,
    in the pass that computes its gradient, which overwrites what was kept.

    A row's weight multiplies its activation, so that the gradient of the weight is a product of what is there anyway:
    w_out^T g and the activation (as in SonicMoE, Guo et al. 2025), and the outputs need not be kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows_RM: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        row_weights_R: Tensor | None,
        ends_L: Tensor,
        swiglu: bool,
    ) -> Tensor:
        hidden = F.grouped_mm(rows_RM, w_in.mT, offs=ends_L)
        ctx.save_for_backward(w_in, w_out, row_weights_R, ends_L)
        ctx.kept, ctx.swiglu = (rows_RM, hidden), swiglu  # not saved tensors: these can't be let go one by one
        return F.grouped_mm(ops.kernels().activate(hidden, ends_L, swiglu, row_weights_R), w_out.mT, offs=ends_L)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None, None]:
        if ctx.kept is None:
            raise RuntimeError("a second backward through the same forward: its hidden values were overwritten")
        (rows_RM, hidden), ctx.kept = ctx.kept, None
        w_in, w_out, row_weights_R, ends_L = ctx.saved_tensors
        grad_RM = grads[0].contiguous()
        activation = F.grouped_mm(grad_RM, w_out, offs=ends_L)
        grad_weights_R = ops.kernels().activate_backward_(hidden, activation, ends_L, ctx.swiglu, row_weights_R)
        grad_out = F.grouped_mm(grad_RM.t(), activation, offs=ends_L)
        del activation
        grad_in = F.grouped_mm(hidden.t(), rows_RM, offs=ends_L)
        del rows_RM
        return F.grouped_mm(hidden, w_in, offs=ends_L), grad_in, grad_out, grad_weights_R, None, None


class _GroupedLinear(torch.autograd.Function):
    """Rows [R, A] sorted by expert and weights [L, B, A] to [R, B], one expert after the other."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, expert_rows: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.expert_rows = expert_rows
        return per_expert(rows, weight, expert_rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight = ctx.saved_tensors
        grad_weight = outer_per_expert(grads[0], rows, ctx.expert_rows)
        return per_expert(grads[0], weight.mT, ctx.expert_rows), grad_weight, None


def per_expert(rows: Tensor, weight: Tensor, expert_rows: list[int]) -> Tensor:
    """Rows [R, A], sorted by expert, and weights [L, B, A] to [R, B], one expert after the other."""
    product = rows.new_empty(len(rows), weight.shape[1])
    for part, matrix, out in zip(rows.split(expert_rows), weight.unbind(), product.split(expert_rows), strict=True):
        out.copy_(_linear(part, matrix))
    return product


def outer_per_expert(grads: Tensor, rows: Tensor, expert_rows: list[int]) -> Tensor:
    """Gradients [R, B] and rows [R, A], sorted by expert, to the gradients of the weights [L, B, A]."""
    product = rows.new_empty(len(expert_rows), grads.shape[1], rows.shape[1])
    for grad, part, out in zip(grads.split(expert_rows), rows.split(expert_rows), product.unbind(), strict=True):
        torch.mm(grad.t(), part, out=out)
    return product


def _linear(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [R, A] times the transpose of weight [B, A]; on a CPU in fp32 by oneDNN, faster on AMD than MKL."""
    if ONEDNN and not rows.is_cuda and rows.dtype == torch.float32 and len(rows):
        return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
    return F.linear(rows, weight)


def feed_forward(
    rows: Tensor, w_in: Tensor, w_out: Tensor, activation: Activation, multiply: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """w_out gelu(w_in rows), or w_out (silu(w1 rows) * (w3 rows)) for `swiglu`, with w_in = [w1, w3].

    Args:
        rows: [..., M].
        w_in, w_out: in the layout that `multiply` takes.
        activation: which.
        multiply: rows [..., A] and a weight to [..., B].

    Returns:
        [..., M].
    """
    hidden = multiply(rows, w_in)
    if activation == "gelu":
        return multiply(F.gelu(hidden), w_out)
    left, right = hidden.chunk(2, -1)
    return multiply(F.silu(left) * right, w_out)
