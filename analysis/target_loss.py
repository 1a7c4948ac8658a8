"""Steps and time to a target loss. A run that never reaches it is told as such, and makes no number.

A batch's loss says more about the batch than about the model: losses are smoothed, as the mean of the last few logged
steps. A curve reaches the target in the first logged step whose mean is at or below it; nothing is interpolated.
"""

from __future__ import annotations

from math import isfinite
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis.comparison import Comparison
from analysis.tables import significant

WINDOW = 10
"""Logged steps that a smoothed loss is the mean of."""

BUDGET = 2 / 3
"""Without a given target: the loss that the baseline has after this share of its steps."""

CURVE_COLUMNS = ["system", "seed", "steps", "value", "seconds"]


class Target(NamedTuple):
    """A loss to reach.

    Attributes:
        loss: nats per token; NaN when there is none.
        origin: where it comes from, as half a sentence.
    """

    loss: float
    origin: str

    def __str__(self) -> str:
        if not isfinite(self.loss):
            return f"No target loss: {self.origin}."
        return f"Target loss: {significant(self.loss)} nats per token, {self.origin}."


class Reached(NamedTuple):
    """When a run was there.

    Attributes:
        steps: done by then.
        seconds: of training by then; NaN where no step time was logged.
    """

    steps: int
    seconds: float


def smoothed_losses(comparison: Comparison, window: int = WINDOW) -> pd.DataFrame:
    """Smoothed training losses of every usable run: columns system, seed, steps (done), value, seconds.

    A run has no row before it has logged `window` steps. Seconds are the run's own step times, cumulated: a logged
    `step_time` is the mean over the steps since the one logged before, so that it counts once for each of them.

    Args:
        comparison: trained runs with the metric `loss`.
        window: logged steps that a value is the mean of.
    """
    losses, times = comparison.trained("loss"), comparison.trained("step_time")
    frames = []
    for (system, seed), rows in losses.groupby(["system", "seed"], sort=False):
        rows = rows.sort_values("step")
        own = times[(times["system"] == system) & (times["seed"] == seed)].sort_values("step")
        done = own["step"].to_numpy() + 1  # steps count from 0
        spent = np.cumsum(own["value"].to_numpy() * np.diff(done, prepend=0))
        steps = rows["step"] + 1
        curve = rows[["system", "seed"]].assign(
            steps=steps,
            value=rows["value"].rolling(window).mean(),
            seconds=np.interp(steps, [0, *done], [0.0, *spent]) if len(own) else np.nan,
        )
        frames.append(curve.dropna(subset="value"))
    return pd.concat(frames, ignore_index=True)[CURVE_COLUMNS] if frames else pd.DataFrame(columns=CURVE_COLUMNS)


def target_of(comparison: Comparison, curves: pd.DataFrame, given: float | None = None) -> Target:
    """The given target, else the baseline's smoothed loss after two thirds of its steps, mean over its seeds.

    Args:
        comparison: whose baseline is meant.
        curves: of `smoothed_losses`.
        given: nats per token; None to take it from the baseline.
    """
    if given is not None:
        return Target(given, "as given")
    own = curves[curves["system"] == comparison.baseline]
    if not len(own):
        return Target(float("nan"), f"{comparison.baseline} has no smoothed loss to take one from")
    budget = own["steps"].max() * BUDGET
    at = own[own["steps"] <= max(budget, own["steps"].min())].groupby("seed").last()
    where = f"after {int(at['steps'].max())} of {int(own['steps'].max())} steps, two thirds of its budget"
    mean = f", mean over {len(at)} seeds" if len(at) > 1 else ""
    return Target(float(at["value"].mean()), f"what {comparison.baseline} has {where}{mean}, taken from these runs")


def when_reached(curves: pd.DataFrame, target: Target) -> dict[tuple[str, int], Reached]:
    """When each run reached the target, by system and seed; runs that never did are left out.

    Args:
        curves: of `smoothed_losses`.
        target: NaN is never reached.
    """
    below = curves[curves["value"] <= target.loss].sort_values("steps")
    firsts = below.groupby(["system", "seed"], sort=False).first()
    return {
        (str(system), int(seed)): Reached(int(row.steps), float(row.seconds))
        for (system, seed), row in zip(firsts.index, firsts.itertuples(), strict=True)
    }


def never_reached(comparison: Comparison, curves: pd.DataFrame, target: Target) -> dict[tuple[str, int], str]:
    """Why usable runs have no step of the target, by system and seed: `not in 150 steps`."""
    if not isfinite(target.loss):
        return {}
    reached = when_reached(curves, target)
    last = curves.groupby(["system", "seed"])["steps"].max()
    pairs = [(system, seed) for system in comparison.systems for seed in comparison.usable_seeds(system, "run")]
    return {
        pair: f"not in {int(last[pair])} steps" if pair in last.index else "too few logged losses to smooth"
        for pair in pairs
        if pair not in reached
    }
