"""The all-to-all-v dispatcher on four ranks: every kept copy arrives once, at its expert, and comes back."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.rank_parts import dispatch_cases

Facts = list[dict[str, Any]]
CASES = list(dispatch_cases(0))


@pytest.fixture
def case(request: pytest.FixtureRequest, rank_facts: dict[str, Facts]) -> Facts:
    """Facts of one case, by rank."""
    return [facts[request.param] for facts in rank_facts["dispatch"]]


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
    assert sum(sum(facts["send_rows"]) for facts in case) == num_kept
    assert sum(sum(facts["receive_rows"]) for facts in case) == num_kept
    assert sum(len(rows) for facts in case for rows in facts["arrived"]) == num_kept


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
