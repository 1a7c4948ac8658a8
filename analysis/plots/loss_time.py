"""Validation loss against steps and against time: what a step is worth, and what a second is worth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from analysis.comparison import Comparison
from analysis.plots.rows import where
from analysis.style import GREY, PAGE_INCHES, caption, legend, look_of, new_figure, panel


def losses_in_time(comparison: Comparison) -> pd.DataFrame:
    """Validation losses with the training time before them: columns system, seed, step, value, seconds.

    A logged `step_time` is the mean over the steps since the one logged before, so that it counts once for each of
    them; validation and checkpoints are no part of it. Seconds are NaN where no step time was logged.
    """
    held_out, times = comparison.trained("val_loss"), comparison.trained("step_time")
    frames = []
    for (system, seed), losses in held_out.groupby(["system", "seed"], sort=False):
        own = times[(times["system"] == system) & (times["seed"] == seed)].sort_values("step")
        done = own["step"].to_numpy() + 1  # steps count from 0, and the loss of `step` was taken after so many
        spent = np.cumsum(own["value"].to_numpy() * np.diff(done, prepend=0))
        losses = losses.sort_values("step")
        seconds = np.interp(losses["step"], [0, *done], [0.0, *spent]) if len(own) else np.nan
        frames.append(losses[["system", "seed", "step", "value"]].assign(seconds=seconds))
    columns = ["system", "seed", "step", "value", "seconds"]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def loss_time_figure(comparison: Comparison) -> Figure:
    """Two panels with one loss axis: against steps on the left, against time on the right; a line a system and seed."""
    figure, panels = new_figure(2.75, PAGE_INCHES, ncols=2, sharey=True)
    losses = losses_in_time(comparison)
    drawn = [system for system in comparison.systems if (losses["system"] == system).any()]
    handles = []
    for index, system in enumerate(drawn):
        # The first system is drawn widest, so that it shows beside one that coincides with it.
        style = _style(system, 1.8 - 0.9 * index / (len(drawn) - 1) if len(drawn) > 1 else 1.1)
        handles.append(Line2D([], [], **style))
        for _, own in losses[losses["system"] == system].groupby("seed"):
            for axes, clock in zip(panels, ("step", "seconds"), strict=True):
                axes.plot(own[clock], own["value"], alpha=0.85, zorder=2 + index, **style)
    for axes, title, label in zip(
        panels,
        ("Validation loss against steps", "Validation loss against time"),
        ("steps", "training time, s (sum of the measured step times)"),
        strict=True,
    ):
        panel(axes, title, comparison.kind, grid="both")
        axes.set_xlabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=label == "steps"))
        if drawn:
            axes.set_xlim(left=0)
        else:
            axes.text(0.5, 0.5, "no validation loss", transform=axes.transAxes, ha="center", va="center", color=GREY)
    panels[0].set_ylabel("validation loss, nats per token")
    untimed = [system for system in drawn if losses.loc[losses["system"] == system, "seconds"].isna().any()]
    missing = [system for system in comparison.systems if system not in drawn]
    if handles:
        labels = [comparison.label(system) for system in drawn]
        legend(figure, handles, labels, 5)
    seeds = ", ".join(str(seed) for seed in comparison.run_seeds)
    caption(
        figure,
        f"A line for each system and seed (seeds {seeds}); widths only keep them apart. Time: each run's own step "
        "times, cumulated, without validation, checkpoints and start-up; runs were trained one after the other, so it "
        "holds what else the machine did: the interleaved rounds compare step times.",
        f"No step times: {', '.join(untimed)}." if untimed else "",
        f"No validation loss: {', '.join(missing)}." if missing else "",
        where(comparison),
    )
    return figure


def _style(system: str, width: float) -> dict[str, Any]:
    look = look_of(system)
    marker = {"marker": look.marker, "ms": 3.6, "mfc": "white", "mew": 0.8}
    return {"color": look.colour, "linewidth": width, **marker}
