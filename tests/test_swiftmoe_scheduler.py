"""SwiftMoE's scheduler: the rule's own vectors, what always holds, and where replicas are; capacities by replicas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.swiftmoe_scheduler import Run, SlotTable, even_table, replica_counts, table_of
from moe.replica_gate import expert_capacities, global_places
from moe.system import LayerSpec


@pytest.mark.parametrize(
    ("popularity", "num_slots", "expected"),
    [
        ([10, 1, 1, 0], 8, (5, 1, 1, 1)),
        ([5, 5, 5, 5], 8, (2, 2, 2, 2)),
        ([7, 3, 1, 1], 8, (4, 2, 1, 1)),
        ([100, *[0] * 7], 16, (9, *[1] * 7)),
        ([1, 2, 3, 4, 5, 6, 7, 8], 16, (1, 1, 1, 2, 2, 3, 3, 3)),
        ([0, 0, 0, 1], 4, (1, 1, 1, 1)),
    ],
)
def test_counts_are_the_algorithms(popularity: list[int], num_slots: int, expected: tuple[int, ...]) -> None:
    assert replica_counts(popularity, num_slots) == expected


@st.composite
def popularities(draw: Any) -> tuple[list[int], int, int]:
    """Popularity of E experts, N ranks and L slots a rank with N L >= E."""
    num_experts, num_ranks = draw(st.integers(1, 40)), draw(st.integers(1, 12))
    least = -(-num_experts // num_ranks)
    slots = draw(st.integers(least, least + 6))
    counts = draw(st.lists(st.integers(0, 10**7), min_size=num_experts, max_size=num_experts))
    return counts, num_ranks, slots


def literally(popularity: list[int], num_slots: int) -> tuple[int, ...]:
    """Algorithm 1 read aloud, one comparison after the other: goals, counts of at least one, then one slot off where
    the excess is largest, or one more where it is least; an expert's excess falls even where its last slot stays."""
    goals = [popular / sum(popularity) * num_slots for popular in popularity]
    counts = [int(goal) if goal >= 1 else 1 for goal in goals]
    excess = [count - goal for count, goal in zip(counts, goals, strict=True)]
    while sum(counts) != num_slots:
        too_many = sum(counts) > num_slots
        chosen = 0
        for expert in range(1, len(counts)):
            if excess[expert] > excess[chosen] if too_many else excess[expert] < excess[chosen]:
                chosen = expert
        if not too_many:
            counts[chosen] += 1
        elif counts[chosen] > 1:
            counts[chosen] -= 1
        excess[chosen] += -1 if too_many else 1
    return tuple(counts)


@given(popularities())
def test_counts_are_those_of_the_rule_read_aloud(drawn: tuple[list[int], int, int]) -> None:
    popularity, num_ranks, slots = drawn
    if any(popularity):
        assert replica_counts(popularity, num_ranks * slots) == literally(popularity, num_ranks * slots)


@given(popularities())
def test_every_slot_is_given_and_every_expert_has_one(drawn: tuple[list[int], int, int]) -> None:
    counts, num_ranks, slots = drawn
    before = even_table(len(counts), num_ranks, slots)
    table = before.after(counts)
    assert sum(table.counts) == table.num_slots == num_ranks * slots
    assert min(table.counts) >= 1
    assert any(counts) or table is before
    assert table_of(table.expert_of_slot, like=before) == table


@given(popularities())
def test_replicas_are_next_to_one_another(drawn: tuple[list[int], int, int]) -> None:
    counts, num_ranks, slots = drawn
    table = even_table(len(counts), num_ranks, slots).after(counts)
    rows = [table.expert_of_slot[rank * slots : (rank + 1) * slots] for rank in range(num_ranks)]
    for expert in range(len(counts)):
        assert list(table.holders[expert]) == [rank for rank, row in enumerate(rows) if expert in row]
        assert table.expert_of_slot[table.first_slots[expert]] == expert
    for rank, row in enumerate(rows):
        assert [run.expert for run in table.runs(rank) for _ in range(run.num_slots)] == row
        assert all(row[run.first] == run.expert for run in table.runs(rank))


@given(popularities())
def test_a_shard_comes_from_who_has_it_and_senders_take_turns(drawn: tuple[list[int], int, int]) -> None:
    counts, num_ranks, slots = drawn
    table = even_table(len(counts), num_ranks, slots).after(counts)
    for expert in range(len(counts)):
        holders = list(table.holders[expert])
        sources = [table.source(expert, rank) for rank in range(num_ranks)]
        assert all(sources[rank] == rank for rank in holders)
        others = [source for rank, source in enumerate(sources) if rank not in holders]
        assert set(others) <= set(holders)
        assert len(others) < len(holders) or set(others) == set(holders)


@given(popularities())
def test_shared_experts_are_reduced_in_two_rounds(drawn: tuple[list[int], int, int]) -> None:
    """In neither of which a rank has two, so that none waits for another one."""
    counts, num_ranks, slots = drawn
    table = even_table(len(counts), num_ranks, slots).after(counts)
    assert sorted(table.shared) == [expert for expert in range(len(counts)) if len(table.holders[expert]) > 1]
    half = -(-len(table.shared) // 2)
    for experts in (table.shared[:half], table.shared[half:]):
        ranks = [rank for expert in experts for rank in table.holders[expert]]
        assert len(ranks) == len(set(ranks))


def test_a_table_in_full() -> None:
    table = SlotTable((1, 4, 2, 1), slots_per_rank=2)
    assert table.expert_of_slot == [0, 1, 1, 1, 1, 2, 2, 3]
    assert [list(table.holders[expert]) for expert in range(4)] == [[0], [0, 1, 2], [2, 3], [3]]
    assert table.runs(1) == [Run(1, 0, 2)]
    assert table.runs(2) == [Run(1, 0, 1), Run(2, 1, 1)]
    assert [table.source(1, rank) for rank in range(4)] == [0, 1, 2, 0]
    assert SlotTable((1, 2, 2, 2, 1), slots_per_rank=2).shared == [1, 3, 2]


def test_without_tokens_the_placement_stays() -> None:
    table = SlotTable((1, 4, 2, 1), slots_per_rank=2)
    assert table.after([0, 0, 0, 0]) is table
    assert table.after([1, 0, 0, 0]).counts == (5, 1, 1, 1)


@pytest.mark.parametrize("slots", [None, [0, 1, 2, 3], [1, 0, 0, 0, 1, 2, 2, 3], [0] * 8, [0, 0, 0, 0, 1, 2, 3, 4]])
def test_a_foreign_placement_is_not_taken(slots: list[int] | None) -> None:
    assert table_of(slots, like=SlotTable((1, 4, 2, 1), slots_per_rank=2)) is None


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.1, 1.5])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_even_replicas_have_the_suites_capacity(factor: float, top_k: int) -> None:
    for num_tokens in (1, 24, 400):
        spec = LayerSpec(8, 8, 8, top_k, capacity_factor=factor)
        capacity_E = expert_capacities(factor, num_tokens * top_k, torch.full((8,), 3), 24)
        assert capacity_E.tolist() == [spec.capacity(num_tokens)] * 8


def test_capacity_grows_with_replicas() -> None:
    assert expert_capacities(1.0, 64, torch.tensor([5, 1, 1, 1]), 8).tolist() == [40, 8, 8, 8]


@given(
    st.lists(st.lists(st.integers(0, 10**6), min_size=3, max_size=3), min_size=1, max_size=6),
    st.lists(st.integers(1, 10**6), min_size=3, max_size=3),
)
def test_a_shared_capacity_is_used_up_and_nobody_keeps_more_than_it_has(
    counts: list[list[int]], capacities: list[int]
) -> None:
    counts_NE, capacity_E = torch.tensor(counts), torch.tensor(capacities)
    places_NE = global_places(counts_NE, capacity_E)
    quota_NE = places_NE.diff(dim=0)
    assert (quota_NE >= 0).all() and (quota_NE <= counts_NE).all()
    assert torch.equal(places_NE[-1], torch.minimum(capacity_E, counts_NE.sum(0)))
