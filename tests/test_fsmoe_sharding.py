"""Experts that are cut over the ranks of a node: two nodes of two, exact whatever the schedule, whole in checkpoints.

The contract (tests/test_contract.py) holds them against the oracle in all its cases, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.launch import run_ranks
from methods.fsmoe import FSMoE
from moe.system import LayerSpec
from moe.topology import cluster_of
from tests.contract import is_plain_sentence
from tests.rank_fsmoe_sharding import DEGREES, NUM_TOKENS, SPEC, SYSTEMS

Facts = dict[str, Any]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Facts]]:
    """What the ranks recorded, by part and rank."""
    folder: Path = tmp_path_factory.mktemp("sharding")
    return run_ranks(
        "tests.rank_fsmoe_sharding:measure",
        {"folder": str(folder)},
        num_ranks=4,
        ranks_per_node=2,
        log_dir=folder / "logs",
        timeout_s=60,
    )


@pytest.mark.parametrize("name", SYSTEMS)
def test_fewer_experts_than_ranks_give_the_oracle_s_gradients(name: str, facts: dict[str, list[Facts]]) -> None:
    for rank, found in enumerate(facts["layers"]):
        case = found[name]
        assert max(case["errors"].values()) < 1e-5, case["errors"]
        assert {f"expert {rank // 2} w1", f"expert {rank // 2} w2"} < case["errors"].keys()
        assert case["sizes"] == [[1, 12, 16], [1, 16, 12]], "half of one expert"


def test_a_path_says_that_experts_are_cut(facts: dict[str, list[Facts]]) -> None:
    path = facts["layers"][0]["schemoe"]["path"]
    assert path.startswith("schemoe, experts cut over 2 ranks")


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_links_and_experts_work_side_by_side(direction: str, facts: dict[str, list[Facts]]) -> None:
    """By the order of issue and of completion, which no clock decides: a chunk's way is in order, the next chunk's
    gather and the last one's scatter are under way while experts compute."""
    degree = DEGREES["degree" if direction == "forward" else "backward_degree"]
    kinds = ("dispatch", "gather", "experts", "scatter", "combine")
    for found in facts["timeline"]:
        at = {(event, task): index for index, (event, task) in enumerate(found["events"])}

        def order(event: str, kind: str, chunk: int, at: Any = at) -> int:
            place: int = at[event, f"{direction} {kind} {chunk}"]
            return place

        for chunk in range(degree):
            for before, behind in zip(kinds, kinds[1:], strict=False):
                assert order("complete", before, chunk) < order("issue", behind, chunk)
        for chunk in range(degree - 1):
            assert order("issue", "gather", chunk + 1) < order("issue", "experts", chunk)
            assert order("complete", "gather", chunk + 1) > order("complete", "experts", chunk)
            assert order("issue", "scatter", chunk) < order("issue", "experts", chunk + 1)
            assert order("complete", "scatter", chunk) > order("complete", "experts", chunk + 1)
        resources = {"experts": "compute", "gather": "intra", "scatter": "intra"}
        for task, resource in found["resources"].items():
            assert resource == resources.get(task.split()[1], "inter"), task


def test_copies_travel_between_nodes_and_are_gathered_in_them(facts: dict[str, list[Facts]]) -> None:
    row_bytes = 4 * SPEC.model_dim
    copies = 0
    for found in facts["timeline"]:
        sent = found["sent"]
        assert "1 alltoall" not in sent, "level 1 is the node"
        copies += sent["2 alltoall"] + sent["0 alltoall"]
        # A ring of two sends once what each rank has, padded to the longest.
        assert sent["1 other"] >= sent["1 reduction"] > 0
    # Forward and backward, there and back; and eight bytes to tell of each expert's queue.
    assert copies == 4 * 4 * NUM_TOKENS * SPEC.top_k * row_bytes + 4 * 8 * SPEC.num_experts


def test_collectives_in_the_node_are_measured(facts: dict[str, list[Facts]]) -> None:
    for found in facts["timeline"]:
        points, work = found["points"], found["work"]
        assert {"all_to_all", "all_gather", "reduce_scatter", "all_reduce", "gemm", "gemm_backward"} < set(points)
        assert work["shard_bytes"] == 2 * work["all_to_all_bytes"] == 2 * 4 * NUM_TOKENS * 2 * SPEC.model_dim
        assert max(points["all_gather"]) == max(points["reduce_scatter"]) == work["shard_bytes"]
        assert max(points["gemm"]) == work["expert_work"] == NUM_TOKENS * 2 * 2 * SPEC.model_dim * SPEC.hidden_dim


@pytest.mark.parametrize("model", ["plain", "other"])
def test_checkpoints_hold_whole_experts(model: str, facts: dict[str, list[Facts]]) -> None:
    for found in facts["checkpoints"]:
        case = found[model]
        assert case["losses"] == pytest.approx(case["expected"], rel=1e-5), "trains as flat does"
        assert case["unlike whole"] == [] == case["unlike again"]
        assert case["steps"] == [2.0, 2.0]
        assert case["later"][0] == pytest.approx(case["later"][1], rel=1e-6)
        assert case["left"] == 0, "whole experts left nothing in the optimizer"


def test_layouts_that_a_cluster_can_not_hold_are_refused() -> None:
    system = FSMoE({"expert_sharding": True})
    assert system.refusals(SPEC, cluster_of([2, 2])) == []
    cases = {
        "a node of cluster ad_hoc has one rank: set expert_sharding=false": (SPEC, cluster_of([1, 4])),
        "num_experts=2 is no multiple of the 3 nodes of cluster ad_hoc: use a multiple of 3": (
            SPEC,
            cluster_of([2, 3]),
        ),
        "hidden_dim=25 is no multiple of 2: use one": (LayerSpec(16, 25, 2, 1), cluster_of([2, 2])),
    }
    for wanted, (spec, cluster) in cases.items():
        (reason,) = system.refusals(spec, cluster)
        assert is_plain_sentence(reason) and wanted in reason, reason
    assert FSMoE().refusals(SPEC, cluster_of([1, 4])) == []
