"""Experts with replicas in slots: whose turn it is to take a copy, sums of their gradients, new weights for all.

Dimensions: T tokens, K choices, E experts, J slots of all ranks, L slots and G experts of this rank, B experts that
fill its slots, P numbers of an expert, which is cut into N shards of F numbers, R shards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.launch import launch
from moe.kernels.sort import _counting

_BLOCK = 1024


@triton.jit(do_not_specialize=["num_tokens"])
def _count_in_queue(
    ids, counts, num_tokens, E: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr
):
    block = tl.program_id(0)
    copy = block * BLOCK + tl.arange(0, BLOCK)  # all first choices, then all second ones
    inside = copy < num_tokens * K
    expert = tl.load(ids + copy % num_tokens * K + copy // num_tokens, mask=inside, other=E)
    column = tl.arange(0, EXPERTS)
    mine = (expert[:, None] == column[None, :]).to(tl.int32)
    tl.store(counts + block * E + column, tl.sum(mine, axis=0), mask=column < E)


@triton.jit(do_not_specialize=["num_tokens"])
def _take_turns(
    ids,
    counts,
    running,
    table,
    slot_order,
    slots,
    kept,
    slot_counts,
    num_tokens,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
    HAS_QUOTA: tl.constexpr,
    HAS_ORDER: tl.constexpr,
):
    block = tl.program_id(0)
    copy = block * BLOCK + tl.arange(0, BLOCK)
    inside = copy < num_tokens * K
    place = copy % num_tokens * K + copy // num_tokens
    expert = tl.load(ids + place, mask=inside, other=E)
    column = tl.arange(0, EXPERTS)
    real = column < E
    mine = (expert[:, None] == column[None, :]).to(tl.int32)
    before = tl.cumsum(mine, axis=0) - mine  # of the same expert, in this block, before this copy
    upto = tl.load(running + block * E + column, mask=real, other=0)
    start = upto - tl.load(counts + block * E + column, mask=real, other=0)
    position = tl.sum(mine * (before + start[None, :]), axis=1)
    first = tl.load(table + expert, mask=inside, other=0)
    replicas = tl.load(table + E + expert, mask=inside, other=1)
    turn = tl.load(table + 2 * E + expert, mask=inside, other=0) + position
    slot = first + turn % replicas
    if HAS_ORDER:
        slot = tl.load(slot_order + slot, mask=inside, other=0)
    tl.store(slots + place, slot, mask=inside)
    if HAS_QUOTA:
        tl.store(kept + place, position < tl.load(table + 3 * E + expert, mask=inside, other=0), mask=inside)
    if block == tl.num_programs(0) - 1:  # which has seen all copies of each expert
        first_E = tl.load(table + column, mask=real, other=0)
        replicas_E = tl.load(table + E + column, mask=real, other=1)
        turn_E = tl.load(table + 2 * E + column, mask=real, other=0) % replicas_E
        for replica in range(tl.max(replicas_E)):
            has = real & (replica < replicas_E)
            wait = (replica - turn_E + replicas_E) % replicas_E  # copies that others take before its first one
            slot_E = first_E + replica
            if HAS_ORDER:
                slot_E = tl.load(slot_order + slot_E, mask=has, other=0)
            tl.store(slot_counts + slot_E, (upto + replicas_E - 1 - wait) // replicas_E, mask=has)


def take_turns(
    ids_TK: Tensor, table_RE: Tensor, num_slots: int, slot_order_J: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """As `moe.replica_gate.take_turns`, of at least one token and at most `moe.ops.MOST_EXPERTS` experts."""
    (num_tokens, top_k), num_experts, device = ids_TK.shape, table_RE.shape[1], ids_TK.device
    experts, block = _counting(num_experts)
    num_blocks = triton.cdiv(ids_TK.numel(), block)
    ids_TK, table_RE = ids_TK.contiguous(), table_RE.contiguous()
    counts = torch.empty(num_blocks, num_experts, dtype=torch.int32, device=device)
    sizes = (num_experts, top_k, block, experts)
    launch(_count_in_queue, (num_blocks,), (ids_TK, counts), (num_tokens,), sizes)
    slots_TK = torch.empty_like(ids_TK)
    kept_TK = torch.empty(ids_TK.shape, dtype=torch.bool, device=device) if len(table_RE) > 3 else None
    slot_counts_J = torch.empty(num_slots, dtype=torch.int64, device=device)
    launch(
        _take_turns,
        (num_blocks,),
        (
            ids_TK,
            counts,
            counts.cumsum(0, dtype=torch.int32),
            table_RE,
            table_RE if slot_order_J is None else slot_order_J,
            slots_TK,
            slots_TK if kept_TK is None else kept_TK,
            slot_counts_J,
        ),
        (num_tokens,),
        (*sizes, kept_TK is not None, slot_order_J is not None),
    )
    return slots_TK, kept_TK, slot_counts_J


@triton.jit
def _sum_replicas(
    grads_in,
    grads_out,
    order,
    runs,
    sums,
    N: tl.constexpr,
    F: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    shard = tl.load(order + row)
    run = runs + shard // N * 2
    first, num_slots = tl.load(run), tl.load(run + 1)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    number = shard % N * F + column
    inside = column < F
    total = tl.zeros([BLOCK], tl.float32)
    for slot in range(first, first + num_slots):
        total += tl.load(grads_in + slot * IN + number, mask=inside & (number < IN), other=0.0).to(tl.float32)
        rest = number - IN
        of_out = inside & (rest >= 0) & (rest < OUT)
        total += tl.load(grads_out + slot * OUT + rest, mask=of_out, other=0.0).to(tl.float32)
    tl.store(sums + row * F + column, total.to(sums.dtype.element_ty), mask=inside)


def sum_replicas(
    grads_in: Tensor,
    grads_out: Tensor,
    order_R: Tensor,
    runs_G2: Tensor,
    num_shards: int,
    size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Shards of experts' gradients, summed over consecutive slots in float32 and rounded once.

    Args:
        grads_in, grads_out: [L, ...], contiguous; together an expert's numbers, in this order, zeros behind them.
        order_R: [R] int64, shard n of the expert at place g as g N + n.
        runs_G2: [G, 2] int64, first slot of each expert and how many it has.
        num_shards: N.
        size: F.
        dtype: of the sums.

    Returns:
        [R, F].
    """
    sums_RF = torch.empty(len(order_R), size, dtype=dtype, device=grads_in.device)
    if len(order_R):
        in_size, out_size = grads_in[0].numel(), grads_out[0].numel()
        launch(
            _sum_replicas,
            (len(order_R), triton.cdiv(size, _BLOCK)),
            (grads_in, grads_out, order_R, runs_G2, sums_RF),
            constants=(num_shards, size, in_size, out_size, _BLOCK),
        )
    return sums_RF


@triton.jit
def _repeat_rows(source, runs, rows, F: tl.constexpr, BLOCK: tl.constexpr):
    expert = tl.program_id(1).to(tl.int64)
    first, num_rows = tl.load(runs + 2 * expert), tl.load(runs + 2 * expert + 1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    number = tl.load(source + expert * F + column, mask=inside).to(rows.dtype.element_ty)
    for row in range(first, first + num_rows):
        tl.store(rows + row * F + column, number, mask=inside)


def repeat_rows(source_EF: Tensor, runs_E2: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """Each expert's row as often as it is wanted.

    Args:
        source_EF: [E, F], contiguous.
        runs_E2: [E, 2] int64, the first row of each expert and how many it has; together they cover all.
        num_rows: R.
        dtype: of the result.

    Returns:
        [R, F].
    """
    num_experts, size = source_EF.shape
    rows_RF = torch.empty(num_rows, size, dtype=dtype, device=source_EF.device)
    launch(
        _repeat_rows,
        (triton.cdiv(size, _BLOCK), num_experts),
        (source_EF, runs_E2, rows_RF),
        constants=(size, _BLOCK),
    )
    return rows_RF


@triton.jit(do_not_specialize=["num_runs"])
def _fill_replicas(
    shards, runs, w_in, w_out, num_runs, F: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr
):
    run = tl.program_id(1)
    first, num_slots = tl.load(runs + 2 * run), tl.load(runs + 2 * run + 1)
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = (number // F).to(tl.int64) * num_runs + run
    value = tl.load(shards + row * F + number % F, mask=number < IN + OUT)
    for slot in range(first, first + num_slots):
        tl.store(w_in + slot * IN + number, value, mask=number < IN)
        tl.store(w_out + slot * OUT + number - IN, value, mask=(number >= IN) & (number < IN + OUT))


def fill_replicas(shards_NBF: Tensor, runs_B2: Tensor, w_in: Tensor, w_out: Tensor) -> None:
    """Write experts that lie in shards into their slots.

    Args:
        shards_NBF: [N, B, F], contiguous; an expert's numbers are those of its shards in a row, w_in's first.
        runs_B2: [B, 2] int64, the first slot of each and how many it fills.
        w_in, w_out: [L, ...], contiguous, of the shards' dtype.
    """
    _, num_runs, size = shards_NBF.shape
    in_size, out_size = w_in[0].numel(), w_out[0].numel()
    launch(
        _fill_replicas,
        (triton.cdiv(in_size + out_size, _BLOCK), num_runs),
        (shards_NBF, runs_B2, w_in, w_out),
        (num_runs,),
        (size, in_size, out_size, _BLOCK),
    )
