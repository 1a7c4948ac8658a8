"""What must hold before runs and samples are put side by side: errors for mixed-up cells, problems for missing ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.errors import ResultsError
from analysis.load import UNKNOWN, Run, Samples

COSMETIC = {"seed", "force", "output_dir", "trainer.progress", "trainer.timeout_s", "data.cache_dir"}
"""Keys of a run's config that may differ within a comparison: what is compared, and what changes no number."""


@dataclass(frozen=True)
class Problem:
    """One system and seed without usable numbers.

    Attributes:
        system: its name.
        seed: None when the problem concerns every seed.
        source: `run` (training) or `samples` (interleaved timing).
        status, reason: such as `failed` and the last line of the traceback.
    """

    system: str
    seed: int | None
    source: str
    status: str
    reason: str

    def __str__(self) -> str:
        where = "" if self.source == "run" else ", timed rounds"
        seed = "all seeds" if self.seed is None else f"seed {self.seed}"
        return f"{self.status} ({seed}{where}): {self.reason}"


def refuse_duplicates(runs: list[Run]) -> None:
    """Raise `ResultsError` when one system and seed has two run folders."""
    seen: dict[tuple[str, int | None], Path] = {}
    for run in runs:
        cell = (run.system, run.seed)
        if cell in seen:
            raise ResultsError(
                f"system={run.system} seed={run.seed} stands in the comparison twice: {seen[cell]} and {run.path}. "
                "Fix: keep one of the two folders in the list."
            )
        seen[cell] = run.path


def shared_labels(runs: list[Run], samples: Samples) -> tuple[str, str, str]:
    """(kind, cluster, emulation), which every file of one comparison must share, else `ResultsError`."""
    footers = [(run.path, run.metadata) for run in runs] + [(samples.path, samples.metadata)]
    shared = []
    for key, default in (("kind", "measured"), ("cluster", ""), ("emulation", "")):
        said = {str(footer[key]): path for path, footer in footers if key in footer}
        if not said and key != "kind":  # no run came as far as a footer: what was declared
            said = {told: run.path for run in runs if (told := run.declared(key))}
        if len(said) > 1:
            told = ", ".join(f"{value or 'nothing'} ({path})" for value, path in said.items())
            raise ResultsError(
                f"one comparison mixes different values of {key}: {told}. Such numbers don't belong in one table. "
                "Fix: compare each set on its own."
            )
        shared.append(next(iter(said), default))
    return shared[0], shared[1], shared[2]


def last_step(run: Run) -> int:
    """The last step whose loss was recorded, 0 when none was."""
    steps = run.metrics.loc[run.metrics["metric"] == "loss", "step"]
    return int(steps.max()) if len(steps) else 0


def flaw(run: Run, expected_step: int) -> Problem | None:
    """Why the numbers of a run that calls itself done are of no use, or None."""
    losses = run.metrics[run.metrics["metric"] == "loss"]
    if not len(losses):
        return Problem(run.system, run.seed, "run", "corrupt", "metrics.parquet holds no loss")
    for metric in ("loss", "val_loss"):
        rows = run.metrics[run.metrics["metric"] == metric]
        bad = rows[~np.isfinite(rows["value"])]
        if len(bad):
            return Problem(
                run.system, run.seed, "run", "nan", f"{metric} is not a number from step {bad['step'].min()}"
            )
    if last_step(run) < expected_step:
        return Problem(
            run.system,
            run.seed,
            "run",
            "incomplete",
            f"its loss ends at step {last_step(run)}, others' at {expected_step}",
        )
    return None


def check_samples(samples: Samples, systems: list[str]) -> tuple[pd.DataFrame, list[Problem], list[int]]:
    """Cells of the usable (system, seed) pairs, what is wrong with the others, and the seeds that should be there."""
    if samples.status != "done":
        problems = [Problem(system, None, "samples", samples.status, samples.reason) for system in systems]
        return samples.table, problems, []
    table = samples.table
    for column in ("shape", "workload"):
        values = list(dict.fromkeys(table[column]))
        if len(values) > 1:
            raise ResultsError(
                f"{samples.path}: samples of several values of {column}: {', '.join(map(str, values))}. One comparison "
                f"has one. Fix: measure one {column} per folder."
            )
    problems = [
        Problem(row.system, int(row.seed), "samples", row.status, row.reason) for row in samples.problems.itertuples()
    ]
    seeds = sorted({int(seed) for seed in [*table["seed"], *samples.problems["seed"]]})
    told = {(problem.system, problem.seed) for problem in problems}
    groups = dict(list(table.groupby(["system", "seed"], sort=False)))
    for system in systems:
        for seed in seeds:
            if (system, seed) not in told:
                flaw = _sample_flaw(groups.get((system, seed)))
                if flaw:
                    problems.append(Problem(system, seed, "samples", *flaw))
    excluded = {(problem.system, problem.seed) for problem in problems}
    usable = [(system, seed) not in excluded for system, seed in zip(table["system"], table["seed"], strict=True)]
    return table[np.array(usable, dtype=bool)], problems, seeds  # an empty list would choose no column


def _sample_flaw(cells: pd.DataFrame | None) -> tuple[str, str] | None:
    """(status, reason) when one system and seed has no usable time of every round, or None."""
    if cells is None:
        return "missing", "no sample of it"
    times = cells[cells["metric"] == "step_time"]
    tokens = cells[cells["metric"] == "tokens"]
    if not len(times):
        return "missing", "no step_time among its samples"
    for rows, name in ((times, "step_time"), (tokens, "tokens")):
        bad = rows[~(np.isfinite(rows["value"]) & (rows["value"] > 0))]
        if len(bad):
            status = "nan" if not np.isfinite(bad["value"].iloc[0]) else "corrupt"
            return status, f"{name} of round {bad['round'].iloc[0]} is {bad['value'].iloc[0]:g}, no positive number"
    uncounted = sorted(set(times["round"]) - set(tokens["round"]))
    if uncounted and len(tokens) != 1:
        return "corrupt", f"no token count in round {uncounted[0]}"
    return None


def timed_step(table: pd.DataFrame) -> str:
    """What one timed step is, in words; "" when nothing was timed. `check_samples` held that there is one."""
    if not len(table):
        return ""
    shape, workload = table["shape"].iloc[0], table["workload"].iloc[0]
    return f"one training step of {shape}" if workload == "training" else f"shape {shape}, workload {workload}"


def implementations(systems: list[str], runs: list[Run], samples: Samples) -> dict[str, str]:
    """{system: native, upstream or unknown}; raises `ResultsError` when files disagree on one system."""
    said: dict[str, set[str]] = {system: set() for system in systems}
    for run in runs:
        said[run.system].add(run.implementation)
    for frame in (samples.table, samples.problems):
        for system, implementation in frame[["system", "implementation"]].drop_duplicates().itertuples(index=False):
            said[system].add(implementation)
    for system, labels in said.items():
        if len(labels - {UNKNOWN}) > 1:
            raise ResultsError(
                f"system={system} is labelled {' and '.join(sorted(labels - {UNKNOWN}))} by different files. "
                "Labels were swapped. Fix: delete the wrong runs and run them again."
            )
    return {system: next(iter(labels - {UNKNOWN}), UNKNOWN) for system, labels in said.items()}


def levels(runs: list[Run], table: pd.DataFrame) -> list[str]:
    """Level names, innermost first, without the rank itself: as declared, then any that only the byte counts name."""
    declared = next((run.level_names for run in runs if run.level_names), [])
    parts = [part for run in runs for part in run.metrics.loc[run.metrics["metric"] == "bytes", "part"].unique()]
    parts += list(table.loc[table["metric"] == "bytes", "part"].unique())
    met = [str(part).split("/")[0] for part in parts]
    return [name for name in dict.fromkeys([*declared, *met]) if name != "self"]


def _flat(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    items: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict):
            items |= _flat(value, f"{prefix}{key}.")
        else:
            items[f"{prefix}{key}"] = value
    return items


def differences(runs: list[Run]) -> list[str]:
    """Sentences on what the runs do not share although a comparison should: config keys, code, machine."""
    notes = []
    configs = [
        _flat({key: value for key, value in run.config.items() if key != "system"}) for run in runs if run.config
    ]
    for key in sorted({key for config in configs for key in config} - COSMETIC):
        values = list(dict.fromkeys(str(config.get(key, "unset")) for config in configs))
        if len(values) > 1:
            notes.append(f"The runs differ in {key}: {', '.join(values)}.")
    manifests = [_flat(run.manifest) for run in runs]
    for key, name in (
        ("git.commit", "code version"),
        ("hardware.cpu", "CPU"),
        ("hardware.gpus", "GPUs"),
        ("text_sha256", "text"),
    ):
        values = list(dict.fromkeys(str(manifest[key]) for manifest in manifests if key in manifest))
        if len(values) > 1:
            notes.append(f"The runs do not share one {name}: {'; '.join(values)}.")
    return notes


def refuse_mixed_units(runs: list[Run], table: pd.DataFrame) -> None:
    """Raise `ResultsError` when one metric comes in two units, which no median may mix, or a time not in seconds."""
    frames = [run.metrics[["metric", "unit"]].drop_duplicates().astype(object) for run in runs]
    for source in (frames, [table[["metric", "unit"]].drop_duplicates()]):
        pairs = pd.concat(source).drop_duplicates() if source else table.iloc[:0]
        twice = pairs[pairs.duplicated("metric")]
        if len(twice):
            metric = twice["metric"].iloc[0]
            units = ", ".join(map(str, pairs.loc[pairs["metric"] == metric, "unit"]))
            raise ResultsError(f"{metric} comes in several units: {units}. Fix: run the cells of the odd unit again.")
        odd = pairs[pairs["metric"].isin(["step_time", "stage_time", "part_time"]) & (pairs["unit"] != "s")]
        if len(odd):
            raise ResultsError(f"{odd['metric'].iloc[0]} is in {odd['unit'].iloc[0]}, not in s. Fix: measure it again.")
