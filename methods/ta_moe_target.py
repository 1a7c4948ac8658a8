"""TA-MoE's target dispatch: how many copies each rank should send to each other, by what a link costs.

Chen et al., NeurIPS 2022 (arXiv 2302.09915). What this follows is the paper's abstract and released code: the objective
is the natural linear program, the closed form agrees with the released gate. Rules marked "ours" are not known from
the paper.

    minimise  max over i, j of alpha_ij + beta_ij * v_ij      v_ij: bytes from rank i to rank j
    with      sum_j v_ij = V (all copies leave),  sum_i v_ij = V (equal load),  v >= 0

Everything here is in shares: s_ij = v_ij / V, so that rows and columns sum to 1. Dimensions: P ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

Matrix = NDArray[np.float64]
SINKHORN_ROUNDS, SINKHORN_TOLERANCE = 1000, 1e-12


def tree_levels(tree: Sequence[Any] | int) -> NDArray[np.int64]:
    """Level of every pair of ranks in a tree of switches; 0 for a rank itself.

    Args:
        tree: nested fan-outs: an int is a switch with so many ranks, a list is a switch over its items. [2, 2] is two
            nodes of two, [[2, 2], [2]] is asymmetric.

    Returns:
        [P, P]. Links equally far below the root share a level, so that a shallow branch of an asymmetric tree counts
        as if it were as deep as the deepest (ours).
    """
    paths: list[tuple[int, ...]] = []

    def descend(node: Sequence[Any] | int, path: tuple[int, ...]) -> None:
        for index, child in enumerate([None] * node if isinstance(node, int) else node):
            if child is None:
                paths.append((*path, index))
            else:
                descend(child, (*path, index))

    descend(tree, ())
    depth = max(map(len, paths))
    levels_PP = np.zeros((len(paths), len(paths)), dtype=np.int64)
    for i, a in enumerate(paths):
        for j, b in enumerate(paths):
            shared = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
            levels_PP[i, j] = 0 if i == j else depth - shared
    return levels_PP


def smooth(cost_PP: Matrix, levels_PP: NDArray[np.int64]) -> Matrix:
    """Every pair's cost replaced by the mean over its level: removes the noise of a measurement, and makes rows equal
    up to their order, which the closed form needs.

    Args:
        cost_PP: [P, P].
        levels_PP: [P, P], the level of each pair.
    """
    smoothed = np.empty_like(cost_PP)
    for level in np.unique(levels_PP):
        smoothed[levels_PP == level] = cost_PP[levels_PP == level].mean()
    return smoothed


def closed_form(beta_PP: Matrix) -> Matrix:
    """Shares with beta_ij * s_ij equal along a row: s_ij = (1 / beta_ij) / sum_j' (1 / beta_ij').

    The optimum where latencies are 0 and the result is doubly stochastic, as it is on homogeneous and symmetric
    clusters; elsewhere see `balanced`.

    Args:
        beta_PP: [P, P], > 0.

    Returns:
        [P, P], rows sum to 1.
    """
    inverse_PP = 1 / beta_PP
    return inverse_PP / inverse_PP.sum(1, keepdims=True)


def balanced(shares_PP: Matrix) -> Matrix:
    """The nearest shares (in relative entropy) whose rows and columns sum to 1, by Sinkhorn's scaling (ours).

    Args:
        shares_PP: [P, P], > 0.
    """
    shares_PP = shares_PP.copy()
    for _ in range(SINKHORN_ROUNDS):
        shares_PP /= shares_PP.sum(0, keepdims=True)
        shares_PP /= shares_PP.sum(1, keepdims=True)
        if np.abs(shares_PP.sum(0) - 1).max() < SINKHORN_TOLERANCE:
            break
    return shares_PP


def exact(alpha_PP: Matrix, beta_PP: Matrix, bytes_per_rank: float) -> tuple[Matrix, float]:
    """The linear program itself, solved by HiGHS.

    Args:
        alpha_PP: [P, P] seconds.
        beta_PP: [P, P] seconds per byte, > 0.
        bytes_per_rank: V, what a rank sends in one exchange.

    Returns:
        shares [P, P], and the seconds of the slowest pair.
    """
    num_ranks = len(beta_PP)
    pairs = num_ranks**2
    # In units of the worst pair's time under even dispatch, so that the solver sees numbers near 1.
    unit_s = float((alpha_PP + beta_PP * bytes_per_rank / num_ranks).max())
    cost = np.zeros(pairs + 1)
    cost[-1] = 1
    bounds_below = np.hstack([np.diag((beta_PP * bytes_per_rank / unit_s).ravel()), -np.ones((pairs, 1))])
    sums = np.zeros((2 * num_ranks, pairs + 1))
    for rank in range(num_ranks):
        sums[rank, rank * num_ranks : (rank + 1) * num_ranks] = 1
        sums[num_ranks + rank, rank:pairs:num_ranks] = 1
    solved = linprog(
        cost,
        A_ub=bounds_below,
        b_ub=-(alpha_PP / unit_s).ravel(),
        A_eq=sums[:-1],  # the last follows from the others
        b_eq=np.ones(2 * num_ranks - 1),
        bounds=(0, None),
        method="highs",
    )
    assert solved.success, solved.message
    return solved.x[:-1].reshape(num_ranks, num_ranks), float(solved.x[-1]) * unit_s


def exchange_s(shares_PP: Matrix, alpha_PP: Matrix, beta_PP: Matrix, bytes_per_rank: float) -> float:
    """Modelled seconds of one all-to-all: its slowest pair's alpha + beta * bytes.

    Args:
        shares_PP: [P, P] of each rank's bytes.
        alpha_PP, beta_PP: [P, P].
        bytes_per_rank: V.
    """
    return float((alpha_PP + beta_PP * shares_PP * bytes_per_rank).max())


def penalties(shares_PP: Matrix, norm: str) -> Matrix:
    """p_i of the topology-aware loss: dearer where the target is smaller, mean 1 in every row, so that the loss weighs
    as much as without topology.

    Args:
        shares_PP: [P, P], > 0.
        norm: `sum`: proportional to 1 / share, which puts the loss' minimum at the target; `softmax`: of 1 / share,
            scaled to mean 1 before, as the released code does with the file's own values (sharper).

    Returns:
        [P, P].
    """
    inverse_PP = 1 / shares_PP
    inverse_PP /= inverse_PP.mean(1, keepdims=True)
    if norm == "softmax":
        inverse_PP = np.exp(inverse_PP - inverse_PP.max(1, keepdims=True))
    return inverse_PP / inverse_PP.mean(1, keepdims=True)
