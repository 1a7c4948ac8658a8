"""Loss against step, and how far each system is from the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from analysis.comparison import Comparison
from analysis.plots.rows import where
from analysis.style import GREY, caption, legend, look_of, new_figure, panel, shortened

_LINEAR_BELOW = 1e-7
"""Distances under this are drawn linearly, down to 0: float32 can't tell losses apart that are closer."""

_GROUND_WIDTH = 3.6
_LINE_WIDTH = 1.3
_DASH = 3.2  # in line widths


def loss_figure(comparison: Comparison) -> Figure:
    """Training loss (lines) and held-out loss (markers) above, distance to the reference below, on a symlog axis.

    Systems that compute the same function lie on one curve. The reference is drawn as a wide, light ground, and the
    others take turns along it: each draws its dash where the others pause.
    """
    height = 3.2 + 0.14 * -(-len(comparison.systems) // 2)
    figure, (main, below) = new_figure(height, nrows=2, sharex=True, gridspec_kw={"height_ratios": [1.75, 1]})
    train, held_out = comparison.trained("loss"), comparison.trained("val_loss")
    trained = [system for system in comparison.systems if (train["system"] == system).any()]
    others = [system for system in trained if system != comparison.reference]
    styles = {system: _turns(index, len(others)) for index, system in enumerate(others)}
    if comparison.reference in trained:
        styles[comparison.reference] = {"linewidth": _GROUND_WIDTH, "alpha": 0.25, "zorder": 1.5}
    for index, system in enumerate(trained):
        _draw_losses(main, train, system, styles[system])
        apart = min(0.022, 0.1 / len(trained))
        _draw_held_out(main, held_out, train, system, apart * (index - (len(trained) - 1) / 2))
    if not trained:
        _say(main, "no usable run")
    main.set_ylabel("loss, nats per token")
    panel(main, "Loss", comparison.kind, grid="y")
    panel(below, f"Distance to {comparison.label(comparison.reference)}", comparison.kind, grid="y")
    _draw_distances(below, comparison, train, others)
    below.set_xlabel("step")
    below.set_ylabel("nats per token")
    below.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    legend(figure, *_legend(comparison, styles), 2)
    caption(figure, *_sentences(comparison), where(comparison))
    return figure


def _say(axes: Axes, reason: str) -> None:
    """Why a panel is empty."""
    axes.set_yticks([])
    axes.text(0.5, 0.5, reason, transform=axes.transAxes, ha="center", va="center", color=GREY)


def _turns(index: int, num_systems: int) -> dict[str, Any]:
    """Line style of the index-th of several systems whose dashes interleave; one alone is solid."""
    if num_systems == 1:
        return {"linewidth": _LINE_WIDTH, "zorder": 2}
    dashes = (index * _DASH, (_DASH, (num_systems - 1) * _DASH))
    return {"linewidth": _LINE_WIDTH, "linestyle": dashes, "dash_capstyle": "butt", "zorder": 2}


def _by_seed(rows: pd.DataFrame, system: str) -> pd.DataFrame:
    """Values [steps, seeds] of one system; NaN where a seed has none."""
    own = rows[rows["system"] == system]
    return own.pivot(index="step", columns="seed", values="value").sort_index()


def _draw_losses(axes: Axes, train: pd.DataFrame, system: str, style: dict[str, Any]) -> None:
    colour = look_of(system).colour
    curves = _by_seed(train, system)
    for seed in curves.columns if curves.shape[1] > 1 else []:
        axes.plot(curves.index, curves[seed], color=colour, linewidth=0.4, alpha=0.3, zorder=1)
    axes.plot(curves.index, curves.mean(axis=1), color=colour, **style)


def _draw_held_out(axes: Axes, held_out: pd.DataFrame, train: pd.DataFrame, system: str, place: float) -> None:
    look = look_of(system)
    points = held_out[held_out["system"] == system]
    shift = place * max(float(train["step"].max() - train["step"].min()), 1.0)
    style: dict[str, Any] = {
        "color": "white",
        "mec": look.colour,
        "mew": 0.8,
        "ms": 3.6,
        "linestyle": "none",
        "zorder": 4,
    }
    axes.plot(points["step"] + shift, points["value"], look.marker, **style)


def _draw_distances(axes: Axes, comparison: Comparison, train: pd.DataFrame, others: list[str]) -> None:
    reference = _by_seed(train, comparison.reference)
    largest = _LINEAR_BELOW
    drawn = False
    for index, system in enumerate(others if reference.size else []):
        distances = (_by_seed(train, system) - reference).abs().dropna(axis=1, how="all").dropna(how="all")
        if not distances.size:
            continue
        drawn = True
        look = look_of(system)
        largest = max(largest, float(distances.max().max()))
        for seed in distances.columns if distances.shape[1] > 1 else []:
            axes.plot(distances.index, distances[seed], color=look.colour, linewidth=0.4, alpha=0.3, zorder=2)
        # A few markers, each system's at steps of its own: with many systems colours alone don't tell.
        every = max(1, len(distances) // 5)
        places = (every * index // max(1, len(others)), every)
        marker: dict[str, Any] = {"marker": look.marker, "ms": 3, "mfc": "white", "mew": 0.7, "markevery": places}
        axes.plot(distances.index, distances.mean(axis=1), color=look.colour, linewidth=0.9, zorder=3, **marker)
    if not drawn:
        _say(axes, f"no usable run to compare with {comparison.reference}")
        return
    top, bottom = int(np.ceil(np.log10(largest) + 0.2)), round(np.log10(_LINEAR_BELOW))
    # The stretch from 0 to the first decade is as high as a tick's label, however many decades lie above it.
    axes.set_yscale("symlog", linthresh=_LINEAR_BELOW, linscale=max(0.5, 0.22 * (top - bottom)))
    step = max(1, -((bottom - top) // 4))
    axes.yaxis.set_major_locator(FixedLocator([0.0, *(10.0**power for power in range(bottom, top + 1, step))]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(-0.25 * _LINEAR_BELOW, 10.0**top)


def _legend(comparison: Comparison, styles: dict[str, dict[str, Any]]) -> tuple[list[Line2D], list[str]]:
    handles, labels = [], []
    for system in comparison.systems:
        look, label = look_of(system), comparison.label(system)
        if system in styles:
            width = styles[system]["linewidth"]
            marker: dict[str, Any] = {"marker": look.marker, "ms": 3.6, "mfc": "white", "mec": look.colour, "mew": 0.8}
            colour = (look.colour, styles[system].get("alpha", 1.0))
            handles.append(Line2D([], [], color=colour, linewidth=width, **marker))
        else:
            handles.append(Line2D([], [], linestyle="none", marker="x", ms=3.6, color=GREY))
            problems = comparison.problems_of(system, "run")
            label += f": {problems[0].status if problems else 'not trained'}"
        labels.append(label)
    return handles, labels


def _sentences(comparison: Comparison) -> list[str]:
    count = len(comparison.run_seeds)
    mean = f", mean of {count} seeds (thin: each seed)" if count > 1 else ""
    told = [
        f"Lines: training loss{mean}; dashes take turns where systems coincide. Markers: held-out loss, one per seed, "
        f"set apart sideways. Distance: absolute, linear under $10^{{{np.log10(_LINEAR_BELOW):.0f}}}$."
    ]
    missing = [
        f"{problem.system} {'' if problem.seed is None else f'seed {problem.seed} '}({problem.status})"
        for problem in comparison.problems
        if problem.source == "run"
    ]
    return [*told, shortened(f"Not drawn: {', '.join(missing)}.", 220)] if missing else told
