"""What one key of the model does to survival and to the way to a target loss, a line a system."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator, PercentFormatter

from analysis.style import GREY, PAGE_INCHES, caption, look_of, new_figure, panel, shortened

_LOG_FROM = 20
"""Values that are so many times apart stand on a logarithmic axis."""


def sweep_figure(table: pd.DataFrame, kind: str, target: str, window: int, place: str) -> Figure:
    """Two panels over the key's values: survival on the left, steps to the target on the right; bars are seeds' ranges.

    Args:
        table: columns as of `analysis.swiftmoe_sweep.COLUMNS`, one value of `key`.
        kind: `measured`, `modelled` or `simulated`.
        target: a sentence on the target loss.
        window: logged steps that a loss is the mean of.
        place: a sentence on the cluster.
    """
    figure, (left, right) = new_figure(2.6, PAGE_INCHES, ncols=2)
    key, systems = str(table["key"].iloc[0]), list(dict.fromkeys(table["system"]))
    values = sorted(set(table["key_value"].astype(float)))
    for axes, name, title in (
        (left, "survival", "Survival"),
        (right, "target_steps", "Steps to the target loss"),
    ):
        drawn = sum(_draw(axes, table[table["system"] == system], system, name) for system in systems)
        panel(axes, title, kind, grid="y")
        axes.set_xlabel(key)
        _scale(axes, values)
        if not drawn:
            axes.set_yticks([])
            axes.text(0.5, 0.5, "no number", transform=axes.transAxes, ha="center", va="center", color=GREY)
    if len(left.lines):
        left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    left.set_ylabel("copies computed, of those routed")
    right.set_ylabel("steps")
    handles = [
        Line2D([], [], color=look_of(system).colour, marker=look_of(system).marker, ms=4, mfc="white", mew=0.9)
        for system in systems
    ]
    labels = [
        f"{system} ({implementation})"
        for system, implementation in table[["system", "implementation"]].drop_duplicates().itertuples(index=False)
    ]
    figure.legend(handles, labels, loc="outside upper left", ncols=min(5, len(systems)))
    without = table[table["target_steps"].isna()]
    told = ", ".join(f"{row.system} at {row.key_value:g}" for row in without.itertuples())
    caption(
        figure,
        f"{target} Loss: mean of the last {window} logged steps. Points: mean over seeds, bars their range; survival: "
        "over all logged steps, whatever the target.",
        shortened(f"Without a number, because some seed was never at the target or did not run: {told}.", 300)
        if told
        else "",
        place,
    )
    return figure


def _draw(axes: Axes, rows: pd.DataFrame, system: str, name: str) -> bool:
    """Whether there was a point to draw."""
    rows = rows[rows[name].notna()].sort_values("key_value")
    if not len(rows):
        return False
    look, numbers = look_of(system), rows[[name, f"{name}_low", f"{name}_high"]].to_numpy(dtype=np.float64)
    bars = np.clip([numbers[:, 0] - numbers[:, 1], numbers[:, 2] - numbers[:, 0]], 0, None)
    axes.errorbar(
        rows["key_value"],
        numbers[:, 0],
        yerr=bars,
        color=look.colour,
        marker=look.marker,
        ms=4,
        mfc="white",
        mew=0.9,
        elinewidth=0.7,
        capsize=1.5,
    )
    return True


def _scale(axes: Axes, values: list[float]) -> None:
    """A tick for each value; logarithmic where they are far apart, with a linear stretch down to 0 if that is one."""
    positive = [value for value in values if value > 0]
    if positive and positive[-1] / positive[0] >= _LOG_FROM:
        if values[0] > 0:
            axes.set_xscale("log")
        else:
            axes.set_xscale("symlog", linthresh=positive[0], linscale=0.5)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(values, [f"{value:g}" for value in values])
