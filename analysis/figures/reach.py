"""Steps and time to a loss of a comparison's systems, runs that never got there included."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from analysis.comparison import Comparison
from analysis.files import write_text
from analysis.plots.reach import CLOCKS, reach_figure
from analysis.statistics import time_to_target
from analysis.style import save, suite_style
from analysis.target_loss import Target, at_budget, smoothed_losses, stated_target, when_reached


def write_reach(comparison: Comparison, out: Path) -> pd.DataFrame | None:
    """reach.csv and its figure: steps and time to a loss, a row a system and clock; None without losses.

    The loss is what the runs state as `trainer.target_loss`, else what the baseline has after two thirds of its steps:
    then it is taken from these very runs, and a picture, no evidence.
    """
    curves = smoothed_losses(comparison)
    target = stated_target(comparison, curves)
    own = [loss for (system, _), loss in at_budget(curves).items() if system == comparison.baseline]
    if not isfinite(target.loss) and own:
        target = Target(
            fmean(own), f"what {comparison.baseline} has after two thirds of its steps, taken from these runs"
        )
    if not isfinite(target.loss):
        return None
    runs = list(_runs(curves, target))
    if not runs:
        return None
    table, rows = pd.DataFrame(runs), []
    for (system, clock), found in table.groupby(["system", "clock"], sort=False):
        times = [value if there else None for value, there in zip(found["value"], found["reached"], strict=True)]
        reach = time_to_target(times, list(found["value"]))
        rows.append({"system": system, "clock": clock, "target_loss": target.loss, **reach._asdict()})
    medians = pd.DataFrame(rows)
    write_text(out / "reach.csv", medians.to_csv(index=False))
    with suite_style():
        save(reach_figure(comparison, table, medians, str(target)), out / "reach")
    return medians


def _runs(curves: pd.DataFrame, target: Target) -> Iterator[dict[str, Any]]:
    reached = when_reached(curves, target)
    for (system, seed), curve in curves.groupby(["system", "seed"], sort=False):
        there, end = reached.get((str(system), int(seed))), curve.sort_values("steps").iloc[-1]
        for clock in CLOCKS:
            value = float(end[clock] if there is None else getattr(there, clock))
            if isfinite(value):
                yield {"system": system, "seed": seed, "clock": clock, "value": value, "reached": there is not None}
