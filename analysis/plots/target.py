"""Training loss against steps and against time, and when each run reaches the target."""

from __future__ import annotations

from math import isfinite
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.comparison import Comparison
from analysis.plots.rows import where
from analysis.style import GREY, PAGE_INCHES, caption, legend, look_of, new_figure, panel, shortened
from analysis.target_loss import Target, never_reached, when_reached, why_missed

_TARGET: dict[str, Any] = {"color": GREY, "linestyle": (0, (4, 2)), "linewidth": 0.8}


def target_figure(comparison: Comparison, curves: pd.DataFrame, target: Target, window: int) -> Figure:
    """Two panels with one loss axis: against steps on the left, against time on the right; a line a system and seed.

    Args:
        comparison: the systems.
        curves: of `analysis.target_loss.smoothed_losses`.
        target: the loss to reach.
        window: logged steps that a value of `curves` is the mean of.
    """
    figure, panels = new_figure(2.9, PAGE_INCHES, ncols=2, sharey=True)
    reached = when_reached(curves, target)
    drawn = [system for system in comparison.systems if (curves["system"] == system).any()]
    handles, labels = [], []
    for index, system in enumerate(drawn):
        look = look_of(system)
        # The first system is drawn widest, so that it shows beside one that coincides with it.
        width = 1.8 - 0.9 * index / (len(drawn) - 1) if len(drawn) > 1 else 1.1
        marker: dict[str, Any] = {"marker": look.marker, "ms": 4, "mfc": "white", "mew": 0.9}
        handles.append(Line2D([], [], color=look.colour, linewidth=width, **marker))
        labels.append(comparison.label(system))
        for seed, own in curves[curves["system"] == system].groupby("seed"):
            when = reached.get((system, int(seed)))
            for axes, clock in zip(panels, ("steps", "seconds"), strict=True):
                axes.plot(own[clock], own["value"], color=look.colour, linewidth=width, alpha=0.85, zorder=2 + index)
                if when is not None:
                    at = own[own["steps"] == when.steps]
                    axes.plot(at[clock], at["value"], color=look.colour, linestyle="none", zorder=20, **marker)
    for axes, title, label in zip(
        panels,
        ("Training loss against steps", "Training loss against time"),
        ("steps", "training time, s (sum of the measured step times)"),
        strict=True,
    ):
        panel(axes, title, comparison.kind, grid="both")
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=label == "steps"))
        if not drawn:
            reason = "no run has logged enough losses"
            axes.text(0.5, 0.5, reason, transform=axes.transAxes, ha="center", va="center", color=GREY)
        elif isfinite(target.loss):
            axes.axhline(target.loss, zorder=1, **_TARGET)
    panels[0].set_ylabel("loss, nats per token")
    if handles:
        if isfinite(target.loss):
            handles.append(Line2D([], [], **_TARGET))
            labels.append("target")
        legend(figure, handles, labels, 5)
    late: dict[str, list[str]] = {}
    for (system, seed), steps in never_reached(comparison, curves, target).items():
        late.setdefault(why_missed(steps), []).append(f"{system} seed {seed}")
    seeds = ", ".join(str(seed) for seed in comparison.run_seeds)
    caption(
        figure,
        str(target),
        f"A line for each system and seed (seeds {seeds}; widths only keep them apart), each value the mean of the "
        f"last {window} logged steps; a marker in the first one at or below the target.",
        *(shortened(f"The target was not reached by {', '.join(runs)} ({why}).", 200) for why, runs in late.items()),
        "Time: each run's own step times, cumulated, without validation, checkpoints and start-up; runs were trained "
        "one after the other, so it holds what else the machine did.",
        where(comparison),
    )
    return figure
