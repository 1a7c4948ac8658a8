"""Simulated against measured step times, a marker for every system and shape."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from analysis.style import GREY, PALE, caption, legend, look_of, new_figure, panel

BAND = 0.25
"""Half width of the grey band, as a share of the measured time."""

_HOLLOW: dict[str, Any] = {"ms": 4.2, "mfc": "none", "mew": 0.9}
"""So that a marker does not hide another one: schedules are often equally fast."""


def validation_figure(rows: pd.DataFrame, error: float) -> Figure:
    """One panel, both axes in ms and logarithmic, with the line where they agree.

    Args:
        rows: of `analysis.validation`.
        error: mean absolute relative error, for the caption.
    """
    figure, (axes,) = new_figure(3.9)
    times_ms = 1e3 * rows[["measured_s", "simulated_s"]]
    ends = float(times_ms.min().min()) / 1.5, float(times_ms.max().max()) * 1.5
    axes.plot(ends, ends, color=GREY, linewidth=0.8)
    below, above = ([end * (1 + sign * BAND) for end in ends] for sign in (-1, 1))
    axes.fill_between(ends, below, above, color=PALE, alpha=0.35, linewidth=0)
    handles = {}
    for (system, implementation), own in rows.groupby(["system", "implementation"], sort=False):
        look = look_of(str(system))
        spread = (own["measured_s"] - own["measured_low_s"], own["measured_high_s"] - own["measured_s"])
        axes.errorbar(
            1e3 * own["measured_s"],
            1e3 * own["simulated_s"],
            xerr=[1e3 * side.clip(lower=0) for side in spread],
            fmt=look.marker,
            color=look.colour,
            elinewidth=0.6,
            **_HOLLOW,
        )
        label = f"{system} ({implementation})"
        handles[label] = Line2D([], [], color=look.colour, marker=look.marker, linestyle="none", **_HOLLOW)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.set_xlim(ends)
    axes.set_ylim(ends)
    axes.set_aspect("equal")
    axes.set_xlabel("measured step time of a layer, ms (median, quartiles)")
    axes.set_ylabel("simulated step time of a layer, ms")
    panel(axes, "Simulator", "measured and simulated", grid="both")
    legend(figure, list(handles.values()), list(handles), 2)
    caption(
        figure,
        f"{len(rows)} pairs of a system and a shape on {'; '.join(rows['machine'].unique())}.",
        f"Mean absolute relative error {100 * error:.1f} %.",
        f"Costs were fitted to the modules of other shapes. Line: equal times; band: {100 * BAND:.0f} %.",
    )
    return figure
