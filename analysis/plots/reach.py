"""When training reaches a loss: every seed drawn, and those that never got there as what they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.comparison import Comparison
from analysis.plots.rows import ROW_INCHES, system_rows, where
from analysis.style import GREY, PAGE_INCHES, caption, legend, look_of, new_figure, panel

CLOCKS = {"steps": "steps to the target", "seconds": "training time to the target, s"}


def reach_figure(comparison: Comparison, runs: pd.DataFrame, medians: pd.DataFrame, target: str) -> Figure:
    """A row a system, steps on the left, time on the right: seeds as points, arrows where one was never there, the
    median as a bar.

    Args:
        comparison: the systems.
        runs: columns system, seed, clock (of CLOCKS), value, reached; `value` is where a run ended that is not.
        medians: columns system, clock, median; infinite where half of the runs were never there.
        target: sentence on the loss.
    """
    figure, panels = new_figure(1.1 + ROW_INCHES * 1.1 * len(comparison.systems), PAGE_INCHES, ncols=2, sharey=True)
    for axes, (clock, label) in zip(panels, CLOCKS.items(), strict=True):
        own = runs[runs["clock"] == clock]
        for row, system in enumerate(comparison.systems):
            look, points = look_of(system), own[own["system"] == system]
            style: dict[str, Any] = {"color": look.colour, "linestyle": "none", "ms": 4.2, "mew": 0.8}
            there = points[points["reached"]]
            axes.plot(there["value"], [row] * len(there), look.marker, mfc="white", zorder=3, **style)
            left = points[~points["reached"]]
            axes.plot(left["value"], [row] * len(left), marker=">", mfc=look.colour, zorder=3, **style)
            median = medians[(medians["system"] == system) & (medians["clock"] == clock)]["median"]
            if len(median) and np.isfinite(median.iloc[0]):
                axes.plot([median.iloc[0]] * 2, [row - 0.32, row + 0.32], color=look.colour, linewidth=1.6, zorder=2)
        axes.set_xlim(left=0, right=1.06 * own["value"].max() if len(own) else 1)
        axes.set_xlabel(label)
        panel(axes, "", comparison.kind)
        system_rows(axes, comparison)
    handles = [
        Line2D([], [], color=GREY, marker="o", mfc="white", ms=4.2, linestyle="none"),
        Line2D([], [], color=GREY, marker=">", ms=4.2, linestyle="none"),
        Line2D([], [], color=GREY, marker="|", ms=8, mew=1.6, linestyle="none"),
    ]
    labels = ["a seed that reached the target", "a seed that did not, where it ended", "median (Kaplan and Meier)"]
    legend(figure, handles, labels, 3)
    caption(
        figure,
        target,
        "Time: each run's own step times, cumulated; runs were trained one after the other, so it holds what else the "
        "machine did.",
        where(comparison),
    )
    return figure
