"""swiftmoe.csv: what each system dropped and when it reached the target loss, a row for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, nan
from typing import Any

import pandas as pd

from analysis.comparison import Comparison
from analysis.popularity import Popularities
from analysis.statistics import Interval, over_seeds
from analysis.tables import NOTHING, aligned, significant
from analysis.target_loss import Target, never_reached, when_reached

NUMBERS = {
    "survival": "share of the routed copies that some expert computed, over all logged steps",
    "dropped_copies": "copies that none did, over all logged steps",
    "dropped_ratio": "dropped copies over the baseline's",
    "target_steps": "steps to the target loss",
    "target_steps_ratio": "over the baseline's",
    "target_s": "training time to the target loss, the run's own step times",
    "target_s_ratio": "over the baseline's",
    "target_timed_s": "steps to the target loss times the median step of the interleaved rounds",
    "target_timed_s_ratio": "over the baseline's",
}
"""Mean over a system's seeds, with _low and _high for their range; ratios are of the same seed."""

COLUMNS = [
    *("system", "implementation", "target_loss"),
    *(f"{name}{end}" for name in NUMBERS for end in ("", "_low", "_high")),
    *("seeds", "status"),
]
REASONS_END = " | "
"""Between the reasons in one cell of `status`."""

PerSeed = Mapping[tuple[str, int], float]
"""A number of each run, by system and seed."""


@dataclass(frozen=True, eq=False)
class Drops:
    """Copies that were dropped.

    Attributes:
        survival: columns system, seed, step, value (share in 0 ... 1 of that step's routed copies).
        totals: over the logged steps of a run.
        shares: survival over the logged steps of a run.
    """

    survival: pd.DataFrame
    totals: PerSeed
    shares: PerSeed


def drops_of(comparison: Comparison, popularities: Popularities) -> Drops:
    """Of every usable run that recorded drops and, for shares, counts.

    Args:
        comparison: trained runs with the metric `dropped_copies`.
        popularities: of its runs.
    """
    frames, totals, shares = [], {}, {}
    for (system, seed), rows in comparison.trained("dropped_copies").groupby(["system", "seed"], sort=False):
        run = str(system), int(seed)
        totals[run] = float(rows["value"].sum())
        if run in popularities:
            routed = popularities[run].routed_copies
            shares[run] = 1 - totals[run] / (routed * len(rows))
            frames.append(rows[["system", "seed", "step"]].assign(value=1 - rows["value"] / routed).sort_values("step"))
    columns = ["system", "seed", "step", "value"]
    survival = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)
    return Drops(survival, totals, shares)


def swiftmoe_table(comparison: Comparison, drops: Drops, curves: pd.DataFrame, target: Target) -> pd.DataFrame:
    """One row for each system, columns as `COLUMNS`; a cell without a number is NaN, `status` says why or `ok`.

    A number stands only where every usable seed has it: the mean over the seeds that reached a target would flatter.

    Args:
        comparison: trained runs and, for interleaved step times, samples.
        drops: of `drops_of`.
        curves: of `analysis.target_loss.smoothed_losses`.
        target: the loss to reach.
    """
    reached = when_reached(curves, target)
    steps = {run: float(when.steps) for run, when in reached.items()}
    seconds = {run: when.seconds for run, when in reached.items() if isfinite(when.seconds)}
    medians = comparison.timed("step_time").groupby(["system", "seed"])["value"].median()
    numbers: dict[str, PerSeed] = {
        "survival": drops.shares,
        "dropped_copies": drops.totals,
        "target_steps": steps,
        "target_s": seconds,
        "target_timed_s": {run: count * float(medians[run]) for run, count in steps.items() if run in medians.index},
    }
    numbers["dropped_ratio"] = _ratios(drops.totals, comparison.baseline)
    for name in ("target_steps", "target_s", "target_timed_s"):
        numbers[f"{name}_ratio"] = _ratios(numbers[name], comparison.baseline)
    missed = never_reached(comparison, curves, target)
    rows = []
    for system in comparison.systems:
        row: dict[str, Any] = {"system": system, "implementation": comparison.implementations[system]}
        row["target_loss"] = target.loss
        for name in NUMBERS:
            seeds = _seeds(comparison, system, ratio=name.endswith("_ratio"))
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), _over(numbers[name], system, seeds), strict=True))
        row["seeds"] = _told_seeds(comparison, system, numbers, missed)
        rows.append(row | {"status": REASONS_END.join(_reasons(comparison, system, drops, target, missed)) or "ok"})
    return pd.DataFrame(rows, columns=COLUMNS)


def _ratios(values: PerSeed, baseline: str) -> dict[tuple[str, int], float]:
    """Over the baseline's of the same seed, where that is more than 0."""
    return {
        (system, seed): value / values[baseline, seed]
        for (system, seed), value in values.items()
        if values.get((baseline, seed), 0.0) > 0
    }


def _seeds(comparison: Comparison, system: str, ratio: bool) -> list[int]:
    seeds = comparison.usable_seeds(system, "run")
    base = comparison.usable_seeds(comparison.baseline, "run")
    return [seed for seed in seeds if seed in base] if ratio else seeds


def _over(values: PerSeed, system: str, seeds: list[int]) -> Interval:
    own = [values[system, seed] for seed in seeds if (system, seed) in values]
    return over_seeds(own) if own and len(own) == len(seeds) else Interval(nan, nan, nan)


def _told_seeds(
    comparison: Comparison, system: str, numbers: Mapping[str, PerSeed], missed: Mapping[tuple[str, int], str]
) -> str:
    """The target of each seed, such as `0: 90 steps, 12.3 s; 1: not in 150 steps`."""
    told = []
    for seed in comparison.usable_seeds(system, "run"):
        run = system, seed
        if run in numbers["target_steps"]:
            seconds = significant(numbers["target_s"].get(run, nan), 3)
            told.append(f"{seed}: {numbers['target_steps'][run]:.0f} steps, {seconds} s")
        elif run in missed:
            told.append(f"{seed}: {missed[run]}")
    return "; ".join(told)


def _reasons(
    comparison: Comparison, system: str, drops: Drops, target: Target, missed: Mapping[tuple[str, int], str]
) -> list[str]:
    base, seeds = comparison.baseline, comparison.usable_seeds(system, "run")
    reasons = [str(problem) for problem in comparison.problems_of(system, "run")]
    if not seeds:
        return reasons or ["it has no usable run"]
    if not all((system, seed) in drops.totals for seed in seeds):
        reasons.append("no run recorded drops" if len(seeds) == 1 else "not every run recorded drops")
    elif not all((system, seed) in drops.shares for seed in seeds):
        reasons.append("without routing.npz's counts there is no share of the routed copies")
    idle = [seed for seed in seeds if drops.totals.get((base, seed)) == 0]
    if idle and system != base:
        reasons.append(f"{base} dropped nothing ({_told(idle)}), so there is no ratio of drops")
    if not isfinite(target.loss):
        reasons.append("there is no target loss")
    late: dict[str, list[int]] = {}
    for seed in seeds:
        if (system, seed) in missed:
            late.setdefault(missed[system, seed], []).append(seed)
    reasons += [f"target loss: {why} ({_told(which)})" for why, which in late.items()]
    late_base = [seed for seed in seeds if (base, seed) in missed]
    if late_base and system != base:
        reasons.append(f"{base} did not reach the target loss ({_told(late_base)}), so there is no ratio of steps")
    return reasons


def _told(seeds: list[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def format_swiftmoe(table: pd.DataFrame, comparison: Comparison, target: Target, window: int) -> str:
    """The table for a terminal, then what is missing and how to read it.

    Args:
        table: of `swiftmoe_table`.
        comparison: it was made from.
        target: the loss to reach.
        window: logged steps that a loss is the mean of.
    """
    base = comparison.baseline
    columns = {
        "survived %": ("survival", 100.0),
        "dropped copies": ("dropped_copies", 1.0),
        f"dropped / {base}": ("dropped_ratio", 1.0),
        "steps to target": ("target_steps", 1.0),
        f"steps / {base}": ("target_steps_ratio", 1.0),
        "s to target": ("target_s", 1.0),
        f"time / {base}": ("target_s_ratio", 1.0),
        f"time / {base}, interleaved": ("target_timed_s_ratio", 1.0),
    }
    cells = pd.DataFrame(
        {
            "system": [comparison.label(system) for system in table["system"]],
            **{
                heading: [with_range(row, name, scale) for _, row in table.iterrows()]
                for heading, (name, scale) in columns.items()
            },
        }
    )
    lines = [aligned(cells)]
    told: dict[str, list[str]] = {}
    for system, status in table[["system", "status"]].itertuples(index=False):
        for reason in status.split(REASONS_END) if status != "ok" else []:
            told.setdefault(reason, []).append(system)
    lines += ["\nto be known:"] if told else []
    lines += [f"  {', '.join(systems)}: {reason}." for reason, systems in told.items()]
    lines.append(f"\n{target}")
    lines.append(
        f"Loss: mean of the last {window} logged steps. All numbers {comparison.kind}, mean over seeds with their "
        "range in brackets; a ratio is of runs of one seed. s: each run's own step times; interleaved: steps times the "
        "median step of the interleaved rounds, which a busy machine disturbs less."
    )
    return "\n".join(lines) + "\n"


def with_range(row: pd.Series, name: str, scale: float = 1.0) -> str:
    """A cell such as `0.71 [0.70, 0.72]` of a row of `swiftmoe_table`; without brackets where there is no range.

    Args:
        row: of the table.
        name: one of `NUMBERS`.
        scale: that its numbers are multiplied by.
    """
    value, low, high = (float(row[f"{name}{end}"]) * scale for end in ("", "_low", "_high"))
    if not isfinite(value):
        return NOTHING
    if low == high:
        return significant(value, 3)
    return f"{significant(value, 3)} [{significant(low, 3)}, {significant(high, 3)}]"
