"""Sorting copies by expert, by counting. Dimensions: T tokens, K choices, S copies, E experts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _count_choices(chosen, counts, num_copies, E: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    block = tl.program_id(0)
    copy = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(chosen + copy, mask=copy < num_copies, other=E)
    ids = tl.arange(0, EXPERTS)
    mine = (expert[:, None] == ids[None, :]).to(tl.int32)
    tl.store(counts + block * E + ids, tl.sum(mine, axis=0), mask=ids < E)


@triton.jit
def _place_copies(
    chosen,
    starts,
    order,
    inverse,
    num_copies,
    num_kept,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    block = tl.program_id(0)
    copy = block * BLOCK + tl.arange(0, BLOCK)
    inside = copy < num_copies
    expert = tl.load(chosen + copy, mask=inside, other=E)
    ids = tl.arange(0, EXPERTS)
    mine = (expert[:, None] == ids[None, :]).to(tl.int32)
    before = tl.cumsum(mine, axis=0) - mine  # of the same expert, in this block, before this copy
    start = tl.load(starts + block * E + ids, mask=ids < E, other=0)
    place = tl.sum(mine * (before + start[None, :]), axis=1).to(tl.int64)
    kept = inside & (expert < E)
    tl.store(order + place, copy.to(tl.int64), mask=kept)
    tl.store(inverse + copy, tl.where(kept, place, num_kept), mask=inside)


def _counting(num_experts: int) -> tuple[int, int]:
    """Padded experts, and copies of one program: together a table of 16384 ones and zeros."""
    experts = max(16, triton.next_power_of_2(num_experts))
    return experts, max(16, 16384 // experts)


def count_choices(chosen_S: Tensor, num_experts: int) -> Tensor:
    """As `moe.ops.count_choices`, of int64 [S]."""
    experts, block = _counting(num_experts)
    num_blocks = triton.cdiv(len(chosen_S), block)
    counts = torch.empty(num_blocks, num_experts, dtype=torch.int32, device=chosen_S.device)
    if num_blocks:
        _count_choices[(num_blocks,)](chosen_S, counts, len(chosen_S), num_experts, block, experts)
    return counts.sum(0)  # int64


def sort_by_expert(chosen_S: Tensor, num_experts: int, num_kept: int) -> tuple[Tensor, Tensor]:
    """As `moe.ops.sort_by_expert`, by counting, for at most 1024 experts."""
    experts, block = _counting(num_experts)
    num_copies = len(chosen_S)
    num_blocks = triton.cdiv(num_copies, block)
    counts = torch.empty(num_blocks, num_experts, dtype=torch.int32, device=chosen_S.device)
    order = torch.empty(num_kept, dtype=torch.int64, device=chosen_S.device)
    inverse = torch.empty_like(chosen_S)
    if num_copies:
        _count_choices[(num_blocks,)](chosen_S, counts, num_copies, num_experts, block, experts)
        # Expert-major: all of expert 0 from block 0, from block 1, ...; then expert 1.
        running = counts.t().contiguous().view(-1).cumsum(0, dtype=torch.int32).view(num_experts, num_blocks).t()
        starts = (running - counts).contiguous()
        _place_copies[(num_blocks,)](
            chosen_S, starts, order, inverse, num_copies, num_kept, num_experts, block, experts
        )
    return order, inverse
