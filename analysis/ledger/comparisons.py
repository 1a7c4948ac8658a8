"""Statistics of comparisons of trained systems that claims.yaml can name, with the keys that they take there.

All of them give an `Evidence`, or raise `Unusable` with the reason why there is no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from analysis.comparison import Comparison
from analysis.ledger.evidence import Evidence, Statistic
from analysis.ledger.results import Results, Unusable
from analysis.statistics import Interval, bootstrap_mean_ratio, over_seeds
from analysis.swiftmoe_numbers import findings_of, ratio_name
from analysis.target_loss import why_missed


class _Compared(Statistic):
    """What comparisons share: folders with compare.json, a system, what it stands against, the seeds of both."""

    folder: str
    system: str
    over: str
    seeds: list[int] = Field(min_length=1)

    def _read(self, results: Results) -> list[tuple[Path, Comparison]]:
        folders = results.folders(self.folder)
        return [(path, results.comparison(path, self.system, self.over, self.seeds)) for path in folders]

    def _read_one(self, results: Results) -> tuple[Path, Comparison]:
        path = results.only(self.folder)
        return path, results.comparison(path, self.system, self.over, self.seeds)


class Throughput(_Compared):
    """Tokens per second over another system's, paired by seed and round; the geometric mean over several folders."""

    statistic: Literal["throughput"]
    tell: Literal["ratio", "less_time_percent", "more_time_percent"] = "ratio"

    def evidence(self, results: Results) -> Evidence:
        """See `Statistic`."""
        read = self._read(results)
        pairs, strata = [], []
        for _, comparison in read:
            rounds = comparison.paired_rates(self.system)
            rounds = rounds[rounds["seed"].isin(self.seeds)]
            if not len(rounds):
                raise Unusable(f"no round with both {self.system} and {self.over}")
            pairs.append((rounds["value"].to_numpy(), rounds["base"].to_numpy()))
            strata.append(rounds["seed"].to_list())
        ratio = bootstrap_mean_ratio(pairs, strata)
        if self.tell == "less_time_percent":  # of a step
            ratio = Interval(*(100 * (1 - 1 / number) for number in ratio))
        if self.tell == "more_time_percent":  # the other end is the lower one
            ratio = Interval(*(100 * (1 / number - 1) for number in (ratio.value, ratio.high, ratio.low)))
        hardware = [results.timed_on(path) for path, _ in read]
        return Evidence(ratio, read[0][1].kind, "; ".join(dict.fromkeys(hardware)), _told(read))


class ValidationLoss(_Compared):
    """By how many per cent the last validation loss is above another system's, each seed by itself."""

    statistic: Literal["validation_loss"]

    def evidence(self, results: Results) -> Evidence:
        """See `Statistic`."""
        read = self._read(results)
        excess = [
            100 * (self._last(comparison, self.system, seed) / self._last(comparison, self.over, seed) - 1)
            for _, comparison in read
            for seed in self.seeds
        ]
        hardware = [results.trained_on(path) for path, _ in read]
        return Evidence(over_seeds(excess), read[0][1].kind, "; ".join(dict.fromkeys(hardware)), _told(read))

    def _last(self, comparison: Comparison, system: str, seed: int) -> float:
        losses = comparison.trained("val_loss")
        own = losses[(losses["system"] == system) & (losses["seed"] == seed)].sort_values("step")
        if not len(own):
            raise Unusable(f"{system} has no validation loss of seed {seed}")
        return float(own["value"].iloc[-1])


class Replicas(_Compared):
    """By how many per cent less: one of `analysis.swiftmoe_numbers` below another system's, each seed by itself."""

    statistic: Literal["replicas"]
    number: Literal["dropped_copies", "target_steps", "target_s", "target_timed_s"]

    def evidence(self, results: Results) -> Evidence:
        """See `Statistic`."""
        path, comparison = self._read_one(results)
        found = findings_of(comparison)
        if self.number.startswith("target") and not np.isfinite(found.target.loss):
            raise Unusable(found.target.origin)
        ratios = found.numbers[ratio_name(self.number)]
        late = found.missed if self.number.startswith("target") else {}
        for seed in self.seeds:
            told = [
                f"{name} {why_missed(late[name, seed])}" for name in (self.over, self.system) if (name, seed) in late
            ]
            if told:
                raise Unusable(f"seed {seed} did not reach the target loss: {', '.join(told)}")
            if (self.system, seed) not in ratios:
                raise Unusable(f"{self.system} or {self.over} has no {self.number} of seed {seed}")
        hardware = results.timed_on(path) if self.number == "target_timed_s" else results.trained_on(path)
        if self.number == "target_s" and ";" in hardware:
            raise Unusable(f"its runs' own times are of several machines: {hardware}")
        fewer = over_seeds([100 * (1 - ratios[self.system, seed]) for seed in self.seeds])
        return Evidence(fewer, comparison.kind, hardware, tuple(comparison.notes))


class PartShare(_Compared):
    """Share of a step that parts of it take, in per cent: medians over the timed rounds, each seed by itself."""

    statistic: Literal["part_share"]
    parts: list[str] = Field(min_length=1)

    def evidence(self, results: Results) -> Evidence:
        """See `Statistic`."""
        path, comparison = self._read_one(results)
        parts, steps = comparison.timed("part_time"), comparison.timed("step_time")
        parts = parts[(parts["system"] == self.system) & parts["part"].isin(self.parts)]
        if set(parts["part"]) != set(self.parts):
            raise Unusable(f"{self.system} has no times of {', '.join(sorted(set(self.parts) - set(parts['part'])))}")
        steps_s = steps[steps["system"] == self.system].groupby("seed")["value"].median()
        parts_s = parts.groupby(["seed", "part"])["value"].median().groupby("seed").sum()
        shares = (100 * parts_s / steps_s).dropna()
        if sorted(shares.index) != sorted(self.seeds):
            raise Unusable(f"{self.system} was not timed with every seed")
        return Evidence(over_seeds(shares.to_numpy()), comparison.kind, results.timed_on(path), tuple(comparison.notes))


class HarnessShare(_Compared):
    """Share of a step that the harness takes, in per cent: the median step of each run, the seeds' mean."""

    statistic: Literal["harness_share"]

    def evidence(self, results: Results) -> Evidence:
        """See `Statistic`."""
        path, comparison = self._read_one(results)
        key = ["seed", "step"]
        own, steps = (
            rows[rows["system"] == self.system].set_index(key)["value"]
            for rows in (comparison.trained("harness_time"), comparison.trained("step_time"))
        )
        shares = (100 * own / steps).dropna().groupby("seed").median()
        if sorted(shares.index) != sorted(self.seeds):
            raise Unusable(f"{self.system} did not record the harness' time with every seed")
        return Evidence(
            over_seeds(shares.to_numpy()), comparison.kind, results.trained_on(path), tuple(comparison.notes)
        )


def _told(read: Sequence[tuple[Path, Comparison]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(note for _, comparison in read for note in comparison.notes))
