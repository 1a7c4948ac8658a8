"""TA-MoE (arXiv 2302.09915): dispatch against the target, locality, loss, time to a loss, throughput by number of
experts and gate.

Not made: the even against the uneven exchange of a fixed volume, which no experiment here measures.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from analysis.comparison import compare
from analysis.figures.found import ComparisonFolder, Found, Recipe
from analysis.figures.parts import write_throughput
from analysis.figures.reach import write_reach
from analysis.files import write_text
from analysis.roofline import write_roofline
from analysis.speedups import write_speedups
from analysis.summary import summarise
from analysis.topology import write_topology

METHOD = "ta_moe"
BASELINE = "deepspeed"


def recipes(found: Found) -> Iterator[Recipe]:
    """What can be made."""
    own = [one for one in found.comparisons if METHOD in one.methods and one.run_dirs]
    grids = _grids(own)
    in_grid = {one.path for grid in grids.values() for one in grid}
    for name, grid in grids.items():
        folders = [one.path for one in grid]
        yield Recipe(f"{name}-speedups", folders, partial(_write_grid, folders))
    for one in own:
        if one.path not in in_grid:
            yield Recipe(one.name, [one.path], partial(_write, one))
    for path in found.files["roofline.csv"]:
        place = next((one for one in own if one.path == path.parent), None)
        if place is not None:
            yield Recipe(place.name, [path], partial(_write_roofline, path, place))
    if own:
        yield Recipe("perplexity", [one.path for one in own], partial(write_perplexity, own))


def _grids(own: Sequence[ComparisonFolder]) -> dict[str, list[ComparisonFolder]]:
    """Comparisons of one place and machine that differ in the number of experts or choices."""
    groups: dict[tuple[Path, str], list[ComparisonFolder]] = defaultdict(list)
    for one in own:
        if one.size is not None and BASELINE in one.methods:
            groups[one.path.parent.parent, one.machine].append(one)
    grids: dict[str, list[ComparisonFolder]] = {}
    for (place, _), group in groups.items():
        if len(group) > 1 and len({one.size for one in group}) == len(group):
            name = place.name if place.name not in grids else f"{place.name}-{len(grids)}"
            grids[name] = sorted(group, key=lambda one: one.size or (0, 0))
    return grids


def _write_grid(folders: Sequence[Path], out: Path) -> None:
    write_speedups(folders, BASELINE, out)


def _write(one: ComparisonFolder, out: Path) -> None:
    write_topology(one.path, one.baseline, out)
    write_throughput(one, one.baseline, out)
    write_reach(compare(one.run_dirs, one.samples_dir, one.baseline), out)


def _write_roofline(path: Path, place: ComparisonFolder, out: Path) -> None:
    comparison = compare(place.run_dirs, place.samples_dir, place.baseline)
    labels = {system: comparison.label(system) for system in comparison.systems}
    write_roofline(path, f"On {place.machine}.", out, labels)


def write_perplexity(own: Sequence[ComparisonFolder], out: Path) -> pd.DataFrame:
    """perplexity.csv: exp of the last validation loss, mean over seeds with their range, by comparison and system."""
    rows = []
    for one in own:
        comparison = compare(one.run_dirs, one.samples_dir, one.baseline)
        summary = summarise(comparison)
        for row in summary[summary["metric"] == "val_loss"].itertuples():
            numbers = {name: math.exp(getattr(row, name)) for name in ("value", "low", "high")}
            top_k, num_experts = one.size or (None, None)
            rows.append(
                {
                    "comparison": one.name,
                    "num_experts": num_experts,
                    "top_k": top_k,
                    "system": row.system,
                    "implementation": row.implementation,
                    **{("perplexity" if name == "value" else name): number for name, number in numbers.items()},
                    "kind": comparison.kind,
                    "status": row.status,
                }
            )
    table = pd.DataFrame(rows)
    write_text(out / "perplexity.csv", table.to_csv(index=False))
    return table
