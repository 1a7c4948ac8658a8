"""Gradients of four ranks after reduction and clipping equal those of one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest

Facts = list[dict[str, Any]]


@pytest.fixture(params=["4", "2"], ids=["ep4", "ep2"])
def facts(request: pytest.FixtureRequest, rank_facts: dict[str, Facts]) -> Facts:
    """Facts by rank, with experts spread over 4 ranks, or over 2 and twice."""
    return [rank[request.param] for rank in rank_facts["sync"]]


def test_reduced_gradients_are_the_whole_batchs(facts: Facts) -> None:
    seen: set[str] = set()
    for rank in facts:
        for name, error in rank["errors"].items():
            assert error < 1e-5, name
        seen |= set(rank["errors"])
    assert {"weight", "bias", "rare", "gate"} <= seen
    assert {f"expert {expert} {name}" for expert in range(8) for name in ("w1", "w2")} <= seen


def test_a_parameter_unused_on_some_ranks_takes_part(facts: Facts) -> None:
    assert [rank["unused_before"] for rank in facts] == [True, False, True, True]
    assert all("rare" in rank["errors"] for rank in facts)


def test_norm_counts_every_parameter_of_the_model_once(facts: Facts) -> None:
    for rank in facts:
        assert max(rank["norm_errors"]) < 1e-5


def test_clipping_scales_to_the_norm_asked_for_and_no_further(facts: Facts) -> None:
    for rank in facts:
        assert rank["clip 0 leaves"]
        assert rank["loose_error"] < 1e-5, "gradients within the norm are left alone"
        assert rank["tight_error"] < 1e-5
        assert rank["norm_after"] == pytest.approx(1 / 3, rel=1e-5)
