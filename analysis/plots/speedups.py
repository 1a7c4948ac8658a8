"""Bars of a ratio to a baseline, a group for each case: number of experts and gate, shape of a layer, testbed."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from analysis.plots.rows import reason_of
from analysis.style import (
    COLUMN_INCHES,
    GREY,
    PAGE_INCHES,
    SMALL_POINTS,
    caption,
    legend,
    look_of,
    new_figure,
    panel,
    shortened,
)
from analysis.tables import significant

_WIDTH = 0.8
"""Of all bars of a group together, the groups being 1 apart."""

_MOST_INCHES = 0.5
"""Of one bar."""

_NARROW_INCHES = 0.28
"""Below this a bar has no room for more than two decimals."""

THROUGHPUT = (
    "Ratios of medians over interleaved rounds with 95 % bootstrap intervals, paired by seed and round; each group of "
    "bars is a comparison of its own."
)


def speedups_figure(
    table: pd.DataFrame,
    baseline: str,
    kind: str,
    where: str,
    *,
    title: str = "Throughput",
    quantity: str = "tokens per second, ratio to",
    told: str = THROUGHPUT,
) -> Figure:
    """A group of bars for every case, a bar a system, a line at 1 for the baseline.

    Args:
        table: columns group, system, label, ratio, low, high and status, the baseline's rows left out.
        baseline: the system that stands at 1, as its label.
        kind: `measured`, `modelled` or `simulated`.
        where: sentence on the cluster.
        title: of the panel.
        quantity: of which the bars are ratios, before the baseline's label.
        told: sentences on how the numbers came to be.
    """
    groups = list(dict.fromkeys(table["group"]))
    systems = list(dict.fromkeys(table["system"]))
    wide = len(groups) * len(systems) > 10
    width_inches = PAGE_INCHES if wide else COLUMN_INCHES
    figure, (axes,) = new_figure(2.6, width_inches)
    cells = table.set_index(["group", "system"])
    each = min(_WIDTH / max(1, len(systems)), _MOST_INCHES * len(groups) / width_inches)
    missing: dict[tuple[str, str], list[str]] = {}
    for column, group in enumerate(groups):
        for index, system in enumerate(systems):
            centre = column + (index - (len(systems) - 1) / 2) * each
            row = cells.loc[(group, system)] if (group, system) in cells.index else None
            if row is None or not np.isfinite(row["ratio"]):
                reason = "not part of the comparison" if row is None else reason_of(str(row["status"]))
                missing.setdefault((system, reason), []).append(group.replace("\n", ", "))
                axes.text(
                    centre, 0.0, "x", ha="center", va="bottom", fontsize=SMALL_POINTS, color=look_of(system).colour
                )
                continue
            _bar(axes, row, centre, each, system, each * width_inches / len(groups) < _NARROW_INCHES)
    axes.axhline(1, color=GREY, linewidth=0.8, zorder=1)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylim(0, 1.12 * max([1.0, *table["high"].dropna()]))
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel(f"{quantity}\n{baseline}")
    panel(axes, title, kind, grid="y")
    labels = dict(zip(table["system"], table["label"], strict=True))
    handles = [Patch(facecolor=look_of(system).colour) for system in systems]
    legend(figure, handles, [labels[system] for system in systems], 5 if wide else 2)
    without = [f"{system} in {'; '.join(names)} ({shortened(why, 90)})" for (system, why), names in missing.items()]
    caption(
        figure,
        told,
        f"No number (x): {'; '.join(without)}." if without else "",
        where,
    )
    return figure


def _bar(axes: Axes, row: pd.Series, centre: float, width: float, system: str, narrow: bool) -> None:
    axes.bar(centre, row["ratio"], width=0.9 * width, color=look_of(system).colour, zorder=2)
    spread = [[max(0.0, row["ratio"] - row["low"])], [max(0.0, row["high"] - row["ratio"])]]
    axes.errorbar(centre, row["ratio"], yerr=spread, color="black", elinewidth=0.8, capsize=1.8, capthick=0.8, zorder=3)
    axes.annotate(
        f"{row['ratio']:.2f}" if narrow else significant(row["ratio"], 3 if row["ratio"] >= 1 else 2),
        (centre, max(row["ratio"], row["high"])),
        xytext=(0, 2),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=SMALL_POINTS,
        bbox={"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none"},
        zorder=2.5,
    )
