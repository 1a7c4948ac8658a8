"""Where the time of a step goes: its stages, forward and backward."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.comparison import Comparison
from analysis.plots.rows import ROW_INCHES, cell, no_number, partial, system_rows, timed, where
from analysis.style import GREY, PALE, STAGE_COLOURS, caption, legend, new_figure, panel
from analysis.summary import DIRECTIONS, stage_parts

_MS = 1e3


def stages_figure(comparison: Comparison, summary: pd.DataFrame) -> Figure:
    """One bar per system: the forward stages, then the backward ones hatched; a tick where the whole step ends."""
    parts = stage_parts(comparison)
    stages = list(dict.fromkeys(part.split("/", 1)[1] for part in parts))
    figure, (axes,) = new_figure(1.3 + ROW_INCHES * 1.1 * len(comparison.systems))
    system_rows(axes, comparison)
    steps = comparison.timed("step_time")
    ends = [0.0]
    for row, system in enumerate(comparison.systems):
        cells = {part: cell(summary, system, f"stage_time/{part}") for part in parts}
        numbers = {part: item["value"] for part, item in cells.items() if item is not None and pd.notna(item["value"])}
        own = steps.loc[steps["system"] == system, "value"]
        if not len(own):
            status = cell(summary, system, "tokens_per_s")
            no_number(axes, row, "no samples" if status is None else status["status"])
            continue
        left = 0.0
        for part, seconds in numbers.items():
            direction, stage = part.split("/", 1)
            axes.barh(
                row,
                seconds * _MS,
                left=left,
                height=0.62,
                color=STAGE_COLOURS.get(stage, PALE),
                edgecolor="white",
                hatch="////" if direction == DIRECTIONS[1] else "",
                linewidth=0.5,
            )
            left += seconds * _MS
        step = float(np.median(own)) * _MS
        if not numbers:
            axes.barh(row, step, height=0.62, facecolor="none", edgecolor=GREY, linewidth=0.6)
            no_number(axes, row, "stages not told apart", 40)
        axes.plot([step, step], [row - 0.4, row + 0.4], color="black", linewidth=1.2, solid_capstyle="butt", zorder=4)
        ends += [left, step]
    axes.set_xlim(0, 1.04 * max(ends) if max(ends) > 0 else 1)
    axes.set_xlabel("time of one timed step, ms")
    panel(axes, "Stage times", comparison.kind)
    handles = [Patch(facecolor=STAGE_COLOURS.get(stage, PALE), edgecolor="white") for stage in stages]
    handles += [Patch(facecolor=GREY, edgecolor="white", hatch=hatch, linewidth=0.5) for hatch in ("", "////")]
    step_tick = Line2D([], [], color="black", marker="|", markersize=6, markeredgewidth=1.2, linestyle="none")
    legend(figure, [*handles, step_tick], [*stages, *DIRECTIONS, "whole step"], 4)
    caption(
        figure,
        "Medians over rounds of the slowest rank, stage by stage, from rounds of their own under the stage clock. "
        "Stages of different ranks overlap, so a bar can end behind the whole step, which also holds all that is no "
        "stage. Some gates also lay out slots: compare gate and dispatch together.",
        partial(summary, comparison.systems, f"stage_time/{parts[0]}") if parts else "",
        timed(comparison),
        where(comparison),
    )
    return figure
