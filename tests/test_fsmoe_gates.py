"""FSMoE's gates on four ranks against their formulas, written token by token in tests/rank_fsmoe_gates.py."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from experiments.launch import run_ranks
from methods.fsmoe import FSMoE
from moe.topology import cluster_of
from tests.contract import is_plain_sentence
from tests.rank_fsmoe_gates import CASES, NUM_EXPERTS, NUM_TOKENS

Facts = dict[str, Any]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Facts]]:
    """What the ranks recorded, by case and rank."""
    return run_ranks(
        "tests.rank_fsmoe_gates:measure",
        {},
        num_ranks=4,
        ranks_per_node=2,
        log_dir=tmp_path_factory.mktemp("gates"),
        timeout_s=60,
    )


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_the_formula_s(name: str, facts: dict[str, list[Facts]]) -> None:
    for found in facts[name]:
        wrong = {part: error for part, error in found["errors"].items() if not error < 1e-5}
        assert not wrong
        assert {"output", "balance loss", "input gradient", "gradient of weight"} < found["errors"].keys()


@pytest.mark.parametrize("name", CASES)
def test_copies_are_counted(name: str, facts: dict[str, list[Facts]]) -> None:
    case = CASES[name]
    for found in facts[name]:
        assert found["counts"] == found["expected_counts"]
        assert found["dropped"] == found["expected_dropped"]
        assert found["repeats"], "in evaluation nothing is drawn"
        assert found["tells"] == (case.gate not in ("expert_choice", "soft"))
        if case.gate in ("expert_choice", "soft"):
            assert found["rows"] == sum(found["counts"])
    if "drops" in name:
        assert all(found["dropped"] > 0 for found in facts[name])


def test_gates_have_the_parameters_of_their_formulas(facts: dict[str, list[Facts]]) -> None:
    errors = {name: facts[name][0]["errors"] for name in CASES}
    assert "gradient of noise_weight" in errors["gshard"]
    assert "gradient of projection" in errors["xmoe"]
    assert "gradient of others" in errors["soft, three slots"]


def test_expert_choice_leaves_tokens_out_where_experts_take_few(facts: dict[str, list[Facts]]) -> None:
    found = facts["expert choice, capacity"]
    assert all(0 < rank["dropped"] < 2 * NUM_TOKENS for rank in found)
    assert all(sum(rank["counts"]) == NUM_EXPERTS * -(-NUM_TOKENS // NUM_EXPERTS) for rank in found)


def test_a_path_says_gate_and_order(facts: dict[str, list[Facts]]) -> None:
    path = "fsmoe, SigmoidGate, dense order, chunks 3 forward, 2 backward; expert by expert"
    assert facts["sigmoid, drops, dense order"][0]["path"] == path


def test_softmoe_refuses_a_capacity() -> None:
    spec = CASES["expert choice, capacity"].spec
    (reason,) = FSMoE({"gate": "soft"}).refusals(spec, cluster_of([4]))
    assert is_plain_sentence(reason) and "capacity_factor=0.5" in reason and "gate_slots" in reason
    assert FSMoE({"gate": "expert_choice"}).refusals(spec, cluster_of([4])) == []


def test_options_of_another_gate_are_refused() -> None:
    with pytest.raises(ValidationError, match="gate_slots belongs to gate=soft, and gate is xmoe; leave gate_slots"):
        FSMoE({"gate": "xmoe", "gate_slots": 2})
    with pytest.raises(ValidationError, match="gate_dim belongs to gate=xmoe"):
        FSMoE({"gate_dim": 4})
    with pytest.raises(ValidationError, match="gate_temperature"):
        FSMoE({"gate": "xmoe", "gate_temperature": 0})


def test_only_the_suite_s_gate_has_an_oracle() -> None:
    assert not FSMoE().own_gate
    assert FSMoE({"gate": "gshard"}).own_gate
