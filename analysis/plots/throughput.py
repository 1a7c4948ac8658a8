"""Tokens per second as a ratio to the baseline, with every round drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis.comparison import Comparison
from analysis.plots.rows import ROW_INCHES, cell, no_number, partial, system_rows, timed, where
from analysis.style import GREY, caption, look_of, new_figure, panel
from analysis.tables import significant

_LOG_FROM = 4.0
"""From this factor between the slowest and the fastest system on, ratios stand on a logarithmic axis."""


_FEW_TICKS_FROM = 15.0
"""From this factor on a logarithmic axis has room for three ticks a decade."""


def throughput_figure(comparison: Comparison, summary: pd.DataFrame) -> Figure:
    """One row per system: its rounds as light points, the ratio of medians with its interval on top, a line at 1."""
    figure, (axes,) = new_figure(0.95 + ROW_INCHES * 1.15 * len(comparison.systems))
    system_rows(axes, comparison)
    drawn = [1.0]
    for row, system in enumerate(comparison.systems):
        result = cell(summary, system, "tokens_per_s_ratio")
        assert result is not None, "the summary has a ratio row for every system"
        if not np.isfinite(result["value"]):
            no_number(axes, row, result["status"])
            continue
        look = look_of(system)
        if system != comparison.baseline:
            ratios = comparison.paired_rates(system)["ratio"].to_numpy()
            drawn += list(ratios)
            # Spread by rank of arrival, not at random: the same data give the same picture.
            offsets = 0.26 * np.sin(2.4 * np.arange(len(ratios)))
            axes.scatter(ratios, row + offsets, s=5, color=look.colour, alpha=0.22, linewidths=0, zorder=2)
            axes.errorbar(
                result["value"],
                row,
                xerr=[[max(0.0, result["value"] - result["low"])], [max(0.0, result["high"] - result["value"])]],
                color=look.colour,
                elinewidth=1.3,
                capsize=2.6,
                capthick=1.0,
                zorder=3,
            )
        style: dict[str, Any] = {"color": look.colour, "ms": look.size(4.4), "mew": 0, "zorder": 4, "clip_on": False}
        axes.plot(result["value"], row, look.marker, **style)
        axes.annotate(
            significant(result["value"], 3),
            (1, row),
            xycoords=axes.get_yaxis_transform(),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=6.5,
        )
    axes.axvline(1, color=GREY, linewidth=0.7, zorder=1)
    low, high = min(drawn), max(drawn)
    if high / low > _LOG_FROM:
        axes.set_xscale("log")
        steps = [1, 2, 5] if high / low > _FEW_TICKS_FROM else [1, 1.5, 2, 3, 5, 7]
        ticks = [tick for decade in range(-4, 5) for tick in np.array(steps) * 10.0**decade]
        axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low / 1.3 <= tick <= high * 1.3]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
        axes.set_xlim(low / 1.15, high * 1.15)
    elif len(drawn) == 1:
        axes.set_xlim(0, 1.1)
    else:
        margin = 0.05 * max(high - low, 0.2)
        axes.set_xlim(low - margin, high + margin)
    axes.set_xlabel(f"tokens per second,\nratio to {comparison.label(comparison.baseline)}")
    panel(axes, "Throughput", comparison.kind)
    caption(
        figure,
        "Points: rounds, each against the baseline in the same round. Marker: ratio of medians with its 95 % bootstrap "
        "interval, paired by seed and round.",
        partial(summary, comparison.systems, "tokens_per_s_ratio"),
        timed(comparison),
        where(comparison),
    )
    return figure
