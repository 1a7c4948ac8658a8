"""What one key of the model does to survival, to the way to a target loss and to a step's time, a line a system."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from analysis.style import COLUMN_INCHES, GREY, PAGE_INCHES, caption, legend, look_of, new_figure, panel, shortened


class Panel(NamedTuple):
    """One panel: which of `analysis.swiftmoe_numbers.NUMBERS`, its title, label and the factor to the label's unit."""

    number: str
    title: str
    label: str
    scale: float


PANELS = (
    Panel("survival", "Survival", "copies computed, % of those routed", 100),
    Panel("target_steps", "Steps to the target loss", "steps", 1),
    Panel("step_s", "Time of a step", "ms", 1e3),
)

LABELS = {
    "aux_loss_weight": "weight of the balance loss",
    "capacity_factor": "capacity factor",
    "model_dim": "model dimension",
    "num_experts": "experts",
}
"""Of keys, for axes."""

_LOG_FROM = 20
"""Values that are so many times apart stand on a logarithmic axis."""


def sweep_figure(table: pd.DataFrame, kind: str, target: str, window: int, place: str) -> Figure:
    """Panels over the key's values: survival, steps to the target, time of a step; bars are seeds' ranges. A panel for
    which no system has a number is left out.

    Args:
        table: columns as of `analysis.swiftmoe_sweep.COLUMNS`, one value of `key`.
        kind: `measured`, `modelled` or `simulated`.
        target: a sentence on the target loss.
        window: logged steps that a loss is the mean of.
        place: a sentence on the cluster.
    """
    key, systems = str(table["key"].iloc[0]), list(dict.fromkeys(table["system"]))
    values = sorted(set(table["key_value"].astype(float)))
    told = [panel_of for panel_of in PANELS if table[panel_of.number].notna().any()] or list(PANELS[:1])
    figure, panels = new_figure(2.6, PAGE_INCHES if len(told) > 1 else COLUMN_INCHES, ncols=len(told))
    for axes, (number, title, label, scale) in zip(panels, told, strict=True):
        drawn = sum(_draw(axes, table[table["system"] == system], system, number, scale) for system in systems)
        panel(axes, title, kind, grid="y")
        axes.set_xlabel(LABELS.get(key, key))
        axes.set_ylabel(label)
        _scale(axes, values)
        if not drawn:
            axes.set_yticks([])
            axes.text(0.5, 0.5, "no number", transform=axes.transAxes, ha="center", va="center", color=GREY)
    handles = [
        Line2D([], [], color=look_of(system).colour, marker=look_of(system).marker, ms=4, mfc="white", mew=0.9)
        for system in systems
    ]
    labels = [
        f"{system} ({implementation})"
        for system, implementation in table[["system", "implementation"]].drop_duplicates().itertuples(index=False)
    ]
    legend(figure, handles, labels, 5)
    without = table[table["target_steps"].isna()] if table["target_loss"].notna().any() else table[:0]
    late = ", ".join(f"{row.system} at {row.key_value:g}" for row in without.itertuples())
    caption(
        figure,
        f"{target} Loss: mean of the last {window} logged steps. Points: mean over seeds, bars their range; survival: "
        "over all logged steps, whatever the target; step: median of the rounds in which the systems of one value took "
        "turns, values one after the other.",
        shortened(f"No steps to the target, because some seed was never there or did not run: {late}.", 300)
        if late
        else "",
        place,
    )
    return figure


def _draw(axes: Axes, rows: pd.DataFrame, system: str, name: str, scale: float) -> bool:
    """Whether there was a point to draw."""
    rows = rows[rows[name].notna()].sort_values("key_value")
    if not len(rows):
        return False
    look, numbers = look_of(system), scale * rows[[name, f"{name}_low", f"{name}_high"]].to_numpy(dtype=np.float64)
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
