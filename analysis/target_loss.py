"""Steps and time to a target loss. A run that never reaches it is told as such, and makes no number.

A batch's loss says more about the batch than about the model: losses are smoothed, as the mean of the last twentieth of
a run's logged steps (20 at least). A curve reaches the target in the first logged step whose mean is at or below it;
nothing is interpolated.

A target is stated before the runs, as their `trainer.target_loss`. `python -m analysis.target_loss outputs/<pilot run>`
tells one: what that run, of the baseline and with a seed of its own, has after two thirds of its steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from math import isfinite, nan
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis.comparison import Comparison, compare
from analysis.errors import ResultsError, exit_code
from analysis.load import load_run
from analysis.tables import significant

WINDOW_SHARE, LEAST_WINDOW = 1 / 20, 20
"""A smoothed loss is the mean of this share of a run's logged steps, and of so many at least."""

BUDGET = 2 / 3
"""A pilot run's loss after this share of its steps is the target."""

SAME_NATS = 1e-5
"""A stated target this near to a run's own loss there was taken from it: other seeds part by a hundredth."""

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


def window_of(comparison: Comparison) -> int:
    """Logged steps that a smoothed loss is the mean of where nothing else is asked for: the same for all runs, of which
    the one with most logged steps counts."""
    logged = comparison.trained("loss").groupby(["system", "seed"]).size()
    return max(LEAST_WINDOW, round(logged.max() * WINDOW_SHARE) if len(logged) else 0)


def smoothed_losses(comparison: Comparison, window: int | None = None) -> pd.DataFrame:
    """Smoothed training losses of every usable run: columns system, seed, steps (done), value, seconds.

    A run has no row before it has logged `window` steps. Seconds are the run's own step times, cumulated: a logged
    `step_time` is the mean over the steps since the one logged before, so that it counts once for each of them.

    Args:
        comparison: trained runs with the metric `loss`.
        window: logged steps that a value is the mean of; None for `window_of`.
    """
    window = window or window_of(comparison)
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


def stated_target(comparison: Comparison, curves: pd.DataFrame) -> Target:
    """What the runs' configuration states: it was written before their first step.

    Args:
        comparison: whose runs are meant.
        curves: of `smoothed_losses`.

    Raises:
        ResultsError: runs that state different ones, or one that was taken from these runs themselves.
    """
    stated = {run.config.get("trainer", {}).get("target_loss"): run.path for run in comparison.runs}
    if len(stated) > 1:
        told = "; ".join(f"{'none' if loss is None else loss} ({path})" for loss, path in stated.items())
        raise ResultsError(f"the runs state different trainer.target_loss: {told}. Fix: run all of them with one.")
    loss = next(iter(stated), None)
    if loss is None:
        return Target(nan, "the runs' configuration states no trainer.target_loss")
    for who, own in _own_losses(curves):
        if abs(own - loss) < SAME_NATS:
            raise ResultsError(
                f"trainer.target_loss={loss} is what {who} has here after two thirds of its steps: a target is stated "
                "before the runs, not taken from them. Fix: take it from a pilot run with another seed, see "
                "`python -m analysis.target_loss --help`, and run these anew with it."
            )
    return Target(float(loss), "stated in the runs' configuration before they began")


def at_budget(curves: pd.DataFrame) -> dict[tuple[str, int], float]:
    """The smoothed loss of each run after two thirds of its steps, by system and seed.

    Args:
        curves: of `smoothed_losses`.
    """
    found = {}
    for (system, seed), own in curves.groupby(["system", "seed"], sort=False):
        within = own[own["steps"] <= max(own["steps"].max() * BUDGET, own["steps"].min())]
        found[str(system), int(seed)] = float(within["value"].iloc[-1])
    return found


def _own_losses(curves: pd.DataFrame) -> Iterator[tuple[str, float]]:
    """What a target could have been taken from: each run's loss at its budget, and each system's mean over seeds."""
    by_system: dict[str, list[float]] = {}
    for (system, seed), loss in at_budget(curves).items():
        by_system.setdefault(system, []).append(loss)
        yield f"{system} seed {seed}", loss
    for system, losses in by_system.items():
        yield f"the mean of {system}", float(np.mean(losses))


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


def never_reached(comparison: Comparison, curves: pd.DataFrame, target: Target) -> dict[tuple[str, int], int]:
    """The usable runs that have no step of the target, by system and seed: how many steps they had (a censored time);
    0 for those with too few logged losses to smooth."""
    if not isfinite(target.loss):
        return {}
    reached = when_reached(curves, target)
    last = curves.groupby(["system", "seed"])["steps"].max()
    pairs = [(system, seed) for system in comparison.systems for seed in comparison.usable_seeds(system, "run")]
    return {pair: int(last.get(pair, 0)) for pair in pairs if pair not in reached}


def why_missed(steps: int) -> str:
    """A value of `never_reached` in words: `not in 150 steps`."""
    return f"not in {steps} steps" if steps else "too few logged losses to smooth"


@exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line, with its exit code."""
    parser = argparse.ArgumentParser(prog="python -m analysis.target_loss", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a pilot run that is done, such as outputs/<run id>")
    folder = parser.parse_args(arguments).run
    pilot = compare([folder], None, load_run(folder, metrics=()).system)
    losses = list(at_budget(smoothed_losses(pilot)).values())
    if not losses:
        flaws = [str(problem) for problem in pilot.problems if problem.source == "run"]
        told = "; ".join(flaws) or f"it has not logged {window_of(pilot)} losses"
        raise ResultsError(f"{folder} tells no target: {told}. Fix: name a training run that is done.")
    print(f"trainer.target_loss={losses[0]:.6f}")


if __name__ == "__main__":
    sys.exit(main())
