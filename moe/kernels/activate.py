"""Activations of the experts and their gradients. Dimensions: R rows, H hidden, L experts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.launch import launch


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _activate(
    hidden,
    weights,
    ends,
    out,
    H: tl.constexpr,
    L: tl.constexpr,
    SWIGLU: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (column < H) & (row < tl.load(ends + L - 1))
    if SWIGLU:
        a = tl.load(hidden + row * (2 * H) + column, mask=inside).to(tl.float32)
        b = tl.load(hidden + row * (2 * H) + H + column, mask=inside).to(tl.float32)
        value = a * tl.sigmoid(a) * b
    else:
        value = _gelu(tl.load(hidden + row * H + column, mask=inside).to(tl.float32))
    if WEIGHTED:
        value *= tl.load(weights + row)
    tl.store(out + row * H + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _activate_backward(
    hidden,
    weights,
    ends,
    grad,
    grad_weights,
    H: tl.constexpr,
    L: tl.constexpr,
    SWIGLU: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    is_real = row < tl.load(ends + L - 1)
    kind = grad.dtype.element_ty
    along = tl.zeros([BLOCK], tl.float32)
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(weights + row)
    for start in range(0, H, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (column < H) & is_real
        g = tl.load(grad + row * H + column, mask=inside, other=0.0).to(tl.float32)
        if SWIGLU:
            left = hidden + row * (2 * H) + column
            a = tl.load(left, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(left + H, mask=inside, other=0.0).to(tl.float32)
            s = tl.sigmoid(a)
            value = a * s * b
            tl.store(left, (weight * g * b * s * (1.0 + a * (1.0 - s))).to(kind), mask=inside)
            tl.store(left + H, (weight * g * a * s).to(kind), mask=inside)
        else:
            x = tl.load(hidden + row * H + column, mask=inside, other=0.0).to(tl.float32)
            cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
            density = tl.exp(-0.5 * x * x) * 0.3989422804014327
            value = x * cdf
            tl.store(hidden + row * H + column, (weight * g * (cdf + x * density)).to(kind), mask=inside)
        along += g * value
        tl.store(grad + row * H + column, (weight * value).to(kind), mask=inside)
    if WEIGHTED:
        tl.store(grad_weights + row, tl.sum(along, axis=0), mask=is_real)


def _block(width: int) -> int:
    return min(2048, triton.next_power_of_2(width))


def activate(hidden: Tensor, ends_L: Tensor, swiglu: bool, row_weights_R: Tensor | None = None) -> Tensor:
    """gelu(h), or silu(a) * b of h = [a, b], times the row's weight.

    Args:
        hidden: [R, H], or [R, 2 H] with `swiglu`.
        ends_L: [L] int32, the row behind each expert's last; rows from the last of them on are left out.
        swiglu: which.
        row_weights_R: [R] float32, or None for ones.

    Returns:
        [R, H].
    """
    width = hidden.shape[1] // 2 if swiglu else hidden.shape[1]
    out = hidden.new_empty(len(hidden), width)
    if out.numel():
        block, weighted = _block(width), row_weights_R is not None
        grid = (len(hidden), triton.cdiv(width, block))
        weights = hidden if row_weights_R is None else row_weights_R
        launch(_activate, grid, (hidden, weights, ends_L, out), (), (width, len(ends_L), swiglu, weighted, block))
    return out


def activate_backward_(
    hidden: Tensor, grad: Tensor, ends_L: Tensor, swiglu: bool, row_weights_R: Tensor | None = None
) -> Tensor | None:
    """In place: `hidden` becomes its gradient, and `grad`, the gradient of what `activate` returned, becomes that.

    Args:
        hidden, ends_L, swiglu, row_weights_R: what `activate` was given.
        grad: [R, H].

    Returns:
        the gradient of the row weights, [R] float32; None where there are none.
    """
    weighted = row_weights_R is not None
    grad_weights = None if row_weights_R is None else torch.empty_like(row_weights_R)
    if grad.numel():
        width = grad.shape[1]
        weights, found = (
            (hidden if row_weights_R is None else row_weights_R),
            (grad if grad_weights is None else grad_weights),
        )
        constants = (width, len(ends_L), swiglu, weighted, _block(width))
        launch(_activate_backward, (len(grad),), (hidden, weights, ends_L, grad, found), (), constants)
    return grad_weights
