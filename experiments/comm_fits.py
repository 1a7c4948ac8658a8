"""Lines through what `experiments.comm` timed: costs of a cluster's levels, and of the collectives over them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from experiments.comm_bench import Collective, CommRow, collectives_to_measure
from moe.costs import AlphaBeta, fit_alpha_beta
from moe.topology import Cluster

DIGITS = 5
"""Significant digits of what is written: far more than a measurement has."""


def rounded_cost(cost: AlphaBeta | None) -> dict[str, float | None]:
    """A cost as conf/cluster holds it; None, of a level that was not measured, is null."""
    if cost is None:
        return {"alpha_s": None, "beta_s_per_byte": None}
    rounded = [float(f"{value:.{DIGITS}g}") for value in (cost.alpha_s, cost.beta_s_per_byte)]
    return {"alpha_s": rounded[0], "beta_s_per_byte": rounded[1]}


class CollectiveFit(NamedTuple):
    """A collective and its cost by the bytes that a rank sends in all."""

    collective: Collective
    cost: AlphaBeta

    def told(self) -> dict[str, Any]:
        """Both as JSON-able numbers and names, for the footer of the timings."""
        return {
            "name": self.collective.name,
            "pattern": self.collective.pattern,
            "level": self.collective.level,
            "ranks": self.collective.num_ranks,
            "alpha_s": self.cost.alpha_s,
            "beta_s_per_byte": self.cost.beta_s_per_byte,
            "r2": self.cost.r2,
        }


def medians(rows: Sequence[CommRow], pattern: str, level: str) -> dict[int, float]:
    """Median seconds by message size; empty when this pattern was not measured at this level."""
    chosen = [row for row in rows if (row.pattern, row.level) == (pattern, level)]
    sizes = sorted({row.size_bytes for row in chosen})
    return {size: median(row.seconds for row in chosen if row.size_bytes == size) for size in sizes}


def level_costs(rows: Sequence[CommRow]) -> dict[str, AlphaBeta]:
    """The fitted cost of every level that was measured, `self` first, by name."""
    costs = {}
    messages = [row for row in rows if row.pattern in ("copy", "exchange")]
    for pattern, level in dict.fromkeys((row.pattern, row.level) for row in messages):
        times = medians(rows, pattern, level)
        costs[level] = fit_alpha_beta(list(times), list(times.values()))
    return costs


def collective_fits(rows: Sequence[CommRow], cluster: Cluster) -> list[CollectiveFit]:
    """The fitted costs of all the cluster's collectives.

    Returns:
        Nothing where one of them was not measured at two sizes: on one rank, with sizes of few bytes, or in timings of
        an earlier version of the suite.
    """
    fits = []
    for collective in collectives_to_measure(cluster):
        times = medians(rows, collective.pattern, collective.level)
        if len(times) < 2:
            return []
        sent_bytes = [part * collective.num_ranks for part in times]
        fits.append(CollectiveFit(collective, fit_alpha_beta(sent_bytes, list(times.values()))))
    return fits
