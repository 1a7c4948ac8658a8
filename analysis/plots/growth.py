"""Time against size, beside its floor: how the cost of a layer grows with one size at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from analysis.style import GREY, PAGE_INCHES, caption, legend, look_of, new_figure, panel, shortened

TITLES = {"tokens_per_rank": "tokens per rank", "num_experts": "experts", "top_k": "experts per token (top-k)"}
FLOOR: dict[str, Any] = {"color": GREY, "linestyle": (0, (3, 2)), "marker": "."}


def growth_figure(growth: pd.DataFrame, labels: Mapping[str, str], kind: str, step: float, where: str) -> Figure:
    """A column for each axis: above, the time of every system and the floor in ms; below, the one over the other.

    Args:
        growth: rows of `analysis.growth`.
        labels: legend text of every system.
        kind: `measured`, `modelled` or `simulated`.
        step: growth of time per unit of work above which a point is ringed.
        where: sentence on the hardware, for the caption.
    """
    axes_names = list(dict.fromkeys(growth["axis"]))
    systems = list(dict.fromkeys(growth[growth["status"] == "ok"]["system"]))  # the caption tells of the others
    figure, panels = new_figure(
        3.6, width_inches=PAGE_INCHES, nrows=2, ncols=len(axes_names), sharex="col", sharey="row"
    )
    above, below = panels[: len(axes_names)], panels[len(axes_names) :]
    for name, times, ratios in zip(axes_names, above, below, strict=True):
        own = growth[(growth["axis"] == name) & (growth["status"] == "ok")]
        floor = own.drop_duplicates("value").sort_values("value")  # one floor for all systems, of the same rounds
        _line(times, floor, ("floor_s", "floor_low_s", "floor_high_s"), 1e3, **FLOOR)
        for system in systems:
            points, look = own[own["system"] == system], look_of(system)
            style = {"color": look.colour, "marker": look.marker}
            _line(times, points, ("time_s", "time_low_s", "time_high_s"), 1e3, **style)
            _line(ratios, points, ("time_over_floor", "over_floor_low", "over_floor_high"), 1.0, **style)
            steps = points[points["step"].astype(bool)]
            times.plot(steps["value"], steps["time_s"] * 1e3, "o", markersize=8, fillstyle="none", color="black")
        ratios.axhline(1.0, color=GREY, linestyle=FLOOR["linestyle"])
        _scales(times, ratios, sorted(set(growth[growth["axis"] == name]["value"])))
        panel(times, TITLES[name], kind, grid="both")
        panel(ratios, "", kind, grid="both")
        unit = ", k = 1024" if growth[growth["axis"] == name]["value"].max() >= 1024 else ""
        ratios.set_xlabel(TITLES[name] + unit)
    above[0].set_ylabel("step time, ms")
    below[0].set_ylabel("step time / floor")
    below[0].set_ylim(0, 1.1 * max([1.0, *growth["over_floor_high"].dropna()]))
    legend(figure, *_legend(systems, labels, step), 6)
    caption(
        figure,
        f"One forward and backward under {' and '.join(dict.fromkeys(growth['workload']))} routing:",
        "medians over rounds of the slowest rank, with 95 % bootstrap intervals.",
        "Floor: the experts' matrix products and four bare all-to-alls of the same bytes, in the same rounds; a system "
        "that sends less, or overlaps the two, can be below it.",
        _untimed(growth),
        where,
    )
    return figure


def _line(axes: Axes, points: pd.DataFrame, columns: tuple[str, str, str], scale: float, **style: Any) -> None:
    value, low, high = (points[column].to_numpy(dtype=float) * scale for column in columns)
    # A percentile interval of few rounds may end a rounding error short of the median.
    spread = [(value - low).clip(0), (high - value).clip(0)]
    axes.errorbar(points["value"], value, yerr=spread, markersize=3, elinewidth=0.8, capsize=1.5, **style)


def _scales(times: Axes, ratios: Axes, values: list[int]) -> None:
    for axes in (times, ratios):
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [f"{v // 1024}k" if v >= 1024 and v % 1024 == 0 else f"{v}" for v in values])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(values[0] / 1.25, values[-1] * 1.25)  # also where the outermost points have no time
    times.set_yscale("log")
    times.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    times.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    times.yaxis.set_minor_locator(NullLocator())


def _legend(systems: list[str], labels: Mapping[str, str], step: float) -> tuple[list[Line2D], list[str]]:
    handles = [Line2D([], [], color=look_of(s).colour, marker=look_of(s).marker, markersize=3) for s in systems]
    handles.append(Line2D([], [], markersize=4, **FLOOR))
    handles.append(Line2D([], [], color="black", marker="o", markersize=7, fillstyle="none", linestyle="none"))
    return handles, [
        *(labels[system] for system in systems),
        "floor",
        f"step: over {100 * (step - 1):.0f} % more time per unit of work than the point before",
    ]


def _untimed(growth: pd.DataFrame) -> str:
    """A sentence on the points that have no time; "" when all have one."""
    told = growth[growth["status"] != "ok"].drop_duplicates(["system", "shape"])
    points = [f"{row.system} at {row.shape} ({shortened(str(row.status), 80)})" for row in told.itertuples()]
    return f"No time: {'; '.join(points)}." if points else ""
