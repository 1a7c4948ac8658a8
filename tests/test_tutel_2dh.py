"""Tutel's 2DH on six ranks: the linear all-to-all's result, exact against flat, its bytes, and what overlaps what."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from baselines.tutel_2dh import Options, TutelTwoDimensional
from baselines.tutel_2dh_exchange import node_size
from experiments.launch import run_ranks
from experiments.registry import create
from moe.errors import Refused
from moe.system import LayerSpec
from moe.topology import cluster_of
from tests.contract import is_plain_sentence
from tests.lone import lone_mesh
from tests.rank_tutel_2dh import (
    CAPACITIES,
    CLUSTERS,
    LAYERS,
    MODEL_DIM,
    NUM_EXPERTS,
    NUM_TOKENS,
    OPTIONS,
    RUNS,
    WORLD_SIZE,
)

ROW_BYTES = 4 * MODEL_DIM
Facts = dict[str, Any]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Facts]]:
    """What the ranks recorded, by part and rank."""
    return run_ranks(
        "tests.rank_tutel_2dh:measure",
        {},
        num_ranks=WORLD_SIZE,
        ranks_per_node=2,
        log_dir=tmp_path_factory.mktemp("tutel_2dh"),
        timeout_s=60,
    )


@pytest.mark.parametrize("first", ["inside", "between"])
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_either_order_is_the_linear_all_to_all(cluster: str, first: str, facts: dict[str, list[Facts]]) -> None:
    """Chunk (s, r) is at place s of rank r behind it, and its gradient where it came from."""
    ep_size = CLUSTERS[cluster][1]
    for rank, found in enumerate(facts["exchanges"]):
        case = found[f"{cluster}, {first} first"]
        assert case["arrived"] == [[source, rank % ep_size] for source in range(ep_size)]
        assert case["gradient"] == case["sent"]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_outputs_and_gradients_are_flat_s(cluster: str, layer: str, facts: dict[str, list[Facts]]) -> None:
    """Also with uneven tokens, and none on one rank; drops are the suite's, so they are flat's, too."""
    tolerance = 2e-2 if layer == "bf16" else 1e-5
    for rank, found in enumerate(facts["layers"]):
        for options in RUNS[cluster]:
            case = found[f"{cluster}, {layer}, {options}"]
            assert max(case["errors"].values()) < tolerance, (rank, options, case["errors"])
            assert case["unequal"] == [], (rank, options)


@pytest.mark.parametrize("name", CAPACITIES)
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_every_slot_crosses_by_itself(cluster: str, name: str, facts: dict[str, list[Facts]]) -> None:
    """There and back, forward and backward: each of a rank's E * C slots is sent once along the nodes and once along
    their ranks, whether it holds a copy or not; on one level, once."""
    fanouts, ep_size = CLUSTERS[cluster]
    ranks = [found[f"{cluster}, {name}"] for found in facts["traffic"]]
    for rank, found in enumerate(ranks):
        group = range(rank // ep_size * ep_size, rank // ep_size * ep_size + ep_size)
        num_slots = max(max(ranks[peer]["kept"]) for peer in group)
        if (capacity_factor := CAPACITIES[name]) is not None:
            num_slots = LayerSpec(MODEL_DIM, 24, NUM_EXPERTS, 2, capacity_factor=capacity_factor).capacity(NUM_TOKENS)
        for options in RUNS[cluster]:
            num_parts = OPTIONS[options].get("overlap_degree", 1)
            rows = NUM_EXPERTS * math.ceil(num_slots / num_parts) * num_parts
            expected = [0] * (len(fanouts) + 1)
            # A rank of several sends equally many rows to each of them, itself included; by the level between them.
            steps = [(fanouts[0], 1), (fanouts[1], 2)] if is_2dh(cluster) else [(ep_size, far_level(cluster))]
            for num_peers, level in steps:
                expected[0] += rows // num_peers
                expected[level] += rows - rows // num_peers
            assert found["sent"][options] == [4 * num * ROW_BYTES for num in expected], (rank, options)


def is_2dh(cluster: str) -> bool:
    """Whether ranks that share experts are several nodes of several ranks."""
    fanouts, ep_size = CLUSTERS[cluster]
    return 1 < fanouts[0] < ep_size


def far_level(cluster: str) -> int:
    """The one level between ranks that share experts, where it is one."""
    return 1 if CLUSTERS[cluster][0][0] > 1 else 2


def test_over_the_slow_level_2dh_sends_slots_and_flat_the_copies(facts: dict[str, list[Facts]]) -> None:
    """A copy's output comes back from where it went, so flat's bytes are those of its copies over all ranks."""
    cases = [found["three nodes of two, dropless"] for found in facts["traffic"]]
    num_far = sum(sum(case["kept"]) - sum(case["kept"][rank // 2 * 4 :][:4]) for rank, case in enumerate(cases))
    counts = WORLD_SIZE * 8 * (NUM_EXPERTS - 4)  # flat tells the experts' ranks how many rows come
    sent = {name: sum(case["sent"][name][2] for case in cases) for name in cases[0]["sent"]}
    assert sent["flat"] == 4 * num_far * ROW_BYTES + counts
    slots = NUM_EXPERTS * max(max(case["kept"]) for case in cases)
    assert sent["paper"] == sent["code"] == WORLD_SIZE * 4 * slots * 2 // 3 * ROW_BYTES > sent["flat"]


FORWARD = {
    "paper": "i+-E" + "i+-",
    "code": "+-iE" + "+-i",
    "paper, 2 parts": "i+i+" + "-Ei+" + "-Ei+" + "--",
    "code, 2 parts": "++" + "-iE+" + "-iE+" + "-i-i",
    "paper, 4 parts": "i+" * 4 + "-Ei+" * 4 + "-" * 4,
}


@pytest.mark.parametrize("options", OPTIONS)
def test_exchanges_between_nodes_are_under_way_while_experts_compute(
    options: str, facts: dict[str, list[Facts]]
) -> None:
    for found in facts["order"]:
        done = found[options]
        assert done["forward"] == FORWARD[options]
        mirrored = {"+": "-", "-": "+", "i": "i", "E": "E"}
        assert done["backward"] == "".join(mirrored[event] for event in reversed(FORWARD[options]))


def test_paths_say_how_tokens_travel(facts: dict[str, list[Facts]]) -> None:
    found = facts["refusal"][0]
    assert found["three nodes of two"] == ("2DH all-to-all, 3 nodes of 2, inside first, blocking; expert by expert")
    for cluster in ("one level", "one rank a node", "two groups of one node"):
        assert found[cluster] == "linear all-to-all on one level, blocking; expert by expert"
    path = facts["order"][0]["code, 2 parts"]["path"]
    assert path == "2DH all-to-all, 3 nodes of 2, between first, 2 parts that overlap; expert by expert"
    (reason,) = found["refused"]
    assert is_plain_sentence(reason)
    assert "6 ranks that share experts are no multiple of the 4 of a node" in reason


@pytest.mark.parametrize(
    ("fanouts", "num_ranks", "size"),
    [
        ([2, 2], 4, 2),
        ([2, 2], 2, 2),
        ([4], 4, 4),
        ([1, 2], 2, 2),
        ([1, 4, 2], 8, 4),
        ([2, 4, 2], 16, 2),
        ([8, 2], 4, 4),
        ([], 1, 1),
    ],
)
def test_a_node_is_the_innermost_level_of_several_ranks_with_others_outside(
    fanouts: list[int], num_ranks: int, size: int
) -> None:
    assert node_size(cluster_of(fanouts), num_ranks) == size


@pytest.mark.parametrize(
    ("fanouts", "size", "path"),
    [
        ([2, 2], 2, "2DH all-to-all, 2 nodes of 2, between first, blocking"),
        ([1, 2, 3], 2, "2DH all-to-all, 3 nodes of 2, between first, blocking"),
        ([1, 2], 2, "2DH asked for, linear all-to-all on one level, blocking"),
    ],
)
def test_upstream_s_2dh_takes_the_same_nodes(
    fanouts: list[int], size: int, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where this process has run it on others: upstream reads LOCAL_SIZE once a process."""

    class Upstream(nn.Module):
        def __init__(self, gate: dict[str, Any], *_: Any, **options: Any) -> None:
            super().__init__()
            assert gate["capacity_factor"] == 0.0 and options["use_2dh"]
            assert os.environ["LOCAL_SIZE"] == str(size)

    communicate: Any = ModuleType("tutel.impls.communicate")
    communicate.RestoreBackward = torch.autograd.Function
    communicate.PrimAllToAll2D = SimpleNamespace(LOCAL_SIZE=7)
    modules: dict[str, dict[str, Any]] = {
        "tutel": {"__path__": []},
        "tutel.impls": {"__path__": []},
        "tutel.moe": {"moe_layer": Upstream},
        "tutel_custom_kernel": {},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "tutel.impls.communicate", communicate)
    monkeypatch.setenv("LOCAL_SIZE", "7")
    monkeypatch.setenv("NUMA_TYPE", "0")
    mesh = dataclasses.replace(lone_mesh(math.prod(fanouts)), cluster=cluster_of(fanouts))
    layer = create("tutel", {"use_2dh": True}).build_layer(LayerSpec(MODEL_DIM, 24, NUM_EXPERTS, 2), mesh)
    told: int = communicate.PrimAllToAll2D.LOCAL_SIZE
    assert (told, layer.path) == (size, path)


def test_options() -> None:
    with pytest.raises(Refused, match="needs whole nodes"):
        node_size(cluster_of([4, 3]), 6)
    assert TutelTwoDimensional().options == Options(order="intra_first", overlap_degree=1)
    for wrong in ({"overlap_degree": 0}, {"overlap_degree": 33}, {"order": "outer_first"}, {"use_2dh": True}):
        with pytest.raises(ValidationError):
            TutelTwoDimensional(wrong)
