"""Claims as bands and our numbers as points on them: what of a paper holds here, at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.ledger.verdicts import NOT_REPRODUCED, NOT_TESTED, PARTLY, REPRODUCED, Verdict
from analysis.plots.rows import number_beside
from analysis.style import GREY, PAGE_INCHES, PALE, SMALL_POINTS, caption, legend, new_figure, panel
from analysis.tables import with_interval

_LOOKS = {
    REPRODUCED: ("#228833", "o"),
    PARTLY: ("#CCAA22", "s"),
    NOT_REPRODUCED: ("#CC3344", "X"),
    NOT_TESTED: (GREY, "d"),
}
"""Of a number with each verdict: no system's colours. The last is fitted to the number that is claimed."""

_POINT: dict[str, Any] = {"mec": "white", "mew": 0.4}

_ROW_INCHES = 0.19


def claims_figure(verdicts: Sequence[Verdict]) -> Figure:
    """A panel for each unit, in it a row for each test with a number: the claim's numbers as a band, ours as a point.

    Args:
        verdicts: of one paper, at least one with a number.
    """
    units: dict[str, list[Verdict]] = {}
    for row in verdicts:
        if row.interval is not None:
            units.setdefault(row.claim.unit, []).append(row)
    heights = [1.6 + len(rows) for rows in units.values()]
    figure, panels = new_figure(
        0.75 + _ROW_INCHES * sum(heights) + 0.16 * len(units),
        PAGE_INCHES,
        nrows=len(units),
        gridspec_kw={"height_ratios": heights},
    )
    for axes, (unit, rows) in zip(panels, units.items(), strict=True):
        kinds = list(dict.fromkeys(row.kind for row in rows))
        _draw(axes, rows)
        names = [f"{row.id} ({row.kind})" if len(kinds) > 1 else row.id for row in rows]
        axes.set_yticks(range(len(rows)), names, fontsize=SMALL_POINTS)
        axes.set_xlabel("ratio, x" if unit == "x" else unit)
        panel(axes, "", " and ".join(kinds))
    found = {row.verdict for rows in units.values() for row in rows}
    handles: list[Artist] = [Patch(facecolor=PALE, alpha=0.6)]
    handles += [
        Line2D([], [], color=colour, marker=marker, ms=_size(marker), linestyle="none", **_POINT)
        for verdict, (colour, marker) in _LOOKS.items()
        if verdict in found
    ]
    labels = ["the claim", *(f"ours: {verdict}" for verdict in _LOOKS if verdict in found)]
    legend(figure, handles, labels, 5)
    without = [row.id for row in verdicts if row.interval is None]
    caption(
        figure,
        "A row for each test, with its 95 % bootstrap interval over rounds or the range over at most five seeds; "
        "dashed: no effect. Settings and hardware, which are not the papers', stand in REPRODUCTION.md.",
        f"Without a number: {', '.join(without)}." if without else "",
    )
    return figure


def _draw(axes: Axes, rows: Sequence[Verdict]) -> None:
    reach = [end for row in rows for end in _ends(row)]
    reach += [
        bound
        for row in rows
        for bound in (row.claim.at_least, row.claim.at_most, row.claim.no_effect)
        if bound is not None
    ]
    margin = 0.06 * (max(reach) - min(reach) or 1.0)
    left, right = min(reach) - margin, max(reach) + margin
    for at, row in enumerate(rows):
        claim, (colour, marker) = row.claim, _LOOKS[row.verdict]
        start = left if claim.at_least is None else claim.at_least
        end = right if claim.at_most is None else claim.at_most
        axes.barh(at, end - start, left=start, height=0.72, facecolor=PALE, alpha=0.6, linewidth=0)
        if claim.no_effect is not None:
            axes.plot([claim.no_effect] * 2, [at - 0.5, at + 0.5], color=GREY, linewidth=0.7, linestyle=(0, (3, 2)))
        assert row.interval is not None, "rows without a number are not drawn"
        low, high = _ends(row)
        axes.plot([low, high], [at, at], color=colour, linewidth=1.4, solid_capstyle="butt", zorder=3)
        axes.plot(row.interval.value, at, marker, color=colour, ms=_size(marker), zorder=4, **_POINT)
        number_beside(axes, at, with_interval(row.interval))
    axes.set_xlim(left, right)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def _size(marker: str) -> float:
    return 6.0 if marker == "X" else 4.5  # its white edge takes more of it


def _ends(row: Verdict) -> tuple[float, float]:
    assert row.interval is not None, "rows without a number are not drawn"
    return min(row.interval), max(row.interval)
