"""Table and figure of one layer benchmark. `python -m analysis.layer outputs/layer-...` makes them again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from analysis.errors import ResultsError, exit_code
from analysis.files import write_text
from analysis.kernels import write_kernels
from analysis.load import Samples, load_run, load_samples
from analysis.machine import machine_of
from analysis.plots.rows import no_number, reason_of
from analysis.plots.speedups import MOST_GROUPS, speedups_figure
from analysis.statistics import Interval, bootstrap_median, bootstrap_ratio, worst
from analysis.style import (
    COLUMN_INCHES,
    GREY,
    PAGE_INCHES,
    PALE,
    STAGE_COLOURS,
    caption,
    legend,
    new_figure,
    panel,
    save,
    shortened,
    suite_style,
)
from analysis.summary import BYTE_CLASSES, DIRECTIONS, STAGES
from analysis.tables import binary_bytes, markdown_row, significant

COLUMNS = ["shape", "workload", "system", "implementation", "metric", "value", "low", "high", "unit", "status"]
STAGES_OF_SYSTEMS, SPEEDS = "stages", "step_time"
"""Figures: of a few shapes stages, of many each system's speed."""


def write_layer(folder: Path, baseline: str, out_dir: Path | None = None) -> pd.DataFrame:
    """Write summary.csv, summary.md, stages.{png,pdf} (step_time.{png,pdf} of more than `MOST_GROUPS` shapes) and, if
    kernels were profiled, kernels.csv of a layer benchmark.

    Args:
        folder: holds samples.parquet.
        baseline: the system that ratios refer to.
        out_dir: where to write; None for that folder.

    Returns:
        The rows of summary.csv: per shape and system step_time, step_time_ratio (time of the baseline over the system's
        in the same rounds: above 1 is faster), floor_time and floor_ratio (the time of the experts' products and four
        bare all-to-alls, over the system's), communication_time (gate, dispatch and combine both ways),
        communication_ratio (the baseline's over the system's), tokens_per_s, stage_time/..., bytes/..., peak_memory,
        dropped_copies, relative_error/..., path/<which implementation ran>, or one `run` row with the reason why there
        is none.

    Raises:
        ResultsError: no samples, a cell that stands there twice, or a time that is no number.
    """
    samples = load_samples(folder)
    if samples.status != "done":
        raise ResultsError(f"{folder}: {samples.reason}. Fix: run `python -m experiments.layer` first.")
    refuse_bad_times(samples)
    summary = pd.DataFrame(list(_rows(samples, baseline)), columns=COLUMNS)
    out_dir = out_dir or folder
    write_text(out_dir / "summary.csv", summary.to_csv(index=False))
    where = _where(samples)
    write_text(out_dir / "summary.md", f"# One MoE layer\n\n{where}\n\n{people_table(summary).to_markdown_text()}")
    write_kernels(out_dir, samples)
    many = len(samples.table[["shape", "workload"]].drop_duplicates()) > MOST_GROUPS
    with suite_style():
        if many:
            save(_speeds_figure(samples, summary, baseline, where), out_dir / SPEEDS)
        else:
            save(stages_figure(samples, summary, where), out_dir / STAGES_OF_SYSTEMS)
    return summary


def _speeds_figure(samples: Samples, summary: pd.DataFrame, baseline: str, where: str) -> Figure:
    table, kind = ratio_rows(summary, "step_time_ratio"), str(samples.metadata.get("kind", "measured"))
    of_baseline = table[table["system"] == baseline]
    return speedups_figure(
        table[table["system"] != baseline],
        str(of_baseline["label"].iloc[0]) if len(of_baseline) else baseline,
        kind,
        where,
        title="Layer",
        quantity="speed, ratio to",
        told="One forward and backward of a layer: ratios of medians over interleaved rounds with 95 % paired "
        "bootstrap intervals.",
    )


def ratio_rows(summary: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Rows for `speedups_figure`, a group for each shape.

    Args:
        summary: of `analysis.layer.write_layer`.
        metric: `step_time_ratio` or `communication_ratio`.
    """
    rows = []
    for (shape, workload, system, implementation), own in summary.groupby(
        ["shape", "workload", "system", "implementation"], sort=False
    ):
        found = own[own["metric"].isin([metric, "run"])]
        if not len(found):
            raise ResultsError(f"{system} under {shape} has neither a {metric} nor a reason. Fix: measure it again.")
        row = found.iloc[0]
        rows.append(
            {
                "group": f"{shape}\n{workload}",
                "system": system,
                "label": f"{system} ({implementation})",
                "ratio": row["value"],
                "low": row["low"],
                "high": row["high"],
                "status": row["status"],
            }
        )
    return pd.DataFrame(rows)


def refuse_bad_times(samples: Samples) -> None:
    """Raise `ResultsError` where a time is no number."""
    times = samples.table[samples.table["metric"].isin(["step_time", "stage_time", "floor_time"])]
    bad = times[~np.isfinite(times["value"])]
    if len(bad):
        cell = bad.iloc[0]
        raise ResultsError(
            f"{samples.path}: {cell['metric']} of {cell['system']} under {cell['shape']}, round {cell['round']}, is "
            f"{cell['value']}. Fix: measure again into an empty folder."
        )


def _where(samples: Samples) -> str:
    if load_run(samples.path, metrics=()).manifest.get("hardware"):
        return f"Measured on {machine_of(samples.path)}."
    emulation = samples.metadata.get("emulation")  # says what stands in for a real cluster
    return f"Measured on cluster {samples.metadata.get('cluster', 'unknown')}" + (
        f": {emulation}." if emulation else "."
    )


def _rows(samples: Samples, baseline: str) -> Iterator[dict[str, Any]]:
    table = samples.table
    for (shape, workload), cells in table.groupby(["shape", "workload"], sort=False):
        of_baseline = cells[cells["system"] == baseline]
        base, base_communication = _values(of_baseline, "step_time"), communication_s(of_baseline)
        for (system, implementation), own in cells.groupby(["system", "implementation"], sort=False):
            key = {"shape": shape, "workload": workload, "system": system, "implementation": implementation}
            yield from ({**key, **row, "status": "ok"} for row in _system_rows(own, base, base_communication))
    for problem in samples.problems.itertuples():
        status = f"{problem.status}: {problem.reason}"
        key = {"shape": problem.shape, "workload": problem.workload, "system": problem.system}
        yield {**key, "implementation": problem.implementation, "metric": "run", "unit": "", "status": status}


def _values(cells: pd.DataFrame, metric: str) -> np.ndarray:
    return cells[cells["metric"] == metric].sort_values("round")["value"].to_numpy()


def communication_s(cells: pd.DataFrame) -> np.ndarray:
    """[rounds] seconds of gate, dispatch and combine, forward and backward: all but the experts. With the gate, since
    in some systems it also sorts the rows that others sort in dispatch."""
    stages = [f"{direction}/{stage}" for direction in DIRECTIONS for stage in STAGES if stage != "experts"]
    found = cells[(cells["metric"] == "stage_time") & cells["part"].isin(stages)]
    return found.pivot(index="round", columns="part", values="value").sum(axis=1, skipna=False).to_numpy()


def _system_rows(own: pd.DataFrame, base: np.ndarray, base_communication: np.ndarray) -> Iterator[dict[str, Any]]:
    def row(metric: str, interval: Interval, unit: str) -> dict[str, Any]:
        return {"metric": metric, **interval._asdict(), "unit": unit}

    times = _values(own, "step_time")
    yield row("step_time", bootstrap_median(times), "s")
    if len(base):
        yield row("step_time_ratio", bootstrap_ratio(base, times), "1")
    floor = _values(own, "floor_time")
    if len(floor):
        yield row("floor_time", bootstrap_median(floor), "s")
        yield row("floor_ratio", bootstrap_ratio(floor, times), "1")
    yield row("tokens_per_s", bootstrap_median(_values(own, "tokens")[0] / times), "tokens/s")
    stage_times = own[own["metric"] == "stage_time"]
    communication = communication_s(own)
    yield row("communication_time", bootstrap_median(communication), "s")
    if len(base_communication):
        yield row("communication_ratio", bootstrap_ratio(base_communication, communication), "1")
    for part in (f"{direction}/{stage}" for direction in DIRECTIONS for stage in STAGES):
        yield row(f"stage_time/{part}", bootstrap_median(stage_times[stage_times["part"] == part]["value"]), "s")
    for metric in ("bytes", "relative_error", "peak_memory", "dropped_copies", "path"):
        for cell in own[own["metric"] == metric].itertuples():
            name = f"{metric}/{cell.part}" if cell.part else metric
            yield row(name, worst([cell.value]), cell.unit)


class PeopleTable:
    """The summary for people: one row a shape and system.

    Args:
        head: column titles.
        rows: texts.
    """

    def __init__(self, head: list[str], rows: list[list[str]]) -> None:
        self.head, self.rows = head, rows

    def to_markdown_text(self) -> str:
        """A Markdown table."""
        return "\n".join(map(markdown_row, [self.head, ["---"] * len(self.head), *self.rows])) + "\n"

    def to_plain_text(self) -> str:
        """An aligned table for a terminal."""
        widths = [max(len(line[i]) for line in [self.head, *self.rows]) for i in range(len(self.head))]
        lines = [self.head, ["-" * width for width in widths], *self.rows]
        return "\n".join(
            "  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def people_table(summary: pd.DataFrame) -> PeopleTable:
    """Median time, speed against the baseline, error, memory, bytes over the outermost level, stages."""
    levels = [name.split("/")[1] for name in summary["metric"] if name.startswith("bytes/")]
    outermost = next((level for level in reversed(levels) if level != "self"), "")
    head = ["shape", "system", "ms", "speed, ratio to baseline", "floor / time", "rel. error", "peak memory"]
    head += ["gate, dispatch, combine: ms", "their speed, ratio to baseline"]
    head += [f"sent over {outermost}"] * bool(outermost)
    head += [f"{direction} ms: {' / '.join(STAGES)}" for direction in DIRECTIONS]
    rows = []
    for (shape, system, implementation), own in summary.groupby(["shape", "system", "implementation"], sort=False):
        label = f"{system} ({implementation})"
        values = own.set_index("metric")["value"]
        if "run" in values.index:
            reason = shortened(reason_of(str(own.loc[own["metric"] == "run", "status"].iloc[0])), 60)
            rows.append([str(shape), label, reason, *[""] * (len(head) - 3)])
            continue
        errors = values[values.index.str.startswith("relative_error/")]
        sent = sum(values.get(f"bytes/{outermost}/{kind}", 0.0) for kind in BYTE_CLASSES)
        line = [str(shape), label, significant(values["step_time"] * 1e3, 3), _interval(own, "step_time_ratio")]
        line.append(_interval(own, "floor_ratio"))
        line += [significant(errors.max(), 2) if len(errors) else "-", binary_bytes(values["peak_memory"], 3)]
        line += [significant(values["communication_time"] * 1e3, 3), _interval(own, "communication_ratio")]
        line += [binary_bytes(sent, 3)] * bool(outermost)
        for direction in DIRECTIONS:
            line.append(" / ".join(significant(values[f"stage_time/{direction}/{s}"] * 1e3, 3) for s in STAGES))
        rows.append(line)
    return PeopleTable(head, rows)


def _interval(own: pd.DataFrame, metric: str) -> str:
    found = own[own["metric"] == metric]
    if not len(found):
        return "-"
    value, low, high = (significant(found[name].iloc[0], 3) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def format_table(summary: pd.DataFrame) -> str:
    """The table of `people_table`, for a terminal."""
    return people_table(summary).to_plain_text() + "\n"


def stages_figure(samples: Samples, summary: pd.DataFrame, where: str) -> Figure:
    """A panel per shape, a bar per system: forward stages, then backward ones hatched."""
    shapes = list(dict.fromkeys(summary["shape"]))
    systems = list(dict.fromkeys(zip(summary["system"], summary["implementation"], strict=True)))
    columns = min(2, len(shapes))
    num_rows = -(-len(shapes) // columns)
    figure, panels = new_figure(
        0.8 + num_rows * (0.6 + 0.22 * len(systems)),
        PAGE_INCHES if columns > 1 else COLUMN_INCHES,
        nrows=num_rows,
        ncols=columns,
        sharey=True,
    )
    for axes, shape in zip(panels, shapes, strict=False):
        own = summary[summary["shape"] == shape]
        for row, (system, _) in enumerate(systems):
            values = own[own["system"] == system].set_index("metric")["value"]
            left = 0.0
            for direction in DIRECTIONS:
                for stage in STAGES:
                    width = values.get(f"stage_time/{direction}/{stage}", 0.0) * 1e3
                    hatch = "////" if direction == "backward" else ""
                    colour = STAGE_COLOURS.get(stage, PALE)
                    axes.barh(
                        row, width, left=left, height=0.62, color=colour, edgecolor="white", hatch=hatch, linewidth=0.5
                    )
                    left += width
            if "run" in values.index:
                status = str(own[(own["system"] == system) & (own["metric"] == "run")]["status"].iloc[0])
                no_number(axes, row, status, 40)
        axes.set_xlim(left=0)
        axes.set_xlabel("time, ms")
        axes.tick_params(axis="y", length=0)
        panel(axes, shortened(str(shape), 24), str(samples.metadata.get("kind", "measured")))
    panels[0].set_yticks(range(len(systems)), [f"{system} ({kind})" for system, kind in systems])
    panels[0].set_ylim(len(systems) - 0.45, -0.55)
    for axes in panels[len(shapes) :]:
        axes.set_axis_off()
    handles = [Patch(facecolor=STAGE_COLOURS.get(stage, PALE), edgecolor="white") for stage in STAGES]
    handles += [Patch(facecolor=GREY, edgecolor="white", hatch=hatch, linewidth=0.5) for hatch in ("", "////")]
    legend(figure, handles, [*STAGES, *DIRECTIONS], 6 if columns > 1 else 3)
    workloads = " and ".join(dict.fromkeys(samples.table["workload"]))
    caption(
        figure,
        f"One forward and backward of a layer under {workloads} routing: medians over rounds of the slowest rank, "
        "stage by stage. Some gates also lay out slots: compare gate and dispatch together.",
        where,
    )
    return figure


@exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line, with its exit code."""
    parser = argparse.ArgumentParser(prog="python -m analysis.layer", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with samples.parquet, such as outputs/layer-...")
    parser.add_argument("--baseline", default="flat", help="system that ratios refer to")
    options = parser.parse_args(arguments)
    print(format_table(write_layer(options.folder, options.baseline)), end="")


if __name__ == "__main__":
    sys.exit(main())
