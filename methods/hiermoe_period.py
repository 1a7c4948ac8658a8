"""How often HierMoE should swap: its performance model over many iterations, beside the paper's ablation.

Dimensions: G ranks, T tokens of a rank, K choices, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch

from methods.hiermoe_model import best_dim
from methods.hiermoe_paper import FIGURE_9, NOTE, NUM_TOKENS, PERIOD_GAINS, POPULARITY_SPREAD, QWEN3_30B_A3B, Model, Row
from methods.hiermoe_simulation import Setting, drawn_ids, times_of
from methods.hiermoe_swap import best_swaps, swap_costs, swap_statistics, swapped

ITERATIONS = 64
"""Ours; the paper does not say over how many it measured."""


def period_gains(
    setting: Setting, num_tokens: int, periods: Sequence[int], iterations: int, spread: float, seed: int = 0
) -> dict[int, float]:
    """What swapping one pair every so many iterations adds to the best d, over all iterations from the first.

    Every iteration draws other tokens by one popularity. A swap is chosen by the tokens of the iteration before it.

    Args:
        setting: of the dispatch.
        num_tokens: T.
        periods: iterations between two swaps.
        iterations: how many are dispatched.
        spread, seed: see `methods.hiermoe_simulation.drawn_ids`.

    Returns:
        Time without swaps over time with them, by period.
    """
    collectives, num_experts = setting.collectives, setting.num_experts
    slot_of_expert = {period: torch.arange(num_experts) for period in periods}
    fixed_s, swapped_s = 0.0, dict.fromkeys(periods, 0.0)
    for iteration in range(1, iterations + 1):
        ids_GTK = drawn_ids(setting, num_tokens, spread, seed, draw=iteration)
        fixed_D = times_of(ids_GTK, setting, dedup=True)
        fixed_s += float(fixed_D.min())
        for period in periods:
            slots_GTK = slot_of_expert[period][ids_GTK]
            placed_D = times_of(slots_GTK, setting, dedup=True)
            swapped_s[period] += float(placed_D.min())
            if iteration % period == 0:
                statistics = swap_statistics(slots_GTK.flatten(0, 1), num_experts, collectives.groups)
                costs = swap_costs(statistics, collectives, setting.row_bytes, best_dim(placed_D))
                slot_of_expert[period] = swapped(slot_of_expert[period], best_swaps(*costs))
    return {period: fixed_s / seconds for period, seconds in swapped_s.items()}


def period_rows(
    num_tokens: int = NUM_TOKENS,
    seeds: Sequence[int] = (0,),
    iterations: int = ITERATIONS,
    model: Model = QWEN3_30B_A3B,
) -> list[Row]:
    """What swaps add to the best d, by the iterations between two of them, beside the paper's ablation; skewed routing.

    Args:
        num_tokens: T, of a rank.
        seeds: of routings that are averaged.
        iterations: how many, from experts that have not moved yet.
        model: which.
    """
    setting, periods = model.setting(FIGURE_9), list(PERIOD_GAINS)
    gains = [period_gains(setting, num_tokens, periods, iterations, POPULARITY_SPREAD, seed) for seed in seeds]
    source = (
        f"text of the ablation, the model and its iterations not verified; the first {iterations} iterations from "
        f"unmoved experts, one popularity (ours); {NOTE}"
    )
    return [
        Row(
            quantity=f"all-to-all speed-up of HierMoE over HD, a swap every {period}, {model.name}",
            paper=PERIOD_GAINS[period],
            ours=fmean(gain[period] for gain in gains),
            unit="x",
            kind="modelled",
            source=source,
        )
        for period in periods
    ]
