"""FasterMoE's DDL-Roofline (PPoPP 2022, section 3): throughput against computation over communication, under bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from analysis.style import GREY, caption, legend, look_of, new_figure, panel

COLUMNS = ("what", "name", "kind", "ratio", "flops_per_s")
_LINES: tuple[dict[str, Any], ...] = (
    {"color": "black", "linestyle": "-"},
    {"color": "black", "linestyle": (0, (5, 2))},
    {"color": GREY, "linestyle": (0, (1, 1.5))},
    {"color": GREY, "linestyle": (0, (5, 1.5, 1, 1.5))},
)
_DENSE_TO = 1e4
"""Up to so many times from end to end an axis has room for three ticks a decade."""

_PREFIXES = ((1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s"), (1.0, "FLOP/s"))


def roofline_figure(table: pd.DataFrame, where: str, labels: Mapping[str, str] | None = None) -> Figure:
    """Curves as lines, systems as points (filled: measured; hollow: modelled), both axes logarithmic.

    Args:
        table: `COLUMNS`: `what` is `curve` or `point`; `name` of the curve or system; `kind` is `measured` or
            `modelled`; `ratio` is R_CC = computation / communication of one layer's forward, > 0; `flops_per_s` of one
            rank, > 0.
        where: sentence on the hardware, for the caption.
        labels: legend text of the systems, such as `flat (native)`; None: their names.
    """
    curves, points = table[table["what"] == "curve"], table[table["what"] == "point"]
    scale, unit = next(item for item in _PREFIXES if table["flops_per_s"].max() >= item[0] or item[0] == 1.0)
    names = list(dict.fromkeys(curves["name"]))
    systems = list(dict.fromkeys(points["name"]))
    num_rows = max(len(names), len(systems))
    figure, (axes,) = new_figure(2.7 + 0.13 * num_rows)
    handles: list[Line2D] = []
    for index, name in enumerate(names):
        own = curves[curves["name"] == name].sort_values("ratio")
        line = _LINES[index % len(_LINES)]
        axes.plot(own["ratio"], own["flops_per_s"] / scale, zorder=1, **line)
        handles.append(Line2D([], [], **line))
    blank = Line2D([], [], linestyle="none")
    handles += [blank] * (num_rows - len(names))  # curves in the first column of the legend, systems in the second
    for index, system in enumerate(systems):
        own, look = points[points["name"] == system], look_of(system)
        for kind, mark in own.groupby("kind"):
            # The first system is drawn largest, so that it shows beside one that coincides with it.
            size = look.size(6.5 - 2.5 * index / max(1, len(systems) - 1))
            style: dict[str, Any] = {"mfc": look.colour, "mec": "white", "mew": 0.4, "ms": size, "zorder": 4}
            if kind != "measured":  # a ring around what is measured, where both are equal
                style = {"mfc": "none", "mec": look.colour, "mew": 0.9, "ms": size + 1, "zorder": 3}
            axes.plot(mark["ratio"], mark["flops_per_s"] / scale, marker=look.marker, linestyle="none", **style)
        handles.append(Line2D([], [], color=look.colour, marker=look.marker, ms=look.size(4.5), linestyle="none"))
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        _ticks(axis)
    axes.set_xlabel("computation / communication of one forward ($R_{CC}$)")
    axes.set_ylabel(f"throughput of one rank, {unit}")
    panel(axes, "DDL-Roofline", " and ".join(sorted(set(points["kind"]))) or "modelled", grid="both")
    handles += [blank] * (num_rows - len(systems))
    told = [*names, *[""] * (num_rows - len(names)), *((labels or {}).get(system, system) for system in systems)]
    legend(figure, handles, told + [""] * (num_rows - len(systems)), 2)
    kinds = set(points["kind"])
    caption(
        figure,
        "Throughput: multiplications of the experts, forward and backward, over the time of a step.",
        "Curves (5) and (6) as published; 3 : 4 counts a step's three computations and four exchanges.",
        "Filled: measured; hollow: modelled." if len(kinds) > 1 else "",
        "Sizes of markers only keep systems apart." if len(systems) > 1 else "",
        where,
    )
    return figure


def _ticks(axis: Axis) -> None:
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < _DENSE_TO else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
