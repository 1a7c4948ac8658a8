"""Sums of whole tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe import ops
from moe.kernels.launch import launch

_BLOCK = 2048


@triton.jit(do_not_specialize=["size"])
def _sum_terms(out, first, second, third, fourth, size, NUM: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    total = tl.load(first + place, mask=inside).to(tl.float32)
    total += tl.load(second + place, mask=inside).to(tl.float32)
    if NUM > 2:
        total += tl.load(third + place, mask=inside).to(tl.float32)
    if NUM > 3:
        total += tl.load(fourth + place, mask=inside).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


def sum_terms(terms: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """As `moe.ops.sum_terms`, of at least 2."""
    out = torch.empty_like(terms[0], dtype=dtype)
    if out.numel():
        padded = (*terms, *[terms[0]] * (ops.MOST_TERMS - len(terms)))
        grid = (triton.cdiv(out.numel(), _BLOCK),)
        launch(_sum_terms, grid, (out, *padded), (out.numel(),), (len(terms), _BLOCK), num_warps=8)
    return out
