"""Where tokens go on a cluster and what that costs: `python -m analysis.topology outputs/compare [--baseline flat]`.

Reads a comparison that `experiments.compare` left and writes into its folder: dispatch (heat maps of ranks), locality
(share of copies inside a node), loss_time (validation loss against steps and time), communication (beside computation)
as PNG and PDF, and model.csv (the cost model beside the measurement).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from analysis.compare import read_index
from analysis.comparison import Comparison, compare
from analysis.errors import ResultsError, exit_code
from analysis.files import write_text
from analysis.plots.communication import communication_figure
from analysis.plots.dispatch import dispatch_figure
from analysis.plots.locality import locality_figure
from analysis.plots.loss_time import loss_time_figure
from analysis.routing import load_routing
from analysis.style import save, suite_style
from analysis.topology_table import Routings, format_model, model_table

FIGURES = ("dispatch", "locality", "loss_time", "communication")


@dataclass(frozen=True, eq=False)
class TopologyReport:
    """What `write_topology` found.

    Attributes:
        table: the rows of model.csv (see `analysis.topology_table.COLUMNS`).
        text: the same for a terminal.
        notes: sentences on what is missing.
    """

    table: pd.DataFrame
    text: str
    notes: list[str]


def write_topology(folder: Path, baseline: str | None = None, out_dir: Path | None = None) -> TopologyReport:
    """Write the figures and model.csv of a comparison.

    Args:
        folder: holds compare.json.
        baseline: the system that ratios refer to; None for that of compare.json.
        out_dir: where to write; None for that folder.

    Raises:
        ResultsError: no comparison there, runs that can't be compared, or a write that failed.
    """
    out_dir = out_dir or folder
    run_dirs, samples_dir, indexed = read_index(folder)
    comparison = compare(run_dirs, samples_dir, baseline or indexed)
    routings, notes = load_routings(comparison)
    table = model_table(comparison, routings)
    write_text(out_dir / "model.csv", table.to_csv(index=False))
    with suite_style():
        save(dispatch_figure(comparison, routings), out_dir / "dispatch")
        save(locality_figure(comparison, routings), out_dir / "locality")
        save(loss_time_figure(comparison), out_dir / "loss_time")
        save(communication_figure(comparison), out_dir / "communication")
    return TopologyReport(table, format_model(table, comparison, told_steps(routings)), notes + comparison.notes)


def load_routings(comparison: Comparison) -> tuple[Routings, list[str]]:
    """(counts of every usable run that has some, sentences on those that have none)."""
    routings: Routings = {}
    notes = []
    for run in comparison.runs:
        try:
            routings[run.system, run.seed] = load_routing(run)
        except ResultsError as error:
            notes.append(str(error))
        else:
            notes += [flaw] if (flaw := routings[run.system, run.seed].flaw) else []
    return routings, notes


def told_steps(routings: Routings) -> str:
    """The steps that stand for the learned routing, in words."""
    spans = sorted({routing.last_steps for routing in routings.values()})
    if not spans:
        return "no step"
    return "the last tenth of the logged steps (" + ", ".join(f"{first} to {last}" for first, last in spans) + ")"


@exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line, with its exit code."""
    parser = argparse.ArgumentParser(prog="python -m analysis.topology", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with compare.json, such as outputs/compare")
    parser.add_argument("--baseline", help="system that ratios refer to; else that of the comparison")
    given = parser.parse_args(arguments)
    report = write_topology(given.folder, given.baseline)
    print(report.text, end="")
    for note in report.notes:
        print(note)
    print(f"\nwritten: {given.folder}/model.csv and {', '.join(FIGURES)} as PNG and PDF")


if __name__ == "__main__":
    sys.exit(main())
