"""HierMoE's expert swap (HierD-ES): which two experts should trade places, so that a dispatch takes least time.

Equations 8 to 11 of arXiv 2508.09591: every pair of experts is scored by the performance model of
`methods.hiermoe_model` with the tokens for each group as they would be after the swap,

    Q_d[A, B] = sum over i < d of Inter-i(n_i[A, B]) + Intra-(d-1)(n[A, B]),   n from max_j Z[A, B, j],

and the pair with the least Q at d* is swapped. Z costs O(T K E) by looking at each token: one that chose A but not B
is new to B's group b if it has no expert there, and leaves A's group a if A was its only expert there; one that chose
both or neither changes nothing. As matrix products over all tokens, S being the mask of chosen experts and c[t, g] the
experts of t in group g (the form is ours, the result is the paper's):

    N = S^T [c == 0],  Q = S o [c[., g(.)] == 1],  P = Q^T S,  gain[A, B] = N[B, a] - P[A, A] + P[A, B]
    Z[A, B, a] = Z[a] + gain[A, B],  Z[A, B, b] = Z[b] + gain[B, A]

Ours, where the paper is silent: the statistics are summed over all ranks, and a rank's share of them taken for the
fullest rank's. They are of a past step's routing, whichever the caller gives.

Everything is by slot: experts are known by where they are, and a swap exchanges what two slots hold. Dimensions: T
tokens, K choices, E slots, U groups of a level, D levels, S = U[1] + ... + U[D]; `...` stands for
several layers at once, or for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from methods.hiermoe_model import Collectives, group_counts

Peak = Literal["max", "smooth", "log_sum_exp"]
LEAST_GAIN = 1e-9
"""Relative; what is below is rounding, as of a swap inside one rank."""


class SwapStatistics(NamedTuple):
    """What scores all swaps; the sum over ranks is that of all their tokens.

    Attributes:
        counts_S: [..., S] int64, tokens for each group of every level (`group_counts`).
        gain_DEE: [..., D, E, E] int64, tokens that the group of slot A gains when the experts of A and B trade places;
            0 where both are in one group.
    """

    counts_S: Tensor
    gain_DEE: Tensor


def swap_statistics(
    expert_ids_TK: Tensor, num_experts: int, groups: Sequence[int], dedup: bool = True, kept_TK: Tensor | None = None
) -> SwapStatistics:
    """Of a rank's tokens; a matrix product a level, on the device, without waiting for it. Not under autocast.

    Args:
        expert_ids_TK: [..., T, K] int64 slots of the chosen experts, distinct within a row, of one layer or of several;
            T below 2^24 (sums are exact).
        num_experts: E.
        groups: U[1], ..., U[D].
        dedup: as in `group_counts`; without, a group gains B's copies and loses A's.
        kept_TK: [..., T, K] bool, False for copies that are dropped; None when none is.

    Raises:
        ConfigError: a number of groups does not divide E.
    """
    counts_S = group_counts(expert_ids_TK, num_experts, groups, dedup, kept_TK)
    columns_TK = expert_ids_TK if kept_TK is None else torch.where(kept_TK, expert_ids_TK, num_experts)
    chosen_TE = torch.zeros(*columns_TK.shape[:-1], num_experts + 1, device=columns_TK.device)
    chosen_TE = chosen_TE.scatter_(-1, columns_TK, 1.0)[..., :num_experts].contiguous()
    gains = []
    for num_groups in groups:
        group_E = _group_of(num_experts, num_groups, columns_TK.device)
        if dedup:
            grouped_TUL = chosen_TE.unflatten(-1, (num_groups, -1))
            per_group_TU = grouped_TUL.sum(-1)  # c
            alone_TE = (grouped_TUL * (per_group_TU == 1).unsqueeze(-1)).flatten(-2)  # Q
            none_TU = (per_group_TU == 0).to(chosen_TE.dtype)
            joint = torch.cat([none_TU, alone_TE], -1).mT @ chosen_TE
            new_UE, both_EE = joint.split([num_groups, num_experts], dim=-2)  # N, transposed, and P
            alone_E = both_EE.diagonal(dim1=-2, dim2=-1)
            gain_EE = new_UE.index_select(-2, group_E) - alone_E.unsqueeze(-1) + both_EE
        else:
            copies_E = chosen_TE.sum(-2)
            gain_EE = copies_E.unsqueeze(-2) - copies_E.unsqueeze(-1)
        apart_EE = group_E.unsqueeze(0) != group_E.unsqueeze(1)
        gains.append((gain_EE * apart_EE).round().long())
    return SwapStatistics(counts_S, torch.stack(gains, dim=-3))


def counts_after(statistics: SwapStatistics, groups: Sequence[int], level: int) -> Tensor:
    """Z of one level: tokens for each group after every possible swap.

    Args:
        statistics: of the tokens.
        groups: U[1], ..., U[D], as the statistics were made.
        level: index into them.

    Returns:
        [..., E, E, U] float64; symmetric in A and B.
    """
    gain_EE = statistics.gain_DEE[..., level, :, :].double()
    num_experts, num_groups = gain_EE.shape[-1], groups[level]
    count_U = statistics.counts_S.split(list(groups), dim=-1)[level].double()
    group_E = _group_of(num_experts, num_groups, gain_EE.device)
    a_EE1 = group_E.view(-1, 1, 1).expand(*gain_EE.shape, 1)
    after_EEU = count_U.unsqueeze(-2).unsqueeze(-2).expand(*gain_EE.shape, num_groups).clone()
    after_EEU.scatter_add_(-1, a_EE1, gain_EE.unsqueeze(-1))
    return after_EEU.scatter_add_(-1, a_EE1.transpose(-3, -2), gain_EE.mT.unsqueeze(-1))


def peak(x: Tensor, how: Peak = "smooth", gamma: float = 10.0) -> Tensor:
    """The largest of the last dimension, or a smooth stand-in that also sees the others.

    - `max`: as it is.
    - `smooth`: max(x) (sum (x / max(x))^gamma)^(1 / gamma), the gamma-norm (the paper's; gamma 10 is its default).
    - `log_sum_exp`: max(x) / gamma log sum exp(gamma x / max(x)). The paper names log-sum-exp and no scale; this
      one, which does not depend on the number of tokens, is ours.

    Args:
        x: [..., U], >= 0.
        how: one of these.
        gamma: > 0.

    Returns:
        [...].
    """
    top = x.amax(-1)
    if how == "max":
        return top
    relative = x / top.clamp_min(torch.finfo(x.dtype).tiny).unsqueeze(-1)
    if how == "smooth":
        return top * relative.pow(gamma).sum(-1).pow(1 / gamma)
    return top * torch.logsumexp(gamma * relative, -1) / gamma


def swap_costs(
    statistics: SwapStatistics,
    collectives: Collectives,
    row_bytes: int,
    dim: int,
    how: Peak = "smooth",
    gamma: float = 10.0,
) -> tuple[Tensor, Tensor]:
    """Q_d: modelled seconds of a dispatch over `dim` levels after every swap, and without any.

    A rank holds 1 / B of the tokens for a group, B the ranks of the block that it can come from: its mean share. With
    smooth peaks the seconds only rank swaps, they predict no time.

    Args:
        statistics: summed over the ranks of `collectives`.
        collectives: of the cluster.
        row_bytes: M v, of a token.
        dim: d, 1 to D.
        how, gamma: see `peak`.

    Returns:
        [..., E, E] float64, symmetric; and [...].

    Raises:
        ConfigError: the cluster has fewer levels.
    """
    after_s = now_s = torch.zeros((), dtype=torch.float64, device=statistics.counts_S.device)
    counts = statistics.counts_S.double().split(list(collectives.groups), dim=-1)
    for cost, level, block, size in collectives.exchanges(dim):
        bytes_per_token = size / block * row_bytes
        after_EE = peak(counts_after(statistics, collectives.groups, level), how, gamma)
        now = peak(counts[level], how, gamma)
        after_s = after_s + cost.alpha_s + cost.beta_s_per_byte * bytes_per_token * after_EE
        now_s = now_s + cost.alpha_s + cost.beta_s_per_byte * bytes_per_token * now
    return after_s, now_s


def ranked_swaps(cost_EE: Tensor, now_s: Tensor, most: int = 1, apart: int = 1) -> Tensor:
    """The best swaps, best first; on the device, without waiting for it.

    The paper swaps one pair at a time. Several at once are ours: each is scored as if it were alone, so together they
    may gain less, or lose; those of no common rank (`apart`) disturb one another less.

    All ranks must swap alike: where they may compute differently, let one of them choose and tell the others.

    Args:
        cost_EE: [..., E, E] from `swap_costs`.
        now_s: [...], likewise.
        most: N, how many pairs at most, > 0 and at most E // 2.
        apart: slots of a block, dividing E; two pairs never have slots in one block (1: no slot twice).

    Returns:
        [..., N, 3] float64: slots a < b, and what is then left of the cost (infinite where no pair is left).
    """
    num_experts = cost_EE.shape[-1]
    assert 0 < most <= num_experts // 2 and num_experts % apart == 0, (most, apart)
    slots_E = torch.arange(num_experts, device=cost_EE.device)
    lower_EE = slots_E.unsqueeze(1) >= slots_E.unsqueeze(0)
    cost_EE = cost_EE.masked_fill(lower_EE, torch.inf)
    found = []
    for _ in range(most):
        cost, least = cost_EE.flatten(-2).min(-1)
        pair_2 = torch.stack([least // num_experts, least % num_experts], -1)
        found.append(torch.cat([pair_2.double(), (cost.double() / now_s.double()).unsqueeze(-1)], -1))
        taken_E = (slots_E // apart == pair_2.unsqueeze(-1) // apart).any(-2)
        cost_EE = cost_EE.masked_fill(taken_E.unsqueeze(-2) | taken_E.unsqueeze(-1), torch.inf)
    return torch.stack(found, -2)


def gaining(ranked_N3: Sequence[Sequence[float]], least_gain: float = LEAST_GAIN) -> list[tuple[int, int]]:
    """The pairs of `ranked_swaps`, read back, that lower the cost by at least that share of it."""
    return [(int(a), int(b)) for a, b, left in ranked_N3 if left < 1 - max(least_gain, LEAST_GAIN)]


def best_swaps(cost_EE: Tensor, now_s: Tensor, most: int = 1, apart: int = 1) -> list[tuple[int, int]]:
    """`gaining` of `ranked_swaps`, `most` being cut to what there is; one read-back from the device."""
    return gaining(ranked_swaps(cost_EE, now_s, min(most, len(cost_EE) // 2), apart).tolist())


def swapped(slot_of_expert_E: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """A placement after swaps.

    Args:
        slot_of_expert_E: [E] int64, a permutation: which slot holds each expert; `slot_of_expert_E[expert_ids_TK]` are
            the slots that the functions above take.
        pairs: of slots, disjoint.

    Returns:
        [E] int64, a new tensor.
    """
    moved_E = torch.arange(len(slot_of_expert_E), device=slot_of_expert_E.device)
    for a, b in pairs:
        moved_E[a], moved_E[b] = b, a
    return moved_E[slot_of_expert_E]


def _group_of(num_experts: int, num_groups: int, device: torch.device) -> Tensor:
    """[E] int64, the group of every slot."""
    return torch.arange(num_experts, device=device) // (num_experts // num_groups)
