"""How the time of a layer grows with its sizes: `python -m analysis.growth outputs/layer-...` draws and tabulates it.

Reads a layer benchmark whose shapes vary one size at a time from a base, such as `experiments.layer
experiment=native_layer_growth`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.errors import ResultsError, exit_code
from analysis.files import write_text
from analysis.load import Samples, load_samples
from analysis.machine import machine_of
from analysis.plots.growth import growth_figure
from analysis.statistics import bootstrap_median, bootstrap_ratio
from analysis.style import save, suite_style
from analysis.tables import significant

AXES = ("tokens_per_rank", "num_experts", "top_k")
"""Sizes that a figure has a panel for, as the result file names them."""

WORK = ("tokens_per_rank", "top_k", "model_dim", "hidden_dim")
"""The experts' multiplications are in proportion to the product of these, however many experts share them."""

STEP = 1.25
"""Time per unit of work over that of the point before: what grows by more has to be explained."""

COLUMNS = [
    *("axis", "value", "shape", "workload", "system", "time_s", "time_low_s", "time_high_s"),
    *("floor_s", "floor_low_s", "floor_high_s", "time_over_floor", "over_floor_low", "over_floor_high"),
    *("time_ratio", "work_ratio", "step", "status"),
]

Sizes = Mapping[str, Mapping[str, Any]]
"""Of every shape by name: tokens_per_rank, model_dim, hidden_dim, num_experts, top_k, activation."""


def write_growth(folder: Path, out_dir: Path | None = None) -> pd.DataFrame:
    """Write growth.csv and growth.{png,pdf} of a layer benchmark.

    Args:
        folder: holds samples.parquet, and manifest.json for the caption; a published one does.
        out_dir: where to write; None for that folder.

    Returns:
        The rows of growth.csv: per axis, system and point the median time of one forward and backward and of the floor
        (the experts' products and four bare all-to-alls), in s, the one over the other, the time and the work over
        those of the point before that has a time, `step` (see `STEP`), and a status: `ok` or why there is no time.

    Raises:
        ResultsError: no samples, no sizes of the shapes in them, or no two shapes that differ in one size only.
    """
    samples = load_samples(folder)
    if samples.status != "done":
        raise ResultsError(f"{folder}: {samples.reason}. Fix: run `python -m experiments.layer` first.")
    sizes = samples.metadata.get("shapes")
    if not isinstance(sizes, dict):
        raise ResultsError(f"{folder}/samples.parquet: its footer has no shapes (an older run). Fix: measure again.")
    series = series_of(sizes)
    if not series:
        raise ResultsError(
            f"{folder}: no two of its shapes differ in {', '.join(AXES)} alone. "
            "Fix: measure `python -m experiments.layer experiment=native_layer_growth`."
        )
    growth = pd.DataFrame(list(_rows(samples, sizes, series)), columns=COLUMNS)
    out_dir = out_dir or folder
    write_text(out_dir / "growth.csv", growth.to_csv(index=False))
    kind = str(samples.metadata.get("kind", "measured"))
    with suite_style():
        save(growth_figure(growth, _labels(samples), kind, STEP, f"On {machine_of(folder)}."), out_dir / "growth")
    return growth


def _labels(samples: Samples) -> dict[str, str]:
    """Legend text of every system, such as `flat (native)`."""
    both = samples.table[["system", "implementation"]].drop_duplicates()
    return {system: f"{system} ({implementation})" for system, implementation in both.itertuples(index=False)}


def series_of(sizes: Sizes) -> dict[str, list[str]]:
    """For each axis the shapes that differ in it alone from one base, by size; without axes of a single point.

    The base is the shape that makes the series longest together, the first of those.
    """
    found: list[dict[str, list[str]]] = []
    for base in sizes.values():
        series = {}
        for axis in AXES:
            alike = [name for name, own in sizes.items() if {**own, axis: None} == {**base, axis: None}]
            points = {sizes[name][axis]: name for name in reversed(alike)}
            if len(points) > 1:
                series[axis] = [points[value] for value in sorted(points)]
        found.append(series)
    return max(found, key=lambda series: sum(map(len, series.values())), default={})


def _rows(samples: Samples, sizes: Sizes, series: Mapping[str, Sequence[str]]) -> Iterator[dict[str, Any]]:
    labels = pd.concat([samples.table, samples.problems])[["system", "workload"]].drop_duplicates()
    for axis, shapes in series.items():
        for system, workload in labels.itertuples(index=False):
            before: tuple[float, float] | None = None
            for shape in shapes:
                key = {"axis": axis, "value": sizes[shape][axis], "shape": shape, "workload": workload}
                row = {**key, "system": system, "step": False, **_times(samples, shape, workload, system)}
                if row["status"] == "ok":
                    now = row["time_s"], math.prod(sizes[shape][size] for size in WORK)
                    if before is not None:
                        ratios = [own / other for own, other in zip(now, before, strict=True)]
                        row |= {"time_ratio": ratios[0], "work_ratio": ratios[1], "step": ratios[0] / ratios[1] > STEP}
                    before = now
                yield row


def _times(samples: Samples, shape: str, workload: str, system: str) -> dict[str, Any]:
    """Time, floor and their ratio of one cell, or its status."""
    key = {"shape": shape, "workload": workload, "system": system}
    own = samples.table[(samples.table[list(key)] == pd.Series(key)).all(axis=1)].sort_values("round")
    times = own[own["metric"] == "step_time"]["value"]
    if not len(times):
        told = samples.problems[(samples.problems[list(key)] == pd.Series(key)).all(axis=1)]
        reasons = [f"{problem.status}: {problem.reason}" for problem in told.itertuples()]
        return {"status": "; ".join(reasons) or "missing: there is no time of it"}
    floor = own[own["metric"] == "floor_time"]["value"]
    found: dict[str, Any] = dict(zip(COLUMNS[5:8], bootstrap_median(times), strict=True))
    if len(floor):
        found |= zip(COLUMNS[8:11], bootstrap_median(floor), strict=True)
        found |= zip(COLUMNS[11:14], bootstrap_ratio(times, floor), strict=True)
    return {**found, "status": "ok"}


def format_growth(growth: pd.DataFrame) -> str:
    """One line a point for a terminal, with the points that have to be explained marked."""
    lines = []
    for row in growth.itertuples():
        head = f"{row.system}, {row.axis} {row.value}: "
        if row.status != "ok":
            lines.append(head + str(row.status))
            continue
        line = f"{significant(row.time_s * 1e3, 3)} ms, {significant(row.time_over_floor, 3)} times the floor"
        if math.isfinite(row.time_ratio):
            line += f", {significant(row.time_ratio, 3)} times the point before for {row.work_ratio:g} times the work"
        lines.append(head + line + ("  <- step" if row.step else ""))
    return "\n".join(lines) + "\n"


@exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line, with its exit code."""
    parser = argparse.ArgumentParser(prog="python -m analysis.growth", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with samples.parquet, such as outputs/layer-...")
    folder = parser.parse_args(arguments).folder
    print(format_growth(write_growth(folder)), end="")
    print(f"written: {folder}/growth.csv, growth.png and growth.pdf")


if __name__ == "__main__":
    sys.exit(main())
