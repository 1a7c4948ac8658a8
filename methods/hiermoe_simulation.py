"""HierMoE without a cluster: its performance model and its swaps on choices drawn at random.

Dimensions: G ranks, T tokens of a rank, K choices, E experts, D levels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from methods.hiermoe_model import Collectives, best_dim, dispatch_s, group_counts
from methods.hiermoe_swap import Peak, best_swaps, swap_costs, swap_statistics, swapped
from moe.weights import seeded_generator

LEARN_FROM = 4
"""Swaps are chosen by one in so many tokens: enough to know the popular experts, and as many times as fast."""


@dataclass(frozen=True)
class Setting:
    """What is dispatched, and over what.

    Args:
        num_experts, top_k: E, K.
        row_bytes: M v, of a token.
        collectives: of the cluster, which says G.
    """

    num_experts: int
    top_k: int
    row_bytes: int
    collectives: Collectives


def drawn_ids(
    setting: Setting, num_tokens: int, spread: float = 0.0, seed: int = 0, draw: int = 0, device: str = "cpu"
) -> Tensor:
    """K distinct experts a token by softmax of logits that are normal over the experts (Gumbel top-k).

    Args:
        setting: G, K and E.
        num_tokens: T.
        spread: standard deviation of the logits, which all ranks share; 0 is uniform.
        seed: of the logits and the tokens.
        draw: of the tokens.
        device: where they are drawn; other kinds of devices draw other tokens.

    Returns:
        [G, T, K] int64.
    """
    popularity = seeded_generator(("hiermoe", seed, "popularity"), device)
    logits_E = spread * torch.randn(setting.num_experts, generator=popularity, device=device)
    draws = torch.empty(setting.collectives.num_ranks, num_tokens, setting.num_experts, device=device)
    draws.exponential_(generator=seeded_generator(("hiermoe", seed, "tokens", draw), device))
    return (logits_E - draws.log()).topk(setting.top_k, dim=-1).indices


def times_of(ids_GTK: Tensor, setting: Setting, dedup: bool) -> Tensor:
    """[D] seconds of one dispatch of all ranks' tokens over 1, ..., D levels (`hiermoe_model.dispatch_s`).

    Args:
        ids_GTK: [G, T, K] int64 slots.
        setting: of the dispatch.
        dedup: HDd, else Hd.
    """
    counts_GS = group_counts(ids_GTK, setting.num_experts, setting.collectives.groups, dedup)
    return dispatch_s(counts_GS, setting.collectives, setting.row_bytes)


def sorted_counts(
    ids_TK: NDArray[np.integer], num_experts: int, groups: Sequence[int], dedup: bool = True
) -> NDArray[np.int64]:
    """`hiermoe_model.group_counts` of one rank's tokens, in a time that does not grow with the groups: a token's are
    sorted, and each counted once.

    Args:
        ids_TK: [T, K], slots.
        num_experts, groups, dedup: as there.

    Returns:
        [S].
    """
    counts = []
    for num_groups in groups:
        group_TK = ids_TK // (num_experts // num_groups)
        chosen = group_TK.ravel()
        if dedup:
            group_TK = np.sort(group_TK, axis=1)
            first_TK = np.ones(group_TK.shape, dtype=bool)
            first_TK[:, 1:] = group_TK[:, 1:] != group_TK[:, :-1]
            chosen = group_TK[first_TK]
        counts.append(np.bincount(chosen, minlength=num_groups))
    return np.concatenate(counts)


def sent_s(counts_GS: NDArray[np.int64], collectives: Collectives, row_bytes: float, dim: int) -> float:
    """Seconds of a dispatch over `dim` levels that sends exactly the rows there are, as ours does, where
    `hiermoe_model.dispatch_s` pads them to the fullest destination: of each exchange what the busiest rank sends or
    receives.

    Args:
        counts_GS: [G, S], `hiermoe_model.group_counts` of every rank's tokens.
        collectives: of the cluster.
        row_bytes: of a token.
        dim: d.
    """
    starts = np.cumsum([0, *collectives.groups])
    total_s = 0.0
    for exchange in collectives.exchanges(dim):
        level, num_groups = exchange.level, collectives.groups[exchange.level]
        counts_GU = counts_GS[:, starts[level] : starts[level + 1]]
        # Before it, a token waits in the block of its group, at its source's place there.
        held_BU = counts_GU.reshape(-1, exchange.block, num_groups).sum(0)
        num_blocks = collectives.num_ranks // exchange.block
        sent = held_BU.reshape(exchange.block, num_blocks, -1).sum(2)
        received = held_BU.reshape(-1, collectives.num_ranks // num_groups, num_groups).sum(0)
        total_s += exchange.cost.predict(float(max(sent.max(), received.max())) * row_bytes)
    return total_s


def learned_placement(
    ids_GTK: Tensor, setting: Setting, most_swaps: int, how: Peak = "smooth", gamma: float = 10.0
) -> Tensor:
    """The slot of every expert after swaps one by one, each the best of what is left, until none gains.

    Args:
        ids_GTK: [G, T, K] int64 experts; they choose d* and the swaps.
        setting: of the dispatch.
        most_swaps: at most so many.
        how, gamma: see `hiermoe_swap.peak`.

    Returns:
        [E] int64.
    """
    num_experts, collectives = setting.num_experts, setting.collectives
    dim = best_dim(times_of(ids_GTK, setting, dedup=True))
    slot_of_expert_E = torch.arange(num_experts, device=ids_GTK.device)
    for _ in range(most_swaps):
        statistics = swap_statistics(slot_of_expert_E[ids_GTK].flatten(0, 1), num_experts, collectives.groups)
        pairs = best_swaps(*swap_costs(statistics, collectives, setting.row_bytes, dim, how, gamma))
        if not pairs:
            break
        slot_of_expert_E = swapped(slot_of_expert_E, pairs)
    return slot_of_expert_E


def dispatch_times(
    setting: Setting,
    num_tokens: int,
    spread: float = 0.0,
    seeds: Iterable[int] = (0,),
    most_swaps: int = 0,
    how: Peak = "smooth",
) -> dict[str, float]:
    """Seconds of one dispatch by each method, means over seeds.

    Args:
        setting: of the dispatch.
        num_tokens: T.
        spread: see `drawn_ids`.
        seeds: of the routings.
        most_swaps: of HierMoE, chosen by another, smaller draw of tokens than the one that is timed. 0: no HierMoE.
        how: see `learned_placement`.

    Returns:
        `H1` (plain all-to-all, Megatron-LM's), `HD1`, ..., `HD<D>`, `HD` (the best d of every routing) and `HierMoE`
        (that, after the swaps).
    """
    samples: dict[str, list[float]] = {}
    for seed in seeds:
        ids_GTK = drawn_ids(setting, num_tokens, spread, seed)
        seconds_D = times_of(ids_GTK, setting, dedup=True)
        times = {"H1": float(times_of(ids_GTK, setting, dedup=False)[0])}
        times |= {f"HD{dim}": seconds for dim, seconds in enumerate(seconds_D.tolist(), 1)}
        times["HD"] = float(seconds_D.min())
        if most_swaps:
            earlier_GTK = drawn_ids(setting, -(-num_tokens // LEARN_FROM), spread, seed, draw=1)
            placed_GTK = learned_placement(earlier_GTK, setting, most_swaps, how)[ids_GTK]
            times["HierMoE"] = float(times_of(placed_GTK, setting, dedup=True).min())
        for name, seconds in times.items():
            samples.setdefault(name, []).append(seconds)
    return {name: fmean(values) for name, values in samples.items()}
