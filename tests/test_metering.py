"""Bytes by cluster level: ranks 0 and 1 share a node (level 1), ranks 2 and 3 another, the network (2) is between."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe import metering
from moe.topology import cluster_of
from tests.rank_parts import FLAT_LAYERS

Facts = list[dict[str, Any]]
ROW = 3 * 4  # bytes of a row of three float32
TENSOR = 8 * ROW

A2A, REDUCTION, OTHER = "alltoall", "reduction", "other"
NODE, NETWORK = 1, 2

# Rank r sends [r, 0, 1, 2] rows to ranks 0 to 3; two ranks of a node have each other at level 1.
UNEVEN = [
    [[0, A2A, 0], [NODE, A2A, 0], [NETWORK, A2A, 3 * ROW]],
    [[0, A2A, 0], [NODE, A2A, 1 * ROW], [NETWORK, A2A, 3 * ROW]],
    [[0, A2A, 1 * ROW], [NODE, A2A, 2 * ROW], [NETWORK, A2A, 2 * ROW]],
    [[0, A2A, 2 * ROW], [NODE, A2A, 1 * ROW], [NETWORK, A2A, 3 * ROW]],
]
EVEN = [[0, A2A, 2 * ROW], [NODE, A2A, 2 * ROW], [NETWORK, A2A, 4 * ROW]]


def ring(num_bytes: int, kind: str) -> list[list[list[Any]]]:
    """Each rank sends to the next: 0 to 1 and 2 to 3 inside a node, 1 to 2 and 3 to 0 over the network."""
    return [[[level, kind, num_bytes]] for level in (NODE, NETWORK, NODE, NETWORK)]


EXPECTED: dict[str, list[list[list[Any]]]] = {
    "all_to_all_single even": [EVEN] * 4,
    "all_to_all_single uneven": UNEVEN,
    "all_to_all_single empty": [[[0, A2A, 0], [NODE, A2A, 0], [NETWORK, A2A, 0]]] * 4,
    "all_to_all_single in a node, by keyword, bf16": [[[0, A2A, 2 * ROW], [NODE, A2A, 2 * ROW]]] * 4,
    "all_to_all of lists": [EVEN] * 4,
    "all_reduce": ring(2 * 3 * TENSOR // 4, REDUCTION),
    "all_reduce across nodes": [[[NETWORK, REDUCTION, TENSOR]]] * 4,
    "all_reduce alone": [[]] * 4,
    "reduce_scatter_tensor": ring(3 * TENSOR // 4, REDUCTION),
    "all_gather_into_tensor": ring(3 * TENSOR, OTHER),
    "all_gather": ring(3 * TENSOR, OTHER),
    # From rank 1 along the ring; rank 0 is the last and sends nothing.
    "broadcast": [[], [[NETWORK, OTHER, TENSOR]], [[NODE, OTHER, TENSOR]], [[NETWORK, OTHER, TENSOR]]],
    "reduce": [[[NODE, REDUCTION, TENSOR]], [], [[NODE, REDUCTION, TENSOR]], [[NETWORK, REDUCTION, TENSOR]]],
    "send": [[[NETWORK, A2A, TENSOR]], [], [], []],
    "send to a rank of a group": [[], [[NETWORK, A2A, TENSOR]], [], []],
    "batch_isend_irecv": ring(TENSOR, A2A),
}


@pytest.mark.parametrize("call", EXPECTED)
def test_bytes_of_each_call(call: str, rank_facts: dict[str, Facts]) -> None:
    assert [facts[call] for facts in rank_facts["metering"]] == EXPECTED[call]


def test_calls_still_do_their_work(rank_facts: dict[str, Facts]) -> None:
    for facts in rank_facts["metering"]:
        assert facts["all_reduce still sums"]
        assert facts["batch_isend_irecv still sends"]


def test_as_tensor_is_levels_by_classes(rank_facts: dict[str, Facts]) -> None:
    inside, across = [[0, 0, 0], [TENSOR, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0], [TENSOR, 0, 0]]
    assert [facts["as_tensor"] for facts in rank_facts["metering"]] == [inside, across, inside, across]


def test_torch_is_left_as_it_was(rank_facts: dict[str, Facts]) -> None:
    for facts in rank_facts["metering"]:
        assert facts["restored"]
        assert facts["restored after an error"]
        assert facts["outside"] == []


@pytest.mark.parametrize("index", range(len(FLAT_LAYERS)))
def test_a_native_layer_sends_every_copy_four_times_and_the_counts_once(
    index: int, rank_facts: dict[str, Facts]
) -> None:
    ep_size, num_experts, model_dim = FLAT_LAYERS[index][0], 8, 16
    per_rank, cluster = num_experts // ep_size, cluster_of([2, 2])
    facts = [rank["flat"][index] for rank in rank_facts["metering"]]
    travelled = Counter(
        (rank, rank // ep_size * ep_size + expert // per_rank)
        for rank in range(4)
        for expert in facts[rank]["kept_experts"]
    )
    for rank in range(4):
        expected: Counter[int] = Counter()
        for peer in range(rank // ep_size * ep_size, (rank // ep_size + 1) * ep_size):
            # My copies leave, and later their outputs' gradients; the peer's outputs return, and its inputs' gradients.
            num_rows = 2 * travelled[rank, peer] + 2 * travelled[peer, rank]
            expected[cluster.level_of(rank, peer)] += num_rows * model_dim * 4 + per_rank * 8  # float32; int64 counts
        assert facts[rank]["sent"] == [[level, A2A, num_bytes] for level, num_bytes in sorted(expected.items())]
    if "capacity_factor" in FLAT_LAYERS[index][1]:
        assert sum(rank["num_dropped"] for rank in facts) > 0


def test_what_a_package_sends_by_itself_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [0, 1, 2, 3])
    meter = metering.LinkMeter(cluster_of([2, 2]), rank=1)
    with meter.installed():
        assert metering.INSTALLED[-1] is meter
        meter.count_all_to_all([1, 2, 30, 400], None)
        meter.count_rows(torch.tensor([1, 0, 2, 0]), 1000, None)
        meter.count_rows(torch.tensor([0, 3, 0, 1]), 100_000, None)
        meter.count_to_next(5, None, "other")
    assert not metering.INSTALLED
    known = {(0, A2A): 300_002, (NODE, A2A): 1001, (NETWORK, A2A): 102_430, (NETWORK, "other"): 5}
    assert meter.sent == known
    assert meter.sent == known, "rows are counted once"
    meter.count_rows(torch.tensor([1, 1, 1, 1]), 8, None)
    meter.reset()
    assert not meter.sent
