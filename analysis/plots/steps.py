"""Time of a training step against step: what a system's own moves cost, and whether it stays as it began."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from analysis.load import Run
from analysis.style import PAGE_INCHES, caption, legend, look_of, new_figure, panel

SMOOTH_STEPS = 5
"""Steps that a drawn line is the running median of."""


def steps_figure(runs: Sequence[Run], kind: str, where: str) -> Figure:
    """A line a run, the running median of its step times; the steps themselves as points.

    Args:
        runs: finished ones, each of another system.
        kind: `measured`, `modelled` or `simulated`.
        where: sentence on the machine.
    """
    figure, (axes,) = new_figure(2.6, PAGE_INCHES)
    times = {run.system: step_times(run) for run in runs}
    smooth = {name: own.rolling(SMOOTH_STEPS, center=True, min_periods=1).median() for name, own in times.items()}
    low, high = 0.8 * min(own.min() for own in times.values()), 1.6 * max(own.max() for own in smooth.values())
    handles = []
    for index, (name, own) in enumerate(times.items()):
        look = look_of(name)
        axes.plot(own.index, own, linestyle="none", marker=look.marker, ms=1.8, color=look.colour, alpha=0.35)
        every = max(1, len(own) // 6)
        style: dict[str, Any] = {"color": look.colour, "marker": look.marker, "ms": 3.4, "mfc": "white", "mew": 0.8}
        axes.plot(smooth[name].index, smooth[name], markevery=(index % every, every), linewidth=1.1, **style)
        handles.append(Line2D([], [], linewidth=1.1, **style))
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel("time of a step, ms")
    panel(axes, "Training steps", kind, grid="y")
    labels = [f"{run.system} ({run.implementation})" for run in runs]
    legend(figure, handles, labels, 6)
    beyond = sum(int((own > high).sum()) for own in times.values())
    caption(
        figure,
        f"Points: steps as logged. Lines: running median of {SMOOTH_STEPS} steps. The runs were trained one after the "
        "other, so differences hold what else the machine did.",
        f"{beyond} steps lie above the axis, the first ones of a run mostly." if beyond else "",
        where,
    )
    return figure


def step_times(run: Run) -> pd.Series:
    """Milliseconds of each logged step, by step."""
    rows = run.metrics[run.metrics["metric"] == "step_time"].sort_values("step")
    return 1e3 * rows.set_index("step")["value"]
