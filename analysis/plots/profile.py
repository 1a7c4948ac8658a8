"""Performance profiles: in what share of the cases a system is at most so many times slower than the fastest one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter
from numpy.typing import NDArray

from analysis.statistics import performance_profile
from analysis.style import caption, legend, look_of, new_figure, panel


def profile_figure(times: NDArray[np.float64], labels: Mapping[str, str], cases: int, kind: str, where: str) -> Figure:
    """A rising step line for each system; higher and further left is better.

    Args:
        times: [systems, cases], NaN where a system has none.
        labels: {system: legend text}, in the order of `times`.
        cases: how many there are, such as shapes.
        kind: `measured`, `modelled` or `simulated`.
        where: sentence on what the cases are, and on the machine.
    """
    at, shares = performance_profile(times)
    figure, (axes,) = new_figure(2.5 + 0.13 * -(-len(labels) // 2))
    end = 1.25 * max(at[-1], 1.6)
    for index, (system, own) in enumerate(zip(labels, shares, strict=True)):
        look = look_of(system)
        width = 1.8 - 0.9 * index / max(1, len(labels) - 1)  # the first shows beside one that coincides with it
        axes.step([*at, end], [*own, own[-1]], where="post", color=look.colour, linewidth=width, zorder=3)
        rises = np.flatnonzero(np.diff(own, prepend=0.0) > 0)
        axes.plot(at[rises], own[rises], look.marker, color=look.colour, ms=3.6, mfc="white", mew=0.9, zorder=4)
    axes.set_xscale("log")
    axes.set_xlim(0.94, end)
    axes.set_ylim(0, 1.06)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if end > 4 else (1.0, 1.2, 1.5, 2.0, 3.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("times slower than the fastest, at most")
    axes.set_ylabel(f"share of the {cases} shapes")
    panel(axes, "Performance profile", kind, grid="both")
    handles = [
        Line2D([], [], color=look_of(system).colour, marker=look_of(system).marker, ms=3.6, mfc="white", mew=0.9)
        for system in labels
    ]
    legend(figure, handles, list(labels.values()), 2)
    caption(
        figure,
        "By the median time of each shape; a system that did not run under one never gets there (Dolan and Moré).",
        where,
    )
    return figure
