"""Communication and computation of the MoE layers in one step, side by side."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from analysis.comparison import Comparison
from analysis.plots.rows import ROW_INCHES, no_number, number_beside, system_rows, timed, where
from analysis.style import STAGE_COLOURS, caption, legend, new_figure, panel
from analysis.tables import significant
from analysis.topology_table import COMMUNICATION, COMPUTATION, stage_interval

_MS = 1e3
PARTS = {
    "communication (dispatch + combine)": (COMMUNICATION, STAGE_COLOURS["dispatch"]),
    "computation (gate + experts)": (COMPUTATION, STAGE_COLOURS["experts"]),
}


def communication_figure(comparison: Comparison) -> Figure:
    """A bar a system: communication, then computation, each with its interval and, at the right, its median."""
    figure, (axes,) = new_figure(1.3 + ROW_INCHES * 1.2 * len(comparison.systems))
    system_rows(axes, comparison)
    longest = 0.0
    for row, system in enumerate(comparison.systems):
        left, numbers = 0.0, []
        for stages, colour in PARTS.values():
            found = stage_interval(comparison, system, stages)
            if found is None:
                continue
            value, low, high = (seconds * _MS for seconds in found)
            axes.barh(row, value, left=left, height=0.62, color=colour, edgecolor="white", linewidth=0.5)
            axes.errorbar(
                left + value,
                row,
                xerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
                color="black",
                elinewidth=0.7,
                capsize=1.8,
                capthick=0.7,
                zorder=4,
            )
            longest = max(longest, left + max(value, high))
            left += value
            numbers.append(significant(value, 3))
        if left:
            number_beside(axes, row, " + ".join(numbers))
        else:
            told = [f"{problem.status}: {problem.reason}" for problem in comparison.problems_of(system, "samples")]
            no_number(axes, row, told[0] if told else "its stages were not timed", 40)
    axes.set_xlim(0, 1.05 * longest or 1)
    axes.set_xlabel("time in one timed step, ms")
    panel(axes, "MoE layers", comparison.kind)
    handles = [Patch(facecolor=colour, edgecolor="white") for _, colour in PARTS.values()]
    legend(figure, handles, list(PARTS), 1)
    caption(
        figure,
        "Forward and backward, summed over layers, at the right in ms: medians over rounds of the slowest rank with "
        "95 % bootstrap intervals, from rounds of their own under the stage clock. A rank that waits for another one "
        "waits in communication. Some gates also lay out slots, and that time stands under computation, as does the "
        "exchange that a schedule hides under its experts (fastermoe).",
        timed(comparison),
        where(comparison),
    )
    return figure
