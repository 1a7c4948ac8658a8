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
from analysis.style import GREY, PAGE_INCHES, PALE, caption, look_of, new_figure, panel

_OWN = look_of("fsmoe").colour
_COSTS = ("#88CCEE", "#117733", "#DDAA33", "#661100", "#AA4499", "#332288")
_OPERATIONS = {
    "gemm": ("#000000", "o"),
    "experts": ("#000000", "o"),
    "attention": (GREY, "D"),
    "all_to_all": ("#004488", "s"),
    "all_gather": ("#DDAA33", "^"),
    "reduce_scatter": ("#BB5566", "v"),
    "all_reduce": ("#228833", "P"),
}
NO_CODE = "Simulated from the paper's own costs: no system's code ran. Testbeds: A 48 A6000, B 32 RTX 2080 Ti."


def _costs_style(costs: Sequence[str], name: str, kind: str) -> dict[str, Any]:
    colour = _COSTS[list(costs).index(name) % len(_COSTS)]
    if kind == "fitted":  # hollow: it says nothing about the number beside it
        return {"facecolor": "white", "edgecolor": colour, "linewidth": 0.9}
    return {"color": colour}


def _legend(figure: Figure, costs: Sequence[str], fitted: bool, stated: Patch | None = None) -> None:
    handles = [stated or Patch(**PAPER), *(Patch(**_costs_style(costs, name, "simulated")) for name in costs)]
    labels = ["the paper's (measured)", *(f"{name} (simulated)" for name in costs)]
    if fitted:
        handles.append(Patch(facecolor="white", edgecolor=GREY, linewidth=0.9))
        labels.append("hollow: fitted to the paper's")
    figure.legend(handles, labels, loc="outside upper left", ncols=3)


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
        grouped_bars(axes, named, series)
        axes.set_xticks(range(len(named)), [SCHEDULES[name] for name in named])
        axes.axhline(1, color=GREY, linewidth=0.8, zorder=4)
        panel(axes, titled(testbed), "simulated", grid="y")
    panels[0].set_ylim(bottom=0.9)
    panels[0].set_ylabel("mean speed-up over Tutel, x\n(axis begins at 0.9)")
    _legend(figure, costs, (rows["kind"] == "fitted").any())
    caption(figure, "FSMoE's table 5, mean over 1458 layers of each testbed.", NO_CODE)
    return figure


def contention_figure(rows: pd.DataFrame) -> Figure:
    """How much table 5's FSMoE hangs on the one constant that was fitted to it.

    Args:
        rows: of contention.csv, with the column contention.
    """
    figure, (axes,) = new_figure(2.5)
    looks = {"A": ("#661100", "o"), "B": ("#0072B2", "s")}
    handles, labels = [], []
    for testbed, own in rows.groupby("testbed", sort=False):
        colour, marker = looks.get(str(testbed), (GREY, "D"))
        own = own.assign(contention=own["contention"].astype(float)).sort_values("contention")
        axes.plot(own["contention"], own["ours"], color=colour, marker=marker, ms=3.6)
        axes.axhline(own["paper"].iloc[0], color=colour, linewidth=0.8, linestyle=(0, (4, 2)))
        fitted = own[own["kind"] == "fitted"]
        axes.plot(fitted["contention"], fitted["ours"], "o", ms=8, fillstyle="none", color="black")
        handles += [Line2D([], [], color=colour, marker=marker, ms=3.6)]
        handles += [Line2D([], [], color=colour, linewidth=0.8, linestyle=(0, (4, 2)))]
        labels += [f"{testbed}, ours (simulated)", f"{testbed}, paper's (measured)"]
    handles.append(Line2D([], [], color="black", marker="o", ms=7, fillstyle="none", linestyle="none"))
    figure.legend(handles, [*labels, "fitted to A's number"], loc="outside upper left", ncols=2)
    axes.set_xlabel("contention: how much the links slow each other, x")
    axes.set_ylabel("FSMoE's mean speed-up over Tutel, x")
    panel(axes, "FSMoE in table 5", "simulated", grid="both")
    caption(figure, "With costs fitted to the paper's table 2. 1: the links do not disturb each other.")
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
    labels = [*(name.replace("_", "-") for name in operations), "testbed A (filled)", "testbed B (hollow)"]
    figure.legend(handles, labels, loc="outside upper left", ncols=4)
    caption(
        figure, "FSMoE's table 2: operations of a layer of GPT2-XL and Mixtral-7B, forward and backward. Band: 25 %."
    )
    return figure


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
                style: dict[str, Any] = {"color": colour, "marker": marker, "ms": 2.6}
                axes.plot(line["size"].astype(float) / 2**20, line["ours"], **style)
                handles.setdefault(str(operation), Line2D([], [], **style))
            axes.set_xlabel("size, 2^20 multiply-adds" if gemm else "size, 2^20 elements")
            axes.set_ylabel("time, ms")
            axes.set_ylim(bottom=0)
            panel(axes, f"testbed {testbed}, {'GEMM' if gemm else 'collectives'}", "modelled", grid="both")
    figure.legend(
        list(handles.values()), [name.replace("_", "-") for name in handles], loc="outside upper left", ncols=5
    )
    caption(
        figure,
        "FSMoE's figure 5: lines that its authors fitted, at the sizes that they profiled; its measured points are in "
        "an image only, and units are not verified.",
    )
    return figure


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
        stated: the span of the paper's own numbers, drawn as a band, where only that is stated.
    """
    costs = list(dict.fromkeys(rows["costs"]))
    cells = list(dict.fromkeys(zip(rows["testbed"], rows[by], strict=True)))
    columns = min(3, len(cells))
    num_rows = -(-len(cells) // columns)
    figure, panels = new_figure(0.75 + 1.75 * num_rows, PAGE_INCHES, nrows=num_rows, ncols=columns, sharey=True)
    for axes, (testbed, name) in zip(panels, cells, strict=False):
        own = rows[(rows["testbed"] == testbed) & (rows[by] == name)]
        series: list[Series] = [(own.drop_duplicates("group").set_index("group")["paper"], PAPER)]
        for (cost, kind), part in own.groupby(["costs", "kind"], sort=False):
            series.append((part.set_index("group")["ours"], _costs_style(costs, cost, kind)))
        here = [group for group in groups if (own["group"] == group).any()]
        grouped_bars(axes, here, series)
        axes.axhline(1, color=GREY, linewidth=0.8, zorder=4)
        if stated is not None:
            axes.axhspan(*stated, color=PALE, alpha=0.35, linewidth=0, zorder=0)
        panel(axes, f"{name}, {titled(testbed)}" if name else titled(testbed), "simulated", grid="y")
        if len(here) > 6:
            axes.set_xticks(range(len(here)), here, rotation=35, ha="right", rotation_mode="anchor")
        axes.tick_params(axis="x", labelsize=5.5)
    for axes in panels[len(cells) :]:
        axes.set_axis_off()
    for axes in panels[::columns]:
        axes.set_ylabel(ylabel)
    span = Patch(facecolor=PALE, alpha=0.35) if stated is not None else None
    _legend(figure, costs, (rows["kind"] == "fitted").any(), span)
    band = "Band: the span of FSMoE's bars in the paper, whose single heights are in an image only." if stated else ""
    caption(figure, title, NO_CODE, band)
    return figure
