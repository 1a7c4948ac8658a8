"""What replicas that follow popularity change: `python -m analysis.swiftmoe outputs/compare [--target-loss 4.0]`.

Reads a comparison that `experiments.compare` left and writes into its folder: replicas (popularity of one expert and
its share of the slots), survival (copies that are not dropped) and target (loss against steps and time, and when it
reaches the target) as PNG and PDF, and swiftmoe.csv.
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
from analysis.plots.replicas import replicas_figure
from analysis.plots.survival import survival_figure
from analysis.plots.target import target_figure
from analysis.popularity import load_popularities
from analysis.style import save, suite_style
from analysis.swiftmoe_table import drops_of, format_swiftmoe, swiftmoe_table
from analysis.target_loss import WINDOW, smoothed_losses, target_of

FIGURES = ("replicas", "survival", "target")
BASELINE = "deepspeed"
"""Where it is part of the comparison, ratios are to it: experts and capacities that stay. In these runs its experts
have no replicas, where SYMI's DeepSpeed has four of each."""


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
    target_loss: float | None = None,
    expert: int | None = None,
    window: int = WINDOW,
) -> SwiftMoEReport:
    """Write the figures and swiftmoe.csv into the folder of a comparison.

    Args:
        folder: holds compare.json.
        baseline: the system that ratios refer to; None for deepspeed, or without it for that of compare.json.
        target_loss: nats per token; None for what the baseline has after two thirds of its steps.
        expert: whose popularity is drawn; None for the most variable one of each run.
        window: logged steps that a smoothed loss is the mean of, at least 1.

    Raises:
        ResultsError: no comparison there, runs that can't be compared, no such expert, or a write that failed.
    """
    comparison = comparison_of(folder, baseline)
    popularities, notes = load_popularities(comparison)
    drops = drops_of(comparison, popularities)
    curves = smoothed_losses(comparison, window)
    target = target_of(comparison, curves, target_loss)
    table = swiftmoe_table(comparison, drops, curves, target)
    with suite_style():
        replicas = replicas_figure(comparison, popularities, expert)
        survival = survival_figure(comparison, drops.survival)
        reached = target_figure(comparison, curves, target, window)
        write_text(folder / "swiftmoe.csv", table.to_csv(index=False))
        for name, figure in zip(FIGURES, (replicas, survival, reached), strict=True):
            save(figure, folder / name)
    return SwiftMoEReport(table, format_swiftmoe(table, comparison, target, window), notes + comparison.notes)


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
    if baseline is None and BASELINE in comparison.systems:
        return dataclasses.replace(comparison, baseline=BASELINE)
    return comparison


def _window(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ResultsError(f"--window {text}: must be a number of logged steps, 1 or more. Fix: --window {WINDOW}.")
    return int(text)


@exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line, with its exit code."""
    parser = argparse.ArgumentParser(prog="python -m analysis.swiftmoe", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with compare.json, such as outputs/compare")
    parser.add_argument("--baseline", help=f"system that ratios refer to (default: {BASELINE}, if it is there)")
    parser.add_argument("--target-loss", type=float, help="nats per token (default: the baseline's at 2/3 of its run)")
    parser.add_argument("--expert", type=int, help="whose popularity is drawn (default: the most variable one's)")
    parser.add_argument("--window", default=str(WINDOW), help=f"logged steps that a loss is the mean of ({WINDOW})")
    given = parser.parse_args(arguments)
    window = _window(given.window)
    report = write_swiftmoe(given.folder, given.baseline, given.target_loss, given.expert, window)
    print(report.text, end="")
    for note in report.notes:
        print(note)
    print(f"\nwritten: {given.folder}/swiftmoe.csv and {', '.join(FIGURES)} as PNG and PDF")


if __name__ == "__main__":
    sys.exit(main())
