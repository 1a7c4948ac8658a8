"""SwiftMoE on four ranks: the same training wherever replicas are, and no byte more than its rule says."""

from __future__ import annotations

import sys
from math import ceil
from typing import Any

import pytest
from pydantic import ValidationError

from experiments.launch import run_ranks
from methods.swiftmoe import Options, SwiftMoE
from methods.swiftmoe_scheduler import SlotTable, even_table
from moe.system import LayerSpec
from moe.topology import cluster_of
from tests.contract import is_plain_sentence
from tests.lone import lone_mesh
from tests.rank_swiftmoe import LAYERS, NUM_EXPERTS, NUM_STEPS, SLOTS, TABLES, WORLD_SIZE

Facts = list[dict[str, Any]]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """What the ranks recorded, by rank."""
    return run_ranks(
        "tests.rank_swiftmoe:measure",
        {},
        num_ranks=WORLD_SIZE,
        ranks_per_node=2,
        log_dir=tmp_path_factory.mktemp("swiftmoe"),
        timeout_s=120,
    )


def test_rows_come_from_where_they_were_sent(facts: Facts) -> None:
    """One message for each pair of ranks, or all in one call."""
    assert all(rank["exchange"]["equal"] == [True, True] for rank in facts)
    assert [rank["exchange"]["calls"] for rank in facts] == [1] * WORLD_SIZE


def test_layers_take_turns(facts: Facts) -> None:
    """A layer's messages are started before the layer before it waits for its own."""
    expected = ["a0", "b0", "a1", "c0", "b1", "a2", "c1", "b2", "c2"]
    assert [rank["exchange"]["order"] for rank in facts] == [expected] * WORLD_SIZE


def test_there_is_a_group_for_all_runs_of_ranks(facts: Facts) -> None:
    for first in range(WORLD_SIZE):
        for last in range(first + 1, WORLD_SIZE):
            members = list(range(first, last + 1))
            for rank, found in enumerate(facts):
                assert found["groups"][f"{first} {last}"] == (members if rank in members else None)
    assert {len(rank["groups"]) for rank in facts} == {WORLD_SIZE * (WORLD_SIZE - 1) // 2}


@pytest.mark.parametrize("layer", LAYERS)
def test_training_is_the_oracles_wherever_replicas_are(layer: str, facts: Facts) -> None:
    """Outputs, gradients, the norm that clipping sees, weights and both moments, step by step."""
    for rank, found in enumerate(facts):
        errors = found["placements"][layer]["errors"]
        assert set(errors) == {f"{kind} {index}" for kind in ("step", "state") for index in range(len(TABLES))}
        for step, by_name in errors.items():
            wrong = {name: error for name, error in by_name.items() if not error <= 1e-5}
            assert not wrong, (rank, step, wrong)
        assert min(found["placements"][layer]["norms"]) > 0.05, "clipping had nothing to do"
        assert found["placements"][layer]["left"] == 2, "state of whole experts is left in the optimizer"


def test_it_takes_all_ranks_where_the_others_share_experts_by_two(facts: Facts) -> None:
    for found in facts:
        for by_name in found["pairs"]["errors"].values():
            assert max(by_name.values()) <= 1e-5


@pytest.mark.parametrize("layer", LAYERS)
def test_replicas_are_the_same_bits_after_every_step(layer: str, facts: Facts) -> None:
    assert all(found["placements"][layer]["replicas"] == [True] * len(TABLES) for found in facts)


def test_gradients_travel_in_float32_unless_bf16_is_asked_for(facts: Facts) -> None:
    """Against the sum in float64 of what the slots' own backward passes gave, which is bfloat16."""
    for found in facts:
        assert max(found["reduced"]["fp32"]["errors"]) < 1e-6
        assert 1e-4 < max(found["reduced"]["bf16"]["errors"]) < 2e-2
        for what in ("collected bytes", "reduced bytes"):
            assert found["reduced"]["fp32"][what] == 2 * found["reduced"]["bf16"][what]
    assert sum(found["reduced"]["fp32"]["reduced bytes"] for found in facts) > 0


def test_an_offloaded_optimizer_trains_bit_for_bit(facts: Facts) -> None:
    for found in facts:
        assert found["offloaded"] == {"steps": [True] * len(TABLES), "state": True, "slots": True}


def test_parts_of_a_step_are_clocked(facts: Facts) -> None:
    done = {
        *("popularity", "expert_gradients", "gradient_shards", "dense_gradients"),
        "scheduler",
        "metadata",
        "weights",
    }
    for found in facts:
        assert {part for part, seconds in found["model"]["swiftmoe"]["parts"].items() if seconds > 0} == done
        assert {part for part, seconds in found["model"]["flat"]["parts"].items() if seconds > 0} == {
            "expert_gradients",
            "dense_gradients",
        }


def test_slots_are_bf16_and_masters_are_not(facts: Facts) -> None:
    for found in facts:
        assert found["bf16"]["dtypes"] == ["torch.bfloat16", "torch.float32"]
        assert found["bf16"]["replicas"] == [True] * len(TABLES)
        assert max(found["bf16"]["errors"]) < 2e-2


@pytest.mark.parametrize("index", range(len(TABLES)))
def test_bytes_are_those_of_the_formulas(index: int, facts: Facts) -> None:
    """SYMI, section 3.3: slots get (sN - s) / N of an expert from every rank, whatever the placement; sent to ranks, as
    much as other ranks have different experts. Of gradients, a rank gets a shard of every expert that it does not
    hold, from the ranks that do in turn (algorithm 2), and replicas' sums go round their ranks."""
    table, spec = TABLES[index], LAYERS["top1"]
    expert_bytes = 2 * spec.model_dim * spec.hidden_dim * 4
    shard_bytes = expert_bytes // WORLD_SIZE
    gate_bytes = spec.num_experts * spec.model_dim * 4
    popularity_bytes = spec.num_experts * 8
    held = [table.expert_of_slot[start : start + SLOTS] for start in range(0, SLOTS * WORLD_SIZE, SLOTS)]
    holders = [[rank for rank in range(WORLD_SIZE) if expert in held[rank]] for expert in range(NUM_EXPERTS)]
    for rank, found in enumerate(facts):
        sent, per_slot = found["bytes"][index], found["bytes per slot"][index]
        assert per_slot["fill"] == (SLOTS * WORLD_SIZE - SLOTS) / WORLD_SIZE * expert_bytes
        assert sent["fill"] == sum(len(set(held[peer])) for peer in range(WORLD_SIZE) if peer != rank) * shard_bytes
        assert per_slot | {"fill": 0} == sent | {"fill": 0}
        assert sent["fill reduction"] == 0
        wanted = sum(
            ranks[peer % len(ranks)] == rank for ranks in holders for peer in range(WORLD_SIZE) if peer not in ranks
        )
        assert sent["collect"] == wanted * shard_bytes
        sizes = [len(ranks) for ranks in holders if rank in ranks]
        rings = sum(round(2 * (size - 1) / size * expert_bytes) for size in sizes)
        assert sent["reduction"] == rings + 2 * (WORLD_SIZE - 1) / WORLD_SIZE * (gate_bytes + popularity_bytes)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has builds for Linux only")
def test_kernels_train_and_drop_as_the_torch_path_does(facts: Facts) -> None:
    for found in facts:
        told = found["on kernels"]
        for by_name in told["placements"]["errors"].values():
            assert max(by_name.values()) <= 1e-5
        assert told["placements"]["replicas"] == [True, True]
        assert told["drops"] == found["drops"]


@pytest.mark.parametrize("drop", ["per_source", "global"])
def test_replicas_are_those_of_the_last_iterations_tokens(drop: str, facts: Facts) -> None:
    ranks = [rank["drops"][drop] for rank in facts]
    counts = [sum(column) for column in zip(*(rank["counts"][0] for rank in ranks), strict=True)]
    followed = even_table(NUM_EXPERTS, WORLD_SIZE, 4).after(counts)
    for rank in ranks:
        assert rank["tables"] == [[2] * NUM_EXPERTS, list(followed.counts), list(followed.counts)]
        assert rank["after evaluation"] == list(followed.counts), "a pass without gradients decides nothing"


@pytest.mark.parametrize("drop", ["per_source", "global"])
def test_capacity_follows_replicas(drop: str, facts: Facts) -> None:
    """Each slot keeps to its capacity, drops are what is over the expert's, and fewer once replicas have followed."""
    ranks = [rank["drops"][drop] for rank in facts]
    num_copies = sum(ranks[0]["counts"][0]) * WORLD_SIZE
    told = []
    for step in range(2):
        replicas = ranks[0]["tables"][step]
        counts = [rank["counts"][step] for rank in ranks]
        dropped = [rank["dropped"][step] for rank in ranks]
        rows = [rank["rows"][step] for rank in ranks]
        assert sum(map(sum, rows)) == num_copies - sum(dropped), "survivors are what the experts computed"
        assert max(map(max, rows)) <= num_copies // 16
        if drop == "global":
            totals = [sum(column) for column in zip(*counts, strict=True)]
            assert sum(dropped) == over(totals, [num * num_copies / 16 for num in replicas])
        else:
            capacities = [num * num_copies / WORLD_SIZE / 16 for num in replicas]
            assert dropped == [over(of_rank, capacities) for of_rank in counts]
        told.append(sum(dropped))
    assert told[1] < 0.7 * told[0]


def over(counts: list[int], capacities: list[float]) -> int:
    """Copies over capacities, rounded up."""
    return sum(max(0, count - ceil(most)) for count, most in zip(counts, capacities, strict=True))


def test_the_global_rule_drops_fewer(facts: Facts) -> None:
    for step in range(2):
        dropped = {
            drop: sum(rank["drops"][drop]["dropped"][step] for rank in facts) for drop in ("per_source", "global")
        }
        assert dropped["global"] < dropped["per_source"]


def test_fewer_experts_than_ranks(facts: Facts) -> None:
    for rank, found in enumerate(facts):
        assert found["few experts"]["views"] == [2 * (rank > 0)] * 2
        assert all(found["few experts"][what] for what in ("weights", "state", "slots"))


def test_whole_experts_go_into_another_layer_and_training_goes_on_bit_for_bit(facts: Facts) -> None:
    for found in facts:
        assert found["checkpoint"]["slots"] == TABLES[2].expert_of_slot
        for name in ("new", "used"):
            told = found["checkpoint"][name]
            assert told == {"again": True, "table": True, "parameters with state": 2, "continued": True}, name
        assert found["checkpoint"]["even"]


def test_whole_experts_are_put_together_one_a_rank_at_a_time(facts: Facts) -> None:
    """Their weights and both moments: where a rank has two experts, in two rounds of shards of four."""
    for found in facts:
        assert found["checkpoint"]["messages"] == 3 * NUM_EXPERTS // WORLD_SIZE
        assert found["checkpoint"]["most rows"] == WORLD_SIZE


def test_a_model_in_the_suites_loop_trains_as_flats(facts: Facts) -> None:
    for found in facts:
        flat, swift = found["model"]["flat"], found["model"]["swiftmoe"]
        assert swift["losses"] == pytest.approx(flat["losses"], rel=1e-5)
        assert swift["norms"] == pytest.approx(flat["norms"], rel=1e-4)
        assert swift["parameters"] == flat["parameters"]
        assert min(flat["norms"]) > 0.5, "clipping had nothing to do"
        assert swift["tables"] == swift["predicted"] == facts[0]["model"]["swiftmoe"]["tables"]
    assert len({str(tables) for tables in facts[0]["model"]["swiftmoe"]["tables"]}) == NUM_STEPS, "placements move"


def test_fewer_slots_than_experts_are_refused() -> None:
    spec = LayerSpec(8, 8, 16, 1)
    (reason,) = SwiftMoE({"slots_per_rank": 3}).refusals(spec, cluster_of([4]))
    assert is_plain_sentence(reason)
    assert "4 ranks with slots_per_rank=3 have 12 for 16 experts; set slots_per_rank to at least 4" in reason
    assert SwiftMoE({"slots_per_rank": 4}).refusals(spec, cluster_of([4])) == []
    assert SwiftMoE().refusals(spec, cluster_of([4])) == []
    (reason,) = SwiftMoE({"slots_per_rank": 1}).refusals(spec, cluster_of([1]))
    assert "1 rank with" in reason


@pytest.mark.parametrize(
    ("num_experts", "num_ranks", "slots"),
    [(16, 16, 4), (16, 4, 16), (8, 4, 8), (8, 3, 8), (16, 2, 16), (16, 1, 16)],
)
def test_slots_are_four_an_expert_or_one_a_rank_unless_they_are_said(
    num_experts: int, num_ranks: int, slots: int
) -> None:
    assert Options().slots(num_experts, num_ranks) == slots
    assert Options(slots_per_rank=5).slots(num_experts, num_ranks) == 5


@pytest.mark.parametrize(
    "options", [{"slots_per_rank": 0}, {"drop": "random"}, {"slots": 4}, {"offload": "disk"}, {"reduce_dtype": "fp8"}]
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SwiftMoE(options)


def test_a_layer_says_what_it_is() -> None:
    layer = SwiftMoE({"slots_per_rank": 9, "offload": True}).build_layer(LayerSpec(8, 8, 8, 1), lone_mesh())
    assert layer.path == "9 slots a rank; all-to-all-v; expert by expert; optimizer in the host's memory"
    in_place = SwiftMoE({"slots_per_rank": 9}).build_layer(LayerSpec(8, 8, 8, 1), lone_mesh())
    assert in_place.path.endswith("; optimizer in place")
    assert layer.expert_of_slot == SlotTable((2, *[1] * 7), 9).expert_of_slot
    assert {name for name, _ in layer.named_parameters()} == {"gate.weight", "shards.master_EF"}
    assert len(layer.expert_views()) == 16
