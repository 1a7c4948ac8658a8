"""The cells of one folder of results, and what two values of a cell tell."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis.comparison import compare
from analysis.errors import ResultsError
from analysis.figures.found import TABLES, ComparisonFolder, Found, LayerFolder, look_into
from analysis.load import load_run
from analysis.statistics import FEW, Interval, bootstrap_unpaired_ratio, over_seeds

DIFFERS, ALIKE, UNKNOWN = "differs", "no difference", "can't tell"


class Measured(NamedTuple):
    """Values of one cell, in their unit.

    Attributes:
        values: one a round, one a seed, or the one of a table.
        unit: of them.
        seeds: of the values, where there is one for each seed; else empty.
        computed: whether it holds no noise, being modelled or simulated.
    """

    values: tuple[float, ...]
    unit: str
    seeds: tuple[int, ...] = ()
    computed: bool = False


Key = tuple[str, str, str]
"""Place (folder, and shape and workload of a layer), system with its implementation, metric."""


@dataclass
class Side:
    """All cells of one side.

    Attributes:
        cells: values by key.
        without: why a system has no values there, by place and system.
        kinds: `measured`, `modelled` or `simulated`, by place.
        told: what was measured on what, by name of a fact such as `commit`.
    """

    cells: dict[Key, Measured] = field(default_factory=dict)
    without: dict[tuple[str, str], str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    told: dict[str, set[str]] = field(default_factory=dict)


FACTS = {
    "commit": ("git", "commit"),
    "CPU": ("hardware", "cpu"),
    "GPUs": ("hardware", "gpus"),
    "cluster": ("cluster", "name"),
    "emulation": ("cluster", "emulation"),
}
"""Of manifest.json; versions of packages come beside them."""


def compared(first: Measured, second: Measured) -> tuple[Interval | None, str, str]:
    """Ratio of the second to the first, a verdict, and why there is no better one.

    Args:
        first, second: one cell on both sides.
    """
    if first.unit != second.unit:
        return None, UNKNOWN, f"in {first.unit} and in {second.unit}"
    if not (np.isfinite(first.values).all() and np.isfinite(second.values).all()):
        return None, UNKNOWN, "not a number"
    if first.values == second.values:
        return Interval(1.0, 1.0, 1.0), ALIKE, "the same"
    if min(*first.values, *second.values) <= 0:
        return None, DIFFERS if first.computed else UNKNOWN, "no ratio to what is not positive"
    if first.computed:
        return over_seeds([second.values[0] / first.values[0]]), DIFFERS, "computed"
    ratio, count = _ratio(first, second)
    if ratio is None or count == 1:
        return ratio, UNKNOWN, "no seed in common" if ratio is None else "one seed" if first.seeds else "one value"
    return ratio, ALIKE if ratio.low <= 1 <= ratio.high else DIFFERS, ""


def _ratio(first: Measured, second: Measured) -> tuple[Interval | None, int]:
    """The ratio, and of how many values on the side that has fewer."""
    if first.seeds:
        seeds = [seed for seed in first.seeds if seed in second.seeds]
        pairs = [(second.values[second.seeds.index(seed)], first.values[first.seeds.index(seed)]) for seed in seeds]
        return (over_seeds([top / bottom for top, bottom in pairs]) if pairs else None), len(pairs)
    count = min(len(first.values), len(second.values))
    if count > FEW:
        return bootstrap_unpaired_ratio(second.values, first.values), count
    ends = min(second.values) / max(first.values), max(second.values) / min(first.values)
    return Interval(float(np.median(second.values) / np.median(first.values)), *ends), count


def side_of(folder: Path) -> Side:
    """All cells under a folder.

    Raises:
        ResultsError: no such folder, nothing in it, or files that contradict one another.
    """
    found = look_into([folder])
    if found.refused:
        raise ResultsError(found.refused[0])
    side = Side()
    for layer in found.layers:
        _add_layer(layer, _place(found, folder, layer.path), side)
    for one in found.comparisons:
        _add_comparison(one, _place(found, folder, one.path), side)
    for path in (path for name in sorted(TABLES) for path in found.files[name]):
        _add_table(path, path.relative_to(folder).as_posix(), side)
    return side


def _add_table(path: Path, place: str, side: Side) -> None:
    """Rows of a table with columns ours, unit and kind; what else it is keyed by is part of the metric's name."""
    table = pd.read_csv(path)
    keys = [name for name in table if name not in ("paper", "ours", "unit", "kind", "source")]
    for row in table.to_dict("records"):
        if pd.notna(row["ours"]):
            metric = ", ".join(str(row[name]) for name in keys)
            side.kinds[f"{place}: {metric}"] = str(row["kind"])
            side.cells[f"{place}: {metric}", "-", "ours"] = Measured((row["ours"],), str(row["unit"]), computed=True)


def _place(found: Found, root: Path, path: Path) -> str:
    """Name of a folder on its side: "" where it is the only one, so that outputs/x can stand beside results/y."""
    if len(found.layers) + len(found.comparisons) == 1:
        return ""
    return path.resolve().relative_to(root.resolve()).as_posix()


def _add_layer(layer: LayerFolder, place: str, side: Side) -> None:
    table = layer.samples.table
    _tell(layer.path, side)
    for (shape, workload, system, implementation), own in table.groupby(
        ["shape", "workload", "system", "implementation"], sort=False
    ):
        where, name = joined(place, f"{shape}, {workload}"), f"{system} ({implementation})"
        side.kinds[where] = str(layer.samples.metadata.get("kind", "measured"))
        for metric, part in (("step_time", ""), ("peak_memory", ""), ("dropped_copies", "")):
            rows = own[(own["metric"] == metric) & (own["part"] == part)].sort_values("round")
            if len(rows):
                side.cells[where, name, metric] = Measured(tuple(rows["value"]), str(rows["unit"].iloc[0]))
        stages = own[own["metric"] == "stage_time"]
        for part, rows in stages.groupby("part", sort=False):
            side.cells[where, name, f"stage_time/{part}"] = Measured(tuple(rows["value"]), "s")
    for row in layer.samples.problems.itertuples():
        where = joined(place, f"{row.shape}, {row.workload}")
        side.without[where, f"{row.system} ({row.implementation})"] = f"{row.status}: {row.reason}"


def _add_comparison(one: ComparisonFolder, place: str, side: Side) -> None:
    comparison = compare(one.run_dirs, one.samples_dir, one.baseline)
    for path in [*one.run_dirs, *([one.samples_dir] if one.samples_dir is not None else [])]:
        _tell(path, side)
    side.kinds[place] = comparison.kind
    for system in comparison.systems:
        name, rates = comparison.label(system), comparison.rates
        own = rates[rates["system"] == system]["value"]
        if len(own):
            side.cells[place, name, "tokens_per_s"] = Measured(tuple(own), "tokens/s")
        for metric in ("val_loss", "dropped_copies"):
            per_seed = _per_seed(comparison.trained(metric), system, last=metric == "val_loss")
            if len(per_seed):
                unit = str(comparison.trained(metric)["unit"].iloc[0])
                side.cells[place, name, metric] = Measured(tuple(per_seed), unit, tuple(per_seed.index))
        sent = comparison.trained("bytes")
        for part, rows in sent[sent["system"] == system].groupby("part", sort=False):
            total = rows.groupby("seed")["value"].sum()
            side.cells[place, name, f"bytes/{part}"] = Measured(tuple(total), "B", tuple(total.index))
        problems = [str(problem) for problem in comparison.problems_of(system)]
        if problems:
            side.without[place, name] = "; ".join(dict.fromkeys(problems))


def _per_seed(rows: pd.DataFrame, system: str, last: bool) -> pd.Series:
    groups = rows[rows["system"] == system].sort_values("step").groupby("seed")["value"]
    return groups.last() if last else groups.mean()


def joined(place: str, name: str) -> str:
    """Name of something in a place; by itself where the place has none."""
    return f"{place}: {name}" if place else name


def _tell(folder: Path, side: Side) -> None:
    manifest = load_run(folder, metrics=()).manifest
    for name, (section, key) in FACTS.items():
        said = manifest.get(section)
        if isinstance(said, dict) and said.get(key):
            side.told.setdefault(name, set()).add(str(said[key]))
    for package, version in (manifest.get("versions") or {}).items():
        side.told.setdefault(package, set()).add(str(version))
