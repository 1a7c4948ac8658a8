"""Experts that change places: rules of placement, and training that does not notice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.gate import Routing
from moe.load_balance import greedy_placement
from moe.placement import Placement
from tests.rank_placement import SYSTEMS

HOME = list(range(8))


def loads(counts_E: list[float], expert_of_slot: list[int], num_ranks: int) -> list[float]:
    """Sum of each rank."""
    size = len(expert_of_slot) // num_ranks
    return [sum(counts_E[e] for e in expert_of_slot[r * size : (r + 1) * size]) for r in range(num_ranks)]


def test_greedy_placement_pairs_heavy_with_light() -> None:
    counts = [9.0, 8.0, 2.0, 1.0]
    assert greedy_placement(counts, [0, 1, 2, 3], 2) == [0, 3, 2, 1], "9 + 1 and 8 + 2; who stays keeps its slot"


def test_nothing_moves_without_gain() -> None:
    assert greedy_placement([5.0, 1.0, 5.0, 1.0], [0, 1, 2, 3], 2) == [0, 1, 2, 3]
    assert greedy_placement([1.0] * 8, HOME[::-1], 4) == HOME[::-1]
    assert greedy_placement([0.0] * 8, HOME, 2) == HOME


@given(st.lists(st.integers(0, 1000), min_size=8, max_size=8), st.permutations(HOME), st.sampled_from([1, 2, 4, 8]))
def test_greedy_placement_is_a_permutation_and_never_worse(
    counts: list[int], places: list[int], num_ranks: int
) -> None:
    counts_E = [float(count) for count in counts]
    after = greedy_placement(counts_E, places, num_ranks)
    assert sorted(after) == HOME
    before = max(loads(counts_E, places, num_ranks))
    assert after == places or max(loads(counts_E, after, num_ranks)) < before


def test_a_placement_gives_slots() -> None:
    placement = Placement(3, torch.device("cpu"))
    placement.set([2, 0, 1])
    ids_TK, none = torch.tensor([[0, 2], [1, 0]]), torch.zeros(())
    routing = Routing(ids_TK, torch.ones(2, 2), None, torch.ones(2, 3) / 3, torch.tensor([2, 1, 1]), none)
    placed = placement.place(routing, remember=False)
    assert placed.expert_ids_TK.tolist() == [[1, 0], [2, 1]]
    assert placed.counts_E.tolist() == [1, 2, 1]
    assert placement.slots_TK is None and placement.loads == []
    for _ in range(3):
        placement.place(routing, remember=True)
    assert [load.tolist() for load in placement.loads] == [[2, 1, 1]] * 2, "by expert, of two calls"


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What four ranks recorded."""
    from experiments.launch import run_ranks

    folder = tmp_path_factory.mktemp("placement")
    return run_ranks(
        "tests.rank_placement:measure",
        {"folder": str(folder / "checkpoints")},
        num_ranks=4,
        ranks_per_node=2,
        log_dir=folder / "logs",
        timeout_s=60,
    )


@pytest.mark.parametrize("name", SYSTEMS)
def test_training_with_moves_is_training_without(name: str, facts: list[dict[str, Any]]) -> None:
    for rank in facts:
        found = rank["errors"][name]
        assert found["moves"] > 0, "a test of nothing"
        assert found["loss"] < 1e-5 and found["tensors"] < 1e-5, found
        assert found["places"] == facts[0]["errors"][name]["places"], "ranks disagree"


@pytest.mark.parametrize("name", ["shuffled", "swap"])
def test_replicas_move_alike(name: str, facts: list[dict[str, Any]]) -> None:
    for rank in facts:
        found = rank["replicated"][name]
        assert found["moves"] > 0 and found["loss"] < 1e-5 and found["tensors"] < 1e-5, found
        assert found["places"] == facts[0]["replicated"][name]["places"]


def test_checkpoints_know_experts_not_slots(facts: list[dict[str, Any]]) -> None:
    seen: dict[str, set[int]] = {"smartmoe": set(), "flat": set()}
    for rank in facts:
        found = rank["checkpoint"]
        assert found["smartmoe"]["places"] == [3, 0, 7, 1, 2, 6, 5, 4], "experts are where they were"
        assert found["flat"]["places"] is None
        assert found["home"] == HOME, "a checkpoint without places"
        for name, experts in seen.items():
            assert all(value == float(expert) for expert, value in found[name]["experts"].items())
            experts |= set(map(int, found[name]["experts"]))
    assert seen == {"smartmoe": set(HOME), "flat": set(HOME)}


def test_the_model_chooses_the_levels(facts: list[dict[str, Any]]) -> None:
    for rank in facts:
        before, modelled, chosen, path = rank["levels"]["uneven"]
        assert before == {} and modelled["2"] < modelled["1"] and chosen == 2
        assert path.startswith("all-to-all-v on 2 levels, a token once per group")
        _, modelled, chosen, path = rank["levels"]["even"]
        assert modelled["1"] < modelled["2"] and chosen == 1
        assert path.startswith("all-to-all-v on 1 level, a token once per group")


def test_the_model_is_asked_again(facts: list[dict[str, Any]]) -> None:
    """Every so many steps, of what is routed then."""
    assert all(rank["levels"]["later"] == [True, True, True] for rank in facts)


def test_swaps_bring_together_what_is_chosen_together(facts: list[dict[str, Any]]) -> None:
    """At first every token goes to both nodes, at last to one."""
    for rank in facts:
        sent, modelled = rank["swaps"]["sent"], rank["swaps"]["modelled"]
        assert sent == facts[0]["swaps"]["sent"]
        assert sent[-1] < 0.6 * sent[0]
        assert modelled == sorted(modelled, reverse=True) and modelled[-1] < modelled[0]
