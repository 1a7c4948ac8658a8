"""Where the time of a whole training step goes, and what moving replicas costs.

Steps and their parts are of the interleaved rounds; how much longer a step takes that moves replicas is of the training
runs, which hold many of both kinds. Sums of parts are of medians over rounds, each of the slowest rank: parts of
different ranks overlap, so that a sum can exceed the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from analysis.comparison import Comparison
from analysis.popularity import Popularities

PerSeed = Mapping[tuple[str, int], float]
"""A number of each run, by system and seed."""

EXTRA_PARTS = ("popularity", "scheduler", "metadata")
"""What SYMI counts as its own (arXiv 2504.19925, section 5): a static system has none of it."""

BREAKDOWN: dict[str, Sequence[tuple[str, str]]] = {
    "MoE layers, forward": [("stage_time", f"forward/{stage}") for stage in ("gate", "dispatch", "experts", "combine")],
    "MoE layers, backward": [
        ("stage_time", f"backward/{stage}") for stage in ("combine", "experts", "dispatch", "gate")
    ],
    "dense gradients": [("part_time", "dense_gradients")],
    "expert gradients": [("part_time", "expert_gradients"), ("part_time", "gradient_shards")],
    "optimizer": [("part_time", "optimizer")],
    "weights to slots": [("part_time", "weights")],
    "popularity, scheduler, metadata": [("part_time", part) for part in EXTRA_PARTS],
    "moves of replicas": [("part_time", "migration")],
}
"""Parts of a step by the names of figures: (metric, part) of the samples."""

REST = "rest (attention, head, waiting)"


def step_seconds(comparison: Comparison) -> PerSeed:
    """Median step of the interleaved rounds."""
    medians = comparison.timed("step_time").groupby(["system", "seed"])["value"].median()
    return {(str(system), int(seed)): float(value) for (system, seed), value in medians.items()}


def part_seconds(comparison: Comparison) -> pd.DataFrame:
    """Median over the rounds of each stage and part: a row a (system, seed), columns (metric, part)."""
    samples = [comparison.timed(metric).assign(metric=metric) for metric in ("stage_time", "part_time")]
    rows = pd.concat(samples, ignore_index=True)
    return rows.pivot_table(index=["system", "seed"], columns=["metric", "part"], values="value", aggfunc="median")


def sums_of(parts: pd.DataFrame, wanted: Sequence[tuple[str, str]]) -> PerSeed:
    """The sum of some parts, of every run that was timed with all of them.

    Args:
        parts: of `part_seconds`.
        wanted: (metric, part).
    """
    if any(part not in parts.columns for part in wanted):
        return {}
    sums = parts[list(wanted)].sum(axis=1, skipna=False).dropna()
    return {(str(system), int(seed)): float(value) for (system, seed), value in sums.items()}


def breakdown(comparison: Comparison) -> pd.DataFrame:
    """Seconds of each of BREAKDOWN, of REST and of the whole `step`, mean over seeds: a row a system.

    Only systems whose rounds were timed have one; what is in none of the parts is REST, 0 where they exceed the step,
    NaN where no part was read.
    """
    parts = part_seconds(comparison)
    columns = {name: pd.Series(sums_of(parts, wanted), dtype=float) for name, wanted in BREAKDOWN.items()}
    known = pd.DataFrame({**columns, "step": pd.Series(step_seconds(comparison), dtype=float)}).dropna(subset="step")
    means = known.groupby(level=0).mean() if len(known) else known
    rest = (means["step"] - means[list(BREAKDOWN)].sum(axis=1, min_count=1)).clip(lower=0)
    ordered = [system for system in comparison.systems if system in means.index]
    return means.assign(**{REST: rest}).reindex(ordered)


def moving_ratios(comparison: Comparison, popularities: Popularities) -> PerSeed:
    """Median training step that ends with other replicas over the median one that does not, of the runs in which most
    steps do not, and all are logged.

    Args:
        comparison: trained runs.
        popularities: of its runs.
    """
    ratios = {}
    for (system, seed), rows in comparison.trained("step_time").groupby(["system", "seed"], sort=False):
        popularity = popularities.get((str(system), int(seed)))
        if popularity is None or popularity.replicas_SLE is None or (np.diff(popularity.steps_S) != 1).any():
            continue
        changed_S = (np.diff(popularity.replicas_SLE, axis=0) != 0).any(axis=(1, 2))
        seconds_S = rows.set_index("step")["value"].reindex(popularity.steps_S[:-1]).to_numpy()
        if np.isnan(seconds_S).any() or not 0 < changed_S.mean() < 0.5:
            continue
        ratios[str(system), int(seed)] = float(np.median(seconds_S[changed_S]) / np.median(seconds_S[~changed_S]))
    return ratios
