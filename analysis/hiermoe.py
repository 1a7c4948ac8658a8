"""HierMoE's figures: `python -m analysis.hiermoe outputs/hiermoe [--comm outputs/comm-...]` draws what
`experiments.hiermoe` wrote: table_ii, table_iv and figure_9 as PNG and PDF; it prints all tables.

Of a layer benchmark's folder it writes levels.{csv,png,pdf} instead: a dispatch over d levels, modelled and measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.errors import exit_code
from analysis.hiermoe_levels import format_levels, write_levels
from analysis.hiermoe_tables import (
    duplication_rows,
    format_tables,
    measured_lines,
    paper_lines,
    read_tables,
    speedup_rows,
)
from analysis.plots.hiermoe import collectives_figure, duplication_figure, speedup_figure
from analysis.style import save, suite_style


def write_figures(folder: Path, comm: Path | None = None, out_dir: Path | None = None) -> tuple[str, list[str]]:
    """Draw the tables of a folder.

    Args:
        folder: holds tables.csv.
        comm: folder of `experiments.comm` whose fitted collectives stand beside figure 9's; None: the paper's alone.
        out_dir: where to write; None for that folder.

    Returns:
        The tables as text, and the names of the figures.

    Raises:
        ResultsError: see `analysis.hiermoe_tables`.
    """
    table = read_tables(folder / "tables.csv")
    lines, where = measured_lines(comm) if comm is not None else ([], "")
    duplication, speedups, paper = duplication_rows(table), speedup_rows(table), paper_lines(table)
    out_dir, drawn = out_dir or folder, []
    with suite_style():
        if len(duplication):
            save(duplication_figure(duplication), out_dir / "table_ii")
            drawn.append("table_ii")
        if len(speedups):
            save(speedup_figure(speedups), out_dir / "table_iv")
            drawn.append("table_iv")
        if paper or lines:
            save(collectives_figure(paper, lines, where), out_dir / "figure_9")
            drawn.append("figure_9")
    return format_tables(table), drawn


@exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line, with its exit code."""
    parser = argparse.ArgumentParser(prog="python -m analysis.hiermoe", description=__doc__)
    parser.add_argument("folder", type=Path, help="with tables.csv, or of a layer benchmark, with samples.parquet")
    parser.add_argument("--comm", type=Path, help="folder of experiments.comm, for figure 9's lines of a cluster")
    given = parser.parse_args(arguments)
    if (given.folder / "samples.parquet").exists() and not (given.folder / "tables.csv").exists():
        if given.comm is not None:
            parser.error("--comm is for a folder with tables.csv, and this one is of a layer benchmark")
        print(format_levels(write_levels(given.folder)), end="")
        print(f"written: {given.folder}/levels.csv, levels.png and levels.pdf")
        return
    text, drawn = write_figures(given.folder, given.comm)
    print(text, end="")
    print(f"written: {', '.join(f'{given.folder}/{name}.png and .pdf' for name in drawn)}")


if __name__ == "__main__":
    sys.exit(main())
