"""From a command line to the cells of a sweep, all of them composed, validated and compared with what is complete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from experiments.allocation import Shape, planned
from experiments.bench_run import BenchRun
from experiments.cells import is_current, refusals_of, run_cells, run_dir_of
from experiments.cli import CONF, compose_cells
from experiments.config import AnyConfig, ClusterConfig, CompareConfig, Kind, RunConfig, find_problems, load
from experiments.experiment_files import GROUP, foreign_keys
from experiments.results import RunDir
from moe.errors import ConfigError, Problem
from slurm.records import Cell

ENTRY_POINTS: tuple[Kind, ...] = ("train", "compare", "layer", "comm")
RUN_KEYS = ("model", "data", "cluster", "trainer", "output_dir")
"""Keys that a comparison's training runs have from it."""

Composed = tuple[list[str], dict[str, Any]]


class PlannedCell(NamedTuple):
    """A cell, and whether there is anything to do.

    Attributes:
        cell: as its job will read it.
        complete: all of it is done already.
        refusals: why its system can't run it, plain sentences; of a cell of several runs, only if all are refused.
    """

    cell: Cell
    complete: bool
    refusals: list[str]

    @property
    def to_run(self) -> bool:
        """Whether it needs a job."""
        return not self.complete and not self.refusals


def plan(overrides: Sequence[str], shape: Shape, kind: Kind | None = None, share: bool = False) -> list[PlannedCell]:
    """The cells of a sweep.

    A comparison (an experiment for `experiments.compare`) becomes its training runs, a cell each, or with `share` one
    cell that trains them one after the other and then times them in turn. `system=` and `seed=` choose among its
    systems, by label or name, and its seeds; a system that it does not list comes with its defaults.

    Args:
        overrides: as typed; `key=a,b` sweeps. Without `cluster=` that is `auto`, whatever an experiment's is.
        shape: of every job.
        kind: the entry point; None: what the experiment is for, else `compare` with `share`, else `train`.
        share: cells of one comparison share an allocation.

    Raises:
        ConfigError: with the problems of all cells.
    """
    if not _values(overrides, "cluster"):
        overrides = [*overrides, "cluster=auto"]
    kind = kind or _kind_of(overrides, share)
    if share and kind != "compare":
        rule = f"only a comparison has cells that can share an allocation, and this is experiments.{kind}"
        raise ConfigError(Problem("--share-allocation", "", rule, "leave it out, or choose an experiment of compare"))
    with planned(shape):
        cells = _comparisons(overrides) if kind == "compare" else _labelled(compose_cells(kind, overrides))
        if kind == "compare" and not share:
            kind, cells = "train", [cell for comparison in cells for cell in _runs(comparison)]
        if problems := [problem for cell in cells for problem in _problems(kind, cell.content)]:
            raise ConfigError(*{str(problem): problem for problem in problems}.values())
        found = [_planned(number, kind, cell, shape) for number, cell in enumerate(cells)]
    _check_apart([planned_cell.cell for planned_cell in found])
    return found


def write_refusals(cells: Sequence[PlannedCell], shape: Shape) -> None:
    """Keep the refusals as results, so that they are rows of tables; nothing is launched."""
    with planned(shape):
        for cell in (planned_cell.cell for planned_cell in cells if planned_cell.refusals):
            config = load("train", cell.config)
            assert isinstance(config, RunConfig), "only training runs are refused before they start"
            run_cells([_with_any_costs(config)], cell.overrides)


def folders_of(config: AnyConfig) -> list[str]:
    """Where a cell's results go, absolute: its training runs in their order, then its benchmark."""
    runs = [config] if isinstance(config, RunConfig) else config.runs() if isinstance(config, CompareConfig) else []
    folders = [run_dir_of(run).path for run in runs]
    if not isinstance(config, RunConfig):
        folders.append(BenchRun(config, []).dir.path)
    return [str(folder.absolute()) for folder in folders]


class _Labelled(NamedTuple):
    label: str
    overrides: list[str]
    content: dict[str, Any]
    swept: str = ""


def _kind_of(overrides: Sequence[str], share: bool) -> Kind:
    chosen = _values(overrides, GROUP)
    if not chosen:
        return "compare" if share else "train"
    path = CONF / GROUP / f"{chosen[0]}.yaml"
    fitting = [kind for kind in ENTRY_POINTS[:3] if path.is_file() and not foreign_keys(path, kind)]
    if share and "compare" in fitting:
        return "compare"
    return fitting[0] if fitting else "train"


def _values(overrides: Sequence[str], key: str) -> list[Any]:
    """All values that a key is given; none where it does not stand."""
    found: list[Any] = []
    for text in overrides:
        if text.lstrip("+").partition("=")[0] != key:
            continue
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            rule = f"can't be read ({str(error).splitlines()[0]})"
            raise ConfigError(Problem(key, text.partition("=")[2], rule, "write key=value")) from error
        found += list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
    return found


def _labelled(cells: Sequence[Composed]) -> list[_Labelled]:
    """Cells called by the overrides in which they differ; one alone by its system, if it has one."""
    differing = [len(set(texts)) > 1 for texts in zip(*(overrides for overrides, _ in cells), strict=True)]
    named = []
    for overrides, content in cells:
        told = [text for text, differs in zip(overrides, differing, strict=True) if differs]
        if not told and "system" in content:
            told = [_run_label(content["system"], content["seed"])]
        named.append(_Labelled(" ".join(told), overrides, content))
    return named


def _run_label(system: Mapping[str, Any], seed: int) -> str:
    return f"system={system.get('label', system['name'])} seed={seed}"


def _comparisons(overrides: Sequence[str]) -> list[_Labelled]:
    """Configs of experiments.compare, with the systems and seeds that were asked for."""
    systems, seeds = _values(overrides, "system"), _values(overrides, "seed")
    others = [text for text in overrides if text.lstrip("+").partition("=")[0] not in ("system", "seed")]
    chosen = [text for text in overrides if text not in others]
    cells = []
    for label, own, content, _ in _labelled(compose_cells("compare", others)):
        if systems:
            content = {**content, "systems": _pick(content["systems"], systems)}
        if seeds:
            content = {**content, "seeds": seeds}
        cells.append(_Labelled(" ".join([*filter(None, [label]), *chosen]) or "all", [*own, *chosen], content, label))
    return cells


def _pick(listed: Sequence[Any], wanted: Sequence[Any]) -> list[Any]:
    items = [dict(item) if isinstance(item, Mapping) else {"name": item} for item in listed]
    picked: list[Any] = []
    for name in wanted:
        by_label = [item for item in items if item.get("label", item["name"]) == name]
        picked += by_label or [item for item in items if item["name"] == name] or [name]
    return picked


def _runs(comparison: _Labelled) -> list[_Labelled]:
    """The training runs of a comparison, not yet settled."""
    content, cells = comparison.content, []
    shared = {key: content[key] for key in RUN_KEYS} | {"force": content["force"]}
    for seed in content["seeds"]:
        for system in content["systems"]:
            item = {"name": system} if isinstance(system, str) else dict(system)
            run = {**shared, "system": item, "seed": seed}
            name = " ".join([*filter(None, [comparison.swept]), _run_label(item, seed)])
            cells.append(_Labelled(name, comparison.overrides, run))
    return cells


def _problems(kind: Kind, content: Mapping[str, Any]) -> list[Problem]:
    problems = find_problems(kind, content)
    if content["cluster"]["launch"] == "netns":
        rule = "network namespaces are made by a plain start, and srun starts the ranks of a job"
        problems.append(Problem("cluster.launch", "netns", rule, "use cluster=auto"))
    return problems


def _check_apart(cells: Sequence[Cell]) -> None:
    """Two jobs must not write into one folder."""
    seen: dict[str, Cell] = {}
    for cell in cells:
        for folder in cell.folders:
            other = seen.setdefault(folder, cell)
            if other is not cell:
                rule = f"is the run {Path(folder).name} of cell {other.number} ({other.label}) again"
                fix = "name every value once, and leave out keys that change no number of a run"
                raise ConfigError(Problem("cell", f"{cell.number} ({cell.label})", rule, fix))


def _planned(number: int, kind: Kind, cell: _Labelled, shape: Shape) -> PlannedCell:
    config = load(kind, cell.content)
    content = {**cell.content, "force": False, "output_dir": str(Path(config.output_dir).absolute())}
    trainer = getattr(config, "trainer", None)
    record = Cell(
        number=number,
        label=" ".join(cell.label.split()),
        kind=kind,
        config=content,
        overrides=cell.overrides,
        folders=folders_of(config),
        max_steps=0 if trainer is None else trainer.max_steps,
        force=config.force,
        shape=shape,
        working_dir=str(Path.cwd()),
    )
    refusals = refusals_of(_with_any_costs(config)) if isinstance(config, RunConfig) else []
    return PlannedCell(record, not config.force and _is_complete(config), refusals)


def _is_complete(config: AnyConfig) -> bool:
    runs = [config] if isinstance(config, RunConfig) else config.runs() if isinstance(config, CompareConfig) else []
    if not all(is_current(run) for run in runs):
        return False
    if isinstance(config, RunConfig):
        return True
    status = RunDir(folders_of(config)[-1]).status()
    return status is not None and status.status == "done" and not status.reason


def _with_any_costs(config: RunConfig) -> RunConfig:
    """As if a cluster that will be measured were: a system that needs costs will have them."""
    cluster = config.cluster
    if not cluster.profile or cluster.is_measured:
        return config
    cost = {"alpha_s": 1e-5, "beta_s_per_byte": 1e-9}  # of anything; only whether a system refuses is asked
    content = cluster.model_dump(mode="json")
    content["levels"] = [{**level, **cost} for level in content["levels"]]
    measured = ClusterConfig.model_validate({**content, "local_copy": cost})
    return config.model_copy(update={"cluster": measured})
