"""What replicas that follow popularity change: `python -m analysis.swiftmoe outputs/compare`.

Reads a comparison that `experiments.compare` left and writes into its folder: replicas (popularity of single experts
and their shares of the slots), survival (copies that are not dropped), target (loss against steps and time, and when it
reaches the target) and latency (parts of a step) as PNG and PDF, and swiftmoe.csv. The target loss is the one that the
runs state, `trainer.target_loss`. What SwiftMoE's paper says beside it: `python -m analysis.claims`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from analysis.compare import read_index
from analysis.comparison import Comparison, compare
from analysis.errors import ResultsError, exit_code
from analysis.files import write_text
from analysis.plots.latency import latency_figure
from analysis.plots.replicas import replicas_figure
from analysis.plots.survival import survival_figure
from analysis.plots.target import target_figure
from analysis.style import save, suite_style
from analysis.swiftmoe_latency import breakdown
from analysis.swiftmoe_numbers import findings_of
from analysis.swiftmoe_table import format_swiftmoe, swiftmoe_table

FIGURES = ("replicas", "survival", "target", "latency")
BASELINES = ("deepspeed_static", "deepspeed")
"""The first of these in the comparison is what ratios are to: experts and capacities that stay."""


@dataclass(frozen=True, eq=False)
class SwiftMoEReport:
    """What `write_swiftmoe` found.

    Attributes:
        table: the rows of swiftmoe.csv (see `analysis.swiftmoe_table.COLUMNS`).
        text: the same for a terminal.
        notes: sentences on what is missing.
    """

    table: pd.DataFrame
    text: str
    notes: list[str]


def write_swiftmoe(
    folder: Path,
    baseline: str | None = None,
    window: int | None = None,
    out_dir: Path | None = None,
) -> SwiftMoEReport:
    """Write the figures and swiftmoe.csv of a comparison.

    Args:
        folder: holds compare.json.
        baseline: the system that ratios refer to; None for the first of BASELINES that is there, or without one for
            that of compare.json.
        window: logged steps that a smoothed loss is the mean of, at least 1; None for `analysis.target_loss.window_of`.
        out_dir: where to write; None for that folder.

    Raises:
        ResultsError: no comparison there, runs that can't be compared, a target loss that was taken from these runs, or
            a write that failed.
    """
    out_dir, comparison = out_dir or folder, comparison_of(folder, baseline)
    found = findings_of(comparison, window)
    table = swiftmoe_table(comparison, found)
    with suite_style():
        figures = {
            "replicas": replicas_figure(comparison, found.popularities),
            "survival": survival_figure(comparison, found.drops.survival),
            "target": target_figure(comparison, found.curves, found.target, found.window),
            "latency": latency_figure(comparison, breakdown(comparison), found.numbers["moving_ratio"]),
        }
        write_text(out_dir / "swiftmoe.csv", table.to_csv(index=False))
        for name in FIGURES:
            save(figures[name], out_dir / name)
    text = format_swiftmoe(table, comparison, found.target, found.window)
    return SwiftMoEReport(table, text, found.notes + comparison.notes)


def comparison_of(folder: Path, baseline: str | None = None) -> Comparison:
    """The comparison in a folder, with its baseline.

    Args:
        folder: holds compare.json.
        baseline: as in `write_swiftmoe`.

    Raises:
        ResultsError: no comparison there, or runs that can't be compared.
    """
    run_dirs, samples_dir, indexed = read_index(folder)
    comparison = compare(run_dirs, samples_dir, baseline or indexed)
    if baseline is not None:
        return comparison
    first = next((system for system in BASELINES if system in comparison.systems), comparison.baseline)
    return dataclasses.replace(comparison, baseline=first)


def _window(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ResultsError(f"--window {text}: must be a number of logged steps, 1 or more. Fix: --window 20.")
    return int(text)


@exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line, with its exit code."""
    parser = argparse.ArgumentParser(prog="python -m analysis.swiftmoe", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with compare.json, such as outputs/compare")
    parser.add_argument("--baseline", help=f"system that ratios refer to (default: {' or '.join(BASELINES)}, if there)")
    parser.add_argument(
        "--window", help="logged steps that a loss is the mean of (default: a twentieth of a run's, 20 at least)"
    )
    given = parser.parse_args(arguments)
    window = _window(given.window)
    report = write_swiftmoe(given.folder, given.baseline, window)
    print(report.text, end="")
    for note in report.notes:
        print(note)
    print(f"\nwritten: {given.folder}/swiftmoe.csv and {', '.join(FIGURES)} as PNG and PDF")


if __name__ == "__main__":
    sys.exit(main())
