"""A roofline from a table: `python -m analysis.roofline roofline.csv` draws roofline.png and roofline.pdf beside it.

The table holds points and curves (`analysis.plots.roofline.COLUMNS`); FasterMoE's predictor makes one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.errors import ResultsError, exit_code
from analysis.files import read_csv
from analysis.plots.roofline import COLUMNS, roofline_figure
from analysis.style import save, suite_style


def write_roofline(
    table_path: Path, where: str = "", out_dir: Path | None = None, labels: Mapping[str, str] | None = None
) -> None:
    """Draw the table as files of its name with .png and .pdf.

    Args:
        table_path: a CSV with the columns of `roofline_figure`.
        where: sentence on the hardware, for the caption.
        out_dir: where to write; None for the table's folder.
        labels: legend text of the systems, such as `flat (native)`; None: their names.

    Raises:
        ResultsError: no such file, a missing column, or a row that can't be drawn.
    """
    table = read_roofline(table_path)
    with suite_style():
        save(roofline_figure(table, where, labels), (out_dir or table_path.parent) / table_path.stem)


def read_roofline(table_path: Path) -> pd.DataFrame:
    """The table, checked.

    Raises:
        ResultsError: see `write_roofline`.
    """
    table = read_csv(table_path, COLUMNS, f"Fix: name the table of a roofline, with {', '.join(COLUMNS)}.")
    allowed = {"what": ("curve", "point"), "kind": ("measured", "modelled")}
    for column, values in allowed.items():
        wrong = table[~table[column].isin(values)]
        if len(wrong):
            found = f"{column}={wrong[column].iloc[0]} in row {wrong.index[0]}"
            raise ResultsError(f"{table_path}: {found}. Fix: use {' or '.join(values)}.")
    for column in ("ratio", "flops_per_s"):
        numbers = pd.to_numeric(table[column], errors="coerce")
        wrong = table[~(np.isfinite(numbers) & (numbers > 0))]
        if len(wrong):
            raise ResultsError(
                f"{table_path}: {column}={wrong[column].iloc[0]} in row {wrong.index[0]} has no place on a logarithmic "
                "axis. Fix: leave the row out."
            )
    return table


@exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line, with its exit code."""
    parser = argparse.ArgumentParser(prog="python -m analysis.roofline", description=__doc__)
    parser.add_argument("table", type=Path, help="CSV of points and curves")
    parser.add_argument("--where", default="", help="sentence on the hardware, for the caption")
    given = parser.parse_args(arguments)
    write_roofline(given.table, given.where)
    print(f"written: {given.table.with_suffix('.png')} and {given.table.with_suffix('.pdf')}")


if __name__ == "__main__":
    sys.exit(main())
