"""The simulator's error: `python -m analysis.validation outputs/validation` draws and tabulates it.

Reads validation.csv of `experiments.validate`: step times of layers as measured, and as simulated with costs that were
fitted to other shapes. Writes validation.md and validation.{png,pdf}.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.errors import exit_code
from analysis.files import read_csv, write_text
from analysis.plots.validation import validation_figure
from analysis.style import save, suite_style
from analysis.tables import markdown_row, significant

COLUMNS = [
    *("run", "machine", "cluster", "system", "implementation", "shape"),
    *("measured_s", "measured_low_s", "measured_high_s", "simulated_s"),
]
"""Of validation.csv: the machine in words, as of `analysis.machine`; median over rounds and its quartiles, and the end
of the simulated timeline, in s."""


def read_validation(folder: Path) -> pd.DataFrame:
    """The rows with `relative_error`, (simulated - measured) / measured.

    Raises:
        ResultsError: no such file, a column that lacks, or no rows.
    """
    fix = "Fix: write it with `python -m experiments.validate`."
    rows = read_csv(folder / "validation.csv", COLUMNS, fix, keep_default_na=False)
    return rows.assign(relative_error=rows["simulated_s"] / rows["measured_s"] - 1)


def mean_absolute_error(rows: pd.DataFrame) -> float:
    """Mean over pairs of a system and a shape of |simulated - measured| / measured."""
    return float(rows["relative_error"].abs().mean())


def ordered_share(rows: pd.DataFrame) -> float:
    """Of all two systems on one shape whose measured quartiles do not overlap, how many the simulator puts in the
    measured order; 1 where there are no such two."""
    right = total = 0
    for _, own in rows.groupby(["run", "shape"], sort=False):
        for a, b in itertools.combinations(own.to_dict("records"), 2):
            if a["measured_low_s"] > b["measured_low_s"]:
                a, b = b, a
            if a["measured_high_s"] < b["measured_low_s"]:
                total += 1
                right += a["simulated_s"] < b["simulated_s"]
    return right / total if total else 1.0


def write_validation(folder: Path) -> pd.DataFrame:
    """Write validation.md and the figure beside validation.csv; its rows."""
    rows = read_validation(folder)
    table = [
        markdown_row(["cluster", "shape", "system", "measured, ms", "simulated, ms", "simulated / measured - 1"]),
        markdown_row(["---"] * 6),
    ]
    for row in rows.itertuples():
        measured, simulated = significant(1e3 * row.measured_s), significant(1e3 * row.simulated_s)
        system = f"{row.system} ({row.implementation})"
        table.append(markdown_row([row.cluster, row.shape, system, measured, simulated, percent(row.relative_error)]))
    write_text(folder / "validation.md", "\n".join([*table, "", *told(rows), ""]))
    with suite_style():
        save(validation_figure(rows, mean_absolute_error(rows)), folder / "validation")
    return rows


def percent(share: float) -> str:
    """A signed share, such as `+4.9 %`."""
    return f"{100 * share:+.1f} %"


def told(rows: pd.DataFrame) -> list[str]:
    """What a reader wants to know of all pairs, in sentences."""
    worst = rows.loc[rows["relative_error"].abs().idxmax()]
    lines = [
        f"{len(rows)} pairs of a system and a shape: mean absolute relative error "
        f"{100 * mean_absolute_error(rows):.1f} %, worst {percent(worst['relative_error'])} ({worst['system']}, "
        f"{worst['shape']}).",
        f"Systems in the measured order, where their quartiles tell them apart: {100 * ordered_share(rows):.1f} %.",
    ]
    for system, own in rows.groupby("system", sort=False):
        lines.append(f"{system}: {100 * mean_absolute_error(own):.1f} % over {len(own)} shapes.")
    return lines


def format_validation(rows: pd.DataFrame) -> str:
    """For a terminal."""
    lines = [
        f"{row.shape:16} {row.system:24} measured {1e3 * row.measured_s:9.3f} ms  simulated "
        f"{1e3 * row.simulated_s:9.3f} ms  {percent(row.relative_error):>9}"
        for row in rows.itertuples()
    ]
    return "\n".join([*lines, *told(rows), ""])


@exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line, with its exit code."""
    parser = argparse.ArgumentParser(prog="python -m analysis.validation", description=__doc__)
    parser.add_argument("folder", type=Path, help="that holds validation.csv")
    given = parser.parse_args(arguments)
    print(format_validation(write_validation(given.folder)), end="")


if __name__ == "__main__":
    sys.exit(main())
