"""Where the time of a whole training step goes, system by system, and how much longer steps are that move replicas."""

from __future__ import annotations

from math import isfinite
from statistics import fmean
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.comparison import Comparison
from analysis.plots.rows import ROW_INCHES, no_number, system_rows, timed, where
from analysis.style import GREY, PAGE_INCHES, PALE, STAGE_COLOURS, caption, legend, look_of, new_figure, panel
from analysis.swiftmoe_latency import BREAKDOWN, REST, PerSeed

_MS = 1e3

_MOVING_TOLD = (
    " Right: median training step that moves replicas over the median one that does not: a marker for each seed, a bar "
    "at their mean; of systems most of whose steps move none."
)

PART_COLOURS = dict(
    zip(
        (*BREAKDOWN, REST),
        # Tol's light set, after those of the stages of a layer: parts are no systems and share no colour with one.
        (STAGE_COLOURS["dispatch"], STAGE_COLOURS["combine"], "#BBCC33", "#AAAA00", "#DDAA33", "#99DDFF", "#EE3377")
        + ("#FFAABB", PALE),
        strict=True,
    )
)


def latency_figure(comparison: Comparison, parts: pd.DataFrame, moving: PerSeed) -> Figure:
    """Left, a stacked bar a system with a tick where the whole step ends; right, where there are any, steps that move
    replicas over others.

    Args:
        comparison: the systems.
        parts: seconds, of `analysis.swiftmoe_latency.breakdown`.
        moving: of `analysis.swiftmoe_latency.moving_ratios`.
    """
    height = 1.5 + ROW_INCHES * 1.15 * len(comparison.systems)
    widths = [2.6, 1] if moving else [1]
    figure, axes = new_figure(height, PAGE_INCHES, ncols=len(widths), width_ratios=widths, sharey=True)
    left = axes[0]
    if moving:
        _draw_moving(axes[1], comparison, moving)
    system_rows(left, comparison)
    ends = [
        _draw(left, row, parts.loc[system]) for row, system in enumerate(comparison.systems) if system in parts.index
    ]
    for row, system in enumerate(comparison.systems):
        if system not in parts.index:
            no_number(left, row, "not timed")
    left.set_xlim(0, 1.04 * max(ends, default=1.0))
    told = [name for name in (*BREAKDOWN, REST) if len(parts) and (parts[name].fillna(0) > 0).any()]
    left.set_xlabel("time of one training step, ms")
    panel(left, "Parts of a step" if told else "A step, whose parts were not read", comparison.kind)
    handles: list[Patch | Line2D] = [Patch(facecolor=PART_COLOURS[name], edgecolor="white") for name in told]
    handles.append(Line2D([], [], color="black", marker="|", markersize=6, markeredgewidth=1.2, linestyle="none"))
    legend(figure, handles, [*told, "whole step"], 4)
    caption(
        figure,
        f"{'Left: medians' if moving else 'Medians'} over interleaved rounds of the slowest rank, part by part, mean "
        "over seeds; parts are from rounds of their own under the stage clock. Parts of different ranks overlap, so a "
        "bar can end behind the whole step; where it ends before, the rest is what no part tells."
        f"{_MOVING_TOLD if moving else ''}",
        timed(comparison),
        where(comparison),
    )
    return figure


def _draw_moving(right: Axes, comparison: Comparison, moving: PerSeed) -> None:
    ratios = [1.0]
    for row, system in enumerate(comparison.systems):
        own = [ratio for (name, _), ratio in moving.items() if name == system]
        look = look_of(system)
        style: dict[str, Any] = {"color": look.colour, "linestyle": "none", "zorder": 3}
        if own:
            right.plot([fmean(own)] * 2, [row - 0.32, row + 0.32], color=look.colour, linewidth=1.6, zorder=2)
            right.plot(own, [row] * len(own), marker=look.marker, ms=4.2, mew=0.8, mfc="white", **style)
        ratios += own
    right.axvline(1, color=GREY, linewidth=0.6)
    right.set_xlim(min(1.0, *ratios) - 0.02, 1.06 * max(ratios))
    right.set_xlabel("time over other steps', x")
    right.tick_params(axis="y", length=0)
    panel(right, "Steps that move", comparison.kind)


def _draw(axes: Axes, row: int, parts: pd.Series) -> float:
    """One system's bar; where it ends, in ms."""
    left = 0.0
    for name, colour in PART_COLOURS.items():
        width = float(parts[name]) * _MS
        if isfinite(width) and width > 0:
            axes.barh(row, width, left=left, height=0.62, color=colour, edgecolor="white", linewidth=0.4)
            left += width
    step = float(parts["step"]) * _MS
    axes.plot([step, step], [row - 0.4, row + 0.4], color="black", linewidth=1.2, solid_capstyle="butt", zorder=4)
    return max(left, step)
