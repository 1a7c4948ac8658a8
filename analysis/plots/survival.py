"""What is left after drops: the share of the routed copies that some expert computes, against step."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from analysis.comparison import Comparison
from analysis.plots.rows import where
from analysis.style import GREY, caption, legend, look_of, new_figure, panel, shortened


def survival_figure(comparison: Comparison, survival: pd.DataFrame) -> Figure:
    """A line a system, the mean over its seeds, every seed thin.

    Args:
        comparison: the systems.
        survival: columns system, seed, step, value, of `analysis.swiftmoe_table.drops_of`.
    """
    figure, (axes,) = new_figure(2.5 + 0.14 * -(-len(comparison.systems) // 2))
    drawn = [system for system in comparison.systems if (survival["system"] == system).any()]
    missing = [system for system in comparison.systems if system not in drawn]
    handles = []
    for index, system in enumerate(drawn):
        # The first system is drawn widest, so that it shows beside one that coincides with it.
        width = 1.1 if len(drawn) == 1 else 1.8 - 0.9 * index / (len(drawn) - 1)
        handles.append(_draw(axes, survival[survival["system"] == system], system, width, index / len(drawn)))
    if drawn:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(top=min(1.02, axes.get_ylim()[1] + 0.02))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        legend(figure, handles, [comparison.label(system) for system in drawn], 2)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
        reason = "no run has both drops and counts"
        axes.text(0.5, 0.5, reason, transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set_xlabel("step")
    axes.set_ylabel("copies computed, of those routed")
    panel(axes, "Survival", comparison.kind, grid="y")
    count = len(comparison.run_seeds)
    caption(
        figure,
        "1 - dropped / routed copies of a step, over all ranks and layers.",
        f"Lines: mean of {count} seeds, each seed thin." if count > 1 else "",
        shortened(f"Not recorded: {', '.join(missing)}.", 200) if missing and drawn else "",
        where(comparison),
    )
    return figure


def _draw(axes: Axes, rows: pd.DataFrame, system: str, width: float, place: float) -> Line2D:
    look = look_of(system)
    curves = rows.pivot(index="step", columns="seed", values="value").sort_index()
    for seed in curves.columns if curves.shape[1] > 1 else []:
        axes.plot(curves.index, curves[seed], color=look.colour, linewidth=0.4, alpha=0.4, zorder=2)
    every = max(1, len(curves) // 5)
    marker: dict[str, Any] = {"marker": look.marker, "ms": 3.4, "mfc": "white", "mew": 0.8}
    mean, places = curves.mean(axis=1), (int(place * every), every)
    axes.plot(mean.index, mean, color=look.colour, linewidth=width, zorder=3, markevery=places, **marker)
    return Line2D([], [], color=look.colour, linewidth=width, **marker)
