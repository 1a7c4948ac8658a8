"""FlexMoE's replicas and static ones on four ranks: training does not notice where they are, bytes are those said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from baselines.deepspeed import DeepSpeed
from baselines.deepspeed_static import DeepSpeedStatic
from baselines.flexmoe import FlexMoE, FlexMoELayer, Options, costs_of
from baselines.flexmoe_migration import Arrival, arrivals
from baselines.flexmoe_popularity import plan_by_popularity
from baselines.flexmoe_sync import part
from experiments.launch import run_ranks
from moe.replica_table import ReplicaTable, cyclic_table
from moe.system import LayerSpec
from moe.topology import cluster_of
from tests.contract import CLUSTER, is_plain_sentence
from tests.lone import lone_mesh
from tests.rank_flexmoe import LAYERS, MODELS, NUM_EXPERTS, SLOTS, STATIC, TABLES, TAKEN_OVER, WORLD_SIZE

Facts = list[dict[str, Any]]
EXPERT_BYTES = 4 * 2 * LAYERS["top1"].model_dim * LAYERS["top1"].hidden_dim


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """What the ranks recorded, by rank."""
    folder: Path = tmp_path_factory.mktemp("flexmoe")
    return run_ranks(
        "tests.rank_flexmoe:measure",
        {"folder": str(folder / "checkpoints")},
        num_ranks=WORLD_SIZE,
        ranks_per_node=2,
        log_dir=folder / "logs",
        timeout_s=60,
    )


def assert_close(errors: dict[str, float]) -> None:
    """All within what order of sums makes."""
    wrong = {name: error for name, error in errors.items() if not error <= 1e-5}
    assert not wrong, wrong


@pytest.mark.parametrize("layer", LAYERS)
def test_training_is_flats_wherever_replicas_are(layer: str, facts: Facts) -> None:
    """Outputs, gradients, the norm that clipping sees, weights and both moments, step by step."""
    for rank in facts:
        found = rank["placements"][layer]
        assert set(found["errors"]) == {f"{kind} {index}" for kind in ("step", "state") for index in range(len(TABLES))}
        for errors in found["errors"].values():
            assert_close(errors)
        assert min(found["norms"]) > 0.05, "clipping had nothing to do"


@pytest.mark.parametrize("layer", LAYERS)
def test_replicas_are_the_same_bits_after_every_step(layer: str, facts: Facts) -> None:
    """But where the CPU's vectors don't divide an expert: the fused AdamW rounds a tensor's last numbers otherwise."""
    apart = 1e-6 if layer == "odd" else 0.0
    for rank in facts:
        assert len(rank["placements"][layer]["replicas"]) == len(TABLES)
        assert max(rank["placements"][layer]["replicas"]) <= apart


def test_it_takes_all_ranks_where_the_others_share_experts_by_two(facts: Facts) -> None:
    for rank in facts:
        for errors in rank["pairs"]["errors"].values():
            assert_close(errors)


@pytest.mark.parametrize("index", range(len(TABLES)))
def test_a_move_sends_weights_and_moments_once_to_every_new_rank(index: int, facts: Facts) -> None:
    before = ReplicaTable(tuple(facts[0]["bytes"][index]["before"]), SLOTS, NUM_EXPERTS)
    moved = list(arrivals(before, TABLES[index]))
    for rank, found in enumerate(facts):
        told = found["bytes"][index]
        assert told["told"] == told["moved"] == 3 * EXPERT_BYTES * sum(arrival.source == rank for arrival in moved)
    assert (len(moved) == 0) == (index == len(TABLES) - 1), "the last table is the one before it"


@pytest.mark.parametrize("index", range(len(TABLES)))
def test_a_reduction_sends_what_a_ring_would(index: int, facts: Facts) -> None:
    """2 (R - 1) / R of an expert's gradient from each of its R ranks, up to a number."""
    for rank, found in enumerate(facts):
        holders = [ranks for ranks in TABLES[index].holders if rank in ranks]
        expected = sum(2 * (len(ranks) - 1) / len(ranks) * EXPERT_BYTES for ranks in holders)
        assert found["bytes"][index]["reduced"] == pytest.approx(expected, abs=4 * 2 * len(holders) * WORLD_SIZE)


@pytest.mark.parametrize("policy", ["popularity", "time"])
def test_replicas_change_at_the_interval_only_and_alike_on_all_ranks(policy: str, facts: Facts) -> None:
    tables = facts[0]["decisions"][policy]["tables"]
    assert all(rank["decisions"][policy]["tables"] == tables for rank in facts)
    assert tables[0] == cyclic_table(NUM_EXPERTS, WORLD_SIZE, 4).expert_of_slot
    assert tables[0] == tables[1] != tables[2] == tables[3]
    assert tables[4] == tables[5]
    for rank in facts:
        for told, table in zip(rank["decisions"][policy]["replicas"], tables[1:], strict=True):
            assert told == [table.count(expert) for expert in range(NUM_EXPERTS)]


def test_popularity_makes_a_capacity_drop_less(facts: Facts) -> None:
    for rank in facts:
        dropped = rank["decisions"]["popularity"]["dropped"]
        assert dropped[0] == dropped[1], "the placement is frozen between decisions"
        assert dropped[2] < 0.7 * dropped[1]
    replicas = facts[0]["decisions"]["popularity"]["replicas"][-1]
    assert replicas[0] == max(replicas) and replicas[4:] == [1] * 4, "what evaluations chose does not count"


def test_time_evens_out_the_rows_of_ranks(facts: Facts) -> None:
    rows = [rank["decisions"]["time"]["rows"] for rank in facts]
    before, after = (max(rank[step] for rank in rows) for step in (0, 5))
    assert sum(rank[0] for rank in rows) == sum(rank[5] for rank in rows)
    assert after < before
    assert all(rank["decisions"]["time"]["dropped"] == [0] * 6 for rank in facts)


def test_systems_train_alike_and_take_over_from_one_another(facts: Facts) -> None:
    told = facts[0]["models"]
    for name in MODELS:
        assert told["losses"][name] == pytest.approx(told["losses"]["flat"], rel=1e-5)
    for source, name in TAKEN_OVER:
        assert told[f"{source} to {name}"] == pytest.approx(told["went on"]["flat"], rel=1e-5)
        assert source != name or told[f"{name} to {name}"] == told["went on"][name], "not bit for bit"


def test_a_checkpoint_brings_its_placement(facts: Facts) -> None:
    told = facts[0]["models"]
    first = cyclic_table(8, WORLD_SIZE, SLOTS).expert_of_slot
    assert first not in told["flexmoe tables"], "replicas have moved"
    assert told["flexmoe to flexmoe tables"] == told["flexmoe tables"]
    assert told["flat to flexmoe tables"] == [first, first]


@pytest.mark.parametrize("name", STATIC)
def test_static_replicas_train_as_flat(name: str, facts: Facts) -> None:
    replicas = STATIC[name][1]["replicas"]
    for rank, found in enumerate(facts):
        told = found["static"][name]
        for errors in told["errors"]:
            assert_close(errors)
        block = WORLD_SIZE // replicas
        place, size = rank % block, NUM_EXPERTS // block
        assert told["held"] == list(range(place * size, (place + 1) * size))
        assert told["replicas"] == (None if replicas == 1 else [replicas] * NUM_EXPERTS)
        assert told["same groups"]


@pytest.mark.parametrize("replicas", [2, 4])
def test_zero_1_trains_a_part_a_replica_and_sends_as_much(replicas: int, facts: Facts) -> None:
    """A float32 ring either way: gradients all-reduced, or scattered and weights gathered."""
    for found in facts:
        cut, whole = (found["static"][f"deepspeed_static {replicas}{kind}"] for kind in ("", ", whole"))
        assert cut["trained"] * replicas == whole["trained"]
        assert cut["sent"] == whole["sent"] > 0


def test_static_capacity_is_the_suites(facts: Facts) -> None:
    for rank in facts:
        assert rank["static drops"] == {"flat": 8, "static": 8}


def test_tables() -> None:
    table = cyclic_table(4, 3, 2)
    assert table.expert_of_slot == [0, 1, 2, 3, 0, 1]
    assert table.counts == (2, 2, 1, 1) and table.holders == [[0, 2], [0, 2], [1], [1]]
    after = table.moved([0, 0, 2, 3, 1, 2])
    assert after.local_slots(0) == {0: [0, 1]} and after.local_slots(2) == {1: [0], 2: [1]}
    assert list(arrivals(table, after)) == [Arrival(2, 1, 2)]
    assert list(arrivals(after, after)) == []
    assert cyclic_table(16, 16, 4).holders[5] == [1, 5, 9, 13], "expert-data parallelism"


@given(st.integers(1, 5), st.integers(0, 40))
def test_parts_are_the_whole(count: int, num_weights: int) -> None:
    holders = list(range(3, 3 + count))
    numbers = [n for rank in holders for n in range(num_weights)[part(holders, rank, num_weights)]]
    assert numbers == list(range(num_weights))


@st.composite
def situations(draw: Any) -> tuple[np.ndarray, np.ndarray]:
    """Slots [E, N], all taken, and copies [N, E]."""
    num_experts, num_ranks = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    slots = draw(st.integers(-(-num_experts // num_ranks), 6))
    spare = num_ranks * slots - num_experts
    more = draw(st.lists(st.integers(0, num_experts - 1), min_size=spare, max_size=spare))
    experts = draw(st.permutations([*range(num_experts), *more]))
    slots_EN = np.zeros((num_experts, num_ranks), dtype=np.int64)
    np.add.at(slots_EN, (experts, np.arange(num_ranks * slots) // slots), 1)
    copies = draw(st.lists(st.integers(0, 1000), min_size=num_ranks * num_experts, max_size=num_ranks * num_experts))
    return slots_EN, np.array(copies).reshape(num_ranks, num_experts)


@given(situations(), st.integers(1, 8))
def test_popularity_keeps_slots_and_only_lowers_the_most_popular_one(
    drawn: tuple[np.ndarray, np.ndarray], most_shifts: int
) -> None:
    slots_EN, copies_NE = drawn
    plan = plan_by_popularity(slots_EN, copies_NE, 1.2, most_shifts)
    assert (plan.slots_EN.sum(0) == slots_EN.sum(0)).all()
    assert plan.slots_EN.sum(1).min() >= 1 and plan.slots_EN.min() >= 0
    assert len(plan.moves) <= 2 * most_shifts
    before, after = ((copies_NE.sum(0) / slots.sum(1)).max() for slots in (slots_EN, plan.slots_EN))
    assert after <= before
    if before * slots_EN.sum() <= 1.2 * copies_NE.sum():
        assert plan.moves == ()


def test_popularity_follows_the_copies() -> None:
    slots_EN = np.array([[1, 1], [1, 1], [1, 1], [1, 1]])
    copies_NE = np.array([[40, 10, 10, 4], [24, 14, 14, 12]])
    plan = plan_by_popularity(slots_EN, copies_NE)
    assert plan.slots_EN.sum(1).tolist() == [3, 2, 2, 1], "64, 24, 24 and 16 copies"
    assert plan_by_popularity(plan.slots_EN, copies_NE).moves == ()


def test_costs_are_the_clusters_where_it_has_some() -> None:
    spec = LayerSpec(8, 16, 4, 1)
    costs = costs_of(Options(flops_per_s=512.0), spec, CLUSTER)
    assert (costs.rows_per_s, costs.row_bytes, costs.expert_bytes) == (1.0, 32, 1024)
    assert costs.bytes_per_s_NN[0].tolist()[1:] == pytest.approx([1e9, 1 / 8e-9, 1 / 8e-9])
    assert (costs_of(Options(), spec, cluster_of([2, 2])).bytes_per_s_NN == 6.25e9).all()
    assert (costs_of(Options(net_bytes_per_s=5.0), spec, CLUSTER).bytes_per_s_NN == 5.0).all()


def test_fewer_slots_than_experts_are_refused() -> None:
    spec = LayerSpec(8, 8, 16, 1)
    (reason,) = FlexMoE({"slots_per_rank": 3}).refusals(spec, cluster_of([4]))
    assert is_plain_sentence(reason)
    assert "FlexMoE needs a slot for every expert: 4 ranks with slots_per_rank=3 have 12 for 16 experts" in reason
    assert FlexMoE().refusals(spec, cluster_of([4])) == []


def test_replicas_that_do_not_fit_are_refused() -> None:
    spec = LayerSpec(8, 8, 8, 1)
    (reason,) = DeepSpeedStatic({"replicas": 3}).refusals(spec, cluster_of([4]))
    assert is_plain_sentence(reason)
    assert "replicas=3 of 8 experts on 4 ranks" in reason and "one of [1, 2, 4], or to null" in reason
    (reason,) = DeepSpeedStatic({"replicas": 1}).refusals(LayerSpec(8, 8, 6, 1), cluster_of([4]))
    assert "one of [2, 4]" in reason
    assert "deepspeed can't have replicas=3 of 8" in DeepSpeed({"replicas": 3}).refusals(spec, cluster_of([4]))[0]
    assert DeepSpeed({"replicas": 2}).expert_copies(8, 4) == 2 and DeepSpeed().expert_copies(8, 4) == 1


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "replicas"), [(16, 16, 4), (16, 4, 4), (8, 6, 3), (8, 1, 1), (16, 2, 2), (6, 4, 4)]
)
def test_static_replicas_are_four_or_what_fits(num_experts: int, num_ranks: int, replicas: int) -> None:
    assert DeepSpeedStatic().replicas(num_experts, num_ranks) == replicas
    assert DeepSpeedStatic().refusals(LayerSpec(8, 12, num_experts, 1), cluster_of([num_ranks])) == []


@pytest.mark.parametrize(
    ("system", "options"),
    [
        (FlexMoE, {"interval": 0}),
        (FlexMoE, {"policy": "random"}),
        (FlexMoE, {"balanced": 0.5}),
        (FlexMoE, {"most_shifts": 0}),
        (FlexMoE, {"net_bytes_per_s": 0}),
        (FlexMoE, {"slots": 4}),
        (DeepSpeedStatic, {"replicas": 0}),
        (DeepSpeedStatic, {"slots_per_rank": 4}),
    ],
)
def test_bad_options(system: type[FlexMoE] | type[DeepSpeedStatic], options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        system(options)


def test_a_layer_says_what_it_is_and_takes_no_foreign_placement() -> None:
    layer = FlexMoE({"slots_per_rank": 9}).build_layer(LayerSpec(8, 8, 8, 1), lone_mesh())
    assert isinstance(layer, FlexMoELayer)
    assert layer.path == "9 slots a rank; all-to-all-v; expert by expert"
    assert {name for name, _ in layer.named_parameters()} == {"gate.weight", "experts.w_in", "experts.w_out"}
    assert len(layer.expert_views()) == 18
    first = [*range(8), 0]
    for foreign in (None, [0] * 9, [*range(8)], [*range(1, 9), 0]):
        layer.restore_placement(foreign)
        assert layer.expert_of_slot == first
    layer.restore_placement([*range(8), 7])
    assert layer.replicas_E == [1] * 7 + [2]
    assert [view.expert for view in layer.expert_views()[::2]] == [*range(8), 7]


def test_zero_1_refuses_experts_that_replicas_can_not_be_cut_along() -> None:
    spec, cluster = LayerSpec(8, 10, 16, 1), cluster_of([4])
    (reason,) = DeepSpeedStatic().refusals(spec, cluster)
    assert "hidden_dim=10 is no multiple of 4" in reason and "zero_stage=0" in reason
    assert DeepSpeedStatic({"zero_stage": 0}).refusals(spec, cluster) == []
    assert DeepSpeedStatic({"replicas": 2}).refusals(spec, cluster) == []
