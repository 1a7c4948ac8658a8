"""What the bar figures share: one row per system, with the reason where there is no number."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes

from analysis.comparison import Comparison
from analysis.machine import machine_of
from analysis.style import GREY, SMALL_POINTS, shortened

ROW_INCHES = 0.23


def cell(summary: pd.DataFrame, system: str, metric: str) -> pd.Series | None:
    """The summary row of one system and metric, None when there is none."""
    found = summary[(summary["system"] == system) & (summary["metric"] == metric)]
    return found.iloc[0] if len(found) else None


def system_rows(axes: Axes, comparison: Comparison) -> None:
    """One tick per system, first on top, named `flat (native)`."""
    axes.set_yticks(range(len(comparison.systems)), [comparison.label(system) for system in comparison.systems])
    axes.set_ylim(len(comparison.systems) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)


_EXCEPTION = re.compile(r"\b(?:\w+\.)+[A-Z]\w*: ")


def reason_of(status: str) -> str:
    """A status for a reader: without the name of the exception that told it, such as `moe.errors.Refused: `."""
    return _EXCEPTION.sub("", status)


def no_number(axes: Axes, row: int, reason: str, length: int = 52) -> None:
    """Write the reason into a system's row, from the left edge on."""
    axes.text(
        0.015,
        row,
        shortened(reason_of(reason), length),
        transform=axes.get_yaxis_transform(),
        va="center",
        fontsize=SMALL_POINTS,
        style="italic",
        color=GREY,
        bbox={"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none"},
        zorder=5,
    )


def number_beside(axes: Axes, row: float, number: str) -> None:
    """Write a row's number to the right of its panel."""
    axes.annotate(
        number,
        (1, row),
        xycoords=axes.get_yaxis_transform(),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=SMALL_POINTS,
    )


def partial(summary: pd.DataFrame, systems: Sequence[str], metric: str) -> str:
    """A sentence naming the systems whose number rests on fewer seeds or rounds than planned; "" when none does."""
    told = []
    for system in systems:
        row = cell(summary, system, metric)
        if row is not None and pd.notna(row["value"]) and row["status"] != "ok":
            told.append(f"{system}: {row['status']}")
    return f"Incomplete: {'; '.join(told)}." if told else ""


def timed(comparison: Comparison) -> str:
    """What one timed step is, as a sentence."""
    return f"Timed step: {comparison.timed_step}." if comparison.timed_step else ""


def where(comparison: Comparison) -> str:
    """Hardware and cluster of a comparison and what stands in for the latter, as a sentence."""
    for run in comparison.runs[:1]:
        if run.manifest.get("hardware"):
            return f"On {machine_of(run.path)}."
    ranks = comparison.ranks
    if "one machine" in comparison.emulation:
        ranks = ranks.removesuffix(" on one machine")
    if " ranks" in comparison.emulation:
        ranks = ""
    phrase = ", ".join(part for part in (ranks, comparison.emulation) if part)
    told = ": ".join(part for part in (comparison.cluster, phrase) if part).rstrip(".")
    return f"Cluster {told}." if told else ""
