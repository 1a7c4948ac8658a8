"""Throughput over numbers of experts and gates: `python -m analysis.speedups FOLDER... [--baseline deepspeed]`.

Every folder is a comparison that `experiments.compare` left, each with another number of experts or another top-k.
Writes speedups.csv and speedups.{png,pdf}.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.compare import read_index
from analysis.comparison import Comparison, compare
from analysis.errors import ResultsError, exit_code
from analysis.files import write_text
from analysis.load import load_run
from analysis.plots.rows import where
from analysis.plots.speedups import speedups_figure
from analysis.style import save, suite_style
from analysis.summary import summarise
from analysis.tables import NOTHING, aligned, significant

COLUMNS = ["num_experts", "top_k", "gate", "system", "implementation", "ratio", "low", "high", "status", "folder"]
GATES = {1: "Switch", 2: "GShard"}
"""What the field calls a gate by its choices; here it is this suite's gate, or the system's own, with so many."""


def write_speedups(folders: Sequence[Path], baseline: str = "deepspeed", out_dir: Path | None = None) -> pd.DataFrame:
    """Write speedups.csv and speedups.{png,pdf}.

    Args:
        folders: of comparisons, one for each number of experts and top-k.
        baseline: the system that ratios refer to; part of every comparison.
        out_dir: where to write; None for the first folder.

    Returns:
        Rows of speedups.csv, by top_k and num_experts: tokens per second over the baseline's, a ratio of medians with
        its 95 % paired bootstrap interval; NaN where `status` says why. The baseline has a row, too.

    Raises:
        ResultsError: no comparison in a folder, one without the baseline, two of one size, or of different clusters.
    """
    found: dict[tuple[int, int], tuple[Path, Comparison]] = {}
    for folder in folders:
        run_dirs, samples_dir, _ = read_index(folder)
        comparison, size = compare(run_dirs, samples_dir, baseline), _size(folder, run_dirs)
        if size in found:
            raise ResultsError(
                f"{folder} and {found[size][0]} both have num_experts={size[1]}, top_k={size[0]}. "
                "Fix: name one of them."
            )
        found[size] = folder, comparison
    if not found:
        raise ResultsError("no folder was named. Fix: name folders with compare.json, such as outputs/compare.")
    _refuse_mixed({folder: comparison for folder, comparison in found.values()})
    rows = [
        row
        for (top_k, num_experts), (folder, comparison) in sorted(found.items())
        for row in _rows(comparison, {"num_experts": num_experts, "top_k": top_k, "folder": str(folder)})
    ]
    table, out_dir = pd.DataFrame(rows), out_dir or folders[0]
    write_text(out_dir / "speedups.csv", table[COLUMNS].to_csv(index=False))
    first = next(iter(found.values()))[1]
    with suite_style():
        others = table[table["system"] != baseline]
        save(speedups_figure(others, first.label(baseline), first.kind, where(first)), out_dir / "speedups")
    return table[COLUMNS]


def _size(folder: Path, run_dirs: Sequence[Path]) -> tuple[int, int]:
    """(top_k, num_experts) of the models of a comparison."""
    models = [load_run(path, metrics=()).config.get("model") for path in run_dirs]
    sizes = {(model.get("top_k"), model.get("num_experts")) for model in models if isinstance(model, dict)}
    top_k, num_experts = next(iter(sizes), (None, None))
    if len(sizes) != 1 or not isinstance(top_k, int) or not isinstance(num_experts, int):
        raise ResultsError(
            f"{folder}: its runs' config.yaml must agree on model.top_k and model.num_experts, and say "
            f"{', '.join(map(str, sizes)) or 'nothing'}. Fix: one comparison for each."
        )
    return top_k, num_experts


def _refuse_mixed(comparisons: dict[Path, Comparison]) -> None:
    for name in ("kind", "cluster", "emulation", "ranks"):
        said = {getattr(comparison, name): folder for folder, comparison in comparisons.items()}
        if len(said) > 1:
            told = ", ".join(f"{value or 'nothing'} ({folder})" for value, folder in said.items())
            raise ResultsError(f"one figure mixes different values of {name}: {told}. Fix: a figure for each.")


def _rows(comparison: Comparison, key: dict[str, Any]) -> list[dict[str, Any]]:
    gate = GATES.get(key["top_k"], f"top-{key['top_k']}")
    summary = summarise(comparison)
    ratios = summary[summary["metric"] == "tokens_per_s_ratio"]
    return [
        {
            **key,
            "gate": gate,
            "group": f"{key['num_experts']} experts\n{gate}, top-{key['top_k']}".replace(f"{gate}, {gate}", gate),
            "system": row.system,
            "label": comparison.label(str(row.system)),
            "implementation": row.implementation,
            "ratio": row.value,
            "low": row.low,
            "high": row.high,
            "status": row.status,
        }
        for row in ratios.itertuples()
    ]


def format_speedups(table: pd.DataFrame) -> str:
    """The table for a terminal."""
    cells = [
        {
            "system": row.system,
            "experts": str(row.num_experts),
            "gate": f"{row.gate} (top-{row.top_k})",
            "ratio": "{} [{}, {}]".format(*(significant(number, 3) for number in (row.ratio, row.low, row.high)))
            if isfinite(row.ratio)
            else NOTHING,
            "status": row.status,
        }
        for row in table.itertuples()
    ]
    return aligned(pd.DataFrame(cells)) + "\n"


@exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line, with its exit code."""
    parser = argparse.ArgumentParser(prog="python -m analysis.speedups", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="folders with compare.json, one for each size")
    parser.add_argument("--baseline", default="deepspeed", help="system that ratios refer to (default: deepspeed)")
    parser.add_argument("--out", type=Path, help="folder to write to (default: the first folder)")
    given = parser.parse_args(arguments)
    out_dir = given.out or given.folders[0]
    print(format_speedups(write_speedups(given.folders, given.baseline, out_dir)), end="")
    print(f"\nwritten: {out_dir}/speedups.csv, speedups.png and speedups.pdf")


if __name__ == "__main__":
    sys.exit(main())
