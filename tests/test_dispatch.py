"""The dispatchers on four ranks: every kept copy arrives once, at its expert, and comes back."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from typing import Any

import pytest

from tests.rank_parts import PEER_LAYERS, dispatch_cases

Facts = list[dict[str, Any]]
CASES = list(dispatch_cases(0))


@pytest.fixture(params=["dispatch", "peer_dispatch"])
def dispatcher(request: pytest.FixtureRequest, rank_facts: dict[str, Facts]) -> Facts:
    """Facts of one dispatcher, by rank."""
    return rank_facts[request.param]


@pytest.fixture
def case(request: pytest.FixtureRequest, dispatcher: Facts) -> Facts:
    """Facts of one case, by rank."""
    return [facts[request.param] for facts in dispatcher]


def copies_for(expert: int, group: int, case: Facts) -> Counter[tuple[int, int]]:
    """(rank, token) of every kept copy that chose the expert in that expert-parallel group."""
    return Counter(
        (rank, token)
        for rank, facts in enumerate(case)
        if facts["group"] == group
        for token, (experts, kept) in enumerate(zip(facts["ids"], facts["kept"], strict=True))
        for chosen, is_kept in zip(experts, kept, strict=True)
        if is_kept and chosen == expert
    )


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_each_expert_gets_exactly_the_copies_that_chose_it(case: Facts) -> None:
    for facts in case:
        for expert, rows in zip(facts["experts"], facts["arrived"], strict=True):
            assert Counter(tuple(row) for row in rows) == copies_for(expert, facts["group"], case)


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_rows_are_conserved(case: Facts) -> None:
    num_kept = sum(sum(map(sum, facts["kept"])) for facts in case)
    for told in ("send_rows", "receive_rows"):
        assert sum(sum(facts[told]) for facts in case) in {num_kept, 0 if case[0][told] == [] else num_kept}
    assert sum(len(rows) for facts in case for rows in facts["arrived"]) == num_kept
    for facts in case:
        assert facts["expert_ends"] == list(accumulate(len(rows) for rows in facts["arrived"]))


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_there_and_back_multiplies_by_the_kept_weights(case: Facts) -> None:
    for facts in case:
        for name in ("round_trip_error", "input_grad_error", "weight_grad_error"):
            assert facts[name] < 1e-5, name


def test_the_cases_are_what_their_names_say(rank_facts: dict[str, Facts]) -> None:
    facts = rank_facts["dispatch"]
    assert facts[3]["a rank without tokens"]["ids"] == []
    assert [len(rank["all to one expert"]["arrived"][1]) for rank in facts] == [0, 0, 28, 0]
    assert any(not rows for rank in facts for rows in rank["idle experts"]["arrived"])
    assert any(False in kept for rank in facts for kept in rank["dropped copies"]["kept"])
    assert sum(sum(rank["all dropped"]["send_rows"]) for rank in facts) == 0
    assert [rank["two groups"]["experts"] for rank in facts] == [[0, 1], [2, 3], [0, 1], [2, 3]]


def test_layers_over_shared_memory_equal_the_oracle(rank_facts: dict[str, Facts]) -> None:
    """Top-2 with drops loses the same copies as the oracle."""
    for facts in rank_facts["peer_layers"]:
        for name, found in facts.items():
            assert max(found["errors"]) < 1e-5, name


def test_the_host_waits_for_numbers_of_rows_only_where_room_for_the_most_would_be_wasted(
    rank_facts: dict[str, Facts],
) -> None:
    for facts in rank_facts["peer_layers"]:
        assert facts["top2 drops, by ends"]["told"] == [False, False]
        assert facts["top2 with much room, by ends"]["told"] == [True, True]


@pytest.mark.parametrize("drop", ["per_source", "global"])
def test_replicas_find_room_whatever_ranks_have(drop: str, rank_facts: dict[str, Facts]) -> None:
    """Four slots a rank, each with room for its capacity, one more for rounding, of four ranks of up to 48 tokens."""
    ranks = [facts[drop] for facts in rank_facts["peer_room"]]
    assert sum(facts["taken"] for facts in ranks) == sum(facts["kept"] for facts in ranks)
    for facts in ranks:
        assert facts["room"] == facts["laid out"] == 4 * 4 * (3 + 1)
        assert facts["taken"] <= 4 * 4 * 3 and facts["places"] and not facts["host knows"]
    assert max(facts["taken"] for facts in ranks) > 4 * 2 * 3, "more than two ranks' full queues"
    assert sum(facts["kept"] for facts in ranks) < 116, "some were dropped"


def test_a_token_crosses_once_to_each_rank(rank_facts: dict[str, Facts]) -> None:
    """Rows of 64 bytes there, back, and both again for the gradients; each token's weights with it and their gradients
    back, 4 bytes a choice; all ids of 8 bytes twice to every rank."""
    ranks = rank_facts["peer_layers"]
    for name, kwargs in PEER_LAYERS.items():
        if "capacity_factor" in kwargs:
            continue
        top_k = kwargs["top_k"]
        for turn in range(2):
            pairs = [facts[name]["pairs"][turn] for facts in ranks]
            for me, facts in enumerate(ranks):
                out, back = sum(pairs[me]), sum(row[me] for row in pairs)
                copies_here = sum(facts[name]["copies"][turn][me] for facts in ranks)
                along = 4 * top_k * out + 4 * copies_here + 4 * 12 * top_k * 16
                assert facts[name]["sent"][turn] == 2 * 64 * (out + back) + along


def test_nobody_writes_what_another_still_reads(rank_facts: dict[str, Facts]) -> None:
    """Barriers beyond a layer's own two each way stand just where an unusual order needs them."""
    for facts in rank_facts["peer_order"]:
        assert facts["barriers"] == {
            "forward": 2,
            "forward and backward": 4,
            "again": 4,
            "two dispatches, then two combines": 2 + 1 + 2 + 1,
            "no gradient of tokens, then forward": 3 + 1 + 2,
        }
        assert facts["plan is freed"]
