"""Dispatch and combine over memory that ranks map into one another: each rank reads the tokens that chose its experts
where they lie, and writes their sums where they are wanted.

A copy (rank p, token t, choice k) is numbered flat, p * T * K + t * K + k. `pointers` [P] int64 holds the address of
every rank's region; kernels add a region's offset in bytes. What belongs to the calling rank comes as a tensor (`own`),
so that it need not lie in mapped memory.

Dimensions: T tokens of a rank, K choices, P ranks, M model, L experts of this rank, R rows they compute, J slots of a
token's partial sums: one a choice where K <= P, else one a rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.launch import launch
from moe.kernels.rows import _warps

PROGRAMS = 128
"""Of the counting kernels, about one for each multiprocessor."""


@triton.jit
def _region(pointers, rank, me, offset, own):
    """Where a region of a rank begins."""
    there = own
    if rank != me:
        there = (tl.load(pointers + rank) + offset).to(own.dtype)
    return there


@triton.jit
def _row(region, row, M: tl.constexpr):
    """Where a row of a region begins. Regions begin at 16-byte boundaries; the compiler can't know, and would move two
    bytes at a time."""
    start = region + row * M
    if M % 8 == 0:
        start = tl.multiple_of(start, 16)
    return start


@triton.jit
def _local_slots(ids, copy, num_copies, first, L: tl.constexpr):
    """Slots of the experts that copies chose, -1 for experts of other ranks."""
    slot = tl.load(ids + copy, mask=copy < num_copies, other=-1).to(tl.int32) - first
    return tl.where((copy < num_copies) & (slot >= 0) & (slot < L), slot, -1)


@triton.jit(do_not_specialize=["offset", "me", "first", "num_copies", "copies_a_block"])
def _count_local(
    pointers,
    own_ids,
    counts,
    offset,
    me,
    first,
    num_copies,
    copies_a_block,
    L: tl.constexpr,
    CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    rank, block = tl.program_id(0), tl.program_id(1)
    ids = _region(pointers, rank, me, offset, own_ids)
    experts = tl.arange(0, EXPERTS)
    total = tl.zeros([EXPERTS], tl.int32)
    for chunk in range(0, copies_a_block, CHUNK):
        copy = block * copies_a_block + chunk + tl.arange(0, CHUNK)
        slot = _local_slots(ids, copy, num_copies, first, L)
        total += tl.sum((slot[:, None] == experts[None, :]).to(tl.int32), axis=0)
    tl.store(counts + (rank * tl.num_programs(1) + block) * EXPERTS + experts, total)


@triton.jit(do_not_specialize=["num_blocks"])
def _scan_counts(counts, ends, num_blocks, L: tl.constexpr, BLOCKS: tl.constexpr, EXPERTS: tl.constexpr):
    """Counts by block and expert become, in place, the row at which a block's copies for an expert begin."""
    block, expert = tl.arange(0, BLOCKS), tl.arange(0, EXPERTS)
    places = counts + block[:, None] * EXPERTS + expert[None, :]
    inside = (block < num_blocks)[:, None]
    table = tl.load(places, mask=inside, other=0)
    of_expert = tl.sum(table, axis=0)
    end = tl.cumsum(of_expert, axis=0)
    tl.store(ends + expert, end, mask=expert < L)
    before = tl.cumsum(table, axis=0) - table
    tl.store(places, before + (end - of_expert)[None, :], mask=inside)


@triton.jit(do_not_specialize=["offset", "me", "first", "num_copies", "copies_a_block", "num_rows"])
def _place_local(
    pointers,
    own_ids,
    starts,
    places,
    offset,
    me,
    first,
    num_copies,
    copies_a_block,
    num_rows,
    L: tl.constexpr,
    CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    rank, block = tl.program_id(0), tl.program_id(1)
    ids = _region(pointers, rank, me, offset, own_ids)
    experts = tl.arange(0, EXPERTS)
    row = tl.load(starts + (rank * tl.num_programs(1) + block) * EXPERTS + experts)
    for chunk in range(0, copies_a_block, CHUNK):
        copy = block * copies_a_block + chunk + tl.arange(0, CHUNK)
        slot = _local_slots(ids, copy, num_copies, first, L)
        mine = (slot[:, None] == experts[None, :]).to(tl.int32)
        before = tl.cumsum(mine, axis=0) - mine
        place = tl.sum(mine * (before + row[None, :]), axis=1)
        inside = (copy < num_copies) & (copy < (block + 1) * copies_a_block)
        fits = (slot >= 0) & (place < num_rows)
        tl.store(places + rank.to(tl.int64) * num_copies + copy, tl.where(fits, place, -1), mask=inside)
        row += tl.sum(mine, axis=0)


class LocalRows:
    """Which rows of this rank's experts the copies of all ranks take: sorted by expert, then in the copies' order.

    Two steps, so that the host can learn the number of rows while the second runs.

    Args:
        pointers: [P] int64.
        offset: of the ids in a rank's region, in bytes.
        own_ids: [T, K] int64 of this rank, E or more where the copy is dropped. All ranks have as many.
        me: this rank, of P.
        experts: global ids of this rank's L experts.

    Attributes:
        ends: [L] int32, the row behind each expert's last; known after the first step.
    """

    def __init__(self, pointers: Tensor, offset: int, own_ids: Tensor, me: int, experts: range) -> None:
        num_ranks, self.num_copies = len(pointers), own_ids.numel()
        self.width = triton.next_power_of_2(len(experts))
        num_blocks = max(1, min(PROGRAMS // num_ranks, triton.cdiv(self.num_copies, 64)))
        copies = triton.cdiv(self.num_copies, num_blocks)
        self.chunk = min(max(16, 8192 // self.width), max(16, triton.next_power_of_2(copies)))
        self.grid = (num_ranks, num_blocks)
        self.copies_a_block = triton.cdiv(copies, self.chunk) * self.chunk
        self.given = pointers, own_ids
        self.num_local = len(experts)
        device = own_ids.device
        self.starts = torch.empty(num_ranks * num_blocks, self.width, dtype=torch.int32, device=device)
        self.ends = torch.empty(self.num_local, dtype=torch.int32, device=device)
        self.numbers = offset, me, experts.start, self.num_copies, self.copies_a_block
        self.constants = self.num_local, self.chunk, self.width
        launch(_count_local, self.grid, (pointers, own_ids, self.starts), self.numbers, self.constants)
        num_blocks, table = len(self.starts), triton.next_power_of_2(len(self.starts))
        launch(
            _scan_counts,
            (1,),
            (self.starts, self.ends),
            (num_blocks,),
            (self.num_local, table, self.width),
            num_warps=min(16, max(1, table * self.width // 1024)),
        )

    def places(self, num_rows: int) -> Tensor:
        """The second step.

        Args:
            num_rows: R, rows that there is room for: nothing is written beyond them, whatever the ends say.

        Returns:
            [P, T, K] int32, the row of each copy, -1 where this rank does not compute it.
        """
        pointers, own_ids = self.given
        places = torch.empty(len(pointers), *own_ids.shape, dtype=torch.int32, device=own_ids.device)
        numbers = *self.numbers, num_rows
        launch(_place_local, self.grid, (pointers, own_ids, self.starts, places), numbers, self.constants)
        return places


@triton.jit(do_not_specialize=["num_tokens", "num_local"])
def _count_crossings(ids, places, crossings, num_tokens, num_local, K: tl.constexpr, BLOCK: tl.constexpr):
    rank, num_ranks = tl.program_id(0), tl.num_programs(0)
    read = tl.zeros([BLOCK], tl.int32)
    sums = tl.zeros([BLOCK], tl.int32)
    copies = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < num_tokens
        wants = tl.zeros([BLOCK], tl.int32)
        has = tl.zeros([BLOCK], tl.int32)
        for k in tl.static_range(K):
            expert = tl.load(ids + token * K + k, mask=inside, other=0)
            wants = wants | (inside & (expert // num_local == rank)).to(tl.int32)
            place = tl.load(places + (rank.to(tl.int64) * num_tokens + token) * K + k, mask=inside, other=-1)
            here = (place >= 0).to(tl.int32)
            has = has | here
            copies += here
        read += wants
        sums += has
    tl.store(crossings + rank, tl.sum(read, axis=0).to(tl.int64))
    tl.store(crossings + num_ranks + rank, tl.sum(sums, axis=0).to(tl.int64))
    tl.store(crossings + 2 * num_ranks + rank, tl.sum(copies, axis=0).to(tl.int64))


def count_crossings(ids_TK: Tensor, places_PTK: Tensor, num_local: int) -> Tensor:
    """What crosses between this rank and each.

    Args:
        ids_TK: [T, K] int64 of this rank, E where the copy is dropped.
        places_PTK: of `LocalRows`, of as many tokens.
        num_local: L of every rank.

    Returns:
        [3, P] int64: this rank's tokens that chose one of the other's experts; its tokens that chose one here, and how
        many of their copies did.
    """
    num_ranks, num_tokens, top_k = places_PTK.shape
    crossings = torch.empty(3, num_ranks, dtype=torch.int64, device=ids_TK.device)
    launch(_count_crossings, (num_ranks,), (ids_TK, places_PTK, crossings), (num_tokens, num_local), (top_k, 1024))
    return crossings


@triton.jit(do_not_specialize=["num_tokens"])
def _stage_tokens(
    tokens,
    ids,
    weights,
    out,
    out_ids,
    out_weights,
    num_tokens,
    E: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    here = (columns < M) & (token < num_tokens)
    tl.store(out + token * M + columns, tl.load(tokens + token * M + columns, mask=here), mask=here)
    for k in tl.static_range(K):
        place = token * K + k
        tl.store(out_ids + place, tl.load(ids + place, mask=token < num_tokens, other=E))
        tl.store(out_weights + place, tl.load(weights + place, mask=token < num_tokens, other=0.0))


def stage_tokens(
    x_TM: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    tokens_TM: Tensor,
    staged_ids_TK: Tensor,
    staged_weights_TK: Tensor,
    num_experts: int,
) -> None:
    """Lay this rank's tokens, choices and weights out for the other ranks; places beyond its T choose no expert.

    Args:
        x_TM, ids_TK, weights_TK: [T, M], [T, K] int64 and float32.
        tokens_TM, staged_ids_TK, staged_weights_TK: where to, of at least T tokens.
        num_experts: E, the id that chooses none.
    """
    max_tokens, model_dim = tokens_TM.shape
    block = triton.next_power_of_2(model_dim)
    launch(
        _stage_tokens,
        (max_tokens,),
        (x_TM, ids_TK, weights_TK, tokens_TM, staged_ids_TK, staged_weights_TK),
        (len(x_TM),),
        (num_experts, ids_TK.shape[1], model_dim, block),
        num_warps=_warps(block),
    )


@triton.jit(do_not_specialize=["offset", "weights_offset", "me", "num_ranks"])
def _pull_rows(
    pointers,
    own,
    own_weights,
    places,
    rows,
    row_weights,
    offset,
    weights_offset,
    me,
    num_ranks,
    K: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    rank, token = tl.program_id(0) % num_ranks, (tl.program_id(0) // num_ranks).to(tl.int64)
    places += (rank.to(tl.int64) * (tl.num_programs(0) // num_ranks) + token) * K
    last = tl.load(places)
    for k in tl.static_range(1, K):
        last = tl.maximum(last, tl.load(places + k))
    if last >= 0:
        columns = tl.arange(0, BLOCK)
        inside = columns < M
        row = tl.load(_row(_region(pointers, rank, me, offset, own), token, M) + columns, mask=inside)
        for k in tl.static_range(K):
            place = tl.load(places + k).to(tl.int64)
            tl.store(rows + place * M + columns, row, mask=inside & (place >= 0))
        if WEIGHTED:
            weights = _region(pointers, rank, me, weights_offset, own_weights) + token * K
            for k in tl.static_range(K):
                place = tl.load(places + k).to(tl.int64)
                tl.store(row_weights + place, tl.load(weights + k), mask=place >= 0)


def pull_rows(
    pointers: Tensor,
    me: int,
    own_TM: Tensor,
    offset: int,
    places_PTK: Tensor,
    num_rows: int,
    own_weights_TK: Tensor | None = None,
    weights_offset: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Read every token that chose an expert of this rank once, and lay it into the row of each such choice.

    Args:
        pointers, me: as above.
        own_TM: [T, M] of this rank; those of others lie at `offset`.
        places_PTK: of `LocalRows`.
        num_rows: R.
        own_weights_TK: [T, K] float32 of this rank, to be brought along; others' lie at `weights_offset`.

    Returns:
        rows [R, M], and their weights [R] float32 where asked for.
    """
    num_ranks, num_tokens, top_k = places_PTK.shape
    model_dim = own_TM.shape[1]
    rows = own_TM.new_empty(num_rows, model_dim)
    weighted = own_weights_TK is not None
    row_weights = torch.empty(num_rows, device=own_TM.device) if weighted else None
    if num_tokens:
        block = triton.next_power_of_2(model_dim)
        own_weights = own_TM if own_weights_TK is None else own_weights_TK
        launch(
            _pull_rows,
            (num_ranks * num_tokens,),  # in turn, so that all links are busy; the other axes end at 65535
            (pointers, own_TM, own_weights, places_PTK, rows, rows if row_weights is None else row_weights),
            (offset, weights_offset, me, num_ranks),
            (top_k, model_dim, block, weighted),
            num_warps=_warps(block),
        )
    return rows, row_weights


@triton.jit(do_not_specialize=["offset", "grads_offset", "me", "num_ranks"])
def _push_sums(
    pointers,
    rows,
    places,
    own,
    row_grads,
    own_grads,
    offset,
    grads_offset,
    me,
    num_ranks,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    ALONE: tl.constexpr,
    GRADS: tl.constexpr,
):
    rank, token = tl.program_id(0) % num_ranks, (tl.program_id(0) // num_ranks).to(tl.int64)
    places += (rank.to(tl.int64) * (tl.num_programs(0) // num_ranks) + token) * K
    slot = tl.full([], K, tl.int32)
    for k in tl.static_range(K):
        if tl.load(places + k) >= 0:
            slot = tl.minimum(slot, k)
    if (slot < K) | ALONE:
        if ALONE:
            slot = 0
        elif SLOTS < K:
            slot = me
        columns = tl.arange(0, BLOCK)
        inside = columns < M
        total = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(K):
            place = tl.load(places + k).to(tl.int64)
            total += tl.load(rows + place * M + columns, mask=inside & (place >= 0), other=0.0).to(tl.float32)
        sums = _row(_region(pointers, rank, me, offset, own), token * SLOTS + slot, M)
        tl.store(sums + columns, total.to(rows.dtype.element_ty), mask=inside)
        if GRADS:
            grads = _region(pointers, rank, me, grads_offset, own_grads) + token * K
            for k in tl.static_range(K):
                place = tl.load(places + k).to(tl.int64)
                tl.store(grads + k, tl.load(row_grads + place, mask=place >= 0), mask=place >= 0)


def push_sums(
    pointers: Tensor,
    me: int,
    rows_RM: Tensor,
    places_PTK: Tensor,
    own_TJM: Tensor,
    offset: int,
    row_grads_R: Tensor | None = None,
    own_grads_TK: Tensor | None = None,
    grads_offset: int = 0,
) -> None:
    """Write the sum of a token's rows on this rank into one of its slots on its own rank.

    Its slot is the first choice that this rank computed, where there is one slot a choice, else this rank's number. On
    a rank alone `own_TJM` is the result itself, 0 for tokens without a row.

    Args:
        pointers, me: as above.
        rows_RM: [R, M].
        places_PTK: of `LocalRows`.
        own_TJM: [T, J, M] of this rank; those of others lie at `offset`.
        row_grads_R: [R] float32, also to be sent, one a choice.
        own_grads_TK: where they are wanted, [T, K] float32; others' lie at `grads_offset`.
    """
    num_ranks, num_tokens, top_k = places_PTK.shape
    model_dim = rows_RM.shape[1]
    if num_tokens:
        block = triton.next_power_of_2(model_dim)
        row_grads = rows_RM if row_grads_R is None else row_grads_R
        own_grads = own_TJM if own_grads_TK is None else own_grads_TK
        launch(
            _push_sums,
            (num_ranks * num_tokens,),  # in turn, so that all links are busy; the other axes end at 65535
            (pointers, rows_RM, places_PTK, own_TJM, row_grads, own_grads),
            (offset, grads_offset, me, num_ranks),
            (top_k, own_TJM.shape[1], model_dim, block, num_ranks == 1, row_grads_R is not None),
            num_warps=_warps(block),
        )


@triton.jit(do_not_specialize=["num_local"])
def _sum_partials(
    partials,
    ids,
    grads,
    out,
    out_grads,
    num_local,
    E: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    GRADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < M
    total = tl.zeros([BLOCK], tl.float32)
    ids += token * K
    for slot in tl.static_range(SLOTS):
        if SLOTS < K:  # a slot a rank, written if any choice went there
            written = tl.full([], 0, tl.int1)
            for k in tl.static_range(K):
                written = written | (tl.load(ids + k) // num_local == slot)
        else:  # a slot a choice, written if no choice before went to the same rank
            expert = tl.load(ids + slot)
            written = expert < E
            for k in tl.static_range(slot):
                written = written & (tl.load(ids + k) // num_local != expert // num_local)
        part = tl.load(partials + (token * SLOTS + slot) * M + columns, mask=inside & written, other=0.0)
        total += part.to(tl.float32)
    tl.store(out + token * M + columns, total.to(out.dtype.element_ty), mask=inside)
    if GRADS:
        for k in tl.static_range(K):
            kept = tl.load(ids + k) < E
            tl.store(out_grads + token * K + k, tl.load(grads + token * K + k, mask=kept, other=0.0))


def sum_partials(
    partials_TJM: Tensor, ids_TK: Tensor, num_experts: int, num_local: int, grads_TK: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Add up the slots that ranks wrote for this rank's tokens, in order.

    Args:
        partials_TJM: [T, J, M].
        ids_TK: [T, K] int64; E where the copy is dropped.
        num_experts, num_local: E, and L of every rank.
        grads_TK: [T, K] float32, also written by the ranks.

    Returns:
        [T, M], and a copy of `grads_TK` with 0 for dropped copies.
    """
    num_tokens, slots, model_dim = partials_TJM.shape
    out = partials_TJM.new_empty(num_tokens, model_dim)
    out_grads = None if grads_TK is None else torch.empty_like(grads_TK)
    if num_tokens:
        block = triton.next_power_of_2(model_dim)
        grads, wanted = (partials_TJM, out) if grads_TK is None or out_grads is None else (grads_TK, out_grads)
        launch(
            _sum_partials,
            (num_tokens,),
            (partials_TJM, ids_TK, grads, out, wanted),
            (num_local,),
            (num_experts, ids_TK.shape[1], slots, model_dim, block, grads_TK is not None),
            num_warps=_warps(block),
        )
    return out, out_grads
