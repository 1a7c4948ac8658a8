"""Moving rows: gathers, and sums of a token's copies. Dimensions: T tokens, K choices, S copies, M model."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.launch import launch


def _warps(block: int) -> int:
    """Warps of a program that holds a row of `block` elements: 16 elements a thread, more beyond 8192."""
    return max(1, min(16, block // 512))


@triton.jit
def _gather_rows(rows, index, out, DIVISOR: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr):
    target = tl.program_id(0).to(tl.int64)
    source = tl.load(index + target) // DIVISOR
    columns = tl.arange(0, BLOCK)
    inside = columns < M
    tl.store(out + target * M + columns, tl.load(rows + source * M + columns, mask=inside), mask=inside)


def gather_rows(rows: Tensor, index: Tensor, divisor: int = 1) -> Tensor:
    """As `moe.ops.gather_rows`."""
    out = rows.new_empty(len(index), rows.shape[1])
    if len(index):
        block = triton.next_power_of_2(rows.shape[1])
        constants = (divisor, rows.shape[1], block)
        launch(_gather_rows, (len(index),), (rows, index, out), (), constants, num_warps=_warps(block))
    return out


@triton.jit(do_not_specialize=["num_copies"])
def _sum_copies(
    copies,
    inverse,
    weights,
    out,
    num_copies,
    K: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < M
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        source = tl.load(inverse + token * K + k)
        row = tl.load(copies + source * M + columns, mask=inside & (source < num_copies), other=0.0).to(tl.float32)
        if WEIGHTED:
            row *= tl.load(weights + token * K + k).to(tl.float32)
        total += row
    tl.store(out + token * M + columns, total.to(out.dtype.element_ty), mask=inside)


def sum_copies(copies_SM: Tensor, inverse_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """As `moe.ops.sum_copies`, summed in float32."""
    num_tokens, top_k = inverse_TK.shape
    model_dim = copies_SM.shape[1]
    out = copies_SM.new_empty(num_tokens, model_dim)
    block = triton.next_power_of_2(model_dim)
    weights = copies_SM if weights_TK is None else weights_TK
    if num_tokens:
        launch(
            _sum_copies,
            (num_tokens,),
            (copies_SM, inverse_TK, weights, out),
            (len(copies_SM),),
            (top_k, model_dim, block, weights_TK is not None),
            num_warps=_warps(block),
        )
    return out


@triton.jit(do_not_specialize=["num_copies"])
def _weight_copies(
    grad,
    copies,
    inverse,
    weights,
    grad_copies,
    grad_weights,
    num_copies,
    K: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < M
    grad_row = tl.load(grad + token * M + columns, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(K):
        place = tl.load(inverse + token * K + k)
        kept = inside & (place < num_copies)
        copy = tl.load(copies + place * M + columns, mask=kept, other=0.0).to(tl.float32)
        weight = tl.load(weights + token * K + k).to(tl.float32)
        tl.store(grad_weights + token * K + k, tl.sum(grad_row * copy, axis=0))
        tl.store(grad_copies + place * M + columns, (grad_row * weight).to(grad_copies.dtype.element_ty), mask=kept)


def weighted_sum_backward(
    grad_TM: Tensor, copies_SM: Tensor, inverse_TK: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """As `moe.ops.weighted_sum_backward`, in one pass; the gradient of the weights is float32."""
    num_tokens, top_k = inverse_TK.shape
    model_dim = copies_SM.shape[1]
    grad_copies = torch.empty_like(copies_SM)
    grad_weights = torch.empty(num_tokens, top_k, device=grad_TM.device)
    block = triton.next_power_of_2(model_dim)
    if num_tokens:
        launch(
            _weight_copies,
            (num_tokens,),
            (grad_TM, copies_SM, inverse_TK, weights_TK, grad_copies, grad_weights),
            (len(copies_SM),),
            (top_k, model_dim, block),
            num_warps=_warps(block),
        )
    return grad_copies, grad_weights
