"""Tables and figures of one comparison. `python -m analysis.compare DIR` makes them again from DIR/compare.json."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.comparison import compare
from analysis.errors import ResultsError, exit_code
from analysis.files import write_text
from analysis.plots.bytes import bytes_figure
from analysis.plots.loss import loss_figure
from analysis.plots.rows import where
from analysis.plots.stages import stages_figure
from analysis.plots.throughput import throughput_figure
from analysis.style import save, suite_style
from analysis.summary import summarise
from analysis.tables import format_table, to_markdown

INDEX = "compare.json"
FIGURES = {
    "loss": "Loss against step, and the difference to the reference",
    "throughput": "Tokens per second as a ratio to the baseline",
    "bytes": "Bytes that cross each cluster level in a step",
    "stages": "Stage times of one timed step",
}

__all__ = ["FIGURES", "INDEX", "format_table", "main", "read_index", "regenerate", "write"]


def write(out_dir: Path, run_dirs: list[Path], samples_dir: Path | None, baseline: str = "flat") -> pd.DataFrame:
    """Write summary.csv, summary.md, {loss,throughput,bytes,stages}.{png,pdf} and compare.json into `out_dir`.

    Args:
        out_dir: made when absent, such as outputs/compare.
        run_dirs: one folder per system and seed; list failed, refused and absent runs too, they become rows.
        samples_dir: folder with the interleaved samples.parquet; None when nothing was timed.
        baseline: the system that ratios refer to.

    Returns:
        The rows of summary.csv (see `analysis.summary.summarise`).

    Raises:
        ResultsError: cells that can't be compared (see `analysis.comparison.compare`), or a write that failed.
    """
    comparison = compare(run_dirs, samples_dir, baseline)
    summary = summarise(comparison)
    write_text(out_dir / INDEX, _index(out_dir, run_dirs, samples_dir, baseline))
    write_text(out_dir / "summary.csv", summary.to_csv(index=False))
    place = where(comparison).removeprefix("On ").replace("Cluster", "cluster", 1) or "a cluster that no file names."
    source = f"{comparison.kind.capitalize()} on {place}"
    write_text(out_dir / "summary.md", to_markdown(summary, source, comparison.notes, FIGURES))
    with suite_style():
        save(loss_figure(comparison), out_dir / "loss")
        save(throughput_figure(comparison, summary), out_dir / "throughput")
        save(bytes_figure(comparison, summary), out_dir / "bytes")
        save(stages_figure(comparison, summary), out_dir / "stages")
    return summary


def regenerate(folder: Path) -> pd.DataFrame:
    """Write tables and figures of `folder` again, from the runs and samples that its compare.json lists.

    Raises:
        ResultsError: as `read_index` and `write`.
    """
    return write(folder, *read_index(folder))


def read_index(folder: Path) -> tuple[list[Path], Path | None, str]:
    """(run folders, folder of the samples, baseline) of the comparison in `folder`, as its compare.json lists them.

    Raises:
        ResultsError: no compare.json, or one that can't be read.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        runs = [folder / name for name in index["runs"]]
        samples = None if index["samples"] is None else folder / index["samples"]
        return runs, samples, str(index["baseline"])
    except FileNotFoundError as error:
        raise ResultsError(f"{path}: there is no such file. Fix: run `python -m experiments.compare` first.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultsError(
            f"{path}: must be a JSON object with runs (list of folders), samples (folder) and baseline (name); "
            f"{type(error).__name__}: {error}. Fix: run `python -m experiments.compare` again."
        ) from error


def _index(out_dir: Path, run_dirs: Sequence[Path], samples_dir: Path | None, baseline: str) -> str:
    """compare.json: folders relative to itself, so that the outputs can be moved as a whole."""
    start = out_dir.resolve()
    index = {
        "runs": [os.path.relpath(Path(path).resolve(), start) for path in run_dirs],
        "samples": None if samples_dir is None else os.path.relpath(Path(samples_dir).resolve(), start),
        "baseline": baseline,
    }
    return json.dumps(index, indent=2) + "\n"


@exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line, with its exit code."""
    parser = argparse.ArgumentParser(prog="python -m analysis.compare", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with compare.json, such as outputs/compare")
    folder = parser.parse_args(arguments).folder
    print(format_table(regenerate(folder)), end="")
    print(f"\nwritten: {folder}/summary.csv, summary.md and {', '.join(FIGURES)} as PNG and PDF")


if __name__ == "__main__":
    sys.exit(main())
