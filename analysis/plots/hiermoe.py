"""HierMoE's tables as figures, the paper's numbers beside the suite's; fitted collectives; its model beside timings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from analysis.hiermoe_tables import Line
from analysis.plots.bars import PAPER, Series, grouped_bars
from analysis.style import COLUMN_INCHES, GREY, PAGE_INCHES, caption, legend, look_of, new_figure, panel, shortened

_OWN = look_of("hiermoe").colour
_METHODS = {name: look_of(name).colour for name in ("HD2", "HD", "HierMoE")}
"""One method with more and more of its parts."""

_ROUTED = ("#44AA77", "#88CCEE", "#AA7744", "#DD7788")
_RUN = re.compile(r"(?P<system>[^-]+)-(?P<model>.+)-s(?P<seed>\d+)(?:-[0-9a-f]{10})?")
_VARIABLES = {"K": "experts per token, K", "E": "experts, E", "G": "GPUs, G"}
_KIBI, _MEBI = 2**10, 2**20


def duplication_figure(rows: pd.DataFrame) -> Figure:
    """Table II: a panel for each number of groups, by K bars of the paper, of the closed form and of recorded routings.

    Args:
        rows: of `analysis.hiermoe_tables.duplication_rows`.
    """
    groups = sorted(set(rows["groups"]))
    routed = list(dict.fromkeys(rows["what"].dropna()))
    figure, panels = new_figure(2.5 + 0.13 * len(routed), PAGE_INCHES, ncols=len(groups), sharey=True)
    for axes, num_groups in zip(panels, groups, strict=True):
        own = rows[rows["groups"] == num_groups]
        choices = sorted(set(own["top_k"]))
        closed = own[own["what"].isna()]
        series: list[Series] = [
            (closed.set_index("top_k")["paper"], PAPER),
            (closed.set_index("top_k")["ours"], {"color": _OWN}),
        ]
        for index, what in enumerate(routed):
            values = own[own["what"] == what].set_index("top_k")["ours"]
            series.append((values, {"color": _ROUTED[index % len(_ROUTED)]}))
        grouped_bars(axes, choices, series)
        axes.set_xlabel(_VARIABLES["K"])
        kind = "modelled" if own["what"].isna().all() else "modelled and measured"
        panel(axes, f"{num_groups} groups", kind, grid="y")
    panels[0].set_ylabel("copies that need not travel, %")
    handles = [Patch(**PAPER), Patch(color=_OWN)]
    handles += [Patch(color=_ROUTED[index % len(_ROUTED)]) for index in range(len(routed))]
    labels = ["the paper's", "closed form of uniform choices (modelled)"]
    labels += [f"{_routing_of(what)} (measured)" for what in routed]
    legend(figure, handles, labels, 3)
    caption(
        figure,
        "HierMoE's table II: share of a token's copies that need not travel when a token is sent once to a group of "
        "experts. Of how many experts the paper's are is not verified; the closed form is of 256.",
        "Measured routing: counted in all tokens' choices at the last step of a run; 0 where a group is one expert."
        if routed
        else "",
    )
    return figure


def _routing_of(run: str) -> str:
    """Whose routing was counted, in words: a run is named by its folder."""
    parts = _RUN.fullmatch(run)
    told = f"{parts['system']} on {parts['model']}, seed {parts['seed']}" if parts else run
    return shortened(f"routing of {told}", 50)


def speedup_figure(rows: pd.DataFrame) -> Figure:
    """Table IV: a row of panels for each routing, a column for K, E and G, the paper's bar beside ours by method.

    Args:
        rows: of `analysis.hiermoe_tables.speedup_rows`.
    """
    routings, variables = (list(dict.fromkeys(rows[name])) for name in ("routing", "variable"))
    figure, panels = new_figure(
        0.8 + 1.7 * len(routings), PAGE_INCHES, nrows=len(routings), ncols=len(variables), sharey=True
    )
    cells = [(routing, variable) for routing in routings for variable in variables]
    for axes, (routing, variable) in zip(panels, cells, strict=True):
        own = rows[(rows["routing"] == routing) & (rows["variable"] == variable)]
        series: list[Series] = []
        for method, colour in _METHODS.items():
            values = own[own["method"] == method].set_index("size")
            if len(values):
                series += [(values["paper"], PAPER), (values["ours"], {"color": colour})]
        grouped_bars(axes, sorted(set(own["size"])), series)
        axes.axhline(1, color=GREY, linewidth=0.8, zorder=4)
        axes.set_xlabel(_VARIABLES[variable])
        panel(axes, shortened(routing, 24), "modelled", grid="y")
    for axes in panels[:: len(variables)]:
        axes.set_ylabel("all-to-all speed-up\nover Megatron-LM, x")
    handles = [Patch(**PAPER), *(Patch(color=colour) for colour in _METHODS.values())]
    labels = ["the paper's, measured, left of each", *(f"{name} (modelled)" for name in _METHODS)]
    legend(figure, handles, labels, 4)
    told = [routing for routing in routings if not (rows[rows["routing"] == routing]["method"] == "HierMoE").any()]
    caption(
        figure,
        "HierMoE's table IV. Ours: its performance model with the fits of its figure 9, Megatron-LM being all-to-all "
        "without deduplication; layer sizes and routing are not verified. The paper's were measured on its GPUs.",
        f"No HierMoE under {' and '.join(told)} routing: swaps have nothing to find there." if told else "",
    )
    return figure


def collectives_figure(paper: Sequence[Line], measured: Sequence[Line], where: str) -> Figure:
    """Figure 9: time of every collective against the bytes that a rank sends; the paper's fits, then a cluster's own.

    Args:
        paper: lines without points.
        measured: lines with points; none: the paper's alone.
        where: sentence on the cluster of the measured ones.
    """
    both = (("The paper's fits", "modelled", paper), ("This cluster", "measured", measured))
    drawn = [(title, kind, lines) for title, kind, lines in both if lines]
    wide = len(drawn) > 1
    names = list(dict.fromkeys(line.name for _, _, lines in drawn for line in lines))
    figure, panels = new_figure(2.6, PAGE_INCHES if wide else COLUMN_INCHES, ncols=len(drawn))
    for axes, (title, kind, lines) in zip(panels, drawn, strict=True):
        for line in lines:
            sizes = np.array([size for size, _ in line.points])
            least, most = (float(sizes.min()), float(sizes.max())) if len(sizes) else (64.0 * _KIBI, 256.0 * _MEBI)
            at = np.geomspace(least, most, 60)
            style = _line_style(line.name)
            axes.plot(at / _MEBI, 1e3 * (line.alpha_s + line.beta_s_per_byte * at), linewidth=0.9, **style)
            if line.points:
                seconds = np.array([value for _, value in line.points])
                marker = "s" if line.name.startswith("Intra") else "o"
                axes.plot(sizes / _MEBI, 1e3 * seconds, marker, markersize=2.6, color=style["color"])
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis, steps in ((axes.xaxis, (1.0,)), (axes.yaxis, (1.0, 2.0, 5.0))):
            axis.set_major_locator(LogLocator(subs=steps))
            axis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
            axis.set_minor_locator(NullLocator())
        axes.set_xlabel("bytes that a rank sends in all, MiB")
        panel(axes, title, kind, grid="both")
    panels[0].set_ylabel("time of one collective, ms")
    handles = [Line2D([], [], **_line_style(name)) for name in names]
    legend(figure, handles, names, 4)
    caption(
        figure,
        "HierMoE's figure 9: fitted lines alpha + n beta of even all-to-alls over all ranks (standard), across one "
        "level (Inter) and inside its parts (Intra), all groups at once.",
        "The paper's: 4 nodes of 8 A6000; it prints no units, milliseconds are not verified, and the span is ours."
        if paper
        else "",
        f"Points: medians over repeats of the slowest rank, on {where}" if measured else "",
    )
    return figure


def _line_style(name: str) -> dict[str, Any]:
    """Inter and Intra of a level share its colour, and differ in their dashes."""
    kind, _, number = name.partition("-")
    if not number.isdigit():
        return {"color": "black", "linestyle": "-"}
    colour = ("#004488", "#BB5566", "#DDAA33")[(int(number) - 1) % 3]
    return {"color": colour, "linestyle": "-" if kind == "Inter" else (0, (4, 2))}


def levels_figure(table: pd.DataFrame, where: str) -> Figure:
    """Time of a dispatch over d levels, modelled beside measured; a panel for each shape and workload.

    Args:
        table: rows of `analysis.hiermoe_levels`.
        where: sentence on the hardware, for the caption.
    """
    cells = list(dict.fromkeys(zip(table["shape"], table["workload"], strict=True)))
    columns = min(3, len(cells))
    num_rows = -(-len(cells) // columns)
    width = PAGE_INCHES if columns > 1 else COLUMN_INCHES
    figure, panels = new_figure(0.9 + 1.7 * num_rows, width, nrows=num_rows, ncols=columns)
    for axes, (shape, workload) in zip(panels, cells, strict=False):
        own = table[(table["shape"] == shape) & (table["workload"] == workload)]
        for at in range(len(own)):
            row = own.iloc[at]
            colour = look_of(row["system"]).colour
            axes.bar(at - 0.2, 1e3 * row["modelled_s"], 0.36, facecolor="white", edgecolor=colour, linewidth=0.8)
            axes.bar(at + 0.2, 1e3 * row["measured_s"], 0.36, color=colour)
            spread = [[max(0.0, row["measured_s"] - row["low_s"])], [max(0.0, row["high_s"] - row["measured_s"])]]
            axes.errorbar(at + 0.2, 1e3 * row["measured_s"], yerr=1e3 * np.array(spread), color="black", capsize=1.8)
        axes.set_xticks(range(len(own)), [shortened(str(system), 14) for system in own["system"]])
        axes.set_ylim(bottom=0)
        axes.tick_params(axis="x", length=0)
        panel(axes, shortened(f"{shape}, {workload}", 18), "modelled and measured", grid="y")
    for axes in panels[len(cells) :]:
        axes.set_axis_off()
    for axes in panels[::columns]:
        axes.set_ylabel("time of one dispatch, ms")
    handles = [Patch(facecolor="white", edgecolor=GREY), Patch(color=GREY)]
    legend(figure, handles, ["modelled (hollow)", "measured (filled)"], 2)
    caption(
        figure,
        "Variants of hiermoe (native). Modelled: HierMoE's equations with the cluster's costs, of what was routed. "
        "Measured: the dispatch stage of a forward, median over rounds of the slowest rank with its 95 % interval; it "
        "also counts, sorts and packs rows, which the model leaves out.",
        where,
    )
    return figure
