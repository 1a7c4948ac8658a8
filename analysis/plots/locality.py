"""How much stays near: the share of token copies inside the innermost group of ranks, against step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from analysis.comparison import Comparison
from analysis.pair_costs import innermost_group, levels_of
from analysis.plots.rows import where
from analysis.routing import Routing
from analysis.style import GREY, caption, legend, look_of, new_figure, panel

EVEN: dict[str, Any] = {"color": GREY, "linestyle": (0, (1, 1.5)), "linewidth": 0.9}
_TARGET_DASHES = (0, (4, 2))


def locality(comparison: Comparison) -> pd.DataFrame:
    """Share of copies inside the innermost group of several ranks: columns system, seed, step, value (in 0 ... 1).

    The sum of the metric `routed_share` over `self` and the levels inside that group.
    """
    _, names = _group(comparison)
    shares = comparison.trained("routed_share")
    near = shares[shares["part"].isin(names)]
    return near.groupby(["system", "seed", "step"], sort=False)["value"].sum().reset_index()


def locality_figure(comparison: Comparison, routings: Mapping[tuple[str, int | None], Routing]) -> Figure:
    """A line a system, the mean over its seeds, every seed thin; dashed the target, dotted an even dispatch.

    Args:
        comparison: trained runs with the metric `routed_share`.
        routings: by system and seed, for targets.
    """
    figure, (axes,) = new_figure(2.5 + 0.14 * -(-len(comparison.systems) // 2))
    size, names = _group(comparison)
    shares = locality(comparison)
    handles, labels, missing = [], [], []
    drawn = [system for system in comparison.systems if (shares["system"] == system).any()]
    for index, system in enumerate(comparison.systems):
        if system not in drawn:
            missing.append(system)
            continue
        # The first system is drawn widest, so that it shows beside one that coincides with it.
        width = 1.1 if len(drawn) == 1 else 1.8 - 0.9 * drawn.index(system) / (len(drawn) - 1)
        handles.append(_draw(axes, shares[shares["system"] == system], system, width, index / len(comparison.systems)))
        labels.append(comparison.label(system))
    targets = _targets(comparison, routings, size)
    for system, share in targets.items():
        axes.axhline(share, color=look_of(system).colour, linestyle=_TARGET_DASHES, linewidth=0.8, zorder=1)
    if targets:
        handles.append(Line2D([], [], color=GREY, linestyle=_TARGET_DASHES, linewidth=0.8))
        labels.append("target (modelled)")
    num_ranks = next((routing.num_ranks for routing in routings.values()), 0)
    if num_ranks > size:
        axes.axhline(size / num_ranks, zorder=1, **EVEN)
        handles.append(Line2D([], [], **EVEN))
        labels.append("even dispatch (modelled)")
    if drawn:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        low, high = axes.get_ylim()
        axes.set_ylim(max(0.0, low - 0.02), min(1.0, high + 0.02))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        legend(figure, handles, labels, 2)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
        reason = "no run recorded the metric routed_share"
        axes.text(0.5, 0.5, reason, transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set_xlabel("step")
    axes.set_ylabel(f"copies inside {names[-1]}" if size > 1 else "copies that stay on their rank")
    panel(axes, "Locality", comparison.kind, grid="y")
    count = len(comparison.run_seeds)
    caption(
        figure,
        f"Share of all ranks' token copies whose expert lies {_place(size, names)}, all layers together, before drops.",
        f"Lines: mean of {count} seeds, each seed thin." if count > 1 else "",
        "Targets in their systems' colours." if targets else "",
        f"Not recorded: {', '.join(missing)}." if missing and drawn else "",
        where(comparison),
    )
    return figure


def _place(size: int, names: list[str]) -> str:
    if size == 1:
        return "on the token's own rank"
    return f"in the group of {size} ranks ({' + '.join(names)}) of the token's own rank"


def _group(comparison: Comparison) -> tuple[int, list[str]]:
    levels = levels_of(*comparison.runs)
    return innermost_group(levels)


def _draw(axes: Axes, rows: pd.DataFrame, system: str, width: float, place: float) -> Line2D:
    look = look_of(system)
    curves = rows.pivot(index="step", columns="seed", values="value").sort_index()
    for seed in curves.columns if curves.shape[1] > 1 else []:
        axes.plot(curves.index, curves[seed], color=look.colour, linewidth=0.4, alpha=0.4, zorder=2)
    every = max(1, len(curves) // 5)
    marker: dict[str, Any] = {"marker": look.marker, "ms": 3.4, "mfc": "white", "mew": 0.8}
    mean = curves.mean(axis=1)
    axes.plot(
        mean.index, mean, color=look.colour, linewidth=width, zorder=3, markevery=(int(place * every), every), **marker
    )
    return Line2D([], [], color=look.colour, linewidth=width, **marker)


def _targets(comparison: Comparison, routings: Mapping[tuple[str, int | None], Routing], size: int) -> dict[str, float]:
    """Of every system with a target the share of copies that it keeps inside the groups of `size` ranks."""
    found: dict[str, float] = {}
    for system in comparison.systems:
        for seed in comparison.usable_seeds(system, "run"):
            routing = routings.get((system, seed))
            if routing is not None and routing.target_WW is not None:
                found.setdefault(system, inside(routing.target_WW, size))
    return found


def inside(shares_WW: NDArray[np.float64], size: int) -> float:
    """Mean over ranks of the share [W, W] that stays in the rank's group of `size` consecutive ranks."""
    group_W = np.arange(len(shares_WW)) // size
    return float((shares_WW * (group_W[:, None] == group_W[None, :])).sum(axis=1).mean())
