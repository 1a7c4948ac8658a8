"""FlexMoE's scheduling policy (SIGMOD 2023, arXiv 2304.03946) as pure functions: which experts get more replicas and
which fewer, by a cost model of the step that comes.

FlexMoE's code is not public, and this is not written from its paper's text but from what papers and code restating it
agree on: an expert's tokens split evenly over its slots; the three moves Expand, Shrink and Migrate; the trigger on the
largest load of a device over the mean one; a step's cost as compute, exchange and synchronisation of replicas on the
slowest device. What they leave open is ours and told as such where it stands. It is a baseline of FlexMoE's kind, and
none of FlexMoE's own figures can be claimed from it.

Everything is a function of integers that all ranks share, so that ranks of like machines plan the same; where sums of
float64 may round otherwise on another, let one rank send its plan. Dimensions: E experts, N ranks, L slots of a rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int64]
"""[E, N], slots of each expert on each rank; at least one of each expert over all ranks."""

Copies = NDArray[np.int64]
"""[N, E], copies of each rank's tokens for each expert, before any drop."""

BALANCED = 1.2
"""Up to this balance ratio nothing is done: the default of one restatement; the paper's own is not known to us."""

MOST_SHIFTS = 10
"""Replicas that one plan shifts at most, and pairs that it migrates at most: one restatement's limit for the former."""

COMPUTE_PASSES = 3
"""One forward and, at twice its cost, one backward pass (ours: restatements do not all weigh it so)."""

EXCHANGES = 4
"""Dispatch and combine, forward and backward (ours, as above)."""

_GAIN = 1e-9
"""A plan must save this share of a step's time (ours): less is rounding, and could go round in circles."""


@dataclass(frozen=True, eq=False)
class Costs:
    """What the cost model knows of the cluster and the layer.

    Args:
        rows_per_s: rows that a rank's experts compute forward in a second.
        row_bytes: of one row on its way.
        expert_bytes: of an expert's gradient.
        bytes_per_s_NN: [N, N] float64, from rank to rank; the diagonal is not read.
    """

    rows_per_s: float
    row_bytes: float
    expert_bytes: float
    bytes_per_s_NN: NDArray[np.float64]


class Expand(NamedTuple):
    """One more slot of an expert, in a free slot of a rank."""

    expert: int
    rank: int


class Shrink(NamedTuple):
    """One slot of an expert on a rank becomes free."""

    expert: int
    rank: int


class Migrate(NamedTuple):
    """A slot of `expert` on `rank` and one of `other` on `other_rank` trade places."""

    expert: int
    rank: int
    other: int
    other_rank: int


Move = Expand | Shrink | Migrate


class Plan(NamedTuple):
    """What is to be done.

    Attributes:
        slots_EN: afterwards.
        moves: in order.
    """

    slots_EN: Slots
    moves: tuple[Move, ...]


def rank_rows(slots_EN: Slots, copies_NE: Copies) -> NDArray[np.float64]:
    """[N, N] rows from rank to rank: each rank's copies of an expert, split evenly over that expert's slots."""
    share_EN = slots_EN / slots_EN.sum(axis=1, keepdims=True)
    rows_NN: NDArray[np.float64] = copies_NE @ share_EN
    return rows_NN


def balance_ratio(slots_EN: Slots, copies_NE: Copies) -> float:
    """The largest number of rows of a rank over the mean one, at least 1; 1 where there is no row.

    Restatements differ on this: one divides by the least of a rank instead.
    """
    rows_N = rank_rows(slots_EN, copies_NE).sum(axis=0)
    return float(rows_N.max() / rows_N.mean()) if rows_N.any() else 1.0


def step_seconds(slots_EN: Slots, copies_NE: Copies, costs: Costs) -> float:
    """Predicted time of one layer in one training step, on its slowest rank.

        max over ranks of  3 rows / rows_per_s  +  4 sum over other ranks of bytes / bandwidth  +  synchronisation

    A rank's bytes are those of the rows that come to it. An expert on n > 1 ranks is synchronised by a ring over the
    slowest link among them, 2 (n - 1) / n times its bytes (ours; restatements take a profiled rate of each group).
    """
    rows_NN = rank_rows(slots_EN, copies_NE)
    others_NN = ~np.eye(len(rows_NN), dtype=bool)
    seconds_NN = np.zeros_like(rows_NN)
    np.divide(rows_NN * costs.row_bytes, costs.bytes_per_s_NN, out=seconds_NN, where=others_NN)
    total_N = COMPUTE_PASSES * rows_NN.sum(axis=0) / costs.rows_per_s + EXCHANGES * seconds_NN.sum(axis=0)
    for on_N in slots_EN > 0:
        ranks = np.flatnonzero(on_N)
        if len(ranks) > 1:
            links = costs.bytes_per_s_NN[others_NN & np.outer(on_N, on_N)]
            total_N[ranks] += 2 * (len(ranks) - 1) / len(ranks) * costs.expert_bytes / links.min()
    return float(total_N.max())


def after(slots_EN: Slots, moves: Sequence[Move]) -> Slots:
    """The slots after some moves; `slots_EN` stays as it is."""
    slots_EN = slots_EN.copy()
    for move in moves:
        match move:
            case Expand(expert, rank):
                slots_EN[expert, rank] += 1
            case Shrink(expert, rank):
                slots_EN[expert, rank] -= 1
            case Migrate(expert, rank, other, other_rank):
                slots_EN[expert, rank] -= 1
                slots_EN[expert, other_rank] += 1
                slots_EN[other, other_rank] -= 1
                slots_EN[other, rank] += 1
    assert slots_EN.min() >= 0, f"{moves} take a slot that is not there"
    return slots_EN


def plan(
    slots_EN: Slots,
    copies_NE: Copies,
    costs: Costs,
    slots_per_rank: int,
    balanced: float = BALANCED,
    most_shifts: int = MOST_SHIFTS,
) -> Plan:
    """Shift replicas from the least to the most popular expert while ranks are unbalanced and the cost model sees a
    gain; then let replicas migrate together where it sees one.

    Args:
        slots_EN: at present; no rank has more than `slots_per_rank`.
        copies_NE: of the last step, which stands for the next.
        costs: of the cost model.
        slots_per_rank: L; where a rank has fewer, the rest are free.
        balanced: balance ratio up to which nothing is done.
        most_shifts: of each of the two kinds of moves.
    """
    assert slots_EN.sum(axis=1).min() >= 1 and slots_EN.sum(axis=0).max() <= slots_per_rank, slots_EN
    if balance_ratio(slots_EN, copies_NE) <= balanced:
        return Plan(slots_EN, ())
    moves: list[Move] = []
    for _ in range(most_shifts):
        shift = _best(slots_EN, copies_NE, costs, _shifts(slots_EN, copies_NE, slots_per_rank))
        if shift is None:
            break
        slots_EN = after(slots_EN, shift)
        moves += shift
        if balance_ratio(slots_EN, copies_NE) <= balanced:
            break
    for _ in range(most_shifts):
        trade = _best(slots_EN, copies_NE, costs, _migrations(slots_EN))
        if trade is None:
            break
        slots_EN = after(slots_EN, trade)
        moves += trade
    return Plan(slots_EN, tuple(moves))


def _shifts(slots_EN: Slots, copies_NE: Copies, slots_per_rank: int) -> Iterator[list[Move]]:
    """Ways to give the most popular expert a slot: a free one if there is any, else one of the least popular expert
    that can spare one. Popularity is copies per slot; of equals the first expert.

    Ranks that already have the popular expert come first: of equally good ways they are taken, and nothing has to be
    sent there (ours).
    """
    popular_E = copies_NE.sum(axis=0) / slots_EN.sum(axis=1)
    hot = int(popular_E.argmax())
    ranks = sorted(range(slots_EN.shape[1]), key=lambda rank: (slots_EN[hot, rank] == 0, rank))
    free_N = slots_per_rank - slots_EN.sum(axis=0)
    if free_N.any():
        for rank in ranks:
            if free_N[rank]:
                yield [Expand(hot, rank)]
        return
    can_spare_E = slots_EN.sum(axis=1) > 1
    if not can_spare_E.any():
        return
    cold = int(np.where(can_spare_E, popular_E, np.inf).argmin())
    for rank in ranks:
        if cold != hot and slots_EN[cold, rank]:
            yield [Shrink(cold, rank), Expand(hot, rank)]


def _migrations(slots_EN: Slots) -> Iterator[list[Move]]:
    """Trades after which an expert is on fewer ranks: its only slot on one rank, for any on another that has it."""
    for expert, rank in np.argwhere(slots_EN == 1).tolist():
        for other_rank in np.flatnonzero(slots_EN[expert]).tolist():
            for other in np.flatnonzero(slots_EN[:, other_rank]).tolist():
                if rank != other_rank and expert != other:
                    yield [Migrate(expert, rank, other, other_rank)]


def _best(slots_EN: Slots, copies_NE: Copies, costs: Costs, ways: Iterator[list[Move]]) -> list[Move] | None:
    """The way with the least predicted time, the first of equals; None where none is faster than doing nothing."""
    best, least = None, step_seconds(slots_EN, copies_NE, costs) * (1 - _GAIN)
    for way in ways:
        seconds = step_seconds(after(slots_EN, way), copies_NE, costs)
        if seconds < least * (1 - _GAIN) or (best is None and seconds < least):
            best, least = way, seconds
    return best


def expert_of_slot(slots_EN: Slots, before: Sequence[int], slots_per_rank: int) -> list[int]:
    """Which expert is in which slot, slot j on rank j // L: who stays on a rank stays in place (ours).

    Args:
        slots_EN: that all slots be filled with.
        before: [N L] experts, as things are.
        slots_per_rank: L.
    """
    placed = list(before)
    for rank, slots_E in enumerate(slots_EN.T.tolist()):
        missing = dict(enumerate(slots_E))
        leaving = []
        for slot in range(rank * slots_per_rank, (rank + 1) * slots_per_rank):
            if missing[before[slot]] > 0:
                missing[before[slot]] -= 1
            else:
                leaving.append(slot)
        coming = [expert for expert, count in missing.items() for _ in range(count)]
        for slot, expert in zip(leaving, coming, strict=True):
            placed[slot] = expert
    return placed


def slots_of(placed: Sequence[int], num_experts: int, slots_per_rank: int) -> Slots:
    """[E, N] of the experts [N L] in all slots, slot j on rank j // L."""
    slots_EN = np.zeros((num_experts, len(placed) // slots_per_rank), dtype=np.int64)
    np.add.at(slots_EN, (np.asarray(placed), np.arange(len(placed)) // slots_per_rank), 1)
    return slots_EN


def arrivals(before_EN: Slots, after_EN: Slots) -> list[tuple[int, int]]:
    """(expert, rank) where a rank gets an expert that it had no slot of: weights and optimizer state go there, once for
    all of its slots."""
    return [(expert, rank) for expert, rank in np.argwhere((after_EN > 0) & (before_EN == 0)).tolist()]
