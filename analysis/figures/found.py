"""What lies in folders of results: comparisons, layer benchmarks, training runs by themselves, tables; and what is of
no use, with its reason."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from analysis.checks import COSMETIC, differences
from analysis.compare import read_index
from analysis.errors import ResultsError
from analysis.files import files_under
from analysis.load import Run, Samples, load_run, load_samples
from analysis.machine import machine_of


class Recipe(NamedTuple):
    """Some figures and tables that belong together.

    Attributes:
        name: of the folder that they go to, under that of the paper.
        sources: that they are made from.
        write: makes them in the folder that it is given.
    """

    name: str
    sources: Sequence[Path]
    write: Callable[[Path], object]


@dataclass(frozen=True)
class ComparisonFolder:
    """A folder with compare.json, or timed rounds without it.

    Attributes:
        path: the folder.
        name: what its figures are filed under.
        run_dirs, samples_dir, baseline: as in compare.json.
        methods: names of its systems, not their labels.
        size: (top_k, num_experts) of its model, None where nothing says it.
        machine: on which it was timed.
        notes: sentences on what its runs do not share, such as the code version.
    """

    path: Path
    name: str
    run_dirs: Sequence[Path]
    samples_dir: Path | None
    baseline: str
    methods: frozenset[str]
    size: tuple[int, int] | None
    machine: str
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class LayerFolder:
    """A layer benchmark: its folder, its samples, and the names of its systems by label."""

    path: Path
    name: str
    samples: Samples
    methods: dict[str, str]


@dataclass(frozen=True)
class Alike:
    """Training runs of one folder that are no part of a comparison and differ in their system alone."""

    path: Path
    name: str
    runs: Sequence[Run]


@dataclass
class Found:
    """All of it.

    Attributes:
        comparisons, layers, alike: see there.
        files: of tables and communication benchmarks, by file name.
        skipped: sentences on what has no numbers yet or none at all, such as a run that was interrupted.
        refused: sentences on what contradicts itself, such as files whose labels were swapped.
    """

    comparisons: list[ComparisonFolder] = field(default_factory=list)
    layers: list[LayerFolder] = field(default_factory=list)
    alike: list[Alike] = field(default_factory=list)
    files: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    skipped: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is there that a figure can be made from."""
        return not (self.comparisons or self.layers or self.alike or self.files)


_PASSED_OVER = {".tmp", "figures"}
"""Folders that hold no results: drafts, and what `analysis.figures` wrote into outputs/ before."""

TABLES = {"tables.csv", "table2.csv", "table5.csv", "contention.csv", *(f"fig{number}.csv" for number in (5, 6, 7, 8))}
"""File names of `experiments.hiermoe` and `experiments.simulate`."""


def look_into(roots: Iterable[Path]) -> Found:
    """Everything under some folders.

    Args:
        roots: such as results/ and outputs/, or single result folders.

    Raises:
        ResultsError: a folder that is not there, or nothing in any of them.
    """
    found, roots = Found(), list(roots)
    for root in roots:
        if not root.is_dir():
            raise ResultsError(f"{root}: there is no such folder. Fix: name a folder of results, such as results.")
        _look_into(root, found)
    if found.is_empty:
        odd = [*found.refused, *found.skipped]
        told = f" ({odd[0]})" if odd else ""
        raise ResultsError(
            f"{', '.join(map(str, roots))}: no finished results there{told}. Fix: run `make compare`, or name another "
            "folder with --results."
        )
    return found


def _look_into(root: Path, found: Found) -> None:
    files = [path for path in files_under(root) if not _PASSED_OVER & set(path.relative_to(root).parts)]
    part_of_comparison: set[Path] = set()
    for path in (path for path in files if path.name == "compare.json"):
        try:
            comparison = _comparison(path.parent, root)
        except ResultsError as error:
            found.refused.append(str(error))
            continue
        found.comparisons.append(comparison)
        part_of_comparison |= {folder.resolve() for folder in comparison.run_dirs}
        part_of_comparison |= {comparison.samples_dir.resolve()} if comparison.samples_dir is not None else set()
    folders = sorted({path.parent for path in files if path.name in ("samples.parquet", "status.json")})
    lone = [path for path in folders if path.resolve() not in part_of_comparison and path.name != "compare"]
    for path in (path for path in lone if (path / "samples.parquet").is_file()):
        try:
            _add_samples(path, root, found)
        except ResultsError as error:
            found.refused.append(str(error))
    runs = [path for path in lone if (path / "status.json").is_file() and not (path / "samples.parquet").is_file()]
    found.alike += _alike([path for path in runs if not (path / "comm.parquet").is_file()], root, found)
    for path in files:
        if path.name in TABLES or path.name in ("comm.parquet", "roofline.csv", "validation.csv"):
            found.files[path.name].append(path)


def _comparison(folder: Path, root: Path) -> ComparisonFolder:
    run_dirs, samples_dir, baseline = read_index(folder)
    runs = [load_run(path, metrics=()) for path in run_dirs]
    models = {(run.config["model"].get("top_k"), run.config["model"].get("num_experts")) for run in runs if run.config}
    size = next(iter(models)) if len(models) == 1 else None
    place = folder.parent if folder.name == "compare" else folder
    return ComparisonFolder(
        path=folder,
        name=_name(place, root),
        run_dirs=run_dirs,
        samples_dir=samples_dir,
        baseline=baseline,
        methods=frozenset(_method(run) for run in runs),
        size=size if size is not None and None not in size else None,
        machine=machine_of(samples_dir if samples_dir is not None else run_dirs[0]) if runs or samples_dir else "",
        notes=differences([run for run in runs if run.is_done]),
    )


def _add_samples(path: Path, root: Path, found: Found) -> None:
    """Timed rounds that no compare.json names: of a layer, or of a comparison whose runs were not kept."""
    samples = load_samples(path)
    if samples.status != "done":
        found.skipped.append(f"{path}: {samples.status}: {samples.reason}")
        return
    labels = list(dict.fromkeys([*samples.table["system"], *samples.problems["system"]]))
    configured = load_run(path, metrics=()).config.get("systems")
    listed = [item for item in configured if isinstance(item, dict)] if isinstance(configured, list) else []
    methods = {label: label for label in labels} | {str(one.get("label")): str(one.get("name")) for one in listed}
    if set(samples.table["workload"]) == {"training"}:
        baseline = "flat" if "flat" in labels else labels[0]
        names = frozenset(methods.values())
        found.comparisons.append(
            ComparisonFolder(path, _name(path, root), [], path, baseline, names, None, machine_of(path))
        )
    else:
        found.layers.append(LayerFolder(path, _name(path, root), samples, methods))


def _alike(folders: Sequence[Path], root: Path, found: Found) -> Iterator[Alike]:
    """Groups of two runs and more."""
    groups: dict[tuple[Path, str], list[Run]] = defaultdict(list)
    for path in folders:
        try:
            run = load_run(path)
        except ResultsError as error:
            found.refused.append(str(error))
            continue
        if not run.is_done:
            found.skipped.append(f"{path}: {run.status}: {run.reason}")
        elif run.config:
            same = {key: value for key, value in run.config.items() if key not in COSMETIC | {"system"}}
            groups[path.parent, json.dumps(same, sort_keys=True, default=str)].append(run)
    for number, ((parent, _), runs) in enumerate(groups.items()):
        if len(runs) > 1:
            name = _name(parent, root)
            yield Alike(parent, name if sum(p == parent for p, _ in groups) == 1 else f"{name}-{number}", runs)


def _method(run: Run) -> str:
    system = run.config.get("system")
    return str(system.get("name", run.system)) if isinstance(system, dict) else run.system


def _name(place: Path, root: Path) -> str:
    """`netns_2x2_ta_moe-e8_k1` for netns_2x2_ta_moe/e8_k1 under results/; of outputs/ itself its own name."""
    relative = place.resolve().relative_to(root.resolve())
    return "-".join(relative.parts) or root.resolve().name
