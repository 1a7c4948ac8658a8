"""Sorting copies by expert, by counting. Dimensions: T tokens, K choices, S copies, E experts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.launch import launch


@triton.jit(do_not_specialize=["num_copies"])
def _count_choices(chosen, counts, num_copies, E: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    block, num_blocks = tl.program_id(0), tl.num_programs(0)
    copy = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(chosen + copy, mask=copy < num_copies, other=E)
    ids = tl.arange(0, EXPERTS)
    mine = (expert[:, None] == ids[None, :]).to(tl.int32)
    tl.store(counts + ids * num_blocks + block, tl.sum(mine, axis=0), mask=ids < E)


@triton.jit(do_not_specialize=["num_copies", "num_kept"])
def _place_copies(
    chosen,
    counts,
    running,
    order,
    inverse,
    num_copies,
    num_kept,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    block, num_blocks = tl.program_id(0), tl.num_programs(0)
    copy = block * BLOCK + tl.arange(0, BLOCK)
    inside = copy < num_copies
    expert = tl.load(chosen + copy, mask=inside, other=E)
    ids = tl.arange(0, EXPERTS)
    mine = (expert[:, None] == ids[None, :]).to(tl.int32)
    before = tl.cumsum(mine, axis=0) - mine  # of the same expert, in this block, before this copy
    of_expert = ids * num_blocks + block
    start = tl.load(running + of_expert, mask=ids < E, other=0) - tl.load(counts + of_expert, mask=ids < E, other=0)
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
    return _counts(chosen_S, num_experts).sum(1)  # int64


def sort_by_expert(chosen_S: Tensor, num_experts: int, num_kept: int) -> tuple[Tensor, Tensor]:
    """As `moe.ops.sort_by_expert`, by counting, for at most 1024 experts."""
    order = torch.empty(num_kept, dtype=torch.int64, device=chosen_S.device)
    inverse = torch.empty_like(chosen_S)
    if len(chosen_S):
        counts_EB = _counts(chosen_S, num_experts)
        # All of expert 0 from block 0, from block 1, ...; then expert 1.
        running = counts_EB.view(-1).cumsum(0, dtype=torch.int32)
        experts, block = _counting(num_experts)
        launch(
            _place_copies,
            (counts_EB.shape[1],),
            (chosen_S, counts_EB, running, order, inverse),
            (len(chosen_S), num_kept),
            (num_experts, block, experts),
        )
    return order, inverse


def _counts(chosen_S: Tensor, num_experts: int) -> Tensor:
    """[E, B] int32, how often each expert stands in each block."""
    experts, block = _counting(num_experts)
    num_blocks = triton.cdiv(len(chosen_S), block)
    counts_EB = torch.empty(num_experts, num_blocks, dtype=torch.int32, device=chosen_S.device)
    if num_blocks:
        launch(_count_choices, (num_blocks,), (chosen_S, counts_EB), (len(chosen_S),), (num_experts, block, experts))
    return counts_EB
