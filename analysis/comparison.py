"""One comparison: runs and interleaved samples of several systems, checked, with what is missing listed beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pandas as pd

from analysis import checks
from analysis.checks import Problem
from analysis.errors import ResultsError
from analysis.load import Run, Samples, load_run, load_samples


@dataclass(frozen=True, eq=False)
class Comparison:
    """What tables and figures are made from.

    Attributes:
        systems: names, in order of appearance.
        implementations: {system: native, upstream or unknown}.
        baseline: the system that ratios refer to.
        reference: the system that losses are compared with: `reference` where it is part of the comparison, else the
            baseline.
        runs: the usable runs only.
        samples: measured cells of the usable (system, seed) pairs only; columns as in samples.parquet.
        problems: everything that is not usable, with its reason.
        run_seeds, sample_seeds: the seeds that every system should have.
        levels: names of the cluster's levels, innermost first, without the rank itself.
        timed_step: what one timed step is, such as `shape m256, workload uniform`; "" when nothing was timed.
        kind: `measured`, `modelled` or `simulated`.
        ranks: such as `4 gloo ranks on one machine`; "" when nothing declares them.
        cluster, emulation: name of the cluster and the phrase that says what stands in for it ("" for a real one).
        notes: sentences that tell where the runs were not alike.
    """

    systems: list[str]
    implementations: dict[str, str]
    baseline: str
    reference: str
    runs: list[Run]
    samples: pd.DataFrame
    problems: list[Problem]
    run_seeds: list[int]
    sample_seeds: list[int]
    levels: list[str]
    timed_step: str
    kind: str
    ranks: str
    cluster: str
    emulation: str
    notes: list[str]
    _trained: dict[str, pd.DataFrame] = field(default_factory=dict, repr=False)

    def label(self, system: str) -> str:
        """Legend text, such as `flat (native)`."""
        return f"{system} ({self.implementations[system]})"

    def problems_of(self, system: str, source: str | None = None) -> list[Problem]:
        """What is missing of a system, in training (`run`), in the timed rounds (`samples`) or in both."""
        return [item for item in self.problems if item.system == system and source in (None, item.source)]

    def trained(self, metric: str) -> pd.DataFrame:
        """One metric of every usable run: columns system, seed, step, part, value, unit."""
        if metric not in self._trained:
            self._trained[metric] = self._collect(metric)
        return self._trained[metric]

    def _collect(self, metric: str) -> pd.DataFrame:
        columns = ["system", "seed", "step", "part", "value", "unit"]
        frames = []
        for run in self.runs:
            rows = run.metrics[run.metrics["metric"] == metric]
            if len(rows):
                frames.append(rows.assign(system=run.system, seed=run.seed)[columns])
        if not frames:
            return pd.DataFrame(columns=columns)
        return pd.concat(frames, ignore_index=True).astype({"part": object, "unit": object})

    def timed(self, metric: str) -> pd.DataFrame:
        """One metric of the interleaved samples: columns system, seed, round, part, value, unit."""
        return self._timed.get(metric, self._no_sample)

    @cached_property
    def _no_sample(self) -> pd.DataFrame:
        return self.samples.iloc[:0][["system", "seed", "round", "part", "value", "unit"]]

    @cached_property
    def _timed(self) -> dict[str, pd.DataFrame]:
        columns = list(self._no_sample.columns)
        groups = self.samples.groupby("metric", sort=False)
        return {str(metric): rows[columns].reset_index(drop=True) for metric, rows in groups}

    def usable_seeds(self, system: str, source: str) -> list[int]:
        """Seeds of a system whose numbers may be used, from training (`run`) or from the timed rounds (`samples`)."""
        return self._usable[source].get(system, [])

    @cached_property
    def _usable(self) -> dict[str, dict[str, list[int]]]:
        usable: dict[str, dict[str, list[int]]] = {"run": {}, "samples": {}}
        trained = [(run.system, run.seed) for run in self.runs if run.seed is not None]
        timed = self.samples[["system", "seed"]].drop_duplicates().itertuples(index=False, name=None)
        for source, pairs in (("run", trained), ("samples", timed)):
            for system, seed in sorted(pairs):
                usable[source].setdefault(system, []).append(int(seed))
        return usable

    @cached_property
    def rates(self) -> pd.DataFrame:
        """Tokens per second of every timed round: columns system, seed, round, value."""
        key = ["system", "seed", "round"]
        times, tokens = self.timed("step_time"), self.timed("tokens")
        # One count stands for all rounds, as every round computes the same tokens.
        single = tokens.groupby(["system", "seed"])["value"].transform("size") == 1
        each = times.merge(tokens[~single], on=key, suffixes=("", "_tokens"))
        shared = times.merge(tokens[single].drop(columns="round"), on=["system", "seed"], suffixes=("", "_tokens"))
        both = pd.concat([each, shared]).sort_values(key, kind="stable", ignore_index=True)
        return both[key].assign(value=both["value_tokens"] / both["value"])

    def paired_rates(self, system: str) -> pd.DataFrame:
        """Rounds in which `system` and the baseline were both timed: columns seed, round, value, base, ratio."""
        own = self.rates[self.rates["system"] == system].drop(columns="system")
        base = (
            self.rates[self.rates["system"] == self.baseline].drop(columns="system").rename(columns={"value": "base"})
        )
        pairs = own.merge(base, on=["seed", "round"])
        return pairs.assign(ratio=pairs["value"] / pairs["base"])


def compare(run_dirs: Sequence[Path], samples_dir: Path | None, baseline: str = "flat") -> Comparison:
    """Load and check everything that one comparison is made of.

    Args:
        run_dirs: one folder per system and seed; folders of failed, refused or absent runs belong in the list too.
        samples_dir: folder of the interleaved samples, None or absent when nothing was timed.
        baseline: the system that ratios refer to.

    Raises:
        ResultsError: nothing to compare, a cell that stands there twice, labels that disagree, runs of different
            clusters or kinds, or a baseline that no file knows.
    """
    loaded = [load_run(path) for path in run_dirs]
    samples = load_samples(samples_dir) if samples_dir is not None else Samples(Path(), "missing", "nothing was timed")
    systems = list(dict.fromkeys([run.system for run in loaded] + _sampled_systems(samples)))
    if not systems:
        raise ResultsError("nothing to compare: no run folder and no sample. Fix: run `python -m experiments.compare`.")
    if baseline not in systems:
        raise ResultsError(
            f"baseline={baseline}: no run and no sample of it. "
            f"Fix: name one of {', '.join(systems)}, or run {baseline}."
        )
    checks.refuse_duplicates(loaded)
    kind, cluster, emulation = checks.shared_labels(loaded, samples)
    checks.refuse_mixed_units(loaded, samples.table)

    problems = [Problem(run.system, run.seed, "run", run.status, run.reason) for run in loaded if not run.is_done]
    done = [run for run in loaded if run.is_done]
    last_steps: dict[int | None, int] = {}
    for run in done:
        last_steps[run.seed] = max(checks.last_step(run), last_steps.get(run.seed, 0))
    flaws = [checks.flaw(run, last_steps[run.seed]) for run in done]
    problems += [flaw for flaw in flaws if flaw]
    run_seeds = sorted({run.seed for run in loaded if run.seed is not None})
    present = {(run.system, run.seed) for run in loaded}
    problems += [
        Problem(system, seed, "run", "missing", "there is no run of this seed")
        for system in systems
        for seed in run_seeds
        if (system, seed) not in present and (system, None) not in present
    ]
    table, sample_problems, sample_seeds = checks.check_samples(samples, systems)
    stopped = str(samples.metadata.get("stopped", ""))
    return Comparison(
        systems=systems,
        implementations=checks.implementations(systems, loaded, samples),
        baseline=baseline,
        reference="reference" if "reference" in systems else baseline,
        runs=[run for run, flaw in zip(done, flaws, strict=True) if not flaw],
        samples=table,
        problems=problems + sample_problems,
        run_seeds=run_seeds,
        sample_seeds=sample_seeds,
        levels=checks.levels(loaded, table),
        timed_step="; ".join(told for told in (checks.timed_step(table), stopped) if told),
        kind=kind,
        ranks=next((run.ranks for run in loaded if run.ranks), ""),
        cluster=cluster,
        emulation=emulation,
        notes=[*checks.differences(done), *([f"The timing was stopped: {stopped}."] if stopped else [])],
    )


def _sampled_systems(samples: Samples) -> list[str]:
    return list(dict.fromkeys([*samples.table["system"], *samples.problems["system"]]))
