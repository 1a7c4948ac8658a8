"""What a message costs: alpha + beta * bytes, fitted to measured times, and what follows for a collective.

    t(n) = alpha + beta * n        alpha: latency in s, beta: inverse bandwidth in s/byte, n: bytes of one message

The model knows no contention. What concurrent traffic costs has to be in beta, so measure under concurrent traffic.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe.topology import Cluster

Matrix = NDArray[np.float64]

MIN_BETA_S_PER_BYTE = 1e-15
"""Where a fit stops that would make bytes free: 1 PB/s, more than any link or memory has."""


@dataclass(frozen=True)
class AlphaBeta:
    """Cost of a message.

    Args:
        alpha_s: latency in seconds, >= 0.
        beta_s_per_byte: inverse bandwidth in seconds per byte, > 0.
        r2: share of the weighted variance that the fit explains (see `fit_alpha_beta`): 1 for points on a line, 0 or
            less for a fit no better than one constant; None for costs that were declared, not fitted.
    """

    alpha_s: float
    beta_s_per_byte: float
    r2: float | None = None

    def predict(self, size_bytes: float) -> float:
        """Seconds that a message of `size_bytes` takes."""
        return self.alpha_s + self.beta_s_per_byte * size_bytes


def fit_alpha_beta(sizes_bytes: Sequence[float], seconds: Sequence[float]) -> AlphaBeta:
    """Fit alpha and beta by least squares on relative errors.

    Sizes and times span orders of magnitude, and a fit of absolute errors would see the largest messages only. So every
    point has the weight 1 / t^2: minimised is the sum of ((alpha + beta n - t) / t)^2. A negative alpha is set to 0 and
    a beta that is not above 0 to `MIN_BETA_S_PER_BYTE`, the other one then being fitted alone; with two parameters that
    is the constrained optimum. r2 = 1 - sum w (t - fit)^2 / sum w (t - mean)^2 with the same weights w, the mean
    being the weighted one; it is 0 when all times are equal, for then there is nothing to explain.

    Args:
        sizes_bytes: of one message each; at least two different ones.
        seconds: its time, > 0; for repeated measurements give their median.
    """
    n, t = np.asarray(sizes_bytes, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    assert n.shape == t.shape and n.ndim == 1, f"{n.shape} sizes, {t.shape} times"
    assert len(np.unique(n)) >= 2, f"two unknowns need two different sizes, and these are {sizes_bytes}"
    assert (n >= 0).all() and (t > 0).all() and np.isfinite(t).all(), (sizes_bytes, seconds)
    weights = 1 / t**2
    mean_n, mean_t = np.average(n, weights=weights), np.average(t, weights=weights)
    beta = float(np.sum(weights * (n - mean_n) * (t - mean_t)) / np.sum(weights * (n - mean_n) ** 2))
    beta = max(beta, MIN_BETA_S_PER_BYTE)
    alpha = float(mean_t - beta * mean_n)
    if alpha < 0:
        alpha, beta = 0.0, float(np.sum(weights * n * t) / np.sum(weights * n**2))
    return AlphaBeta(alpha, beta, _r2(t, alpha + beta * n, weights, mean_t))


def _r2(
    t: NDArray[np.float64], fitted: NDArray[np.float64], weights: NDArray[np.float64], mean_t: np.floating
) -> float:
    total = float(np.sum(weights * (t - mean_t) ** 2))
    # Equal times leave rounding errors of the mean, not exactly 0.
    if total <= 1e-24 * len(t):
        return 0.0
    return 1.0 - float(np.sum(weights * (t - fitted) ** 2)) / total


def pair_costs(cluster: Cluster, ranks: Sequence[int]) -> tuple[Matrix, Matrix]:
    """What a message from each rank to each other costs, by the level of the pair.

    A rank's copy to itself has the cost of the level `self` where it is known, else that of the innermost level between
    ranks.

    Args:
        cluster: whose levels above the rank have costs, as far as `ranks` need them.
        ranks: P of the cluster's.

    Returns:
        alpha [P, P] in seconds and beta [P, P] in seconds per byte, float64; nan where a level has no cost.
    """
    known = [AlphaBeta(*(math.nan if v is None else v for v in (x.alpha_s, x.beta_s_per_byte))) for x in cluster.levels]
    if math.isnan(known[0].beta_s_per_byte) and len(known) > 1:
        known[0] = next((known[i] for i in range(1, len(known)) if cluster.levels[i].fanout > 1), known[0])
    levels_PP = np.array(cluster.pair_levels(ranks))
    alphas, betas = (np.array(values) for values in zip(*((c.alpha_s, c.beta_s_per_byte) for c in known), strict=True))
    return alphas[levels_PP], betas[levels_PP]


def slowest_pair_s(costs: Iterable[AlphaBeta], size_bytes: float) -> float:
    """Seconds of an all-to-all that sends `size_bytes` from every rank to every other: those of its slowest pair.

    TA-MoE's model, T = max over pairs (i, j) of alpha_ij + beta_ij * bytes_ij, for equal bytes: one pair of every level
    stands for all. It takes a rank's messages to travel side by side, each as fast as if it were alone.

    Args:
        costs: of every level that the all-to-all crosses; at least one.
        size_bytes: from one rank to one other.
    """
    return max(cost.predict(size_bytes) for cost in costs)
