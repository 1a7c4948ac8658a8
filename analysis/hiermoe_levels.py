"""HierMoE's model against the clock: a dispatch over d levels, modelled and measured, of one layer benchmark."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.errors import ResultsError
from analysis.files import write_text
from analysis.layer import PeopleTable
from analysis.load import load_run, load_samples
from analysis.machine import machine_of
from analysis.plots.hiermoe import levels_figure
from analysis.statistics import bootstrap_median
from analysis.style import save, suite_style
from analysis.tables import significant

SYSTEM, MODELLED, STAGE = "hiermoe", "modelled_dispatch", "forward/dispatch"
COLUMNS = [
    *("shape", "workload", "system", "levels", "modelled_s", "measured_s", "low_s", "high_s", "error"),
    *("modelled_best", "measured_best"),
]
_LABEL = re.compile(r"HD?(\d+)\b")


def write_levels(folder: Path, out_dir: Path | None = None) -> pd.DataFrame:
    """Write levels.csv and levels.{png,pdf} of a layer benchmark.

    Args:
        folder: holds samples.parquet, whose systems tell the modelled seconds of a dispatch (`modelled_dispatch`, of
            which `part` is the number of levels); config.yaml says over how many a system went, where there is none a
            label such as HD2, else the least modelled time.
        out_dir: where to write; None for that folder.

    Returns:
        The rows of levels.csv, by shape and system: modelled and measured seconds of a dispatch, the latter's 95 %
        interval, `error` (modelled over measured, less 1), and whether either is the least of its shape.

    Raises:
        ResultsError: no samples, or none with a model.
    """
    samples = load_samples(folder)
    if samples.status != "done":
        raise ResultsError(f"{folder}: {samples.reason}. Fix: run `python -m experiments.layer` first.")
    told = _configured(folder)
    table = pd.DataFrame(list(_rows(samples.table, told)), columns=COLUMNS[:-2])
    if table.empty:
        raise ResultsError(
            f"{folder}: none of its systems tells {MODELLED}. Fix: measure hiermoe on a cluster with costs, such as "
            "`systems=[{name: hiermoe, label: HD1, levels: 1}, {name: hiermoe, label: HD2, levels: 2}]`."
        )
    groups = table.groupby(["shape", "workload"], sort=False)
    for name in ("modelled", "measured"):
        table[f"{name}_best"] = table[f"{name}_s"] == groups[f"{name}_s"].transform("min")
    out_dir = out_dir or folder
    write_text(out_dir / "levels.csv", table.to_csv(index=False))
    with suite_style():
        save(levels_figure(table, f"On {machine_of(folder)}."), out_dir / "levels")
    return table


def _configured(folder: Path) -> dict[str, Any] | None:
    """`levels` of every HierMoE by its label, as config.yaml says; None without one."""
    systems = load_run(folder, metrics=[]).config.get("systems")
    if not isinstance(systems, list):
        return None
    listed = [system for system in systems if isinstance(system, dict) and system.get("name") == SYSTEM]
    return {str(system.get("label") or SYSTEM): system.get("levels") for system in listed}


def _rows(samples: pd.DataFrame, told: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    for (shape, workload, system), own in samples.groupby(["shape", "workload", "system"], sort=False):
        if told is not None and system not in told:
            continue  # other systems may have models, but not of levels
        modelled = own[own["metric"] == MODELLED].groupby("part")["value"].median()
        times = own[(own["metric"] == "stage_time") & (own["part"] == STAGE)]["value"]
        by_levels = {int(part): float(seconds) for part, seconds in modelled.items() if str(part).isdigit()}
        if not by_levels or not len(times):
            continue
        levels = _levels(str(system), (told or {}).get(str(system), "auto" if told else None), by_levels)
        if levels not in by_levels:
            continue
        measured = bootstrap_median(times)
        yield {
            "shape": shape,
            "workload": workload,
            "system": system,
            "levels": levels,
            "modelled_s": by_levels[levels],
            "measured_s": measured.value,
            "low_s": measured.low,
            "high_s": measured.high,
            "error": by_levels[levels] / measured.value - 1,
        }


def _levels(system: str, configured: Any, modelled_s: dict[int, float]) -> int:
    """Over how many levels a system dispatched."""
    if isinstance(configured, int):
        return configured
    if configured == "all":
        return max(modelled_s)
    if len(modelled_s) == 1:
        return next(iter(modelled_s))
    named = _LABEL.fullmatch(system)
    if configured is None and named:
        return int(named[1])
    return min(modelled_s, key=lambda levels: (modelled_s[levels], levels))  # left to the model


def format_levels(table: pd.DataFrame) -> str:
    """The table for a terminal."""
    head = ["shape", "workload", "system", "levels", "modelled ms", "measured ms", "error", "least"]
    rows = []
    for row in table.itertuples():
        measured, low, high = (significant(1e3 * float(x), 3) for x in (row.measured_s, row.low_s, row.high_s))
        least = " and ".join(name for name in ("modelled", "measured") if getattr(row, f"{name}_best"))
        line = [row.shape, row.workload, row.system, str(row.levels), significant(1e3 * float(row.modelled_s), 3)]
        rows.append([*map(str, line), f"{measured} [{low}, {high}]", f"{100 * float(row.error):+.0f} %", least])
    return PeopleTable(head, rows).to_plain_text() + "\n"
