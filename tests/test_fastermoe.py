"""FasterMoE: its policies and predictor on cases worked by hand, its variants against flat, its gate's limit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.fastermoe import FasterMoE, group_size_of
from baselines.fastermoe_gate import TopologyGate, outgoing_fraction
from baselines.fastermoe_predictor import (
    CURVES,
    Link,
    Point,
    all_reduce_traffic,
    all_to_all_traffic,
    broadcast_traffic,
    communication_latency_s,
    compute_latency_s,
    compute_over_communication,
    end_to_end_latency_s,
    link_bytes_per_s,
    path,
    roofline_rows,
    throughput_flops_per_s,
)
from baselines.fastermoe_shadow import ShadowCosts, fastmoe_policy, paper_policy
from experiments.launch import run_ranks
from moe.errors import Refused
from moe.gate import balance_loss
from moe.system import LayerSpec
from moe.topology import Cluster, Level, cluster_of
from tests.lone import lone_mesh
from tests.rank_fastermoe import VARIANTS

# One second for every token a rank computes, 1 s for all four exchanges of a token, 2 s for an expert there and back.
COSTS = ShadowCosts(model_dim=1, expert_parameters=4, element_bytes=1, flops_per_s=24, net_bytes_per_s=4)


def counts(*rows: list[int]) -> np.ndarray:
    """[P, E]."""
    return np.array(rows, dtype=np.int64)


def test_the_costs_are_equations_7_and_8() -> None:
    assert (COSTS.compute_s(5), COSTS.exchange_s(5), COSTS.transfer_s(3)) == (5, 5, 3)
    assert COSTS.imbalanced_s(5) == 10
    assert COSTS.shadowed_s(2, 5) == 5 + 2 * 2


def test_paper_policy_by_hand() -> None:
    # Loads 16 and 0: 32 s. Expert 0 shadowed: 8 and 8, 8 + 2 s. Expert 1 has no tokens: 8 + 4 s, no better.
    assert paper_policy(counts([8, 0], [8, 0]), COSTS) == [0]
    # Loads 22, 14, 0: 44 s. Expert 0: 7, 14 + 7, 8 -> 21 + 2. Expert 1: 7 + 7, 21 - 7, 8 -> 14 + 4. Expert 2: + 6.
    assert paper_policy(counts([7, 7, 0], [7, 7, 0], [8, 0, 0]), COSTS) == [0, 1]


def test_a_later_shadow_subtracts_and_does_not_overwrite() -> None:
    """Rank 1 keeps the 20 tokens of expert 0 that it was given when its own expert is shadowed, too."""
    # Loads 40, 30: 80 s. Expert 0: 20, 50 -> 50 + 2. Expert 1: 20 + 30, 50 - 30 -> 50 + 4: no better, and stop.
    assert paper_policy(counts([20, 30], [20, 0]), COSTS) == [0]


def test_several_experts_a_rank_are_moved_one_by_one() -> None:
    # Rank 0 has experts 0, 1. Loads 22, 2: 44 s. Expert 1: 22 - 6, 2 + 6 -> 16 + 2. Expert 0: 16 - 5, 8 + 5 -> 13 + 4.
    assert paper_policy(counts([5, 6, 0, 1], [5, 6, 1, 0]), COSTS) == [1, 0]


def test_fastmoe_policy_by_hand() -> None:
    costs = ShadowCosts(1, 4, element_bytes=2, flops_per_s=24, net_bytes_per_s=16)  # it takes elements of four bytes
    # Sizes 16, 6, 5: 32 s. One shadow: 12 + 1. Two: 10 + 2. The last one never.
    assert fastmoe_policy(counts([10, 3, 5], [3, 3, 0], [3, 0, 0]), costs) == [0, 1]
    assert fastmoe_policy(counts([3, 3, 3], [3, 3, 3], [3, 3, 3]), costs) == []


@pytest.mark.parametrize("policy", [paper_policy, fastmoe_policy])
def test_degenerate_counts(policy: Any) -> None:
    assert policy(counts([0, 0], [0, 0]), COSTS) == []
    assert policy(counts([9, 9]), COSTS) == [], "one rank has nobody to share with"
    equal = counts([1, 1], [1, 1])
    assert policy(equal, ShadowCosts(1, 4, 1, 24, 1e-3)) == policy(equal.copy(), ShadowCosts(1, 4, 1, 24, 1e-3))


@given(
    st.integers(1, 4).flatmap(
        lambda ranks: st.integers(1, 3).flatmap(
            lambda local: st.lists(
                st.lists(st.integers(0, 50), min_size=ranks * local, max_size=ranks * local),
                min_size=ranks,
                max_size=ranks,
            )
        )
    ),
    st.floats(0.1, 1e4),
    st.sampled_from([paper_policy, fastmoe_policy]),
)
def test_a_policy_shadows_the_busiest_and_never_predicts_worse(
    rows: list[list[int]], net_bytes_per_s: float, policy: Any
) -> None:
    counts_PE = np.array(rows, dtype=np.int64)
    before = counts_PE.copy()
    costs = ShadowCosts(1, 4, 1, 24, net_bytes_per_s)
    shadowed = policy(counts_PE, costs)
    assert (counts_PE == before).all()
    busiest = sorted(range(counts_PE.shape[1]), key=lambda expert: -int(counts_PE[:, expert].sum()))
    assert shadowed == busiest[: len(shadowed)]
    if shadowed and policy is paper_policy:
        num_ranks, num_experts = counts_PE.shape
        owner_E = np.arange(num_experts) // (num_experts // num_ranks)
        loads = [
            sum(
                int(counts_PE[rank, expert]) if expert in shadowed else int(counts_PE[:, expert].sum())
                for expert in range(num_experts)
                if expert in shadowed or owner_E[expert] == rank
            )
            for rank in range(num_ranks)
        ]
        unshadowed = max(counts_PE[:, owner_E == rank].sum() for rank in range(num_ranks))
        assert costs.shadowed_s(len(shadowed), max(loads)) < costs.imbalanced_s(int(unshadowed))


# The predictor

# Two nodes of two ranks; 10 B/s inside a node, 1 B/s for each rank between nodes, so 2 B/s for a node's link.
CLUSTER = Cluster("tried", (Level("self", 1), Level("node", 2, 0.0, 0.1), Level("network", 2, 0.0, 1.0)))


def test_a_path_goes_up_and_down() -> None:
    assert path(CLUSTER, 1, 1) == []
    assert path(CLUSTER, 0, 1) == [Link(0, 0, True), Link(0, 1, False)]
    assert path(CLUSTER, 1, 2) == [Link(0, 1, True), Link(1, 0, True), Link(1, 1, False), Link(0, 2, False)]
    assert link_bytes_per_s(CLUSTER, Link(0, 0, True)) == pytest.approx(10)
    assert link_bytes_per_s(CLUSTER, Link(1, 0, True)) == pytest.approx(2)
    with pytest.raises(ValueError, match="level node of cluster ad_hoc has no beta_s_per_byte"):
        link_bytes_per_s(cluster_of([2, 2]), Link(0, 0, True))


def test_traffic_adds_up_on_directed_links() -> None:
    traffic = all_to_all_traffic(CLUSTER, np.full((4, 4), 5.0))
    assert traffic[Link(0, 0, True)] == traffic[Link(0, 0, False)] == 3 * 5
    assert traffic[Link(1, 0, True)] == traffic[Link(1, 1, False)] == 4 * 5
    assert communication_latency_s(CLUSTER, traffic) == pytest.approx(20 / 2)
    one_way = np.zeros((4, 4))
    one_way[0, 1] = 5
    assert all_to_all_traffic(CLUSTER, one_way) == {Link(0, 0, True): 5, Link(0, 1, False): 5}
    assert all_reduce_traffic(CLUSTER, 8)[Link(1, 0, True)] == pytest.approx(2 * 3 / 4 * 8)
    assert broadcast_traffic(CLUSTER, 8)[Link(1, 0, True)] == 8
    assert communication_latency_s(CLUSTER, {}) == 0


def test_equations_1_3_and_4() -> None:
    compute_s = compute_latency_s([3, 5], expert_parameters=8, flops_per_s=10)  # 2 alpha H^2 = 8
    assert compute_s == 4 * 5 * 4 / 10
    assert compute_over_communication(compute_s, 2.0) == 4
    assert compute_over_communication(compute_s, 0.0) == float("inf")
    assert end_to_end_latency_s(compute_s, 2.0) == 3 * 8 + 4 * 2
    assert throughput_flops_per_s([3, 5], 8, 32.0) == 12 * 4 * 8 / (2 * 32)


def test_equations_5_and_6_and_their_3_to_4_forms() -> None:
    ratio = np.array([0.5, 1.0, 4.0])
    found = {curve.name: curve.flops_per_s(ratio, 12.0).tolist() for curve in CURVES}
    assert found["ideal (5)"] == pytest.approx([6, 12, 12])
    assert found["semi-ideal (6)"] == pytest.approx([4, 6, 9.6])
    assert found["ideal, 3 : 4"] == pytest.approx([4.5, 9, 12])
    assert found["semi-ideal, 3 : 4"] == pytest.approx([12 * 1.5 / 5.5, 12 * 3 / 7, 9])


def test_balanced_synchronous_training_lies_on_the_3_to_4_curve() -> None:
    peak, communication_s = 10.0, 0.7
    compute_s = compute_latency_s([5, 5], 8, peak)
    achieved = throughput_flops_per_s([5, 5], 8, end_to_end_latency_s(compute_s, communication_s))
    ratio = np.array([compute_over_communication(compute_s, communication_s)])
    assert achieved == pytest.approx(CURVES[3].flops_per_s(ratio, peak)[0])


def test_the_table_of_the_roofline_holds_points_and_curves() -> None:
    rows = roofline_rows([Point("flat", 0.2, 1e12, "measured")], 1e13, num_samples=9)
    assert [row["name"] for row in rows if row["what"] == "point"] == ["flat"]
    assert {row["name"] for row in rows if row["what"] == "curve"} == {curve.name for curve in CURVES}
    assert len(rows) == 1 + 9 * len(CURVES)
    assert min(float(row["ratio"]) for row in rows) < 0.2 < 1 < max(float(row["ratio"]) for row in rows)


# The layer


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What four ranks of two nodes recorded."""
    logs = tmp_path_factory.mktemp("fastermoe")
    return run_ranks("tests.rank_fastermoe:measure", {}, num_ranks=4, ranks_per_node=2, log_dir=logs, timeout_s=60)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_computes_what_flat_computes(variant: str, facts: dict[str, list[dict[str, Any]]]) -> None:
    for rank, told in enumerate(facts["variants"]):
        wrong = {name: error for name, error in told[variant]["errors"].items() if not error <= 1e-5}
        assert not wrong, f"rank {rank}: {wrong}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_shadows_are_agreed_on_and_used(variant: str, facts: dict[str, list[dict[str, Any]]]) -> None:
    shadowed = [told[variant]["shadowed"] for told in facts["variants"]]
    assert all(others == shadowed[0] for others in shadowed)
    assert bool(shadowed[0]) == (VARIANTS[variant].get("shadowing") != "none")


@pytest.mark.parametrize("variant", VARIANTS)
def test_meters_count_what_is_sent(variant: str, facts: dict[str, list[dict[str, Any]]]) -> None:
    """The rows of an all-to-all where nothing is shadowed, fewer where something is."""
    sent = [sum(dict(told[variant]["alltoall"]).values()) for told in facts["variants"]]
    # flat also sends its counts by all-to-all: 8 int64 from each rank.
    flat = [sum(dict(told["flat"]["alltoall"]).values()) - 8 * 8 for told in facts["variants"]]
    if VARIANTS[variant].get("shadowing") == "none":
        assert sent == flat
    else:
        assert sum(sent) < sum(flat)


def test_the_gate_never_sends_more_than_its_limit(facts: dict[str, list[dict[str, Any]]]) -> None:
    for told in facts["gate"]:
        assert told["limit"] == 5
        assert told["leaving"] <= 5 < told["leaving under plain top-2"], told
        assert told["distinct"] and told["finite"]


# The gate, in one process


def gate_of(fraction: float, num_experts: int = 8) -> TopologyGate:
    """Of rank 0 of two nodes of two ranks."""
    mesh = replace(lone_mesh(4), cluster=cluster_of([2, 2]))
    return TopologyGate(LayerSpec(16, 8, num_experts, 2), mesh, fraction)


def test_the_highest_scores_go() -> None:
    gate = gate_of(0.5, num_experts=4)  # experts 0 and 1 are near
    probs_TE = torch.tensor(
        [
            [0.10, 0.05, 0.60, 0.25],  # wants out, second highest
            [0.05, 0.10, 0.15, 0.70],  # wants out, highest
            [0.20, 0.15, 0.40, 0.25],  # wants out, too low
            [0.50, 0.10, 0.30, 0.10],  # its second choice is remote
        ]
    )
    assert gate.choose(probs_TE).tolist() == [[2, 0], [3, 1], [0, 1], [0, 1]]
    assert gate_of(1.0, num_experts=4).choose(probs_TE).tolist() == [[2, 3], [3, 2], [2, 3], [0, 2]]
    assert gate_of(0.0, num_experts=4).choose(probs_TE).tolist() == [[0, 1], [1, 0], [0, 1], [0, 1]]
    first = probs_TE.argmax(1, keepdim=True)
    assert gate.aux_loss(probs_TE, gate.choose(probs_TE)) == balance_loss(probs_TE, first)


def test_equal_scores_go_in_the_order_of_tokens() -> None:
    probs_TE = torch.tensor([[0.1, 0.1, 0.5, 0.3]] * 4)
    assert gate_of(0.5, num_experts=4).choose(probs_TE)[:, 0].ge(2).tolist() == [True, True, False, False]


@given(
    st.integers(0, 30),
    st.sampled_from([0.0, 0.14, 0.25, 0.5, 1.0]),
    st.integers(0, 2**32 - 1),
)
def test_no_routing_exceeds_the_limit(num_tokens: int, fraction: float, seed: int) -> None:
    gate = gate_of(fraction)
    probs_TE = torch.randn(num_tokens, 8, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(1)
    ids_TK = gate.choose(probs_TE)
    assert int((ids_TK >= 4).any(1).sum()) <= gate.limit(num_tokens) <= fraction * num_tokens + 1e-6
    assert bool((ids_TK[:, 0] != ids_TK[:, 1]).all())


def test_the_fraction_is_the_paper_s_from_the_costs() -> None:
    assert outgoing_fraction(CLUSTER) == pytest.approx(0.1)  # W_net / (M W_local) = 2 / (2 * 10)
    assert outgoing_fraction(cluster_of([4])) == 1
    assert outgoing_fraction(cluster_of([2, 2])) is None


# Options


SPEC = LayerSpec(16, 8, 8, 2)


def test_group_sizes() -> None:
    def size(options: dict[str, Any], fanouts: list[int], num_ranks: int) -> int:
        return group_size_of(FasterMoE(options).options, cluster_of(fanouts), num_ranks)

    assert size({}, [2, 2], 4) == 2
    assert size({}, [4, 2], 2) == 2, "an expert-parallel group inside a node"
    assert size({}, [4], 4) == 4
    assert size({"group_size": 1}, [2, 2], 4) == 1
    assert size({"group_size": 8}, [2, 2], 4) == 4
    assert size({"schedule": "none"}, [2, 2], 4) == 4
    with pytest.raises(Refused, match="group_size=3 must divide the 4 ranks"):
        size({"group_size": 3}, [2, 2], 4)


@pytest.mark.parametrize(
    ("options", "spec", "reason"),
    [
        ({"group_size": 3}, SPEC, "must divide"),
        ({"topology_gate": True, "outgoing_fraction": 0.5}, LayerSpec(16, 8, 8, 1), "top_k=1"),
        ({"topology_gate": True, "outgoing_fraction": 0.5}, LayerSpec(16, 8, 2, 2), "two experts in every node"),
        ({"topology_gate": True}, SPEC, "give outgoing_fraction or a measured cluster"),
    ],
)
def test_what_cannot_run_is_refused(options: dict[str, Any], spec: LayerSpec, reason: str) -> None:
    (refusal,) = FasterMoE(options).refusals(spec, cluster_of([2, 2]))
    assert reason in refusal
    assert refusal.endswith(".")


def test_what_can_run_is_not_refused() -> None:
    assert FasterMoE().refusals(SPEC, cluster_of([2, 2])) == []
    assert FasterMoE({"topology_gate": True}).refusals(SPEC, CLUSTER) == []
