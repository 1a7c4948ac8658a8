"""SwiftMoE's Expert Placement Scheduler (SYMI, arXiv 2504.19925, algorithm 1): how many slots each expert gets in the
next iteration, from how many tokens chose it in this one, and which slots those are.

Every rank runs it on the same all-reduced integers, in float64 without any reduction over ranks, so that all agree bit
for bit. Dimensions: E experts, N ranks, L slots of a rank, J = N L slots in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple


def replica_counts(popularity: Sequence[int], num_slots: int) -> tuple[int, ...]:
    """Slots of each expert, in proportion to its popularity but at least one (algorithm 1; first index on ties).

    Args:
        popularity: E copies that chose each expert, over all ranks, before any drop; not all 0.
        num_slots: J >= E.

    Returns:
        E counts >= 1 that sum to J.
    """
    total = sum(popularity)
    assert num_slots >= len(popularity), f"{num_slots} slots can't hold {len(popularity)} experts"
    assert min(popularity) >= 0 and total > 0, f"no proportions in {list(popularity)}"
    goals = [popular / total * num_slots for popular in popularity]
    counts = [max(1, int(goal)) for goal in goals]
    excess = [count - goal for count, goal in zip(counts, goals, strict=True)]
    surplus = sum(counts) - num_slots
    while surplus > 0:
        most = excess.index(max(excess))
        if counts[most] > 1:
            counts[most] -= 1
            surplus -= 1
        excess[most] -= 1  # also where the last slot must stay, so that the search goes on to another expert
    while surplus < 0:
        least = excess.index(min(excess))
        counts[least] += 1
        surplus += 1
        excess[least] += 1
    return tuple(counts)


class Run(NamedTuple):
    """Slots of one rank that hold the same expert: `num_slots` of them from `first` on, counted within the rank."""

    expert: int
    first: int
    num_slots: int


@dataclass(frozen=True)
class SlotTable:
    """Which expert is in which slot: expert 0 in the first `counts[0]` slots, then expert 1, ...; slot j is on rank
    j // L (SYMI, section 3.3). So replicas fill a rank first, and an expert's ranks are consecutive.

    Args:
        counts: slots of each of the E experts, each >= 1; they sum to J.
        slots_per_rank: L, which divides J.
    """

    counts: tuple[int, ...]
    slots_per_rank: int

    def __post_init__(self) -> None:
        assert min(self.counts) >= 1 and sum(self.counts) % self.slots_per_rank == 0, (self.counts, self.slots_per_rank)

    @cached_property
    def num_slots(self) -> int:
        """J."""
        return sum(self.counts)

    @cached_property
    def expert_of_slot(self) -> list[int]:
        """[J] experts."""
        return [expert for expert, count in enumerate(self.counts) for _ in range(count)]

    @cached_property
    def first_slots(self) -> list[int]:
        """[E], the first slot of each expert."""
        return list(accumulate(self.counts, initial=0))[:-1]

    @cached_property
    def holders(self) -> list[range]:
        """[E], the ranks that hold each expert."""
        return [
            range(first // self.slots_per_rank, (first + count - 1) // self.slots_per_rank + 1)
            for first, count in zip(self.first_slots, self.counts, strict=True)
        ]

    @cached_property
    def shared(self) -> list[int]:
        """Experts on several ranks: every second one of them first, then those between. Experts' ranks are consecutive,
        so two of one half never meet on a rank: reduced in this order, all are done in two rounds, where in the order
        of slots each would wait for the one before it, from the first rank to the last."""
        shared = [expert for expert, ranks in enumerate(self.holders) if len(ranks) > 1]
        return shared[::2] + shared[1::2]

    def runs(self, rank: int) -> list[Run]:
        """The experts of a rank's slots, in order, each once."""
        start = rank * self.slots_per_rank
        last = start + self.slots_per_rank - 1
        edges = [start, *self.first_slots[self.expert_of_slot[start] + 1 : self.expert_of_slot[last] + 1], last + 1]
        experts = range(self.expert_of_slot[start], self.expert_of_slot[last] + 1)
        return [
            Run(expert, first - start, stop - first)
            for expert, (first, stop) in zip(experts, pairwise(edges), strict=True)
        ]

    def num_experts_on(self, rank: int) -> int:
        """How many experts are in a rank's slots."""
        start = rank * self.slots_per_rank
        return self.expert_of_slot[start + self.slots_per_rank - 1] - self.expert_of_slot[start] + 1

    def source(self, expert: int, rank: int) -> int:
        """Whose gradient of an expert a rank takes its shard of: its own if it has one, else one of those that have, so
        that they share the sending (SYMI, algorithm 2)."""
        holders = self.holders[expert]
        return rank if rank in holders else holders[rank % len(holders)]

    def takers(self, expert: int, rank: int) -> list[int]:
        """The ranks, this one among them, that take their shards of an expert from this one, which holds it."""
        holders = self.holders[expert]
        others = range(rank - holders.start, self.num_slots // self.slots_per_rank, len(holders))
        return sorted([rank, *(peer for peer in others if peer not in holders)])

    def after(self, popularity: Sequence[int]) -> SlotTable:
        """The next iteration's table. Where no token chose anything the old one stays (ours; the paper has no rule)."""
        counts = replica_counts(popularity, self.num_slots) if any(popularity) else self.counts
        return self if counts == self.counts else SlotTable(counts, self.slots_per_rank)


def even_table(num_experts: int, num_ranks: int, slots_per_rank: int) -> SlotTable:
    """The first iteration's table: as if all experts were equally popular (ours; the paper does not say)."""
    return SlotTable(replica_counts([1] * num_experts, num_ranks * slots_per_rank), slots_per_rank)


def table_of(expert_of_slot: Sequence[int] | None, like: SlotTable) -> SlotTable | None:
    """The table of some slots' experts if it is one of `like`'s sizes; None where it is not.

    Args:
        expert_of_slot: from a checkpoint, perhaps of another world size or system.
        like: a table of this run.
    """
    if expert_of_slot is None or len(expert_of_slot) != like.num_slots:
        return None
    counts = tuple(list(expert_of_slot).count(expert) for expert in range(len(like.counts)))
    if min(counts) < 1 or sum(counts) != like.num_slots:
        return None
    table = SlotTable(counts, like.slots_per_rank)
    return table if table.expert_of_slot == list(expert_of_slot) else None
