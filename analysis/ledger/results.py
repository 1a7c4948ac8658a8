"""The result folders behind the claims: read once each, checked, and refused where files contradict one another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.compare import read_index
from analysis.comparison import Comparison, compare
from analysis.errors import ResultsError
from analysis.load import Samples, load_samples, one_line
from analysis.machine import machine_of

_TOLERANCE = 1e-6
"""Relative difference between a summary and its samples that is rounding, no contradiction."""


class Unusable(Exception):
    """Why a test gives no number.

    Attributes:
        refused: a system refused to run it; else there is no result, or none that can be used.
    """

    def __init__(self, reason: str, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


class Results:
    """Folders under one root, each read once.

    Args:
        root: such as results/.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._comparisons: dict[str, Comparison] = {}
        self._timed_in: dict[str, Path | None] = {}
        self._layers: dict[str, Samples] = {}

    def folders(self, pattern: str) -> list[Path]:
        """Folders or files that a pattern such as `netns_2x2_ta_moe_speedup/*/compare` names, at least one; an absolute
        path is itself.

        Raises:
            Unusable: none.
        """
        found = [Path(pattern)] if Path(pattern).is_absolute() else sorted(self.root.glob(pattern))
        if not found:
            raise Unusable("there is no result of it")
        return found

    def only(self, pattern: str) -> Path:
        """The one folder or file that a pattern names.

        Raises:
            Unusable: none.
            ResultsError: several, of which nobody can say which is meant.
        """
        found = self.folders(pattern)
        if len(found) > 1:
            told = " and ".join(str(path) for path in found[:2])
            raise ResultsError(f"{told} are both {pattern}. Fix: name one of them in claims.yaml.")
        return found[0]

    def comparison(self, folder: Path, system: str, over: str, seeds: Sequence[int]) -> Comparison:
        """A comparison in which two systems have usable runs and timed rounds of every seed; `over` is its baseline.

        Args:
            folder: holds compare.json.
            system, over: labels.
            seeds: that both must have.

        Raises:
            Unusable: no comparison there, a system or a seed without usable numbers.
            ResultsError: files that contradict one another.
        """
        key = str(folder)
        if key not in self._comparisons:
            if not (folder / "compare.json").is_file():
                raise Unusable("there is no result of it")
            runs, self._timed_in[key], baseline = read_index(folder)
            self._comparisons[key] = compare(runs, self._timed_in[key], baseline)
        comparison = self._comparisons[key]
        for name in dict.fromkeys((over, system)):
            _refuse_holes(comparison, name, seeds, folder.parent.name)
        medians = comparison.rates.groupby("system")["value"].median()
        _refuse_contradiction(folder, {(name, "tokens_per_s"): float(medians[name]) for name in (system, over)})
        return dataclasses.replace(comparison, baseline=over)

    def timed_on(self, folder: Path) -> str:
        """The machine on which the rounds of a comparison, or else its runs, were timed.

        Args:
            folder: of a comparison that was read.
        """
        samples = self._timed_in[str(folder)]
        return machine_of(samples) if samples is not None else self.trained_on(folder)

    def trained_on(self, folder: Path) -> str:
        """The machine on which the runs of a comparison were trained; several are told one after the other.

        Args:
            folder: of a comparison that was read.
        """
        return "; ".join(dict.fromkeys(machine_of(run.path) for run in self._comparisons[str(folder)].runs))

    def layer(self, folder: Path) -> Samples:
        """A layer benchmark.

        Raises:
            Unusable: no samples there.
            ResultsError: files that contradict one another.
        """
        key = str(folder)
        if key not in self._layers:
            samples = load_samples(folder)
            if samples.status != "done":
                missing = samples.status == "missing"
                raise Unusable("there is no result of it" if missing else f"{samples.status}: {samples.reason}")
            times = samples.table[samples.table["metric"] == "step_time"]
            cells = times.groupby(["shape", "workload", "system"])["value"]
            told = {(*cell, "step_time"): values.median() for cell, values in cells if np.isfinite(values).all()}
            _refuse_contradiction(folder, told)
            self._layers[key] = samples
        return self._layers[key]


def _refuse_holes(comparison: Comparison, system: str, seeds: Sequence[int], place: str) -> None:
    """Raise `Unusable` where a system has no usable numbers of some seed."""
    if system not in comparison.systems:
        raise Unusable(f"{system} is no part of {place}")
    problems = comparison.problems_of(system)
    if problems:
        told = "; ".join(dict.fromkeys(f"{system}: {problem}" for problem in problems))
        raise Unusable(told, refused=all(problem.status == "refused" for problem in problems))
    for source, what in (("run", "runs"), ("samples", "timed rounds")):
        missing = sorted(set(seeds) - set(comparison.usable_seeds(system, source)))
        if missing:
            raise Unusable(f"{system} has no {what} of seed {', '.join(map(str, missing))}")


def _refuse_contradiction(folder: Path, found: Mapping[tuple[str, ...], float]) -> None:
    """Raise `ResultsError` where summary.csv beside the samples says another number than they give: labels or files
    were swapped, or one of the two was not published anew."""
    try:
        summary = pd.read_csv(folder / "summary.csv")
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise ResultsError(
            f"{folder}/summary.csv: can't be read ({one_line(error)[:80]}). Fix: write it anew."
        ) from error
    names = [name for name in ("shape", "workload", "system", "metric") if name in summary]
    told = summary.dropna(subset="value")
    for key, value in zip(told[names].itertuples(index=False, name=None), told["value"], strict=True):
        if key in found and not np.isclose(found[key], value, rtol=_TOLERANCE, atol=0):
            raise ResultsError(
                f"{folder}: of {', '.join(map(str, key))} summary.csv says {value:g} and samples.parquet gives "
                f"{found[key]:g}: labels or files were swapped. Fix: put back what was measured, or write the summary "
                "anew where the samples are right."
            )
