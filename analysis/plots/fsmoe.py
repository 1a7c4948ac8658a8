"""FSMoE's tables and figures as simulated, the paper's measured numbers hatched beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from analysis.fsmoe_tables import SCHEDULES, titled
from analysis.plots.bars import PAPER, Series, grouped_bars
from analysis.style import GREY, PAGE_INCHES, PALE, SMALL_POINTS, caption, legend, look_of, new_figure, panel

_TESTBEDS = {"A": (look_of("fsmoe").colour, "o"), "B": ("#CC8866", "s")}
_COSTS = {
    "figure 5": "#88CCEE",
    "figure 5, GEMM x 4 (ours)": "#4477AA",
    "table 2": "#EE8866",
    "table 2, contention 1.4": "#994455",
}
"""One colour for life: tables and figures are simulated from different ones of these costs."""

_OTHER_COSTS = ("#BBCC33", "#AAAA00", "#77AADD")
_OPERATIONS = {
    "gemm": ("#000000", "o"),
    "experts": ("#000000", "o"),
    "attention": (GREY, "D"),
    "all_to_all": ("#004488", "s"),
    "all_gather": ("#DDAA33", "^"),
    "reduce_scatter": ("#BB5566", "v"),
    "all_reduce": ("#228833", "P"),
}
_MACHINES = {"A": "48 A6000", "B": "32 RTX 2080 Ti"}


def _no_code(testbeds: Sequence[str]) -> str:
    """What a simulation is of, as sentences."""
    named = [f"{name}: {_MACHINES[name]}" for name in _MACHINES if any(name in testbed for testbed in testbeds)]
    return f"Simulated from the paper's own costs: no system's code ran. Testbed {'; '.join(named)}."


def _costs_style(costs: Sequence[str], name: str, kind: str) -> dict[str, Any]:
    others = [cost for cost in costs if cost not in _COSTS]
    colour = _COSTS[name] if name in _COSTS else _OTHER_COSTS[others.index(name) % len(_OTHER_COSTS)]
    if kind == "fitted":  # hollow: it says nothing about the number beside it
        return {"facecolor": "white", "edgecolor": colour, "linewidth": 0.9}
    return {"color": colour}


def _legend(figure: Figure, costs: Sequence[str], fitted: bool, span: Patch | None = None) -> None:
    handles = [span or Patch(**PAPER), *(Patch(**_costs_style(costs, name, "simulated")) for name in costs)]
    paper = "span of FSMoE in the paper (measured)" if span else "the paper's (measured)"
    labels = [paper, *(f"costs of {name} (simulated)" for name in costs)]
    if fitted:
        handles.append(Patch(facecolor="white", edgecolor=GREY, linewidth=0.9))
        labels.append("hollow: fitted to the paper's")
    legend(figure, handles, labels, 3)


def table_5_figure(rows: pd.DataFrame) -> Figure:
    """Mean speed-up over Tutel: a panel a testbed, a group a schedule that the paper has a number of.

    Args:
        rows: of table5.csv, with the column schedule.
    """
    testbeds, costs = (list(dict.fromkeys(rows[name])) for name in ("testbed", "costs"))
    named = [name for name in SCHEDULES if rows.loc[rows["schedule"] == name, "paper"].notna().any()]
    named = [name for name in named if name != "tutel_overlap"]  # 1 by definition
    figure, panels = new_figure(2.7, PAGE_INCHES, ncols=len(testbeds), sharey=True)
    for axes, testbed in zip(panels, testbeds, strict=True):
        own = rows[(rows["testbed"] == testbed) & rows["schedule"].isin(named)]
        series: list[Series] = [(own.drop_duplicates("schedule").set_index("schedule")["paper"], PAPER)]
        for (cost, kind), cells in own.groupby(["costs", "kind"], sort=False):
            series.append((cells.set_index("schedule")["ours"], _costs_style(costs, cost, kind)))
        grouped_bars(axes, named, series, numbers=True)
        axes.set_xticks(range(len(named)), [SCHEDULES[name] for name in named])
        axes.axhline(1, color=GREY, linewidth=0.8, zorder=4)
        panel(axes, titled(testbed), "simulated", grid="y")
    panels[0].set_ylim(0, 1.2 * float(rows.loc[rows["schedule"].isin(named), ["paper", "ours"]].max().max()))
    panels[0].set_ylabel("mean speed-up over Tutel, x")
    _legend(figure, costs, (rows["kind"] == "fitted").any())
    caption(figure, "FSMoE's table 5, mean over 1458 layers of each testbed.", _no_code(testbeds))
    return figure


def contention_figure(rows: pd.DataFrame) -> Figure:
    """How much table 5's FSMoE hangs on the one constant that was fitted to it.

    Args:
        rows: of contention.csv, with the column contention.
    """
    figure, (axes,) = new_figure(2.9)
    ours: dict[str, Line2D] = {}
    papers: dict[str, Line2D] = {}
    for testbed, own in rows.groupby("testbed", sort=False):
        colour, marker = _TESTBEDS.get(str(testbed), (GREY, "D"))
        own = own.assign(contention=own["contention"].astype(float)).sort_values("contention")
        axes.plot(own["contention"], own["ours"], color=colour, marker=marker, ms=3.6)
        axes.axhline(own["paper"].iloc[0], color=colour, linewidth=0.8, linestyle=(0, (4, 2)))
        fitted = own[own["kind"] == "fitted"]
        axes.plot(fitted["contention"], fitted["ours"], "o", ms=8, fillstyle="none", color="black")
        ours[f"testbed {testbed} (simulated)"] = Line2D([], [], color=colour, marker=marker, ms=3.6)
        papers[f"{testbed} in the paper (measured)"] = Line2D(
            [], [], color=colour, linewidth=0.8, linestyle=(0, (4, 2))
        )
    ring = {"fitted to A's number": Line2D([], [], color="black", marker="o", ms=7, fillstyle="none", linestyle="none")}
    handles = ours | ring | papers
    legend(figure, list(handles.values()), list(handles), 2)
    axes.set_xlabel("contention: how much the links slow each other, x")
    axes.set_ylabel("mean speed-up over Tutel, x")
    panel(axes, "FSMoE in table 5", "simulated", grid="both")
    caption(
        figure,
        "FSMoE's mean speed-up over Tutel in its table 5, with costs fitted to the paper's table 2. 1: the links do "
        "not disturb each other.",
    )
    return figure


def table_2_figure(rows: pd.DataFrame) -> Figure:
    """Time of each operation, ours against the paper's: a panel for each source of costs, a marker an operation.

    Args:
        rows: of table2.csv, with the columns operation, model and direction.
    """
    costs = list(dict.fromkeys(zip(rows["costs"], rows["kind"], strict=True)))
    figure, panels = new_figure(3.1, PAGE_INCHES, ncols=len(costs), sharex=True, sharey=True)
    low, high = (float(extreme(rows[["paper", "ours"]].to_numpy())) for extreme in (np.min, np.max))
    ends = low / 1.4, high * 1.4
    operations = list(dict.fromkeys(rows["operation"]))
    for axes, (name, kind) in zip(panels, costs, strict=True):
        axes.plot(ends, ends, color=GREY, linewidth=0.8)
        axes.fill_between(
            ends, [end / 1.25 for end in ends], [end * 1.25 for end in ends], color=PALE, alpha=0.35, lw=0
        )
        own = rows[rows["costs"] == name]
        for operation in operations:
            colour, marker = _OPERATIONS.get(operation, (GREY, "o"))
            cells = own[own["operation"] == operation]
            for testbed, face in (("A", colour), ("B", "white")):
                points = cells[cells["testbed"] == testbed]
                axes.plot(points["paper"], points["ours"], marker, color=colour, mfc=face, ms=4, mew=0.9)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator())
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
            axis.set_minor_locator(NullLocator())
        axes.set_xlim(ends)
        axes.set_ylim(ends)
        axes.set_xlabel("the paper's time of an operation, ms (measured)")
        panel(axes, f"costs of {name}", kind, grid="both")
    panels[0].set_ylabel("our time, ms")
    handles = [Line2D([], [], linestyle="none", marker=m, color=c, ms=4) for c, m in map(_operation, operations)]
    handles += [Line2D([], [], linestyle="none", marker="o", color=GREY, mfc=face, ms=4) for face in (GREY, "white")]
    labels = [*map(_named, operations), "testbed A (filled)", "testbed B (hollow)"]
    legend(figure, handles, labels, 4)
    caption(
        figure, "FSMoE's table 2: operations of a layer of GPT2-XL and Mixtral-7B, forward and backward. Band: 25 %."
    )
    return figure


def _named(operation: str) -> str:
    return "GEMM" if operation == "gemm" else operation.replace("_", "-")


def _operation(name: str) -> tuple[str, str]:
    return _OPERATIONS.get(name, (GREY, "o"))


def figure_5_figure(rows: pd.DataFrame) -> Figure:
    """The paper's fitted lines of time against size, a row a testbed: matrix products, collectives.

    Args:
        rows: of fig5.csv, with the columns operation, size and what.
    """
    testbeds = list(dict.fromkeys(rows["testbed"]))
    figure, panels = new_figure(0.6 + 1.75 * len(testbeds), PAGE_INCHES, nrows=len(testbeds), ncols=2)
    handles: dict[str, Line2D] = {}
    for index, testbed in enumerate(testbeds):
        for axes, gemm in zip(panels[2 * index : 2 * index + 2], (True, False), strict=True):
            own = rows[(rows["testbed"] == testbed) & ((rows["operation"] == "gemm") == gemm)]
            for operation, line in own.groupby("operation", sort=False):
                colour, marker = _operation(str(operation))
                style: dict[str, Any] = {"color": colour, "marker": marker, "ms": 3.2, "mfc": "none", "mew": 0.8}
                axes.plot(line["size"].astype(float) / 2**20, line["ours"], **style)
                handles.setdefault(str(operation), Line2D([], [], **style))
            axes.set_xlabel(f"size, $2^{{20}}$ {'multiply-adds' if gemm else 'elements'}")
            axes.set_ylabel("time, ms")
            axes.set_ylim(0, 1.15 * float(own["ours"].max()))
            panel(axes, f"testbed {testbed}, {'GEMM' if gemm else 'collectives'}", "modelled", grid="both")
    legend(figure, list(handles.values()), [_named(name) for name in handles], 5)
    caption(
        figure,
        "FSMoE's figure 5: lines that its authors fitted, at the sizes that they profiled; its measured points are in "
        "an image only, and units are not verified. Of GEMM's line the time for each multiply-add is so small, as we "
        "read its unit, that only the constant shows.",
    )
    return figure


_SPAN: dict[str, Any] = {"color": PALE, "alpha": 0.5, "linewidth": 0}


def speedup_panels(
    rows: pd.DataFrame,
    groups: Sequence[str],
    by: str,
    title: str,
    ylabel: str,
    stated: tuple[float, float] | None = None,
) -> Figure:
    """Bars of our speed-ups by source of costs, a panel for each testbed and `by`; the paper's are hatched.

    Args:
        rows: with the column group, the one named by `by`, testbed, costs, paper, ours and kind.
        groups: from left to right.
        by: what panels differ in beside the testbed.
        title: first sentence of the caption.
        ylabel: with its unit.
        stated: the span of the paper's own numbers of FSMoE, drawn as a band, where only that is stated.
    """
    costs = list(dict.fromkeys(rows["costs"]))
    cells = list(dict.fromkeys(zip(rows["testbed"], rows[by], strict=True)))
    columns = min(3, len(cells))
    num_rows = -(-len(cells) // columns)
    figure, panels = new_figure(0.75 + 1.9 * num_rows, PAGE_INCHES, nrows=num_rows, ncols=columns, sharey=True)
    for axes, (testbed, name) in zip(panels, cells, strict=False):
        own = rows[(rows["testbed"] == testbed) & (rows[by] == name)]
        series: list[Series] = [(own.drop_duplicates("group").set_index("group")["paper"], PAPER)]
        for (cost, kind), part in own.groupby(["costs", "kind"], sort=False):
            series.append((part.set_index("group")["ours"], _costs_style(costs, cost, kind)))
        here = [group for group in groups if (own["group"] == group).any()]
        grouped_bars(axes, here, series)
        axes.axhline(1, color=GREY, linewidth=0.8, zorder=4)
        if stated is not None:
            place = here.index(SCHEDULES["fsmoe"])
            axes.bar(place, stated[1] - stated[0], bottom=stated[0], width=0.96, zorder=0, **_SPAN)
        panel(axes, f"{name}, {titled(testbed)}" if name else titled(testbed), "simulated", grid="y")
        if len(here) > 6:
            axes.set_xticks(range(len(here)), here, rotation=35, ha="right", rotation_mode="anchor")
        axes.tick_params(axis="x", labelsize=SMALL_POINTS)
    for axes in panels[len(cells) :]:
        axes.set_axis_off()
    for axes in panels[::columns]:
        axes.set_ylabel(ylabel)
    span = Patch(**_SPAN) if stated is not None else None
    _legend(figure, costs, (rows["kind"] == "fitted").any(), span)
    band = "Band: the span of FSMoE's bars in the paper, whose single heights are in an image only." if stated else ""
    caption(figure, title, _no_code([testbed for testbed, _ in cells]), band)
    return figure
