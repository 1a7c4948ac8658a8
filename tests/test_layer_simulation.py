"""What systems' layers do to a routing, in bytes and multiply-adds, against counts made copy by copy."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from baselines.tutel_2dh import two_dimensional
from experiments.registry import create, discover
from methods.hiermoe_model import best_dim, collectives_of, dispatch_s, group_counts
from methods.hiermoe_simulation import sorted_counts
from methods.ta_moe import Options, simulated_shares, target_shares
from moe.costs import AlphaBeta
from moe.exchange_costs import Exchange, busiest_by_level, chained, first_ranks, outside_of, ring_cost
from moe.layer_simulation import RoutedLayer
from moe.simulator import makespan_s
from moe.system import LayerSpec
from moe.topology import Cluster, Level

SPEC = LayerSpec(16, 24, 16, 2)
NODE, NETWORK, SITE = AlphaBeta(1e-5, 1e-9), AlphaBeta(3e-5, 2e-8), AlphaBeta(9e-5, 5e-8)
COSTS = {
    "outside": AlphaBeta(1e-4, 1e-9),
    "outside_backward": AlphaBeta(2e-4, 3e-9),
    "gemm": AlphaBeta(1e-5, 1e-12),
    "all_reduce": AlphaBeta(1e-4, 1e-9),
}
ROW_BYTES = 4 * SPEC.model_dim
WEIGHTS = 2 * SPEC.model_dim * SPEC.hidden_dim


def level(name: str, fanout: int, cost: AlphaBeta) -> Level:
    """With that cost."""
    return Level(name, fanout, cost.alpha_s, cost.beta_s_per_byte)


CLUSTER = Cluster("c", (Level("self", 1), level("node", 2, NODE), level("network", 2, NETWORK), level("site", 2, SITE)))


def routed(num_tokens: int = 20, spec: LayerSpec = SPEC, cluster: Cluster = CLUSTER, **costs: AlphaBeta) -> RoutedLayer:
    """Choices that crowd onto the first experts."""
    random = np.random.default_rng(0)
    shape = (cluster.world_size, num_tokens, spec.num_experts)
    ids = np.argsort(random.random(shape) * np.arange(1, spec.num_experts + 1), axis=2)[:, :, : spec.top_k]
    return RoutedLayer(spec, cluster, ids, {**COSTS, **costs})


def copies(layer: RoutedLayer) -> list[tuple[int, int]]:
    """(rank, expert) of every copy."""
    return [(rank, int(e)) for rank, ids_TK in enumerate(layer.ids_PTK) for e in ids_TK.ravel()]


def busiest(layer: RoutedLayer, sent: Counter[tuple[int, int]]) -> dict[int, int]:
    """Most copies of a rank over each level, sent or received, from how many go from rank to rank."""
    by_level: Counter[tuple[str, int, int]] = Counter()
    for (source, target), number in sent.items():
        crossed = layer.cluster.level_of(source, target)
        by_level["out", crossed, source] += number
        by_level["in", crossed, target] += number
    found: dict[int, int] = {}
    for (_, crossed, _), number in by_level.items():
        found[crossed] = max(found.get(crossed, 0), number)
    return found


def rows_of(layer: RoutedLayer) -> tuple[Counter[tuple[int, int]], NDArray[np.int64]]:
    """Copies from rank to rank: counted, and as the layer has them."""
    per_rank = layer.spec.num_experts // layer.num_ranks
    return Counter((rank, e // per_rank) for rank, e in copies(layer)), layer.rows_between(layer.counts_PE)


def test_the_busiest_rank_of_every_level() -> None:
    layer = routed()
    sent, rows_PP = rows_of(layer)
    assert {(a, b): int(rows_PP[a, b]) for a, b in np.argwhere(rows_PP)} == dict(sent)
    assert dict(enumerate(busiest_by_level(rows_PP, CLUSTER))) == busiest(layer, sent)


def test_an_exchange_takes_as_long_as_its_slowest_level() -> None:
    layer = routed()
    sent, rows_PP = rows_of(layer)
    times = {
        index: cost.predict(busiest(layer, sent)[index] * ROW_BYTES)
        for index, cost in ((1, NODE), (2, NETWORK), (3, SITE))
    }
    assert layer.exchange(rows_PP).seconds == pytest.approx(max(times.values()))
    measured = AlphaBeta(7e-5, 4e-9)
    most = max(Counter(a for a, b in sent.elements()).values()), max(Counter(b for a, b in sent.elements()).values())
    assert routed(all_to_all=measured).exchange(rows_PP) == Exchange(measured, max(most) * ROW_BYTES)


def test_a_layer_in_sequence_takes_the_sum_of_its_parts() -> None:
    layer = routed()
    sent, rows_PP = rows_of(layer)
    rows = max(Counter(target for _, target in sent.elements()).values())
    exchange_s = layer.exchange(rows_PP).seconds
    copies_bytes = 20 * SPEC.top_k * ROW_BYTES
    expected = COSTS["outside"].predict(copies_bytes) + COSTS["outside_backward"].predict(copies_bytes)
    expected += 4 * exchange_s
    expected += 3 * (2 * COSTS["gemm"].alpha_s + rows * WEIGHTS * COSTS["gemm"].beta_s_per_byte)
    model = create("flat").simulated_layer(layer)
    assert makespan_s(model.simulated([model.work])) == pytest.approx(expected)
    assert makespan_s(model.simulated([model.work] * 3)) == pytest.approx(3 * expected)


def test_padding_gives_every_expert_the_fullest_queue() -> None:
    layer = routed()
    fullest = max(Counter(copies(layer)).values())
    padded = layer.padded_PE
    assert padded.shape == (8, 16) and (padded == fullest).all()
    capped = routed(spec=LayerSpec(16, 24, 16, 2, capacity_factor=1.25))
    assert (capped.padded_PE == 4).all() and capped.counts_PE.max() == 4, "ceil(1.25 * 2 * 20 / 16)"
    work = create("deepspeed").simulated_layer(layer).work
    assert work.expert_work == 8 * 2 * fullest * WEIGHTS


def test_two_exchanges_go_inside_nodes_first() -> None:
    cluster = Cluster("c", (Level("self", 1), level("node", 4, NODE), level("network", 2, NETWORK)))
    layer = routed(cluster=cluster)
    inside: Counter[tuple[int, int]] = Counter()
    between: Counter[tuple[int, int]] = Counter()
    for (source, target), number in rows_of(layer)[0].items():
        through = source // 4 * 4 + target % 4
        inside[source, through] += number
        between[through, target] += number
    times = [
        NODE.predict(busiest(layer, inside)[1] * ROW_BYTES),
        NETWORK.predict(busiest(layer, between)[2] * ROW_BYTES),
    ]
    assert two_dimensional(layer, layer.counts_PE).seconds == pytest.approx(sum(times))


def test_exchanges_in_a_row_add_up() -> None:
    one, other = Exchange(NODE, 1000.0), Exchange(NETWORK, 300.0)
    assert chained(one, other).seconds == pytest.approx(one.seconds + other.seconds)


def hierarchical_s(layer: RoutedLayer, dim: int, dedup: bool, row_bytes: int) -> float:
    """A dispatch of single tokens: first to their groups' ranks at the sender's place, level by level, then to their
    experts' ranks; each exchange as long as its busiest rank's tokens take."""
    collectives = collectives_of(CLUSTER)
    at = [
        (rank, rank, token, int(e))
        for rank, ids in enumerate(layer.ids_PTK)
        for token, row in enumerate(ids)
        for e in row
    ]
    total_s = 0.0
    for exchange in collectives.exchanges(dim):
        size = 8 // collectives.groups[exchange.level]  # ranks of a group
        out: Counter[int] = Counter()
        into: Counter[int] = Counter()
        seen: set[tuple[int, ...]] = set()
        moved = []
        for source, rank, token, expert in at:
            target = expert // 2 // size * size + rank % size
            if (source, token, target) not in seen or not dedup:
                seen.add((source, token, target))
                out[rank] += 1
                into[target] += 1
            moved.append((source, target, token, expert))
        at = moved
        most = max(*out.values(), *into.values())
        total_s += exchange.cost.predict(most * row_bytes)
    assert all(rank == expert // 2 for _, rank, _, expert in at)
    return total_s


@pytest.mark.parametrize("dedup", [True, False])
def test_hiermoe_sends_each_token_once_to_a_group(dedup: bool) -> None:
    layer, collectives = routed(), collectives_of(CLUSTER)
    ids = torch.from_numpy(layer.ids_PTK)
    counts_GS = group_counts(ids, 16, collectives.groups, dedup)
    found = np.stack([sorted_counts(ids_TK, 16, collectives.groups, dedup) for ids_TK in layer.ids_PTK])
    assert (found == counts_GS.numpy()).all()
    row_bytes = ROW_BYTES + 8 * (2 if dedup else 1)
    best = best_dim(dispatch_s(counts_GS, collectives, row_bytes))
    for levels, dim in ((1, 1), (2, 2), (3, 3), ("all", 3), ("auto", best)):
        wanted = hierarchical_s(layer, dim, dedup, row_bytes)
        model = create("hiermoe", {"levels": levels, "dedup": dedup}).simulated_layer(layer)
        assert model.work.all_to_all_bytes * model.costs["all_to_all"].beta_s_per_byte == pytest.approx(0, abs=1e-12)
        assert model.costs["all_to_all"].alpha_s == pytest.approx(wanted)


@pytest.mark.parametrize("options", [{}, {"self_cost": "own"}])
def test_ta_moe_s_target_follows_from_levels_alone(options: dict[str, Any]) -> None:
    levels = (Level("self", 1, 0.0, 1e-10), *CLUSTER.levels[1:])
    cluster = Cluster("c", levels)
    expected = target_shares(Options(**options), cluster, list(range(8)))
    np.testing.assert_allclose(simulated_shares(Options(**options), cluster), expected, rtol=1e-9)
    flat, own = (create(name).simulated_layer(routed(cluster=cluster)).work for name in ("flat", "ta_moe"))
    assert own.all_to_all_bytes < flat.all_to_all_bytes


def test_replicas_spread_a_popular_expert() -> None:
    """All tokens choose experts 0 and 1; with four slots of each in a row they are on eight slots of two ranks."""
    ids = np.tile(np.array([0, 1]), (8, 20, 1))
    layer = RoutedLayer(LayerSpec(16, 24, 8, 2), CLUSTER, ids, COSTS)
    plain = create("flat").simulated_layer(layer).work.expert_work
    assert plain == 8 * 20 * WEIGHTS, "one rank has each of them"
    swift = create("swiftmoe", {"slots_per_rank": 4}).simulated_layer(layer)
    # 26 of 32 slots are left for the two after one each for the others: 13 and 13, four of them on a rank.
    assert swift.work.expert_work == pytest.approx(8 * 20 * WEIGHTS * 4 / 13, rel=0.05), "whole copies of each rank"
    assert [extra.kind for extra in swift.extras] == ["replica_gradients", "gradient_shards", "slot_weights"]
    sizes = {extra.kind: extra.size_bytes for extra in swift.extras}
    assert sizes["gradient_shards"] == 8 * 4 * WEIGHTS / 8 and sizes["slot_weights"] == 4 * 4 * WEIGHTS
    for scatter, fills in (("rank", 7), ("slot", 8)):  # 29 slots of either and 6 others: the last rank has two of one
        swift = create("swiftmoe", {"slots_per_rank": 8, "scatter": scatter}).simulated_layer(layer)
        assert swift.extras[-1].size_bytes == fills * 4 * WEIGHTS
    flex = create("flexmoe", {"slots_per_rank": 4}).simulated_layer(layer).work.expert_work
    assert flex < plain


def test_blocks_of_replicas_exchange_inside_a_block() -> None:
    layer = routed()
    block = layer.block(4)
    assert [lv.fanout for lv in block.cluster.levels] == [1, 2, 2, 1] and block.ids_PTK.shape[0] == 4
    assert [lv.fanout for lv in outside_of(CLUSTER, 4).levels] == [1, 1, 1, 2]
    model = create("deepspeed_static", {"replicas": 2, "zero_stage": 0}).simulated_layer(layer)
    (extra,) = model.extras
    assert extra.size_bytes == 4 * 4 * WEIGHTS, "four experts a rank, float32"
    assert extra.cost == AlphaBeta(2 * SITE.alpha_s, SITE.beta_s_per_byte), "an all-reduce of two sends all once"
    gradients, weights = create("deepspeed_static", {"replicas": 2}).simulated_layer(layer).extras
    assert gradients.cost == weights.cost == AlphaBeta(SITE.alpha_s, SITE.beta_s_per_byte / 2), "half of the ring each"
    itemsize = layer.spec.dtype.itemsize
    assert (gradients.size_bytes, weights.size_bytes) == (4 * 4 * WEIGHTS, itemsize * 4 * WEIGHTS)
    assert model.costs["all_to_all"] in (NODE, NETWORK)


def test_a_ring_goes_level_by_level() -> None:
    cost = ring_cost(CLUSTER)
    betas = NODE.beta_s_per_byte / 2, NETWORK.beta_s_per_byte / 2 / 2, SITE.beta_s_per_byte / 2 / 4
    assert cost.beta_s_per_byte == pytest.approx(sum(betas))
    assert cost.alpha_s == pytest.approx(NODE.alpha_s + NETWORK.alpha_s + SITE.alpha_s)
    assert ring_cost(first_ranks(CLUSTER, 1)).predict(1e6) < 1e-8, "nobody to gather from"


def test_shadowed_experts_send_nothing() -> None:
    ids = np.tile(np.array([0, 1]), (8, 200, 1))
    layer = RoutedLayer(LayerSpec(16, 24, 16, 2), CLUSTER, ids, COSTS)
    options = {"flops_per_s": 1e6, "net_bytes_per_s": 1e12}
    model = create("fastermoe", options).simulated_layer(layer)
    weights_s = ring_cost(CLUSTER).predict(2 * 4 * WEIGHTS)
    plain = create("flat").simulated_layer(layer).work
    assert model.work.all_to_all_bytes == 0
    assert model.work.dense_s == pytest.approx(plain.dense_s + weights_s)
    assert model.work.dense_backward_s == pytest.approx(plain.dense_backward_s + weights_s)
    assert model.work.expert_work == 200 * 2 * WEIGHTS, "each rank its own copies"
    assert create("fastermoe", {**options, "shadowing": "none"}).simulated_layer(layer).work.all_to_all_bytes > 0


def test_cut_experts_gather_in_the_node() -> None:
    layer = routed()
    arriving: Counter[int] = Counter()
    sent: Counter[tuple[int, int]] = Counter()
    for source, expert in copies(layer):
        target = expert // 4 * 2 + source % 2  # four nodes of four experts; the sender's place in the node
        arriving[target] += 1
        sent[source, target] += 1
    model = create("fsmoe", {"expert_sharding": True}).simulated_layer(layer)
    assert model.work.shard_bytes == 2 * max(arriving.values()) * ROW_BYTES
    nodes = [arriving[2 * node] + arriving[2 * node + 1] for node in range(4)]
    assert model.work.expert_work == max(nodes) * WEIGHTS / 2
    assert 1 not in busiest(layer, sent), "nothing inside nodes but the gather"
    assert model.costs["all_gather"] == ring_cost(first_ranks(CLUSTER, 2))


def test_gates_in_which_tokens_do_not_choose_send_alike() -> None:
    layer = routed()
    even = create("fsmoe", {"gate": "expert_choice"}).simulated_layer(layer).work
    assert even.expert_work == 8 * 2 * 3 * WEIGHTS, "ceil(2 * 20 / 16) of every rank"
    slots = create("fsmoe", {"gate": "soft", "gate_slots": 5}).simulated_layer(layer).work
    assert slots.expert_work == 8 * 2 * 5 * WEIGHTS


@pytest.mark.parametrize("name", discover())
def test_every_system_can_be_simulated_and_slower_links_cost(name: str) -> None:
    options = {"schedule": "sequential"} if name == "pipelined" else {}

    def step_s(cluster: Cluster) -> float:
        model = create(name, options).simulated_layer(routed(cluster=cluster, num_tokens=200))
        return makespan_s(model.simulated([model.work]))

    slow = Cluster("s", (*CLUSTER.levels[:3], level("site", 2, AlphaBeta(1e-3, 1e-6))))
    assert 0 < step_s(CLUSTER) < step_s(slow)


def test_pipelines_overlap_where_costs_say_so() -> None:
    """Exchanges about as long as experts: chunks hide one behind the other."""
    layer = routed(num_tokens=4000, gemm=AlphaBeta(1e-6, 1e-9), all_to_all=AlphaBeta(1e-6, 1e-8))
    times = {}
    for name, options in {"sequential": {"schedule": "sequential"}, "pipemoe": {"schedule": "pipemoe"}}.items():
        model = create("pipelined", options).simulated_layer(layer)
        times[name] = makespan_s(model.simulated([model.work]))
    model = create("fsmoe", {"degree": 1, "backward_degree": 1}).simulated_layer(layer)
    assert makespan_s(model.simulated([model.work])) == pytest.approx(times["sequential"])
    assert times["pipemoe"] < 0.9 * times["sequential"]
