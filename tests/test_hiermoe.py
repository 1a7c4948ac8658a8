"""HierMoE's dispatch on eight ranks: exact against one all-to-all-v, and no byte more than its rule says."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from experiments.launch import run_ranks
from methods.hiermoe import HierarchicalMoE, HierMoE
from methods.hiermoe_dispatch import HierarchicalDispatcher, block_sizes
from moe.dispatch import AllToAllDispatcher, Dispatcher
from moe.errors import Refused
from moe.system import LayerSpec
from moe.topology import Cluster, Level, cluster_of
from tests.contract import is_plain_sentence
from tests.lone import lone_mesh
from tests.rank_hiermoe import CLUSTERS, DISPATCHERS, FIXED, LAYERS, MODEL_DIM, NUM_EXPERTS, RUNS, WORLD_SIZE
from tests.test_dispatch import copies_for

SPEC = LayerSpec(model_dim=16, hidden_dim=16, num_experts=16, top_k=2)
Facts = dict[str, Any]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Facts]]:
    """What the ranks recorded, by part and rank."""
    return run_ranks(
        "tests.rank_hiermoe:measure",
        {},
        num_ranks=WORLD_SIZE,
        ranks_per_node=2,
        log_dir=tmp_path_factory.mktemp("hiermoe"),
        timeout_s=60,
    )


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_outputs_and_gradients_are_those_of_one_all_to_all(
    cluster: str, layer: str, facts: dict[str, list[Facts]]
) -> None:
    tolerance = 2e-2 if layer.startswith("bf16") else 1e-5
    for rank, found in enumerate(facts["layers"]):
        for name in RUNS[cluster]:
            errors = found[cluster][layer][name]["errors"]
            assert max(errors.values()) < tolerance, (rank, name, errors)


@pytest.mark.parametrize("copies", ["deduplicated", "copies"])
def test_each_expert_gets_exactly_the_copies_that_chose_it(copies: str, facts: dict[str, list[Facts]]) -> None:
    """Also without tokens, with all dropped, all to one expert, and in groups of two and four of eight ranks."""
    ranks = [found[copies] for found in facts["round trips"]]
    for name in ranks[0]:
        case = [found[name] for found in ranks]
        for rank in case:
            for expert, rows in zip(rank["experts"], rank["arrived"], strict=True):
                assert Counter(tuple(row) for row in rows) == copies_for(expert, rank["group"], case), name
            for error in ("round_trip_error", "input_grad_error", "weight_grad_error"):
                assert rank[error] < 1e-5, (name, error)


def test_four_levels_are_exact_and_send_least_over_the_outermost(tmp_path: Path) -> None:
    ranks = run_ranks(
        "tests.rank_hiermoe:four_levels", {}, num_ranks=16, ranks_per_node=2, log_dir=tmp_path, timeout_s=120
    )
    assert max(facts[name][0] for facts in ranks for name in ("HD", "H")) < 1e-5
    over_outermost = {name: sum(facts[name][1][-1] for facts in ranks) for name in ("HD", "H")}
    assert over_outermost["HD"] < 0.8 * over_outermost["H"]
    assert over_outermost["HD"] < sum(facts["flat"][-1] for facts in ranks)


def block_chain(fanouts: list[int], ep_size: int, num_levels: int | None) -> list[int]:
    """Ranks of the blocks that copies find their way by, outermost first, the whole group before them."""
    sizes = [1]
    for fanout in fanouts:
        sizes.append(sizes[-1] * fanout)
    inside = sorted({size for size in sizes if size < ep_size}, reverse=True)
    return [ep_size, *(inside if num_levels is None else [*inside[: num_levels - 1], 1])]


def walked(
    choices: list[list[list[int]]], fanouts: list[int], ep_size: int, chain: list[int], dedup: bool
) -> Counter[int]:
    """Copies that left their rank, by level of the cluster, when every token walks by itself.

    Args:
        choices: kept expert ids by rank and token.
        fanouts: of the cluster, innermost first.
        ep_size: ranks that share experts.
        chain: of `block_chain`.
        dedup: whether a token walks once for all of its experts, or once for each.
    """
    cluster, experts_a_rank = cluster_of(fanouts), NUM_EXPERTS // ep_size
    crossed: Counter[int] = Counter()
    for source, tokens in enumerate(choices):
        first = source // ep_size * ep_size
        walkers = [set(token) for token in tokens] if dedup else [{expert} for token in tokens for expert in token]
        for experts in walkers:
            targets = {first + expert // experts_a_rank for expert in experts}
            holders = {source}
            for whole, block in zip(chain, chain[1:], strict=False):
                moves = {
                    (holder, target // block * block + holder % block)
                    for holder, target in product(holders, targets)
                    if holder // whole == target // whole
                }
                crossed.update(cluster.level_of(holder, arrived) for holder, arrived in moves)
                holders = {arrived for _, arrived in moves}
            assert holders == targets
    return crossed


def told_bytes(fanouts: list[int], ep_size: int, chain: list[int]) -> Counter[int]:
    """Bytes of all ranks' numbers of rows: 8 for each block behind a peer, on every level, and for each expert."""
    cluster, sent = cluster_of(fanouts), Counter[int]()
    for level, (whole, block) in enumerate(zip(chain, chain[1:], strict=False), start=1):
        numbers = sum(block // deeper for deeper in chain[level:]) + block * (NUM_EXPERTS // ep_size)
        for rank, peer in product(range(WORLD_SIZE), repeat=2):
            if rank // whole == peer // whole and rank % block == peer % block:
                sent[cluster.level_of(rank, peer)] += 8 * numbers
    return sent


@pytest.mark.parametrize("layer", [name for name in LAYERS if not name.startswith("bf16")])
@pytest.mark.parametrize(("cluster", "name"), [(cluster, name) for cluster, names in RUNS.items() for name in names])
def test_bytes_on_every_level_are_those_of_walking_tokens(
    cluster: str, name: str, layer: str, facts: dict[str, list[Facts]]
) -> None:
    """A row there with 8 bytes a choice told, a row back; for the gradients a row each way, with 4 bytes a choice."""
    (fanouts, ep_size), (num_levels, dedup) = CLUSTERS[cluster], DISPATCHERS[name]
    ranks = [found[cluster][layer] for found in facts["layers"]]
    chain = block_chain(fanouts, ep_size, num_levels)
    crossed = walked([rank["flat"]["ids"] for rank in ranks], fanouts, ep_size, chain, dedup)
    told = told_bytes(fanouts, ep_size, chain)
    choices = LAYERS[layer]["top_k"] if dedup else 1
    for level in range(1, len(fanouts) + 1):
        forward = sum(rank[name]["forward bytes"][level] for rank in ranks)
        assert forward == crossed[level] * (2 * 4 * MODEL_DIM + 8 * choices) + told[level]
        both = sum(rank[name]["bytes"][level] for rank in ranks)
        assert both == crossed[level] * (4 * 4 * MODEL_DIM + 12 * choices) + told[level]


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_each_rank_sends_a_token_once_to_every_other_node_that_wants_it(
    cluster: str, facts: dict[str, list[Facts]]
) -> None:
    """The outermost level, rank by rank: distinct (token, block) pairs there, and sums for the pairs that came."""
    fanouts, ep_size = CLUSTERS[cluster]
    block = block_chain(fanouts, ep_size, None)[1]
    outermost = cluster_of(fanouts).level_of(0, ep_size - 1)
    layer = "top6, more than a node has"
    ranks = [found[cluster][layer] for found in facts["layers"]]
    per_block = NUM_EXPERTS // ep_size * block

    def pairs(rank: int, other: int) -> int:
        return sum(any(expert // per_block == other for expert in token) for token in ranks[rank]["flat"]["ids"])

    told = told_bytes(fanouts, ep_size, block_chain(fanouts, ep_size, None))[outermost] // WORLD_SIZE
    for rank, found in enumerate(ranks):
        mine = rank % ep_size // block
        peer = rank + block if mine == 0 else rank - block
        row, choices = 4 * MODEL_DIM, LAYERS[layer]["top_k"]
        expected = pairs(rank, 1 - mine) * (row + 8 * choices) + pairs(peer, mine) * row + told
        assert found["HD"]["forward bytes"][outermost] == expected


def test_fewest_bytes_cross_the_slow_level_when_a_token_crosses_once(facts: dict[str, list[Facts]]) -> None:
    for cluster, (fanouts, ep_size) in CLUSTERS.items():
        outermost = cluster_of(fanouts).level_of(0, ep_size - 1)
        sent = {
            name: sum(rank[cluster]["top6, more than a node has"][name]["bytes"][outermost] for rank in facts["layers"])
            for name in ("flat", *RUNS[cluster])
        }
        assert all(sent["HD"] < num_bytes for name, num_bytes in sent.items() if name not in ("HD", "HD2")), cluster
        assert sent["HD"] < 0.6 * sent["flat"], cluster


def test_groups_of_blocks(facts: dict[str, list[Facts]]) -> None:
    for rank, found in enumerate(facts["groups"]):
        half, pair = rank // 4 * 4, rank % 2
        assert found["ranks"] == {
            "8 4": [rank % 4, rank % 4 + 4],
            "8 2": [pair, pair + 2, pair + 4, pair + 6],
            "4 2": [half + pair, half + pair + 2],
            "4 1": [half, half + 1, half + 2, half + 3],
            "8 1": list(range(8)),
        }
        assert found["once"] and found["whole"]


def test_layers_tell_how_they_send(facts: dict[str, list[Facts]]) -> None:
    for found in facts["system"]:
        three, two, one = found["paths"]
        assert three.startswith("all-to-all-v on 3 levels, a token once per group; ")
        assert two.startswith("all-to-all-v on 2 levels, every copy by itself; ")
        assert one.startswith("all-to-all-v on 1 level, a token once per group; ")
        one_level = "all-to-all-v on 1 level, a token once per group; "
        assert all(path.startswith(one_level) for path in found["paths of a pair"])
        assert found["refused"] == [
            "HierMoE can't take levels=2: the 2 ranks that share experts are divided by 1 level of cluster ad_hoc.",
            "HierMoE needs whole groups of a level: 3 ranks of level node and 2 ranks that share experts do not divide "
            "each other.",
        ]


@pytest.mark.parametrize(
    ("fanouts", "num_ranks", "sizes"),
    [
        ([4], 4, [1]),
        ([1], 1, [1]),
        ([2, 2], 4, [2, 1]),
        ([2, 2], 2, [1]),
        ([1, 4], 4, [1]),
        ([2, 1, 2], 4, [2, 1]),
        ([2, 2, 2, 4], 32, [8, 4, 2, 1]),
        ([4, 2], 2, [1]),
    ],
)
def test_blocks_of_a_cluster(fanouts: list[int], num_ranks: int, sizes: list[int]) -> None:
    """The paper's testbed, 4 nodes of 2 sockets of 2 pairs of GPUs, has U = [1, 4, 8, 16] and 32 ranks."""
    assert block_sizes(cluster_of(fanouts), num_ranks) == sizes


def test_blocks_that_do_not_fit() -> None:
    with pytest.raises(Refused, match=r"2 ranks of level node and 3 ranks that share experts do not divide each other"):
        block_sizes(cluster_of([2, 3]), 3)


@pytest.mark.parametrize(
    ("cluster", "levels", "told"),
    [
        (cluster_of([2, 2]), 3, "cluster ad_hoc has 2 levels of more than one group; set levels to at most 2"),
        (cluster_of([4]), 2, "cluster ad_hoc has 1 level of more than one group; set levels to at most 1"),
    ],
)
def test_more_levels_than_the_cluster_has_are_refused(cluster: Cluster, levels: int, told: str) -> None:
    (reason,) = HierMoE(FIXED | {"levels": levels}).refusals(SPEC, cluster)
    assert f"levels={levels}" in reason and told in reason and is_plain_sentence(reason)
    for fewer in (levels - 1, "all"):
        assert HierMoE(FIXED | {"levels": fewer}).refusals(SPEC, cluster) == []


@pytest.mark.parametrize("options", [{}, {"placement": "fixed"}, {"levels": "all"}])
def test_the_performance_model_needs_costs(options: dict[str, Any]) -> None:
    (reason,) = HierMoE(options).refusals(SPEC, cluster_of([2, 2]))
    assert "needs the costs of the level" in reason and "experiments.comm" in reason and is_plain_sentence(reason)
    costs = Cluster("c", (Level("self", 1), Level("node", 2, 0.0, 1e-9), Level("network", 2, 0.0, 1e-8)))
    assert HierMoE(options).refusals(SPEC, costs) == HierMoE(options).refusals(SPEC, cluster_of([4])) == []


def test_more_pairs_than_there_are_are_refused() -> None:
    (reason,) = HierMoE({"swap_pairs": 9}).refusals(SPEC, cluster_of([4]))
    assert "swap_pairs=9" in reason and "at most 8" in reason and is_plain_sentence(reason)


@pytest.mark.parametrize("options", [{"levels": 0}, {"levels": 1.5}, {"dedup": "perhaps"}, {"level": 2}])
def test_bad_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        HierMoE(options)


@pytest.mark.parametrize(("dedup", "kind"), [(True, HierarchicalDispatcher), (False, AllToAllDispatcher)])
@pytest.mark.parametrize("levels", ["auto", "all", 1])
def test_on_one_level_there_is_one_exchange(levels: Any, dedup: bool, kind: type[Dispatcher]) -> None:
    layer = HierMoE({"levels": levels, "dedup": dedup}).build_layer(SPEC, lone_mesh(4))
    assert isinstance(layer, HierarchicalMoE) and type(layer.dispatcher.chosen) is kind
    assert layer.dispatcher.num_levels == 1 and layer.modelled_dispatch_s == {}
