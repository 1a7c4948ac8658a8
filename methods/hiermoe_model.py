"""HierMoE's performance model: how long a dispatch over d levels takes, and which d is best (arXiv 2508.09591).

A cluster is cut into U[1] groups of ranks, each of these into smaller ones until there are U[i] groups at level i, and
U[D] = G ranks at last. A dispatch over d levels is d exchanges, equations 1 to 7 and algorithm 1 of the paper:

    t_1 = standard(n),  n = G max_j p[j] M v                         one all-to-all over all ranks
    t_d = sum over i < d of Inter-i(n_i) + Intra-(d-1)(n)            for 1 < d <= D, with U[0] = 1
          n_i = U[i] / U[i-1] max_j p_i[j] M v,   n = G / U[d-1] max_j p[j] M v
    d*  = the least d with the least t_d

Inter-i joins ranks at equal places of the U[i] / U[i-1] groups inside one group of level i - 1; Intra-(d-1) joins the
ranks of one group of level d - 1. p_i[j]: tokens, each once, that a rank holds before Inter-i for group j of level i.
Each collective costs alpha + beta n, n being what a rank sends, padded to the fullest destination.

Ours, where the paper is silent: a collective takes as long as its slowest rank (max over ranks of p, not only over j).
The paper passes restricted masks from level to level; here all p follow from counts of the ranks' own tokens, which is
the same: a token from rank s waits, after Inter-i, at place s mod (G / U[i]) of its group. So what a rank holds for
group j is the sum over all s at its place of their tokens for j, and a run need only gather these counts.

Dimensions: T tokens of a rank, K choices, E experts (by slot: the first E / G are on rank 0), G ranks, D levels,
S = U[1] + ... + U[D] counts, M v bytes of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor

from moe.costs import MIN_BETA_S_PER_BYTE, AlphaBeta
from moe.errors import ConfigError, Problem
from moe.topology import Cluster, Level


class Exchange(NamedTuple):
    """One collective of a dispatch.

    Attributes:
        cost: of it, by bytes that a rank sends.
        level: index into `Collectives.groups` of the groups that it tells apart.
        block: consecutive ranks among which tokens stay that take part.
        size: ranks that it joins.
    """

    cost: AlphaBeta
    level: int
    block: int
    size: int


@dataclass(frozen=True)
class Collectives:
    """The 2 D - 1 collectives of a cluster with their fitted costs (figure 9).

    Args:
        groups: U[1] < ... < U[D] = G, each dividing the next.
        standard: all-to-all over all G ranks.
        inter: Inter-1 to Inter-(D-1).
        intra: Intra-1 to Intra-(D-1).

    Raises:
        ConfigError: group sizes that do not divide the ranks, or a level without costs.
    """

    groups: tuple[int, ...]
    standard: AlphaBeta
    inter: tuple[AlphaBeta, ...] = ()
    intra: tuple[AlphaBeta, ...] = ()

    def __post_init__(self) -> None:
        sizes = (1, *self.groups)
        rising = all(coarse < fine and fine % coarse == 0 for coarse, fine in pairwise(sizes))
        if not self.groups or not (rising or self.groups == (1,)):
            rule = "numbers of groups must rise from level to level, each dividing the next, the last being the ranks"
            raise ConfigError(Problem("groups", list(self.groups), rule, "use [4, 8, 16, 32], for example"))
        for name in ("inter", "intra"):
            if len(getattr(self, name)) != self.depth - 1:
                rule = f"{self.depth} levels have {self.depth - 1} such collectives, each with a cost"
                raise ConfigError(Problem(name, len(getattr(self, name)), rule, "measure the missing ones"))

    @property
    def depth(self) -> int:
        """D."""
        return len(self.groups)

    @property
    def num_ranks(self) -> int:
        """G."""
        return self.groups[-1]

    def exchanges(self, dim: int) -> list[Exchange]:
        """The collectives of a dispatch over `dim` levels, in their order.

        Raises:
            ConfigError: the cluster has fewer levels.
        """
        if not 1 <= dim <= self.depth:
            rule = f"the cluster has {self.depth} levels"
            raise ConfigError(Problem("levels", dim, rule, f"use a number from 1 to {self.depth}"))
        ranks, last = self.num_ranks, self.depth - 1
        if dim == 1:
            return [Exchange(self.standard, last, ranks, ranks)]
        coarser = (1, *self.groups)
        inter = [Exchange(self.inter[i], i, ranks // coarser[i], self.groups[i] // coarser[i]) for i in range(dim - 1)]
        block = ranks // coarser[dim - 1]
        return [*inter, Exchange(self.intra[dim - 2], last, block, block)]


def expected_destinations(num_experts: int, num_groups: int, top_k: int) -> float:
    """Of how many groups a token has an expert, on average, if it chooses K distinct experts at random.

    R (1 - C(E - E/R, K) / C(E, K)): a group is missed when all K are among the E - E/R experts of the others. Ours; the
    paper's table II is within a point of what follows from it (`duplication_rate`).

    Args:
        num_experts: E.
        num_groups: R, dividing E.
        top_k: K <= E.

    Raises:
        ConfigError: R does not divide E, or K > E.
    """
    _check_groups(num_experts, num_groups)
    if not 1 <= top_k <= num_experts:
        raise ConfigError(Problem("top_k", top_k, f"must be from 1 to num_experts={num_experts}", "choose fewer"))
    missed = comb(num_experts - num_experts // num_groups, top_k) / comb(num_experts, top_k)
    return num_groups * (1 - missed)


def duplication_rate(num_experts: int, num_groups: int, top_k: int) -> float:
    """Share of the copies that need not travel when a token is sent once to a group: table II, in closed form.

    Args and errors as in `expected_destinations`.
    """
    return 1 - expected_destinations(num_experts, num_groups, top_k) / top_k


def routed_duplication_rate(expert_ids_TK: Tensor, num_experts: int, num_groups: int) -> float:
    """`duplication_rate` of a recorded routing; reads one number back from the device.

    Args:
        expert_ids_TK: [..., T, K] int64, at least one token.
        num_experts, num_groups: E and R.
    """
    assert expert_ids_TK.numel(), "a duplication rate of no tokens"
    return 1 - int(group_counts(expert_ids_TK, num_experts, [num_groups]).sum()) / expert_ids_TK.numel()


def group_counts(
    expert_ids_TK: Tensor, num_experts: int, groups: Sequence[int], dedup: bool = True, kept_TK: Tensor | None = None
) -> Tensor:
    """p of a rank's own tokens: how many go to each group of every level. On the device, without waiting for it.

    Args:
        expert_ids_TK: [..., T, K] int64 slots: where experts have moved, slots of the chosen experts.
        num_experts: E.
        groups: U[1], ..., U[D], each dividing E.
        dedup: count a token once a group (HDd), not once a copy (Hd).
        kept_TK: [..., T, K] bool, False for copies that are dropped; None when none is.

    Returns:
        [..., S] int64, levels after one another.

    Raises:
        ConfigError: a number of groups does not divide E.
    """
    counts = []
    for num_groups in groups:
        _check_groups(num_experts, num_groups)
        group_TK = expert_ids_TK // (num_experts // num_groups)
        if kept_TK is not None:
            group_TK = torch.where(kept_TK, group_TK, num_groups)  # a column of its own, cut off below
        if dedup:
            chosen_TU = group_TK.new_zeros(*group_TK.shape[:-1], num_groups + 1, dtype=torch.bool)
            count_U = chosen_TU.scatter_(-1, group_TK, True).sum(-2)
        else:
            group_S = group_TK.flatten(-2)
            count_U = group_TK.new_zeros(*group_S.shape[:-1], num_groups + 1)
            count_U = count_U.scatter_add_(-1, group_S, torch.ones_like(group_S))
        counts.append(count_U[..., :num_groups])
    return torch.cat(counts, -1)


def dispatch_s(counts_GS: Tensor, collectives: Collectives, row_bytes: int) -> Tensor:
    """t_1, ..., t_D: seconds of one dispatch over d levels. On the device, without waiting for it.

    Args:
        counts_GS: [G, S], `group_counts` of every rank's tokens, with or without duplicates.
        collectives: of the cluster.
        row_bytes: M v, of a token (what travels beside it included, if it matters).

    Returns:
        [D] float64.
    """
    assert counts_GS.shape == (collectives.num_ranks, sum(collectives.groups)), counts_GS.shape
    counts = counts_GS.to(torch.float64).split(list(collectives.groups), dim=1)

    def exchange_s(exchange: Exchange) -> Tensor:
        held_BU = counts[exchange.level].unflatten(0, (-1, exchange.block)).sum(0)  # by place in a block, and group
        sent_bytes = exchange.size * held_BU.max() * row_bytes
        return exchange.cost.alpha_s + exchange.cost.beta_s_per_byte * sent_bytes

    times = [
        torch.stack([exchange_s(exchange) for exchange in collectives.exchanges(dim)]).sum()
        for dim in range(1, collectives.depth + 1)
    ]
    return torch.stack(times)


def best_dim(seconds_D: Tensor) -> int:
    """d*, the least number of levels that takes the least time; reads D numbers back from the device.

    Args:
        seconds_D: [D], from `dispatch_s`.
    """
    seconds = seconds_D.tolist()
    return seconds.index(min(seconds)) + 1


def collectives_of(cluster: Cluster, ep_size: int | None = None) -> Collectives:
    """The collectives of a cluster: those that it has fitted, where all its ranks exchange, else by its levels' costs.

    Fitted one by one, as the paper fits them, they are `Cluster.collectives`. Where there are none, or for some of the
    ranks, they follow from the costs of messages between two ranks of each level (ours). Messages of one collective
    travel side by side, all ranks at once, as the levels' costs are measured: of n bytes that a rank of a block sends
    evenly, the share that crosses a level takes beta of that level; the slowest level decides, and so does the largest
    alpha.

    Args:
        cluster: its levels with fan-out 1 tell nothing apart and are left out.
        ep_size: consecutive ranks that exchange; None for all.

    Raises:
        ConfigError: a level without costs, or ranks that fill no whole groups of a level.
    """
    num_ranks = ep_size or cluster.world_size
    if cluster.collectives is not None and num_ranks == cluster.world_size:
        fitted = cluster.collectives
        groups = [num_ranks // cluster.group_size(level - 1) for level in reversed(cluster.crossed_levels)]
        return Collectives(tuple(groups), fitted.standard, fitted.inter, fitted.intra)
    levels: list[tuple[Level, int, int]] = []  # a level, ranks of a group of the level below, of its own group
    inner = 1
    for index in range(1, len(cluster.levels)):
        outer = min(cluster.group_size(index), num_ranks)
        if outer == inner:
            continue
        level = cluster.levels[index]
        if outer % inner or num_ranks % outer:
            rule = f"{num_ranks} ranks do not fill whole groups of the level {level.name}"
            raise ConfigError(Problem("ep_size", num_ranks, rule, "use a multiple or a divisor of its size"))
        if level.alpha_s is None or not level.beta_s_per_byte:
            rule = f"HierMoE's cost model needs the costs of the level {level.name} of cluster {cluster.name}"
            fix = "measure them with `python -m experiments.comm`, or say how many levels to use"
            raise ConfigError(Problem("beta_s_per_byte", level.beta_s_per_byte, rule, fix))
        levels.append((level, inner, outer))
        inner = outer
    if inner != num_ranks:
        rule = f"cluster {cluster.name} has {cluster.world_size} ranks"
        raise ConfigError(Problem("ep_size", num_ranks, rule, "use at most as many"))
    if not levels:
        return Collectives((1,), AlphaBeta(0.0, MIN_BETA_S_PER_BYTE))

    def over(first: int, last: int) -> AlphaBeta:
        """An all-to-all across the levels `first` to `last`, of ranks that are a group of the one before `first` each
        apart."""
        size = levels[last][2] // levels[first][1]
        shares = [(outer - below) / levels[first][1] / size for _, below, outer in levels[first : last + 1]]
        betas = [level.beta_s_per_byte or 0.0 for level, _, _ in levels[first : last + 1]]
        alpha_s = max(level.alpha_s or 0.0 for level, _, _ in levels[first : last + 1])
        return AlphaBeta(alpha_s, max(beta * share for beta, share in zip(betas, shares, strict=True)))

    depth = len(levels)
    outermost_first = range(depth - 1, 0, -1)
    return Collectives(
        tuple(num_ranks // below for _, below, _ in reversed(levels)),
        over(0, depth - 1),
        tuple(over(index, index) for index in outermost_first),
        tuple(over(0, index - 1) for index in outermost_first),
    )


def _check_groups(num_experts: int, num_groups: int) -> None:
    if num_groups < 1 or num_experts % num_groups:
        rule = f"num_experts={num_experts} can't be spread over so many groups"
        raise ConfigError(Problem("groups", num_groups, rule, "use divisors of the number of experts"))
