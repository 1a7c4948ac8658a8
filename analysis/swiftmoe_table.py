"""swiftmoe.csv: what each system dropped, when it reached the target loss and what its steps cost, a row for each."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite, nan
from typing import Any

import pandas as pd

from analysis.comparison import Comparison
from analysis.statistics import Interval, over_seeds
from analysis.swiftmoe_latency import PerSeed
from analysis.swiftmoe_numbers import NUMBERS, TO_BASELINE, Findings, ratio_name
from analysis.tables import NOTHING, aligned, significant
from analysis.target_loss import Target, why_missed

COLUMNS = [
    *("system", "implementation", "target_loss"),
    *(f"{name}{end}" for name in NUMBERS for end in ("", "_low", "_high")),
    *("target_reached", "target_steps_at_least", "seeds", "status"),
]
"""Numbers are means over a system's seeds, with _low and _high for their range; ratios are of the same seed.
target_steps_at_least: mean over all seeds, those that never reached the target counted with the steps that they had."""

REASONS_END = " | "
"""Between the reasons in one cell of `status`."""

RATIOS = [ratio_name(name) for name in TO_BASELINE]

Missed = Mapping[tuple[str, int], int]
"""Of `analysis.target_loss.never_reached`."""


def swiftmoe_table(comparison: Comparison, found: Findings) -> pd.DataFrame:
    """One row for each system, columns as `COLUMNS`; a cell without a number is NaN, `status` says why or `ok`.

    A number stands only where every usable seed has it: the mean over the seeds that reached a target would flatter.

    Args:
        comparison: the systems.
        found: about them.
    """
    numbers, missed = found.numbers, found.missed
    rows = []
    for system in comparison.systems:
        row: dict[str, Any] = {"system": system, "implementation": comparison.implementations[system]}
        row["target_loss"] = found.target.loss
        for name in NUMBERS:
            seeds = _seeds(comparison, system, ratio=name in RATIOS)
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), _over(numbers[name], system, seeds), strict=True))
        row |= _reached(comparison, system, numbers["target_steps"], missed)
        row["seeds"] = _told_seeds(comparison, system, numbers, missed)
        rows.append(row | {"status": REASONS_END.join(_reasons(comparison, system, found)) or "ok"})
    return pd.DataFrame(rows, columns=COLUMNS)


def _seeds(comparison: Comparison, system: str, ratio: bool) -> list[int]:
    seeds = comparison.usable_seeds(system, "run")
    base = comparison.usable_seeds(comparison.baseline, "run")
    return [seed for seed in seeds if seed in base] if ratio else seeds


def _over(values: PerSeed, system: str, seeds: list[int]) -> Interval:
    own = [values[system, seed] for seed in seeds if (system, seed) in values]
    return over_seeds(own) if own and len(own) == len(seeds) else Interval(nan, nan, nan)


def _reached(comparison: Comparison, system: str, steps: PerSeed, missed: Missed) -> dict[str, Any]:
    seeds = comparison.usable_seeds(system, "run")
    known = [steps.get((system, seed)) or missed.get((system, seed)) or nan for seed in seeds]
    there = sum((system, seed) in steps for seed in seeds)
    least = sum(known) / len(known) if known else nan
    return {"target_reached": f"{there} of {len(seeds)}" if seeds else "", "target_steps_at_least": least}


def _told_seeds(comparison: Comparison, system: str, numbers: Mapping[str, PerSeed], missed: Missed) -> str:
    """The target of each seed, such as `0: 90 steps, 12.3 s; 1: not in 150 steps`."""
    told = []
    for seed in comparison.usable_seeds(system, "run"):
        run = system, seed
        if run in numbers["target_steps"]:
            seconds = significant(numbers["target_s"].get(run, nan), 3)
            told.append(f"{seed}: {numbers['target_steps'][run]:.0f} steps, {seconds} s")
        elif run in missed:
            told.append(f"{seed}: {why_missed(missed[run])}")
    return "; ".join(told)


def _reasons(comparison: Comparison, system: str, found: Findings) -> list[str]:
    numbers, missed = found.numbers, found.missed
    base, seeds = comparison.baseline, comparison.usable_seeds(system, "run")
    dropped = numbers["dropped_copies"]
    reasons = [str(problem) for problem in comparison.problems_of(system, "run")]
    if not seeds:
        return reasons or ["it has no usable run"]
    if not all((system, seed) in dropped for seed in seeds):
        reasons.append("no run recorded drops" if len(seeds) == 1 else "not every run recorded drops")
    elif not all((system, seed) in numbers["survival"] for seed in seeds):
        reasons.append("without routing.npz's counts there is no share of the routed copies")
    idle = [seed for seed in seeds if dropped.get((base, seed)) == 0]
    if idle and system != base:
        reasons.append(f"{base} dropped nothing ({_told(idle)}), so there is no ratio of drops")
    if not isfinite(found.target.loss):
        reasons.append("there is no target loss")
    late: dict[int, list[int]] = {}
    for seed in seeds:
        if (system, seed) in missed:
            late.setdefault(missed[system, seed], []).append(seed)
    reasons += [f"target loss: {why_missed(steps)} ({_told(which)})" for steps, which in late.items()]
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
    base, rows = comparison.baseline, [row for _, row in table.iterrows()]
    columns = {
        "survived %": ("survival", 100.0),
        f"dropped / {base}": ("dropped_ratio", 1.0),
        "steps to target": ("target_steps", 1.0),
        f"steps / {base}": ("target_steps_ratio", 1.0),
        "step, ms": ("step_s", 1e3),
        f"time / {base}": ("target_timed_s_ratio", 1.0),
        f"time / {base}, as trained": ("target_s_ratio", 1.0),
        "own parts, % of a step": ("extra_share", 100.0),
        "moving / other steps": ("moving_ratio", 1.0),
    }
    cells = pd.DataFrame(
        {
            "system": [comparison.label(system) for system in table["system"]],
            **{heading: [_cell(row, name, scale) for row in rows] for heading, (name, scale) in columns.items()},
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
        "range in brackets; a ratio is of runs of one seed. step: median of the interleaved rounds; time: steps to the "
        "target times that, which a busy machine disturbs less than the runs' own step times (as trained). > : some "
        "seed never got there and counts with the steps that it had. own parts: popularity, scheduler and metadata; "
        "popularity is where ranks meet first after the backward pass, and so holds the wait for the slowest."
    )
    return "\n".join(lines) + "\n"


def steps_to_target(row: pd.Series) -> str:
    """A cell such as `29 [27, 31]` of a row of `swiftmoe_table`; `> 48 (1 of 2 seeds)` where some seed never got there
    and counts with the steps that it had."""
    least = float(row["target_steps_at_least"])
    if isfinite(row["target_steps"]) or not (isfinite(row["target_loss"]) and isfinite(least)):
        return with_range(row, "target_steps")
    return f"> {least:.0f} ({row['target_reached']} seeds)"


def _cell(row: pd.Series, name: str, scale: float) -> str:
    return steps_to_target(row) if name == "target_steps" else with_range(row, name, scale)


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
