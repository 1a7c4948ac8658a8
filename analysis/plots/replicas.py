"""Popularity of single experts against their slots: flat lines where slots are static, else lines that follow."""

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
from analysis.style import GREY, PAGE_INCHES, SMALL_POINTS, caption, legend, look_of, new_figure, panel, shortened

MOST_ROWS = 6
"""Systems that a page has room for."""

ZOOM_STEPS = 30
"""Logged steps of the last column, around the largest change of popularity from one to the next."""

COLUMNS = ("growing", "shrinking", "spiky", "spiky, in detail")
"""`Popularity.characters`, the last one twice."""

_POPULARITY: dict[str, Any] = {"color": "#333333", "linewidth": 0.5}


class Drawn(NamedTuple):
    """What one row shows."""

    system: str
    seed: int
    popularity: Popularity


def rows_of(comparison: Comparison, popularities: Popularities) -> list[Drawn]:
    """The baseline, then every system whose experts have replicas; of each the first seed that has counts.

    Args:
        comparison: the systems.
        popularities: of its runs.
    """
    found: dict[str, Drawn] = {}
    for system in [comparison.baseline, *comparison.systems]:
        for seed in comparison.usable_seeds(system, "run"):
            popularity = popularities.get((system, seed))
            if popularity is not None and (system == comparison.baseline or popularity.replicas_SLE is not None):
                found.setdefault(system, Drawn(system, seed, popularity))
    return list(found.values())


def replicas_figure(comparison: Comparison, popularities: Popularities) -> Figure:
    """Share of the layer's copies and share of its slots against step: a row a system, a column a kind of expert.

    Args:
        comparison: the systems.
        popularities: of its runs.
    """
    rows = rows_of(comparison, popularities)
    drawn, left_out = rows[:MOST_ROWS], [row.system for row in rows[MOST_ROWS:]]
    height = 0.9 + 1.0 * max(1, len(drawn))
    figure, panels = new_figure(height, PAGE_INCHES, nrows=max(1, len(drawn)), ncols=len(COLUMNS))
    for index, row in enumerate(drawn):
        own = panels[index * len(COLUMNS) : (index + 1) * len(COLUMNS)]
        _draw_row(own, row, comparison, last=index == len(drawn) - 1)
    if drawn:
        handles = [Line2D([], [], **_POPULARITY), Line2D([], [], color="black", linewidth=1.4)]
        labels = ["popularity: share of the layer's copies", "replicas: share of its slots, in the system's colour"]
        legend(figure, handles, labels, 2)
    else:
        for axes, title in zip(panels, COLUMNS, strict=True):
            panel(axes, title, comparison.kind)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.text(0.5, 0.5, "no run has counts", transform=axes.transAxes, ha="center", va="center", color=GREY)
    caption(
        figure,
        "Copies of all ranks before drops; at a capacity factor of 1 an expert's capacity is its share of the slots. "
        "Of each run the expert whose share grew most from its first third to its last, the one whose share shrank "
        f"most, and the one that changed most from step to step; in detail: {ZOOM_STEPS} logged steps around its "
        "largest change.",
        "No run tells replicas." if not any(row.popularity.replicas_SLE is not None for row in rows) else "",
        shortened(f"Not drawn: {', '.join(left_out)}.", 200) if left_out else "",
        where(comparison),
    )
    return figure


def _draw_row(panels: list[Axes], row: Drawn, comparison: Comparison, last: bool) -> None:
    characters = row.popularity.characters()
    for axes, title in zip(panels, COLUMNS, strict=True):
        of = characters.get(title.partition(",")[0])
        panel(axes, title, comparison.kind, grid="y")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        if of is None:
            axes.set_yticks([])
            continue
        steps = np.ones(len(row.popularity.steps_S), dtype=bool)
        _draw(axes, row, of, _busiest(row.popularity.copy_shares_S(of)) if title == COLUMNS[-1] else steps)
        top = axes.get_ylim()[1]
        axes.set_yticks([tick for tick in MaxNLocator(nbins=4).tick_values(0, top) if tick <= top])
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(0, 1.3 * top)  # room for the name
        name = f"layer {of.layer}, expert {of.expert}"
        style: dict[str, Any] = {"ha": "right", "va": "top", "fontsize": SMALL_POINTS, "color": GREY}
        axes.text(0.98, 0.97, name, transform=axes.transAxes, **style)
        if last:
            axes.set_xlabel("step")
    label = comparison.label(row.system).replace(" (", "\n(")
    panels[0].set_ylabel(f"{label}\nseed {row.seed}", fontsize=SMALL_POINTS)


def _draw(axes: Axes, row: Drawn, of: Expert, shown_S: NDArray[np.bool_]) -> None:
    steps_S = row.popularity.steps_S[shown_S]
    axes.plot(steps_S, row.popularity.copy_shares_S(of)[shown_S], zorder=3, **_POPULARITY)
    slots_S = row.popularity.slot_shares_S(of)[shown_S]
    style: dict[str, Any] = {"color": look_of(row.system).colour, "linewidth": 1.4, "drawstyle": "steps-mid"}
    axes.plot(steps_S, slots_S, zorder=2, **style)


def _busiest(shares_S: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[S] bool, `ZOOM_STEPS` steps around the largest change from one to the next, all where there are no more."""
    shown_S = np.zeros(len(shares_S), dtype=bool)
    changes = np.nan_to_num(np.abs(np.diff(shares_S)))
    centre = int(changes.argmax()) if len(changes) else 0
    first = max(0, min(centre - ZOOM_STEPS // 2, len(shares_S) - ZOOM_STEPS))
    shown_S[first : first + ZOOM_STEPS] = True
    return shown_S
