"""Heat maps of who sends to whom: the share of each rank's token copies by the rank that they are for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from numpy.typing import NDArray

from analysis.comparison import Comparison
from analysis.pair_costs import levels_of
from analysis.plots.rows import where
from analysis.routing import Routing
from analysis.style import COLUMN_INCHES, GREY, PAGE_INCHES, caption, new_figure, panel, shortened

_COLUMNS = 4
_MOST_NUMBERED = 8
"""Up to so many ranks the numbers are written into the cells."""

_MOST_TICKS = 8
_COLOURS = "Blues"


def dispatch_figure(comparison: Comparison, routings: Mapping[tuple[str, int | None], Routing]) -> Figure:
    """A panel for each system, [source rank x destination rank], then one for each target dispatch; one colour scale.

    Args:
        comparison: for systems, labels and levels.
        routings: by system and seed; a system's first seed is drawn.
    """
    shown: list[tuple[str, str, NDArray[np.float64]]] = []  # title, kind, shares [W, W]
    targets: list[tuple[list[str], NDArray[np.float64]]] = []
    spans: dict[str, list[str]] = {}  # which seed and steps are drawn: the systems
    for system in comparison.systems:
        seeds = [seed for seed in comparison.usable_seeds(system, "run") if (system, seed) in routings]
        if not seeds:
            spans.setdefault("no dispatch counts", []).append(system)
            continue
        routing = routings[system, seeds[0]]
        title = f"{shortened(system, 24)}\n({comparison.implementations[system]})"
        shown.append((title, comparison.kind, routing.shares_WW))
        first, last = routing.last_steps
        spans.setdefault(f"seed {seeds[0]}, steps {first} to {last}", []).append(system)
        if routing.target_WW is not None:
            _add_target(targets, system, routing.target_WW)
    for names, target_WW in targets:
        more = f" + {len(names) - 1}" if len(names) > 1 else ""
        shown.append((f"{shortened(names[0], 24)}{more}\n(target)", "modelled", target_WW))
    if not shown:
        return _empty(comparison)
    num_rows = -(-len(shown) // _COLUMNS)
    num_columns = min(_COLUMNS, len(shown))
    width = max(COLUMN_INCHES, PAGE_INCHES * (num_columns + 0.3) / (_COLUMNS + 0.3))
    figure, panels = new_figure(0.75 + 1.9 * num_rows, width, nrows=num_rows, ncols=num_columns)
    largest = max((float(np.nanmax(shares)) for *_, shares in shown if np.isfinite(shares).any()), default=1.0)
    groups = _group_sizes(comparison)
    image = None
    for axes, (title, kind, shares_WW) in zip(panels, shown, strict=False):
        panel(axes, title, kind)
        axes.grid(False)
        image = axes.imshow(shares_WW, cmap=_COLOURS, vmin=0, vmax=largest)
        _label(axes, shares_WW, largest, groups)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    for index, axes in enumerate(panels[: len(shown)]):
        if index % _COLUMNS == 0:
            axes.set_ylabel("rank of the token")
        axes.set_xlabel("rank of the expert")
    assert image is not None
    bar = figure.colorbar(image, ax=panels, shrink=0.85, aspect=25, pad=0.015)
    bar.set_label("share of the rank's copies")
    bar.outline.set_linewidth(0.4)
    caption(
        figure,
        "Where the experts lie that each rank's tokens chose, before any drop: mean over layers and the last tenth of "
        "the logged steps, first seed only.",
        *(f"{', '.join(systems)}: {span}." for span, systems in spans.items()),
        "Lines: groups of ranks." if groups else "",
        *(
            f"Target of {', '.join(names)}: the shares that the run aimed at, from the costs of the levels; no "
            "measurement."
            for names, _ in targets
        ),
        where(comparison),
    )
    return figure


def _add_target(
    targets: list[tuple[list[str], NDArray[np.float64]]], system: str, target_WW: NDArray[np.float64]
) -> None:
    """Add a target [W, W], or the system's name to an equal one."""
    for names, other_WW in targets:
        if other_WW.shape == target_WW.shape and np.allclose(other_WW, target_WW):
            names.append(system)
            return
    targets.append(([system], target_WW))


def _empty(comparison: Comparison) -> Figure:
    figure, (axes,) = new_figure(1.4)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, "no run has dispatch counts", transform=axes.transAxes, ha="center", va="center", color=GREY)
    panel(axes, "Dispatch", comparison.kind)
    caption(figure, where(comparison))
    return figure


def _group_sizes(comparison: Comparison) -> list[int]:
    """Ranks in one group of each level between the rank itself and the whole cluster."""
    levels = levels_of(*comparison.runs)
    sizes = np.cumprod([level.fanout for level in levels]).tolist()
    return [size for size in dict.fromkeys(sizes) if 1 < size < sizes[-1]]


def _label(axes: Axes, shares_WW: NDArray[np.float64], largest: float, groups: list[int]) -> None:
    num_ranks = len(shares_WW)
    every = -(-num_ranks // _MOST_TICKS)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator(list(range(0, num_ranks, every))))
    axes.tick_params(length=0)
    for size in groups:
        for edge in range(size, num_ranks, size):
            axes.axhline(edge - 0.5, color=GREY, linewidth=0.7)
            axes.axvline(edge - 0.5, color=GREY, linewidth=0.7)
    if num_ranks > _MOST_NUMBERED:
        return
    digits, font_size = (0, 6.5) if num_ranks <= 4 else (1, 5.5)  # 0.25, where ranks are many .25
    for (row, column), share in np.ndenumerate(shares_WW):
        colour = "white" if share > 0.72 * largest else "black"
        text = f"{share:.2f}"[digits if share < 0.995 else 0 :] if np.isfinite(share) else "-"
        axes.text(column, row, text, ha="center", va="center", fontsize=font_size, color=colour)
