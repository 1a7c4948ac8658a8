"""One expert's popularity against its slots: a flat line where they are static, else one that follows."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from analysis.comparison import Comparison
from analysis.plots.rows import where
from analysis.popularity import Expert, Popularities, Popularity
from analysis.style import GREY, PAGE_INCHES, caption, look_of, new_figure, panel, shortened

MOST_PANELS = 4
"""Columns that a page has room for."""

ZOOM_STEPS = 30
"""Logged steps of the lower row, around the largest change of popularity from one to the next."""

_POPULARITY: dict[str, Any] = {"color": GREY, "linewidth": 0.8}


class Drawn(NamedTuple):
    """What one column shows."""

    system: str
    seed: int
    popularity: Popularity
    of: Expert


def columns_of(comparison: Comparison, popularities: Popularities, expert: int | None = None) -> list[Drawn]:
    """The baseline, then every system whose experts have replicas; of each the first seed that has counts.

    Args:
        comparison: the systems.
        popularities: of its runs.
        expert: see `Popularity.most_variable`.

    Raises:
        ResultsError: there is no such expert.
    """
    found: dict[str, Drawn] = {}
    for system in [comparison.baseline, *comparison.systems]:
        for seed in comparison.usable_seeds(system, "run"):
            popularity = popularities.get((system, seed))
            if popularity is not None and (system == comparison.baseline or popularity.replicas_SLE is not None):
                found.setdefault(system, Drawn(system, seed, popularity, popularity.most_variable(expert)))
    return list(found.values())


def replicas_figure(comparison: Comparison, popularities: Popularities, expert: int | None = None) -> Figure:
    """Share of the layer's copies and share of its slots against step, a column a system; below, a stretch of it.

    Args:
        comparison: the systems.
        popularities: of its runs.
        expert: whose lines are drawn; None for the most variable one of each run.

    Raises:
        ResultsError: there is no such expert.
    """
    columns = columns_of(comparison, popularities, expert)
    drawn, left_out = columns[:MOST_PANELS], [column.system for column in columns[MOST_PANELS:]]
    figure, panels = new_figure(3.4, PAGE_INCHES, nrows=2, ncols=max(1, len(drawn)), sharey="row")
    for index, column in enumerate(drawn):
        steps_S = column.popularity.steps_S
        whole, zoom = panels[index], panels[len(drawn) + index]
        label = comparison.label(column.system)
        panel(whole, label.replace(" (", "\n("), comparison.kind, grid="y")
        panel(zoom, f"layer {column.of.layer}, expert {column.of.expert}", comparison.kind, grid="y")
        _draw(whole, column, np.ones(len(steps_S), dtype=bool))
        _draw(zoom, column, _busiest(column.popularity.copy_shares_S(column.of)))
        zoom.set_xlabel(f"step (seed {column.seed})")
    for axes in panels:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        axes.set_ylim(bottom=0)
    if drawn:
        handles = [Line2D([], [], **_POPULARITY), Line2D([], [], color="black", linewidth=1.4)]
        labels = ["popularity: share of the layer's copies", "replicas: share of its slots, in the system's colour"]
        figure.legend(handles, labels, loc="outside upper left", ncols=2)
        panels[0].set_ylabel("share, whole run")
        panels[len(drawn)].set_ylabel("share, in detail")
    else:
        for axes in panels:
            panel(axes, "Popularity and replicas", comparison.kind)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.text(0.5, 0.5, "no run has counts", transform=axes.transAxes, ha="center", va="center", color=GREY)
    told = "the most variable of its run (standard deviation of its copies)" if expert is None else "as asked for"
    caption(
        figure,
        f"One expert a column, {told}; copies of all ranks before drops. With a capacity factor of 1 an expert's "
        f"capacity is its share of the slots. Below: {ZOOM_STEPS} logged steps around the largest change of popularity "
        "between two of them.",
        "No run tells replicas." if not any(column.popularity.replicas_SLE is not None for column in columns) else "",
        shortened(f"Not drawn: {', '.join(left_out)}.", 200) if left_out else "",
        where(comparison),
    )
    return figure


def _draw(axes: Axes, column: Drawn, shown_S: NDArray[np.bool_]) -> None:
    steps_S = column.popularity.steps_S[shown_S]
    axes.plot(steps_S, column.popularity.copy_shares_S(column.of)[shown_S], zorder=2, **_POPULARITY)
    slots_S = column.popularity.slot_shares_S(column.of)[shown_S]
    style: dict[str, Any] = {"color": look_of(column.system).colour, "linewidth": 1.4, "drawstyle": "steps-mid"}
    axes.plot(steps_S, slots_S, zorder=3, **style)


def _busiest(shares_S: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[S] bool, `ZOOM_STEPS` steps around the largest change from one to the next, all where there are no more."""
    shown_S = np.zeros(len(shares_S), dtype=bool)
    changes = np.nan_to_num(np.abs(np.diff(shares_S)))
    centre = int(changes.argmax()) if len(changes) else 0
    first = max(0, min(centre - ZOOM_STEPS // 2, len(shares_S) - ZOOM_STEPS))
    shown_S[first : first + ZOOM_STEPS] = True
    return shown_S
