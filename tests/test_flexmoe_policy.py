"""FlexMoE's policy: costs reckoned by hand, and what must hold of every plan."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.flexmoe_policy import (
    BALANCED,
    Copies,
    Costs,
    Expand,
    Migrate,
    Shrink,
    Slots,
    after,
    arrivals,
    balance_ratio,
    expert_of_slot,
    plan,
    rank_rows,
    slots_of,
    step_seconds,
)


def costs(num_ranks: int, row_bytes: float = 4.0, expert_bytes: float = 0.0, rows_per_s: float = 1e3) -> Costs:
    """100 bytes a second from any rank to any other; the diagonal is what it must not read."""
    links_NN = np.full((num_ranks, num_ranks), 100.0)
    np.fill_diagonal(links_NN, 0.0)
    return Costs(rows_per_s, row_bytes, expert_bytes, links_NN)


def test_a_step_is_reckoned_by_hand() -> None:
    slots_EN = np.array([[2, 1], [0, 1]])  # expert 0 has two slots on rank 0 and one on rank 1
    copies_NE = np.array([[30, 10], [60, 20]])
    assert rank_rows(slots_EN, copies_NE).tolist() == [[20, 20], [40, 40]]
    assert balance_ratio(slots_EN, copies_NE) == pytest.approx(1.0)
    # Rank 0: 60 rows, 40 of them come; rank 1: 60, 20 come. Expert 0 is on both: a ring of two sends its bytes once.
    assert step_seconds(slots_EN, copies_NE, costs(2)) == pytest.approx(3 * 60 / 1e3 + 4 * 40 * 4 / 100)
    assert step_seconds(slots_EN, copies_NE, costs(2, expert_bytes=50)) == pytest.approx(0.18 + 6.4 + 0.5)


def test_the_slowest_link_of_its_ranks_synchronises_an_expert() -> None:
    slots_EN, copies_NE = np.array([[1, 1, 1], [1, 0, 0]]), np.zeros((3, 2), dtype=np.int64)
    links_NN = np.full((3, 3), 100.0)
    links_NN[2, 1] = 10.0
    assert step_seconds(slots_EN, copies_NE, Costs(1e3, 4.0, 30.0, links_NN)) == pytest.approx(4 / 3 * 30 / 10)
    links_NN[2, 1], links_NN[2, 2] = 100.0, 1.0
    assert step_seconds(slots_EN, copies_NE, Costs(1e3, 4.0, 30.0, links_NN)) == pytest.approx(4 / 3 * 30 / 100)


def test_the_most_popular_expert_gets_a_slot_of_the_least_popular_one() -> None:
    slots_EN = np.array([[1, 0], [1, 0], [0, 2]])  # ranks of two slots; expert 2 has two and hardly needs one
    copies_NE = np.array([[40, 10, 2], [40, 10, 2]])
    planned = plan(slots_EN, copies_NE, costs(2, row_bytes=0.0), slots_per_rank=2)
    assert planned.moves == (Shrink(2, 1), Expand(0, 1))
    assert planned.slots_EN.tolist() == [[1, 1], [1, 0], [0, 1]]
    assert arrivals(slots_EN, planned.slots_EN) == [(0, 1)]
    assert slots_EN.tolist() == [[1, 0], [1, 0], [0, 2]], "the present placement stays as it is"


def test_free_slots_are_filled_first_and_no_more_than_pays() -> None:
    slots_EN, copies_NE = np.array([[1, 0], [0, 1]]), np.array([[50, 5], [50, 5]])
    planned = plan(slots_EN, copies_NE, costs(2, row_bytes=0.0), slots_per_rank=3)
    assert planned.moves[0] == Expand(0, 1), "on the rank that has it, it would not even anything out"
    assert balance_ratio(planned.slots_EN, copies_NE) < balance_ratio(slots_EN, copies_NE)
    dear = costs(2, row_bytes=0.0, expert_bytes=1e6)  # to synchronise a replica takes longer than all rows
    assert plan(slots_EN, copies_NE, dear, slots_per_rank=3).moves == ()


def test_replicas_migrate_together_where_synchronising_them_is_dear() -> None:
    slots_EN = np.array([[1, 1], [1, 1]])
    copies_NE = np.array([[20, 20], [20, 20]])  # no expert is the more popular one
    dear = costs(2, row_bytes=0.0, expert_bytes=1e4)
    assert plan(slots_EN, copies_NE, dear, slots_per_rank=2).moves == (), "both ranks have as many rows"
    planned = plan(slots_EN, copies_NE, dear, slots_per_rank=2, balanced=0.5)
    assert planned.moves == (Migrate(0, 0, 1, 1),)
    assert planned.slots_EN.tolist() == [[0, 2], [2, 0]]


def test_without_tokens_nothing_is_done() -> None:
    slots_EN, copies_NE = np.array([[2, 0], [0, 2]]), np.zeros((2, 2), dtype=np.int64)
    assert balance_ratio(slots_EN, copies_NE) == 1.0
    assert plan(slots_EN, copies_NE, costs(2), slots_per_rank=2).moves == ()


def test_who_stays_on_a_rank_stays_in_its_slot() -> None:
    before = [0, 1, 2, 2]
    slots_EN = np.array([[1, 1], [1, 0], [0, 1]])
    assert expert_of_slot(slots_EN, before, 2) == [0, 1, 2, 0]
    assert slots_of([0, 1, 2, 0], 3, 2).tolist() == slots_EN.tolist()


@st.composite
def situations(draw: st.DrawFn) -> tuple[Slots, Copies, Costs, int]:
    """(slots, copies, costs, slots of a rank), perhaps with free slots."""
    num_ranks, num_experts = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    least = -(-num_experts // num_ranks)
    slots_per_rank = draw(st.integers(least, least + 2))
    places = [rank for rank in range(num_ranks) for _ in range(slots_per_rank)]
    order = draw(st.permutations(places))
    slots_EN = np.zeros((num_experts, num_ranks), dtype=np.int64)
    for expert, rank in enumerate(order[: draw(st.integers(num_experts, len(order)))]):
        chosen = expert if expert < num_experts else draw(st.integers(0, num_experts - 1))
        slots_EN[chosen, rank] += 1
    row = st.lists(st.integers(0, 1000), min_size=num_experts, max_size=num_experts)
    copies_NE = np.array(draw(st.lists(row, min_size=num_ranks, max_size=num_ranks)))
    links_NN = np.array(draw(st.lists(st.sampled_from([10.0, 100.0]), min_size=num_ranks**2, max_size=num_ranks**2)))
    expert_bytes = draw(st.sampled_from([0.0, 10.0, 1e4]))
    return slots_EN, copies_NE, Costs(1e3, 0.1, expert_bytes, links_NN.reshape(num_ranks, -1)), slots_per_rank


@settings(max_examples=60)
@given(situations())
def test_a_plan_is_possible_and_never_slower(situation: tuple[Slots, Copies, Costs, int]) -> None:
    slots_EN, copies_NE, known, slots_per_rank = situation
    planned = plan(slots_EN, copies_NE, known, slots_per_rank)
    assert planned.slots_EN.sum(axis=1).min() >= 1, "every expert keeps a slot"
    assert planned.slots_EN.min() >= 0 and planned.slots_EN.sum(axis=0).max() <= slots_per_rank
    assert planned.slots_EN.sum() >= slots_EN.sum(), "a slot that was filled stays so"
    assert (after(slots_EN, planned.moves) == planned.slots_EN).all()
    before_s, after_s = (step_seconds(slots, copies_NE, known) for slots in (slots_EN, planned.slots_EN))
    assert after_s < before_s if planned.moves else after_s == before_s
    if balance_ratio(slots_EN, copies_NE) <= BALANCED:
        assert planned.moves == ()
    assert plan(slots_EN, copies_NE, known, slots_per_rank).moves == planned.moves


@settings(max_examples=60)
@given(situations())
def test_slots_take_a_plan_with_as_few_changes_as_it_needs(situation: tuple[Slots, Copies, Costs, int]) -> None:
    slots_EN, copies_NE, known, slots_per_rank = situation
    free_N = slots_per_rank - slots_EN.sum(axis=0)
    slots_EN = slots_EN.copy()
    slots_EN[0] += free_N  # a table of slots has none that is free
    before = [expert for slots_E in slots_EN.T.tolist() for expert, count in enumerate(slots_E) for _ in range(count)]
    planned = plan(slots_EN, copies_NE, known, slots_per_rank)
    placed = expert_of_slot(planned.slots_EN, before, slots_per_rank)
    assert (slots_of(placed, len(slots_EN), slots_per_rank) == planned.slots_EN).all()
    changed = sum(old != new for old, new in zip(before, placed, strict=True))
    assert changed == np.clip(planned.slots_EN - slots_EN, 0, None).sum()
    for expert, rank in arrivals(slots_EN, planned.slots_EN):
        held = slice(rank * slots_per_rank, (rank + 1) * slots_per_rank)
        assert expert in placed[held] and expert not in before[held]
