"""methods.hiermoe_swap: every score against a recount of the swapped routing; peaks, selection, placements."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from methods.hiermoe_model import best_dim, dispatch_s, group_counts
from methods.hiermoe_paper import FIGURE_9, QWEN3_30B_A3B, figure_9_of
from methods.hiermoe_simulation import Setting, dispatch_times, drawn_ids, learned_placement, times_of
from methods.hiermoe_swap import (
    Peak,
    SwapStatistics,
    best_swaps,
    counts_after,
    gaining,
    peak,
    ranked_swaps,
    swap_costs,
    swap_statistics,
    swapped,
)
from tests.test_hiermoe_model import COLLECTIVES, ROW_BYTES, random_ids

GROUPS = COLLECTIVES.groups
PEAKS: list[Peak] = ["max", "smooth", "log_sum_exp"]


def after_swap(ids_TK: Tensor, num_experts: int, a: int, b: int) -> Tensor:
    """The slots that the tokens choose once the experts of two slots have traded places."""
    return swapped(torch.arange(num_experts), [(a, b)])[ids_TK]


@pytest.mark.parametrize("dedup", [True, False])
@pytest.mark.parametrize("with_drops", [True, False])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 1), (16, 3), (16, 9)])
def test_all_pairs_are_counted_as_a_recount_counts_them(
    num_experts: int, top_k: int, with_drops: bool, dedup: bool
) -> None:
    ids_TK = random_ids((40,), num_experts, top_k)
    kept_TK = torch.rand(ids_TK.shape, generator=torch.Generator().manual_seed(1)) < 0.7 if with_drops else None
    statistics = swap_statistics(ids_TK, num_experts, GROUPS, dedup, kept_TK)
    after = torch.cat([counts_after(statistics, GROUPS, level) for level in range(len(GROUPS))], -1).long()
    for a in range(num_experts):
        for b in range(num_experts):
            moved_TK = after_swap(ids_TK, num_experts, a, b)
            assert after[a, b].tolist() == group_counts(moved_TK, num_experts, GROUPS, dedup, kept_TK).tolist()


@given(st.integers(0, 2**32), st.integers(1, 8), st.integers(0, 12))
def test_statistics_of_ranks_add_up(seed: int, top_k: int, cut: int) -> None:
    ids_TK = random_ids((12,), 8, top_k, seed)
    whole, *parts = (swap_statistics(ids, 8, [2, 4]) for ids in (ids_TK, ids_TK[:cut], ids_TK[cut:]))
    assert torch.equal(whole.counts_S, parts[0].counts_S + parts[1].counts_S)
    assert torch.equal(whole.gain_DEE, parts[0].gain_DEE + parts[1].gain_DEE)


@pytest.mark.parametrize("how", PEAKS)
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_costs_are_the_models_of_the_swapped_routing(dim: int, how: Peak) -> None:
    """On even shares, every rank having all tokens' counts / 8: that is what a sum over ranks knows."""
    ids_TK = random_ids((48,), 16, 4)
    cost_EE, now_s = swap_costs(swap_statistics(ids_TK, 16, GROUPS), COLLECTIVES, ROW_BYTES, dim, how)

    def expected_s(slots_TK: Tensor) -> float:
        counts = group_counts(slots_TK, 16, GROUPS).double().split(list(GROUPS))
        return sum(
            cost.predict(size * float(peak(counts[level] / block, how)) * ROW_BYTES)
            for cost, level, block, size in COLLECTIVES.exchanges(dim)
        )

    assert float(now_s) == pytest.approx(expected_s(ids_TK), rel=1e-12)
    for a, b in [(0, 1), (0, 2), (0, 15), (3, 9), (9, 3), (7, 8)]:
        assert float(cost_EE[a, b]) == pytest.approx(expected_s(after_swap(ids_TK, 16, a, b)), rel=1e-12)
    if how == "max":
        shared_GS = (group_counts(ids_TK, 16, GROUPS).double() / 8).expand(8, -1)
        assert float(now_s) == pytest.approx(float(dispatch_s(shared_GS, COLLECTIVES, ROW_BYTES)[dim - 1]), rel=1e-12)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=40), st.sampled_from(PEAKS), st.floats(1, 50))
def test_peaks_are_near_the_maximum(values: list[int], how: Peak, gamma: float) -> None:
    found = float(peak(torch.tensor(values, dtype=torch.float64), how, gamma))
    top, size = max(values), len(values)
    widest = {"max": 1.0, "smooth": size ** (1 / gamma), "log_sum_exp": 1 + math.log(size) / gamma}[how]
    assert top * (1 - 1e-9) <= found <= top * widest * (1 + 1e-9)


def test_the_smooth_peak_is_the_gamma_norm() -> None:
    x = torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64)
    assert float(peak(x, "smooth", 2.0)) == pytest.approx(5)
    assert float(peak(x, "smooth", 10.0)) == pytest.approx((3**10 + 4**10) ** 0.1)
    assert float(peak(x, "log_sum_exp", 4.0)) == pytest.approx(math.log(math.exp(3) + math.exp(4) + 1))
    assert [float(peak(torch.zeros(3), how)) for how in PEAKS] == [0, 0, 0]


def test_the_best_swap_is_the_best_of_all() -> None:
    ids_TK = random_ids((64,), 16, 2, seed=3)
    cost_EE, now_s = swap_costs(swap_statistics(ids_TK, 16, GROUPS), COLLECTIVES, ROW_BYTES, 3)
    assert torch.equal(cost_EE, cost_EE.t())
    ((a, b),) = best_swaps(cost_EE, now_s)
    assert a < b
    assert cost_EE[a, b] == cost_EE.min()
    assert cost_EE[a, b] < now_s


def test_several_swaps_are_disjoint_and_best_first() -> None:
    cost_EE = torch.full((8, 8), 5.0, dtype=torch.float64)
    for (a, b), cost in {(0, 7): 1.0, (0, 6): 2.0, (1, 6): 3.0, (2, 5): 4.0, (3, 4): 6.0}.items():
        cost_EE[a, b] = cost_EE[b, a] = cost
    now_s = torch.tensor(5.0, dtype=torch.float64)
    assert best_swaps(cost_EE, now_s) == [(0, 7)]
    assert best_swaps(cost_EE, now_s, most=2) == [(0, 7), (1, 6)]
    assert best_swaps(cost_EE, now_s, most=8) == [(0, 7), (1, 6), (2, 5)], "the next ones gain nothing"
    assert best_swaps(cost_EE, now_s, most=8, apart=2) == [(0, 7), (2, 5)], "1 is on the rank of 0, 6 on that of 7"
    assert best_swaps(cost_EE, torch.tensor(1.0), most=2) == []


@pytest.mark.parametrize("dedup", [True, False])
def test_several_layers_at_once_are_each_by_itself(dedup: bool) -> None:
    layers = [random_ids((40,), 16, 3, seed) for seed in range(3)]
    alone = [swap_statistics(ids_TK, 16, GROUPS, dedup) for ids_TK in layers]
    joint = swap_statistics(torch.stack(layers), 16, GROUPS, dedup)
    assert torch.equal(joint.counts_S, torch.stack([one.counts_S for one in alone]))
    assert torch.equal(joint.gain_DEE, torch.stack([one.gain_DEE for one in alone]))
    ranked = ranked_swaps(*swap_costs(joint, COLLECTIVES, ROW_BYTES, 2), most=3, apart=2)
    for layer, one in enumerate(alone):
        expected = ranked_swaps(*swap_costs(one, COLLECTIVES, ROW_BYTES, 2), most=3, apart=2)
        torch.testing.assert_close(ranked[layer], expected)


def test_small_gains_are_left() -> None:
    ranked = [[0.0, 3.0, 0.98], [1.0, 2.0, 0.995], [4.0, 5.0, float("inf")]]
    assert gaining(ranked) == [(0, 3), (1, 2)]
    assert gaining(ranked, least_gain=0.01) == [(0, 3)]


def test_what_is_balanced_is_left_alone() -> None:
    ids_TK = torch.arange(16).view(16, 1)  # every expert once
    assert best_swaps(*swap_costs(swap_statistics(ids_TK, 16, GROUPS), COLLECTIVES, ROW_BYTES, 2), most=4) == []


def test_no_tokens_no_swaps() -> None:
    empty = swap_statistics(torch.zeros(0, 2, dtype=torch.int64), 16, GROUPS)
    assert isinstance(empty, SwapStatistics)
    assert best_swaps(*swap_costs(empty, COLLECTIVES, ROW_BYTES, 2)) == []


def test_two_hot_experts_of_one_rank_are_parted() -> None:
    ids_TK = torch.tensor([[0]] * 10 + [[1]] * 10 + [[expert] for expert in range(2, 16)])
    ((a, b),) = best_swaps(*swap_costs(swap_statistics(ids_TK, 16, GROUPS), COLLECTIVES, ROW_BYTES, 1))
    assert a in (0, 1)
    assert b >= 2


def test_a_placement_follows_its_swaps() -> None:
    slots_E = torch.tensor([2, 0, 1, 3])
    moved_E = swapped(slots_E, [(0, 3), (1, 2)])
    assert moved_E.tolist() == [1, 3, 2, 0]
    assert slots_E.tolist() == [2, 0, 1, 3], "a new tensor"
    assert torch.equal(swapped(moved_E, [(0, 3), (1, 2)]), slots_E)


@pytest.mark.parametrize("how", PEAKS)
def test_swaps_lower_the_time_of_tokens_to_come(how: Peak) -> None:
    setting = Setting(32, 4, ROW_BYTES, figure_9_of(1))
    earlier_GTK, later_GTK = (drawn_ids(setting, 256, spread=1.0, seed=1, draw=draw) for draw in (0, 1))
    slots_E = learned_placement(earlier_GTK, setting, most_swaps=16, how=how)
    assert slots_E.sort().values.tolist() == list(range(32))
    before_D, after_D = (times_of(ids_GTK, setting, dedup=True) for ids_GTK in (later_GTK, slots_E[later_GTK]))
    assert after_D.min() < 0.97 * before_D.min()
    assert 1 <= best_dim(after_D) <= 3


def test_hiermoe_gains_over_the_best_d_where_experts_differ() -> None:
    times = dispatch_times(QWEN3_30B_A3B.setting(FIGURE_9), 128, spread=1.0, most_swaps=4)
    assert times["HierMoE"] < times["HD"] < times["HD2"] < times["H1"]
