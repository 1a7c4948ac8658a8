"""Survival, the way to a target loss and the time of a step over one key of the model:
`python -m analysis.swiftmoe_sweep aux_loss_weight outputs/swiftmoe_aux/*/compare`.

Every folder is a comparison that `experiments.compare` left, each with another value of that key, such as
capacity_factor, aux_loss_weight or model_dim. Writes sweep.csv and sweep.{png,pdf}.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.compare import read_index
from analysis.comparison import Comparison
from analysis.errors import ResultsError, exit_code
from analysis.files import write_text
from analysis.load import load_run
from analysis.plots.rows import where
from analysis.plots.sweep import sweep_figure
from analysis.style import save, suite_style
from analysis.swiftmoe import BASELINES, comparison_of
from analysis.swiftmoe_numbers import findings_of
from analysis.swiftmoe_table import steps_to_target, swiftmoe_table, with_range
from analysis.tables import aligned, significant
from analysis.target_loss import window_of

NUMBERS = (
    *("survival", "dropped_ratio", "target_steps", "target_steps_ratio", "target_timed_s"),
    *("step_s", "step_s_ratio", "forward_s", "extra_share"),
)
"""Of `analysis.swiftmoe_numbers.NUMBERS`, with their ranges over seeds."""

COLUMNS = [
    *("key", "key_value", "system", "implementation", "target_loss"),
    *(f"{name}{end}" for name in NUMBERS for end in ("", "_low", "_high")),
    *("target_reached", "target_steps_at_least", "status", "folder"),
]


def write_sweep(
    key: str,
    folders: Sequence[Path],
    baseline: str | None = None,
    window: int | None = None,
    out_dir: Path | None = None,
) -> pd.DataFrame:
    """Write sweep.csv and sweep.{png,pdf}.

    Args:
        key: of `model` in config.yaml, a number, such as capacity_factor.
        folders: of comparisons, one for each value of it.
        baseline: the system that ratios refer to; None as in `analysis.swiftmoe`.
        window: logged steps that a smoothed loss is the mean of; None for the first's
            `analysis.target_loss.window_of`.
        out_dir: where to write; None for the first folder.

    Returns:
        Rows of sweep.csv, by value and system, columns as `COLUMNS`.

    Raises:
        ResultsError: no comparison in a folder, runs that do not agree on the key or the target loss, two folders with
            one value of the key, or comparisons of different clusters.
    """
    found: dict[float, tuple[Path, Comparison]] = {}
    for folder in folders:
        value = _value(folder, key)
        if value in found:
            raise ResultsError(
                f"{folder} and {found[value][0]} both have model.{key}={value:g}. Fix: name one of them."
            )
        found[value] = folder, comparison_of(folder, baseline)
    if not found:
        raise ResultsError("no folder was named. Fix: name folders with compare.json, such as outputs/compare.")
    first = next(iter(found.values()))[1]
    places = {f"{comparison.kind} on {where(comparison)}": folder for folder, comparison in found.values()}
    if len(places) > 1:
        told = "; ".join(f"{place} ({folder})" for place, folder in places.items())
        raise ResultsError(f"one figure mixes different clusters: {told}. Fix: a figure for each.")
    rows, targets, window = [], set(), window or window_of(first)
    for value, (folder, comparison) in sorted(found.items()):
        findings = findings_of(comparison, window)
        targets.add(str(findings.target))
        for row in swiftmoe_table(comparison, findings).to_dict("records"):
            rows.append({"key": key, "key_value": value, "folder": str(folder)} | row)
    if len(targets) > 1:
        raise ResultsError(f"one figure mixes different targets: {' '.join(sorted(targets))} Fix: a figure for each.")
    table, out_dir = pd.DataFrame(rows)[COLUMNS], out_dir or folders[0]
    with suite_style():
        figure = sweep_figure(table, first.kind, targets.pop(), window, where(first))
        write_text(out_dir / "sweep.csv", table.to_csv(index=False))
        save(figure, out_dir / "sweep")
    return table


def _value(folder: Path, key: str) -> float:
    """The value of a key of the model that a comparison's runs agree on."""
    run_dirs, _, _ = read_index(folder)
    models = [load_run(path, metrics=()).config.get("model") for path in run_dirs]
    values = {model.get(key) for model in models if isinstance(model, dict)}
    value = next(iter(values), None)
    if len(values) != 1 or isinstance(value, bool) or not isinstance(value, int | float):
        raise ResultsError(
            f"{folder}: its runs' config.yaml must agree on model.{key}, a number, and say "
            f"{', '.join(map(str, values)) or 'nothing'}. Fix: one comparison for each value, and a key that has one."
        )
    return float(value)


def format_sweep(table: pd.DataFrame) -> str:
    """The table for a terminal, then what is missing."""
    key, target = str(table["key"].iloc[0]), significant(float(table["target_loss"].iloc[0]))
    cells = pd.DataFrame(
        {
            "system": table["system"],
            key: [f"{value:g}" for value in table["key_value"]],
            "survived %": [with_range(row, "survival", 100.0) for _, row in table.iterrows()],
            f"steps to {target}": [steps_to_target(row) for _, row in table.iterrows()],
            "step, ms": [with_range(row, "step_s", 1e3) for _, row in table.iterrows()],
            "MoE forward, ms": [with_range(row, "forward_s", 1e3) for _, row in table.iterrows()],
            f"s to {target}": [with_range(row, "target_timed_s") for _, row in table.iterrows()],
        }
    )
    odd = table[table["status"] != "ok"]
    told = [f"  {row.system}, {key} {row.key_value:g}: {row.status}." for row in odd.itertuples()]
    return "\n".join([aligned(cells), *(["\nto be known:", *told] if told else [])]) + "\n"


@exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line, with its exit code."""
    parser = argparse.ArgumentParser(prog="python -m analysis.swiftmoe_sweep", description=__doc__)
    parser.add_argument("key", help="of the model, such as aux_loss_weight or capacity_factor")
    parser.add_argument("folders", type=Path, nargs="+", help="folders with compare.json, one for each value")
    parser.add_argument("--baseline", help=f"system that ratios refer to (default: {' or '.join(BASELINES)}, if there)")
    parser.add_argument("--out", type=Path, help="folder to write to (default: the first folder)")
    given = parser.parse_args(arguments)
    out_dir = given.out or given.folders[0]
    table = write_sweep(given.key, given.folders, given.baseline, out_dir=out_dir)
    print(format_sweep(table), end="")
    print(f"\nwritten: {out_dir}/sweep.csv, sweep.png and sweep.pdf")


if __name__ == "__main__":
    sys.exit(main())
