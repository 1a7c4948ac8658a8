"""Bytes that cross each level of the cluster in a step, by class of traffic."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from analysis.comparison import Comparison
from analysis.plots.rows import ROW_INCHES, cell, no_number, partial, system_rows, where
from analysis.style import GREY, SMALL_POINTS, caption, legend, look_of, new_figure, panel
from analysis.summary import BYTE_CLASSES, byte_parts, byte_source
from analysis.tables import binary_bytes

_HATCHES = {"alltoall": "", "reduction": "/////", "other": "....."}
_NAMES = {"alltoall": "token traffic (all-to-all)", "reduction": "reductions", "other": "other"}
_SCALES = ((1024.0**3, "GiB"), (1024.0**2, "MiB"), (1024.0, "KiB"), (1.0, "B"))


def bytes_figure(comparison: Comparison, summary: pd.DataFrame) -> Figure:
    """One panel per level, innermost first, on one axis; one bar per system, its classes stacked."""
    parts = byte_parts(comparison)
    levels = list(dict.fromkeys(part.split("/")[0] for part in parts)) or comparison.levels or ["network"]
    classes = [kind for kind in BYTE_CLASSES if any(part.endswith(f"/{kind}") for part in parts)]
    height = 0.95 + len(levels) * (0.35 + ROW_INCHES * len(comparison.systems))
    figure, panels = new_figure(height, nrows=len(levels), sharex=True)
    totals = {
        (level, system): sum(_value(summary, system, level, kind) for kind in classes) if classes else float("nan")
        for level in levels
        for system in comparison.systems
    }
    largest = max((total for total in totals.values() if np.isfinite(total)), default=1.0) or 1.0
    scale, unit = next(item for item in _SCALES if largest >= item[0] or item[0] == 1.0)
    for axes, level in zip(panels, levels, strict=True):
        system_rows(axes, comparison)
        for row, system in enumerate(comparison.systems):
            if not np.isfinite(totals[level, system]):
                no_number(axes, row, _reason(summary, system, level, classes))
                continue
            left = 0.0
            for kind in classes:
                width = _value(summary, system, level, kind) / scale
                axes.barh(
                    row,
                    width,
                    left=left,
                    height=0.62,
                    facecolor=look_of(system).colour if kind == "alltoall" else "white",
                    edgecolor=look_of(system).colour,
                    hatch=_HATCHES[kind],
                    linewidth=0.6,
                )
                left += width
            axes.annotate(
                binary_bytes(totals[level, system], 3),
                (left, row),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=SMALL_POINTS,
                color=GREY,
            )
        panel(axes, f"over level {level}", comparison.kind)
        axes.set_xlim(0, 1.22 * largest / scale)
    steps = "training step" if byte_source(comparison) == "run" else "timed step"
    panels[-1].set_xlabel(f"{unit} per {steps}, sum over ranks")
    handles = [
        Patch(facecolor=GREY if kind == "alltoall" else "white", edgecolor=GREY, hatch=_HATCHES[kind], linewidth=0.6)
        for kind in classes
    ]
    if handles:
        legend(figure, handles, [_NAMES[kind] for kind in classes], 3)
    caption(
        figure,
        "Token traffic is counted exactly; reductions as a ring moves them. Mean over steps and seeds. Copies that "
        "stay on their rank cross no level.",
        partial(summary, comparison.systems, f"bytes/{parts[0]}") if parts else "",
        where(comparison),
    )
    return figure


def _value(summary: pd.DataFrame, system: str, level: str, kind: str) -> float:
    """Bytes per step; 0 when no system has this class on this level, NaN when this one has no number."""
    result = cell(summary, system, f"bytes/{level}/{kind}")
    return 0.0 if result is None else float(result["value"])


def _reason(summary: pd.DataFrame, system: str, level: str, classes: list[str]) -> str:
    for kind in classes:
        result = cell(summary, system, f"bytes/{level}/{kind}")
        if result is not None and not np.isfinite(result["value"]):
            return str(result["status"])
    return "no byte counts were recorded"
