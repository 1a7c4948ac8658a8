"""TA-MoE: its target against the exact program, its loss against the plain one; gates and capacities on four ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from methods.ta_moe import Options, StaticCapacities, TAMoE, TopologyGate, missing_costs, target_shares
from methods.ta_moe_target import balanced, closed_form, exact, exchange_s, penalties, smooth, tree_levels
from moe.costs import pair_costs
from moe.gate import TopKGate, balance_loss
from moe.system import LayerSpec
from moe.topology import Cluster, Level, cluster_of
from moe.weights import gate_matrix
from tests.lone import lone_mesh
from tests.rank_ta_moe import CLUSTER, TARGET_FAR_SHARE

SPEC = LayerSpec(model_dim=16, hidden_dim=16, num_experts=8, top_k=2)


def cluster(fanouts: list[int], betas: list[float], copy: float | None = None) -> Cluster:
    """Of levels with costs and no latency."""
    levels = [Level(f"of {fanout}", fanout, 0.0, beta) for fanout, beta in zip(fanouts, betas, strict=True)]
    return Cluster("made", (Level("self", 1, None if copy is None else 0.0, copy), *levels))


SYMMETRIC = {
    "one level": cluster([8], [1e-9]),
    "two nodes": cluster([2, 2], [1e-9, 8e-9]),
    "four nodes": cluster([4, 4], [1e-9, 8e-9]),
    "three levels": cluster([2, 3, 2], [1e-9, 3e-9, 2e-8]),
    "own copies": cluster([2, 2], [1e-9, 8e-9], 1e-10),
}


@pytest.mark.parametrize("made", SYMMETRIC.values(), ids=SYMMETRIC.keys())
def test_closed_form_is_the_programs_optimum_on_symmetric_clusters(made: Cluster) -> None:
    alpha_PP, beta_PP = pair_costs(made, range(made.world_size))
    shares_PP = closed_form(beta_PP)
    best_s = exact(alpha_PP, beta_PP, 1e8)[1]
    assert exchange_s(shares_PP, alpha_PP, beta_PP, 1e8) == pytest.approx(best_s, rel=1e-6)
    np.testing.assert_allclose(shares_PP.sum(0), 1, rtol=1e-12)


@pytest.mark.parametrize(("nodes", "ratio"), [(2, 8.0), (4, 8.0), (2, 1.0)])
def test_predicted_speed_up_of_two_levels(nodes: int, ratio: float) -> None:
    """(r + n - 1) / n: even dispatch over the target, n nodes, inter-node links r times as dear."""
    made = cluster([2, nodes], [1e-9, ratio * 1e-9])
    alpha_PP, beta_PP = pair_costs(made, range(made.world_size))
    even_PP = np.full_like(beta_PP, 1 / len(beta_PP))
    gain = exchange_s(even_PP, alpha_PP, beta_PP, 1e8) / exchange_s(closed_form(beta_PP), alpha_PP, beta_PP, 1e8)
    assert gain == pytest.approx((ratio + nodes - 1) / nodes)


def test_levels_of_an_asymmetric_tree() -> None:
    assert tree_levels([2, 2]).tolist() == [[0, 1, 2, 2], [1, 0, 2, 2], [2, 2, 0, 1], [2, 2, 1, 0]]
    levels_PP = tree_levels([[2, 2], [2]])
    assert levels_PP[0].tolist() == [0, 1, 2, 2, 3, 3]
    assert levels_PP[5].tolist() == [3, 3, 3, 3, 1, 0]
    assert tree_levels(3).tolist() == [[0, 1, 1], [1, 0, 1], [1, 1, 0]]


def test_asymmetric_trees_are_balanced_and_between_even_and_best() -> None:
    beta_PP = np.choose(tree_levels([[2, 2], [2]]), [1.0, 1.0, 3.0, 9.0])
    shares_PP = balanced(closed_form(beta_PP))
    np.testing.assert_allclose(shares_PP.sum(0), 1, rtol=1e-9)
    np.testing.assert_allclose(shares_PP.sum(1), 1, rtol=1e-9)
    zeros_PP, even_PP = np.zeros_like(beta_PP), np.full_like(beta_PP, 1 / 6)
    best_shares_PP, best_s = exact(zeros_PP, beta_PP, 1.0)
    found_s = exchange_s(shares_PP, zeros_PP, beta_PP, 1.0)
    assert best_s <= found_s < 1.05 * best_s < exchange_s(even_PP, zeros_PP, beta_PP, 1.0)
    assert exchange_s(best_shares_PP, zeros_PP, beta_PP, 1.0) == pytest.approx(best_s)


@given(
    st.lists(st.lists(st.floats(0.1, 10.0), min_size=4, max_size=4), min_size=4, max_size=4),
    st.floats(0, 1),
)
def test_the_program_is_no_worse_than_any_balanced_shares(betas: list[list[float]], alpha: float) -> None:
    beta_PP, alpha_PP = np.array(betas), np.full((4, 4), alpha)
    shares_PP, best_s = exact(alpha_PP, beta_PP, 1.0)
    np.testing.assert_allclose(shares_PP.sum(0), 1, atol=1e-6)
    np.testing.assert_allclose(shares_PP.sum(1), 1, atol=1e-6)
    assert best_s <= exchange_s(balanced(closed_form(beta_PP)), alpha_PP, beta_PP, 1.0) * (1 + 1e-6)


def test_smoothing_leaves_one_cost_a_level() -> None:
    levels_PP = tree_levels([2, 2])
    noisy_PP = np.choose(levels_PP, [0.5, 1.0, 8.0]) * (1 + 0.1 * np.arange(16).reshape(4, 4) / 16)
    smoothed_PP = smooth(noisy_PP, levels_PP)
    assert [len(np.unique(smoothed_PP[levels_PP == level])) for level in range(3)] == [1, 1, 1]
    assert smoothed_PP[0, 1] == pytest.approx(noisy_PP[levels_PP == 1].mean())


@pytest.mark.parametrize("norm", ["sum", "softmax"])
def test_penalties_have_mean_one_and_grow_with_distance(norm: str) -> None:
    penalties_PP = penalties(target_shares(Options(), CLUSTER, [0, 1, 2, 3]), norm)
    np.testing.assert_allclose(penalties_PP.mean(1), 1)
    assert penalties_PP[0, 0] == pytest.approx(penalties_PP[0, 1])
    assert penalties_PP[0, 1] < 1 < penalties_PP[0, 2] == pytest.approx(penalties_PP[0, 3])


def test_the_loss_is_least_at_the_target() -> None:
    """sum_e p_e m_e^2 with p = 1 / c_hat, over m that sum to 1."""
    shares_P = target_shares(Options(), CLUSTER, [0, 1, 2, 3])[0]
    penalty_P = penalties(shares_P[None], "sum")[0]
    at_target = (penalty_P * shares_P**2).sum()
    generator = np.random.default_rng(0)
    for _ in range(200):
        other_P = generator.dirichlet(np.ones(4))
        assert (penalty_P * other_P**2).sum() >= at_target


def test_where_all_is_equally_dear_it_is_plain_moe() -> None:
    mesh = lone_mesh()
    x_TM = torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    plain, gate = TopKGate(SPEC, mesh.device), TopologyGate(SPEC, mesh, None, None, False, 10.0)
    for one in (plain, gate):
        one.weight.data.copy_(gate_matrix(SPEC, mesh.device))
    assert torch.equal(gate(x_TM).aux_loss, plain(x_TM).aux_loss)
    one_level = cluster_of([4])
    assert missing_costs(Options(), one_level) == []
    assert (target_shares(Options(), one_level, [0, 1, 2, 3]) == 0.25).all()
    layer = TAMoE().build_layer(SPEC, mesh)
    assert layer.local_parameters() == {}


def test_penalties_weigh_the_plain_loss() -> None:
    probs_TE = torch.rand(20, 8, generator=torch.Generator().manual_seed(0)).softmax(1)
    ids_TK = probs_TE.topk(2).indices
    ones = torch.ones(8)
    assert torch.equal(balance_loss(probs_TE, ids_TK, ones), balance_loss(probs_TE, ids_TK))
    uniform_TE = torch.full((8, 8), 1 / 8)
    each_once_TK = torch.arange(8).view(8, 1)
    penalty_E = torch.tensor([0.2, 0.2, 0.2, 0.2, 1.8, 1.8, 1.8, 1.8])
    assert balance_loss(uniform_TE, each_once_TK, penalty_E) == pytest.approx(1.0)


def test_static_capacities_sum_to_what_a_rank_sends_and_an_expert_takes() -> None:
    spec = LayerSpec(16, 16, 8, 2, capacity_factor=1.0)
    shares_PP = target_shares(Options(), CLUSTER, [0, 1, 2, 3])
    slots_PE = StaticCapacities(spec, shares_PP)(1000)
    assert slots_PE.shape == (4, 8)
    assert StaticCapacities(spec, np.full((4, 4), 0.25))(1).max() == 1, "a token chooses an expert at most once"
    assert slots_PE[0].tolist() == [450, 450, 450, 450, 50, 50, 50, 50]
    assert slots_PE.sum(0).tolist() == [1000] * 8 and slots_PE.sum(1).tolist() == [2000] * 4
    assert StaticCapacities(spec, shares_PP)(1).min() == 1, "no pair without a slot"


@pytest.mark.parametrize(
    ("options", "made", "capacity_factor", "sentence"),
    [
        ({}, cluster_of([2, 2]), None, "needs the cost of the levels node and network of cluster ad_hoc"),
        ({"self_cost": "own"}, cluster_of([4]), None, "needs the cost of the levels self and node"),
        ({"mode": "deepspeed"}, CLUSTER, None, "needs a capacity factor"),
        ({"mode": "fastmoe"}, CLUSTER, 1.25, "drops nothing"),
        ({"average_every": 5}, CLUSTER, None, "averages local gates only"),
    ],
)
def test_refusals(options: dict[str, Any], made: Cluster, capacity_factor: float | None, sentence: str) -> None:
    spec = LayerSpec(16, 16, 8, 2, capacity_factor=capacity_factor)
    assert any(sentence in reason for reason in TAMoE(options).refusals(spec, made))
    assert TAMoE().refusals(SPEC, CLUSTER) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2\n3 4\n5 6\n", "must be square"),
        ("1 2\n0 1\n", "positive"),
        ("1 nan\n2 1\n", "positive, finite"),
        ("1 x\n2 1\n", "matrix of numbers"),
        ("1 2\n3\n", "matrix of numbers"),
        (None, "there is no such file"),
    ],
)
def test_a_bad_topology_file_is_told(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "topology.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=message):
        Options.model_validate({"topology": str(file)})


def test_a_topology_file_stands_in_for_costs(tmp_path: Path) -> None:
    file = tmp_path / "topology.txt"
    np.savetxt(file, np.choose(tree_levels([2, 2]), [0.1, 1.0, 9.0]))
    system = TAMoE({"topology": str(file)})
    assert system.refusals(SPEC, cluster_of([2, 2])) == []
    np.testing.assert_allclose(
        target_shares(system.options, cluster_of([2, 2]), [0, 1, 2, 3]), target_shares(Options(), CLUSTER, [0, 1, 2, 3])
    )
    assert "is of 4 ranks, cluster ad_hoc has 8" in system.refusals(SPEC, cluster_of([2, 4]))[0]


def test_an_asymmetric_cluster_is_a_file_and_a_tree(tmp_path: Path) -> None:
    file, tree = tmp_path / "topology.txt", [[2, 2], [2]]
    noise_PP = 1 + 0.01 * np.random.default_rng(0).random((6, 6))
    np.savetxt(file, np.choose(tree_levels(tree), [0.1, 1.0, 3.0, 9.0]) * noise_PP)
    system = TAMoE({"topology": str(file), "tree": tree})
    assert system.refusals(SPEC, cluster_of([6])) == []
    shares_PP = target_shares(system.options, cluster_of([6]), list(range(6)))
    np.testing.assert_allclose(shares_PP.sum(0), 1, rtol=1e-9)
    assert shares_PP[0, 1] > 2 * shares_PP[0, 2] > 4 * shares_PP[0, 4]
    assert "has 6 ranks, cluster ad_hoc 4" in TAMoE({"tree": tree}).refusals(SPEC, cluster_of([4]))[0]
    assert "needs a topology" in TAMoE({"tree": tree}).refusals(SPEC, cluster_of([6]))[0]
    for wrong in ([], [0], [[2], "x"], [2, []]):
        with pytest.raises(ValueError, match=r"nested lists|at least 1 item"):
            Options(tree=wrong)


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What four ranks recorded."""
    from experiments.launch import run_ranks

    folder = tmp_path_factory.mktemp("ta_moe")
    return run_ranks(
        "tests.rank_ta_moe:measure",
        {"folder": str(folder / "checkpoints")},
        num_ranks=4,
        ranks_per_node=2,
        log_dir=folder / "logs",
        timeout_s=60,
    )


def last(facts: list[dict[str, Any]], name: str) -> list[float]:
    """Share of each rank's copies that leave its node, at the end."""
    return [rank["far_shares"][name][-1] for rank in facts]


@pytest.mark.parametrize("name", ["bias", "local", "softmax"])
def test_locality_emerges_with_gate_state_of_a_ranks_own(name: str, facts: list[dict[str, Any]]) -> None:
    assert all(rank["far_shares"][name][0] > 0.35 for rank in facts)
    assert all(share < 0.25 for share in last(facts, name))


def test_the_bias_settles_at_the_target(facts: list[dict[str, Any]]) -> None:
    assert last(facts, "bias") == pytest.approx([TARGET_FAR_SHARE] * 4, abs=0.06)


def test_a_synchronised_gate_learns_no_locality(facts: list[dict[str, Any]]) -> None:
    assert last(facts, "synchronised") == pytest.approx([0.5] * 4, abs=0.1)


def test_averaging_erases_the_locality_that_was_learned(facts: list[dict[str, Any]]) -> None:
    for rank in facts:
        shares = rank["far_shares"]["averaged"]
        assert shares[9] < 0.2 < 0.4 < shares[10], "before and after the average"


def test_on_one_level_every_kind_of_gate_trains_as_flat_does(facts: list[dict[str, Any]]) -> None:
    for rank in facts:
        assert rank["one level"] == {"bias": 0.0, "local": 0.0, "synchronised": 0.0}


def test_local_gradients_are_of_the_mean_loss_and_count_in_the_norm(facts: list[dict[str, Any]]) -> None:
    records = [rank["local gradient"] for rank in facts]
    norm = (records[0]["gate_square"] + sum(record["square"] for record in records)) ** 0.5
    for record in records:
        assert record["after"] == pytest.approx([grad / 4 for grad in record["before"]])
        assert record["norm"] == pytest.approx(norm)
        assert record["clipped"] == pytest.approx(record["square"] ** 0.5 * 1e-4 / norm, rel=1e-2)
    assert len({tuple(record["after"]) for record in records}) == 4, "not reduced"


def test_slots_with_room_for_all_give_what_exact_rows_give(facts: list[dict[str, Any]]) -> None:
    for rank in facts:
        assert len(rank["static"]) > 10
        assert max(rank["static"].values()) < 1e-5


def test_no_pair_exceeds_its_capacity_and_drops_are_counted(facts: list[dict[str, Any]]) -> None:
    for index, rank in enumerate(facts):
        record = rank["capacities"]
        slots = record["slots"][index]
        assert record["kept"] == [min(pair) for pair in zip(record["chosen"], slots, strict=True)]
        assert record["dropped"] == sum(record["chosen"]) - sum(record["kept"]) > 0
        assert record["zero_tokens"] == record["tokens_without_copy"]
        assert rank["capacities"]["slots"] == facts[0]["capacities"]["slots"], "known to all"


def test_checkpoints_keep_what_is_a_ranks_own(facts: list[dict[str, Any]]) -> None:
    for index, rank in enumerate(facts):
        record = rank["checkpoint"]
        assert record["saved"] == index + 1
        assert record["loaded"] == [index + 1.0] * 8
        assert record["from_flat"] == [7.0] * 8, "a checkpoint without one leaves it alone"
        assert record["other_shape"] == [0.0] * 8, "it was learned for other neighbours"
        assert record["local_gate"] == index + 1
        assert record["local_gate_in_flat"] == pytest.approx(2.5), "the mean over ranks, whoever else loads it"
