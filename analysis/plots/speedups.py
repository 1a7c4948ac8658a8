"""A ratio to a baseline, for each case (number of experts and gate, shape of a layer, testbed) and system: bars, or
where cases are many a row of marks for each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
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

MOST_GROUPS = 16
"""Cases that bars have room for on a page."""

_ROW_INCHES = 0.135

_WIDTH = 0.8
"""Of all bars of a group together, the groups being 1 apart."""

_MOST_INCHES = 0.5
"""Of one bar."""

_NARROW_INCHES = 0.28
"""Below this a bar has no room for more than two decimals."""

THROUGHPUT = (
    "Ratios of medians over interleaved rounds with 95 % bootstrap intervals, paired by seed and round; each group is "
    "a comparison of its own."
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
    """A group of bars for every case, a bar a system, a line at 1 for the baseline; beyond `MOST_GROUPS` a row of marks
    for every case, and a line at each system's geometric mean.

    Args:
        table: columns group, system, label, ratio, low, high and status, the baseline's rows left out.
        baseline: the system that stands at 1, as its label.
        kind: `measured`, `modelled` or `simulated`.
        where: sentence on the cluster.
        title: of the panel.
        quantity: of which the bars are ratios, before the baseline's label.
        told: sentences on how the numbers came to be.
    """
    groups, systems = list(dict.fromkeys(table["group"])), list(dict.fromkeys(table["system"]))
    labels = dict(zip(table["system"], table["label"], strict=True))
    draw = _rows if len(groups) > MOST_GROUPS else _bars
    figure, axes, handles, missing = draw(table.set_index(["group", "system"]), groups, systems)
    by_row = draw is _rows
    heading = f"{quantity}\n{baseline}"
    if by_row:
        axes.set_xlabel(heading.replace("\n", " "))
        means, num_cases = _means(table)
        labels |= {system: f"{labels[system]}, mean {significant(mean, 3)}" for system, mean in means.items()}
        for system, mean in means.items():
            axes.axvline(mean, color=look_of(str(system)).colour, linewidth=0.8, linestyle="--", zorder=2)
        told += f" Lines: geometric means over the {num_cases} cases in which all have a number."
    else:
        axes.set_ylabel(heading)
    panel(axes, title, kind, grid="x" if by_row else "y")
    legend(figure, handles, [labels[system] for system in systems], 5 if figure.get_figwidth() == PAGE_INCHES else 2)
    without = [f"{system} in {'; '.join(names)} ({shortened(why, 90)})" for (system, why), names in missing.items()]
    caption(
        figure,
        told,
        f"No number{'' if by_row else ' (x)'}: {'; '.join(without)}." if without else "",
        where,
    )
    return figure


def _means(table: pd.DataFrame) -> tuple[dict[str, float], int]:
    """Each system's geometric mean over the cases in which all have a number, and how many these are."""
    ratios = table.pivot(index="group", columns="system", values="ratio").dropna()
    return {str(system): float(np.exp(np.log(ratios[system]).mean())) for system in ratios if len(ratios)}, len(ratios)


Missing = dict[tuple[str, str], list[str]]
"""Cases without a number, by system and reason."""

Drawn = tuple[Figure, Axes, list[Artist], Missing]
"""A figure, its panel, what stands for each system in the legend, and what could not be drawn."""


def _number(cells: pd.DataFrame, group: str, system: str, missing: Missing) -> pd.Series | None:
    """The row of a case and system; None where it has no number, which `missing` is told."""
    row = cells.loc[(group, system)] if (group, system) in cells.index else None
    if row is not None and np.isfinite(row["ratio"]):
        return row
    reason = "not part of the comparison" if row is None else reason_of(str(row["status"]))
    missing.setdefault((system, reason), []).append(group.replace("\n", ", "))
    return None


def _bars(cells: pd.DataFrame, groups: list[str], systems: list[str]) -> Drawn:
    width_inches = PAGE_INCHES if len(groups) * len(systems) > 10 else COLUMN_INCHES
    figure, (axes,) = new_figure(2.6, width_inches)
    each = min(_WIDTH / max(1, len(systems)), _MOST_INCHES * len(groups) / width_inches)
    missing: Missing = {}
    for column, group in enumerate(groups):
        for index, system in enumerate(systems):
            centre = column + (index - (len(systems) - 1) / 2) * each
            row = _number(cells, group, system, missing)
            if row is None:
                axes.text(
                    centre, 0.0, "x", ha="center", va="bottom", fontsize=SMALL_POINTS, color=look_of(system).colour
                )
                continue
            _bar(axes, row, centre, each, system, each * width_inches / len(groups) < _NARROW_INCHES)
    axes.axhline(1, color=GREY, linewidth=0.8, zorder=1)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylim(0, 1.12 * max([1.0, *cells["high"].dropna()]))
    axes.tick_params(axis="x", length=0)
    return figure, axes, [Patch(facecolor=look_of(system).colour) for system in systems], missing


def _rows(cells: pd.DataFrame, groups: list[str], systems: list[str]) -> Drawn:
    figure, (axes,) = new_figure(1.0 + _ROW_INCHES * len(groups), PAGE_INCHES)
    missing: Missing = {}
    handles: list[Artist] = []
    for index, system in enumerate(systems):
        look = look_of(system)
        style: dict[str, Any] = {"color": look.colour, "marker": look.marker, "markersize": look.size(2.6)}
        handles.append(Line2D([], [], linestyle="none", **style))
        found = {row: _number(cells, group, system, missing) for row, group in enumerate(groups)}
        numbers = pd.DataFrame({row: number for row, number in found.items() if number is not None}).T
        if numbers.empty:
            continue
        ratios, lows, highs = (numbers[name].astype(float) for name in ("ratio", "low", "high"))
        heights = numbers.index.to_numpy() + (index - (len(systems) - 1) / 2) * 0.5 / len(systems)
        spread = [(ratios - lows).clip(lower=0), (highs - ratios).clip(lower=0)]
        axes.errorbar(ratios, heights, xerr=spread, linestyle="none", elinewidth=0.6, zorder=3, **style)
    axes.axvline(1, color=GREY, linewidth=0.8, zorder=1)
    alike = len({group.partition("\n")[2] for group in groups}) == 1
    names = [group.partition("\n")[0] if alike else group.replace("\n", ", ") for group in groups]
    axes.set_yticks(range(len(groups)), names, fontsize=SMALL_POINTS)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    return figure, axes, handles, missing


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
