"""SwiftMoE (SYMI, arXiv 2504.19925): popularity and replicas, survival, the way to a target loss, parts of a step, and
sweeps of the balance loss' weight and of the capacity factor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from analysis.figures.found import ComparisonFolder, Found, Recipe
from analysis.load import load_run
from analysis.swiftmoe import write_swiftmoe
from analysis.swiftmoe_sweep import write_sweep

METHOD = "swiftmoe"
KEYS = ("capacity_factor", "aux_loss_weight", "model_dim")
"""Of the model, over which sweeps go."""


def recipes(found: Found) -> Iterator[Recipe]:
    """What can be made."""
    own = [one for one in found.comparisons if METHOD in one.methods and one.run_dirs]
    swept = set()
    for key, group in _sweeps(own):
        folders = [one.path for one in group]
        swept |= set(folders)
        yield Recipe(f"{folders[0].parent.parent.name}-{key}", folders, partial(_write_sweep, key, folders))
    for one in own:
        if one.path not in swept:
            yield Recipe(one.name, [one.path], partial(_write, one.path))


def _sweeps(own: Sequence[ComparisonFolder]) -> Iterator[tuple[str, list[ComparisonFolder]]]:
    """(key, comparisons of one place and machine that have different values of it, and of no other key)."""
    groups: dict[tuple[Path, str], list[ComparisonFolder]] = defaultdict(list)
    for one in own:
        groups[one.path.parent.parent, one.machine].append(one)
    for group in groups.values():
        models = [load_run(one.run_dirs[0], metrics=()).config.get("model", {}) for one in group]
        differ = [key for key in KEYS if len({str(model.get(key)) for model in models}) == len(group) > 1]
        if len(differ) == 1:
            yield differ[0], group


def _write_sweep(key: str, folders: Sequence[Path], out: Path) -> None:
    write_sweep(key, folders, out_dir=out)


def _write(folder: Path, out: Path) -> None:
    write_swiftmoe(folder, out_dir=out)
