"""Groups of bars, and how a paper's own numbers look beside ours."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.style import PALE, SMALL_POINTS

PAPER: dict[str, Any] = {"facecolor": PALE, "edgecolor": "white", "hatch": "////", "linewidth": 0.4}
"""A number that the paper states; ours are plain."""

Series = tuple[pd.Series, dict[str, Any]]
"""Values by position, and the style of their bars."""


def grouped_bars(axes: Axes, positions: Sequence[Hashable], series: Sequence[Series], numbers: bool = False) -> None:
    """A group of bars at every position, in it a bar of every series that has a value there.

    Args:
        axes: to draw on.
        positions: of the groups, from left to right, written below them.
        series: their values, indexed by position.
        numbers: whether each bar has its value above it, upright.
    """
    each = 0.84 / max(1, len(series))
    for column, position in enumerate(positions):
        there = [(float(values[position]), style) for values, style in series if position in values.index]
        there = [(value, style) for value, style in there if np.isfinite(value)]
        for index, (value, style) in enumerate(there):
            at = column + (index - (len(there) - 1) / 2) * each
            axes.bar(at, value, width=0.94 * each, zorder=2, **style)
            if numbers:
                axes.annotate(
                    f"{value:.2f}",
                    (at, value),
                    xytext=(0, 2),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                    rotation=90,
                    fontsize=SMALL_POINTS,
                )
    axes.set_xticks(range(len(positions)), [str(position) for position in positions])
    axes.tick_params(axis="x", length=0)
