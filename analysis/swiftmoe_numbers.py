"""What each run dropped, when it reached the target loss, and how long its steps took: numbers by system and seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

import pandas as pd

from analysis.comparison import Comparison
from analysis.popularity import Popularities, load_popularities
from analysis.swiftmoe_latency import (
    BREAKDOWN,
    EXTRA_PARTS,
    PerSeed,
    moving_ratios,
    part_seconds,
    step_seconds,
    sums_of,
)
from analysis.target_loss import Target, never_reached, smoothed_losses, stated_target, when_reached, window_of

NUMBERS = {
    "survival": "share of the routed copies that some expert computed, over all logged steps",
    "dropped_copies": "copies that none did, over all logged steps",
    "dropped_ratio": "dropped copies over the baseline's",
    "target_steps": "steps to the target loss",
    "target_steps_ratio": "over the baseline's",
    "target_s": "training time to the target loss, the run's own step times",
    "target_s_ratio": "over the baseline's",
    "target_timed_s": "steps to the target loss times the median step of the interleaved rounds",
    "target_timed_s_ratio": "over the baseline's",
    "step_s": "median step of the interleaved rounds",
    "step_s_ratio": "over the baseline's",
    "forward_s": "forward pass of the MoE layers, interleaved",
    "extra_share": "popularity, scheduler and metadata over the interleaved step",
    "moving_ratio": "training steps that move replicas over the others",
}
"""By their names in swiftmoe.csv."""

TO_BASELINE = ("dropped_copies", "target_steps", "target_s", "target_timed_s", "step_s")
"""Numbers that have a ratio to the baseline's of the same seed."""


@dataclass(frozen=True, eq=False)
class Drops:
    """Copies that were dropped.

    Attributes:
        survival: columns system, seed, step, value (share in 0 ... 1 of that step's routed copies).
        totals: over the logged steps of a run.
        shares: survival over the logged steps of a run.
    """

    survival: pd.DataFrame
    totals: PerSeed
    shares: PerSeed


def drops_of(comparison: Comparison, popularities: Popularities) -> Drops:
    """Of every usable run that recorded drops and, for shares, counts.

    Args:
        comparison: trained runs with the metric `dropped_copies`.
        popularities: of its runs.
    """
    frames, totals, shares = [], {}, {}
    for (system, seed), rows in comparison.trained("dropped_copies").groupby(["system", "seed"], sort=False):
        run = str(system), int(seed)
        totals[run] = float(rows["value"].sum())
        if run in popularities:
            routed = popularities[run].routed_copies
            shares[run] = 1 - totals[run] / (routed * len(rows))
            frames.append(rows[["system", "seed", "step"]].assign(value=1 - rows["value"] / routed).sort_values("step"))
    columns = ["system", "seed", "step", "value"]
    survival = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)
    return Drops(survival, totals, shares)


@dataclass(frozen=True, eq=False)
class Findings:
    """All that is found about the replicas of a comparison.

    Attributes:
        popularities: of its runs.
        drops: copies that none of the experts computed.
        curves: of `analysis.target_loss.smoothed_losses`.
        window: logged steps that their values are the mean of.
        target: the loss to reach.
        missed: runs that never did, and the steps that they had (`analysis.target_loss.never_reached`).
        numbers: each of NUMBERS by system and seed, where a run has it.
        notes: sentences on what is missing.
    """

    popularities: Popularities
    drops: Drops
    curves: pd.DataFrame
    window: int
    target: Target
    missed: Mapping[tuple[str, int], int]
    numbers: Mapping[str, PerSeed]
    notes: list[str]


def findings_of(comparison: Comparison, window: int | None = None) -> Findings:
    """What `analysis.swiftmoe` tells of a comparison, its baseline being what ratios are to.

    Args:
        comparison: trained runs and, for interleaved times, samples.
        window: logged steps that a smoothed loss is the mean of; None for `analysis.target_loss.window_of`.

    Raises:
        ResultsError: a target loss that the runs do not agree on, or that was taken from them.
    """
    popularities, notes = load_popularities(comparison)
    window = window or window_of(comparison)
    drops, curves = drops_of(comparison, popularities), smoothed_losses(comparison, window)
    target = stated_target(comparison, curves)
    reached = when_reached(curves, target)
    steps = {run: float(when.steps) for run, when in reached.items()}
    step_s, parts = step_seconds(comparison), part_seconds(comparison)
    extra_s = sums_of(parts, [("part_time", part) for part in EXTRA_PARTS])
    numbers: dict[str, PerSeed] = {
        "survival": drops.shares,
        "dropped_copies": drops.totals,
        "target_steps": steps,
        "target_s": {run: when.seconds for run, when in reached.items() if isfinite(when.seconds)},
        "target_timed_s": {run: count * step_s[run] for run, count in steps.items() if run in step_s},
        "step_s": step_s,
        "forward_s": sums_of(parts, BREAKDOWN["MoE layers, forward"]),
        "extra_share": {run: seconds / step_s[run] for run, seconds in extra_s.items() if run in step_s},
        "moving_ratio": moving_ratios(comparison, popularities),
    }
    numbers |= {ratio_name(name): ratios(numbers[name], comparison.baseline) for name in TO_BASELINE}
    missed = never_reached(comparison, curves, target)
    return Findings(popularities, drops, curves, window, target, missed, numbers, notes)


def ratio_name(name: str) -> str:
    """Of a number's ratio to the baseline's."""
    return "dropped_ratio" if name == "dropped_copies" else f"{name}_ratio"


def ratios(values: PerSeed, base: str) -> PerSeed:
    """Over another system's number of the same seed, where that is more than 0.

    Args:
        values: by system and seed.
        base: that system.
    """
    return {
        (system, seed): value / values[base, seed]
        for (system, seed), value in values.items()
        if values.get((base, seed), 0.0) > 0
    }
