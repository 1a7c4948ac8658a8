"""model.csv: what a topology-aware dispatch was modelled to save, beside what was measured, a row for each system."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from analysis.comparison import Comparison
from analysis.errors import ResultsError
from analysis.load import Run
from analysis.pair_costs import communication_s, pair_costs, row_bytes, traffic_bytes
from analysis.routing import Routing
from analysis.statistics import Interval, bootstrap_median, bootstrap_ratio, over_seeds
from analysis.summary import DIRECTIONS
from analysis.tables import NOTHING, aligned, binary_bytes, significant

COMMUNICATION = ("dispatch", "combine")
COMPUTATION = ("gate", "experts")

COLUMNS = [
    *("system", "implementation"),
    *("measured_communication_s", "measured_communication_low_s", "measured_communication_high_s"),
    *("modelled_communication_s", "communication_error"),
    *("measured_step_ratio", "measured_step_ratio_low", "measured_step_ratio_high"),
    *("modelled_step_ratio", "step_ratio_error"),
    *("measured_bytes", "modelled_bytes"),
    *("val_loss_step", "val_loss", "val_loss_ratio", "val_loss_ratio_low", "val_loss_ratio_high"),
    *("val_loss_ratio_seeds", "status"),
]
"""Times are of one training step; ratios are to the baseline, a step ratio below 1 is faster; an error is modelled over
measured, minus 1; bytes are token traffic that leaves its rank, over all ranks, in one step."""

REASONS_END = " | "
"""Between the reasons in one cell of `status`."""

_ALIKE = 1.1
"""Up to this factor between the bytes that were sent and those that the model counts they are told as the same."""

Routings = dict[tuple[str, int | None], Routing]
"""Of every usable run that has counts, by system and seed."""


@dataclass
class Modelled:
    """What the cost model says of one system, mean over its seeds; NaN where it says nothing, with `reasons` why."""

    seconds: float = float("nan")
    num_bytes: float = float("nan")
    reasons: list[str] = field(default_factory=list)


def model_table(comparison: Comparison, routings: Routings) -> pd.DataFrame:
    """One row for each system, columns as `COLUMNS`; a cell without a number is NaN, `status` says why or `ok`.

    Args:
        comparison: trained runs and interleaved samples.
        routings: counts of its runs.
    """
    modelled = {system: _modelled(comparison, routings, system) for system in comparison.systems}
    step, losses = _last_common_losses(comparison)
    rows = [_row(comparison, system, modelled, step, losses) for system in comparison.systems]
    return pd.DataFrame(rows, columns=COLUMNS)


def stage_sums(comparison: Comparison, system: str, stages: Iterable[str]) -> pd.DataFrame:
    """Seconds of some stages together, forward and backward, by round: columns seed, round, value.

    Rounds that lack one of the parts are left out.
    """
    wanted = [f"{direction}/{stage}" for direction in DIRECTIONS for stage in stages]
    times = comparison.timed("stage_time")
    own = times[(times["system"] == system) & times["part"].isin(wanted)]
    own = own[np.isfinite(own["value"].astype(float))]
    sums = own.groupby(["seed", "round"])["value"].agg(["sum", "size"]).reset_index()
    return sums[sums["size"] == len(wanted)].rename(columns={"sum": "value"})[["seed", "round", "value"]]


def stage_interval(comparison: Comparison, system: str, stages: Iterable[str]) -> Interval | None:
    """Median over rounds of `stage_sums` with its bootstrap interval, None when there is no round."""
    sums = stage_sums(comparison, system, stages)
    return bootstrap_median(sums["value"], list(sums["seed"])) if len(sums) else None


def step_seconds(comparison: Comparison, system: str) -> pd.DataFrame:
    """Measured step times of the interleaved rounds: columns seed, round, value."""
    times = comparison.timed("step_time")
    return times[times["system"] == system][["seed", "round", "value"]]


def sent_bytes(comparison: Comparison, system: str) -> float:
    """Measured token traffic that left its rank in a timed step, else in a training step; NaN when nobody counted."""
    for table in (comparison.timed("bytes"), comparison.trained("bytes")):
        own = table[table["system"] == system]
        if not len(own):
            continue
        clock = "round" if "round" in own else "step"
        level_and_kind = own["part"].astype(str).str.partition("/")
        crosses = (level_and_kind[0] != "self") & (level_and_kind[2] == "alltoall")
        return float(own.loc[crosses, "value"].sum() / len(own[["seed", clock]].drop_duplicates()))
    return float("nan")


def _modelled(comparison: Comparison, routings: Routings, system: str) -> Modelled:
    if sent_bytes(comparison, system) == 0:
        return Modelled(reasons=["it sends no tokens by all-to-all, so there is nothing to model"])
    seconds, num_bytes, reasons = [], [], []
    for run in _runs_of(comparison, system):
        routing = routings.get((system, run.seed))
        if routing is None:
            reasons.append("no dispatch counts, so nothing is modelled")
            continue
        try:
            copy_bytes = row_bytes(run)
            num_bytes.append(traffic_bytes(routing.last_copies_SLWW, copy_bytes))
            seconds.append(communication_s(pair_costs(run), routing.last_copies_SLWW, copy_bytes))
        except ResultsError as error:
            reasons.append(str(error))
    mean_s, mean_bytes = (float(np.mean(values)) if values else float("nan") for values in (seconds, num_bytes))
    return Modelled(mean_s, mean_bytes, list(dict.fromkeys(reasons)))


def _runs_of(comparison: Comparison, system: str) -> list[Run]:
    return [run for run in comparison.runs if run.system == system]


def _row(
    comparison: Comparison,
    system: str,
    modelled: dict[str, Modelled],
    step: int | None,
    losses: dict[tuple[str, int], float],
) -> dict[str, Any]:
    base, own = comparison.baseline, modelled[system]
    row: dict[str, Any] = {"system": system, "implementation": comparison.implementations[system]}
    reasons = [*_problems(comparison, system), *own.reasons]
    communication = stage_interval(comparison, system, COMMUNICATION)
    if communication is not None:
        row |= _named("measured_communication", communication, "_s")
    elif not comparison.problems_of(system, "samples"):
        reasons.append("its stages were not timed")
    row |= {"modelled_communication_s": own.seconds, "modelled_bytes": own.num_bytes}
    row["measured_bytes"] = sent_bytes(comparison, system)
    if communication is not None and communication.value > 0:
        row["communication_error"] = own.seconds / communication.value - 1

    pairs = step_seconds(comparison, system).merge(step_seconds(comparison, base), on=["seed", "round"])
    if len(pairs):
        ratio = bootstrap_ratio(pairs["value_x"], pairs["value_y"], list(pairs["seed"]))
        row |= _named("measured_step_ratio", ratio)
        predicted, reason = _predicted_ratio(float(np.median(pairs["value_y"])), modelled[base], own)
        row |= {"modelled_step_ratio": predicted, "step_ratio_error": predicted / ratio.value - 1}
        reasons += [f"{base}: {reason}"] if reason and np.isfinite(own.seconds) else []
    reasons += _told_bytes(row)

    seeds = [seed for seed in comparison.run_seeds if (system, seed) in losses and (base, seed) in losses]
    if seeds:
        ratios = [losses[system, seed] / losses[base, seed] for seed in seeds]
        row |= {"val_loss_step": step, "val_loss": float(np.mean([losses[system, seed] for seed in seeds]))}
        row |= _named("val_loss_ratio", over_seeds(ratios))
        row["val_loss_ratio_seeds"] = "; ".join(
            f"{seed}: {ratio:.6f}" for seed, ratio in zip(seeds, ratios, strict=True)
        )
    elif _runs_of(comparison, system):
        reasons.append(f"no validation loss at a step that all runs have and that {base} has, too")
    return row | {"status": REASONS_END.join(dict.fromkeys(reasons)) or "ok"}


def _problems(comparison: Comparison, system: str) -> list[str]:
    """What is missing of a system, seeds with one reason together."""
    told: dict[tuple[str, str, str], list[str]] = {}
    for problem in comparison.problems_of(system):
        where = "in training" if problem.source == "run" else "in the timed rounds"
        seed = "all" if problem.seed is None else str(problem.seed)
        told.setdefault((problem.status, where, problem.reason), []).append(seed)
    return [f"{status} {where} (seeds: {', '.join(seeds)}): {why}" for (status, where, why), seeds in told.items()]


def _named(name: str, interval: Interval, unit: str = "") -> dict[str, float]:
    """The three columns of a value with its interval."""
    return {f"{name}{end}{unit}": number for end, number in zip(("", "_low", "_high"), interval, strict=True)}


def _predicted_ratio(base_s: float, base: Modelled, own: Modelled) -> tuple[float, str]:
    """(step time over the baseline's if only communication changed, a sentence when that can't be said)."""
    if not np.isfinite(base.seconds):
        return float("nan"), "it has no modelled communication, so no step time is predicted"
    if base.seconds >= base_s:
        told = f"its modelled communication ({significant(base.seconds, 3)} s) is longer than its measured step"
        return float("nan"), f"{told} ({significant(base_s, 3)} s), so no step time is predicted"
    return (base_s - base.seconds + own.seconds) / base_s, ""


def _told_bytes(row: dict[str, Any]) -> list[str]:
    """A sentence where the bytes that were sent are not those that the model counts."""
    measured, modelled = row["measured_bytes"], row["modelled_bytes"]
    if not (np.isfinite(measured) and np.isfinite(modelled) and measured > 0 and modelled > 0):
        return []
    factor = measured / modelled
    if 1 / _ALIKE <= factor <= _ALIKE:
        return []
    return [
        f"a measured step sends {significant(factor, 3)} times the bytes that the model counts (it knows no padding, "
        "no drops, no token sent once for several choices, and its counts are of the steps before the timed ones)"
    ]


def _last_common_losses(comparison: Comparison) -> tuple[int | None, dict[tuple[str, int], float]]:
    """(the last step that every run with a validation loss has one of, that loss by system and seed)."""
    held_out = comparison.trained("val_loss")
    if not len(held_out):
        return None, {}
    of_runs = held_out.groupby(["system", "seed"])["step"].agg(set)
    common = set.intersection(*of_runs)
    if not common:
        return None, {}
    step = int(max(common))
    rows = held_out[held_out["step"] == step]
    return step, {
        (system, int(seed)): float(value)
        for system, seed, value in rows[["system", "seed", "value"]].itertuples(index=False)
    }


def format_model(table: pd.DataFrame, comparison: Comparison, steps: str) -> str:
    """The table for a terminal: measured beside modelled, then what is missing or to be known.

    Args:
        table: of `model_table`.
        comparison: it was made from.
        steps: the logged steps whose counts the model reads, in words.
    """
    cells = pd.DataFrame(
        {
            "system": [comparison.label(system) for system in table["system"]],
            "communication ms, measured": [
                _with_interval(row, "measured_communication", 1e3, "_s") for _, row in table.iterrows()
            ],
            "modelled": [significant(value * 1e3, 3) for value in table["modelled_communication_s"]],
            "error": [_percent(value) for value in table["communication_error"]],
            f"step time / {comparison.baseline}, {comparison.kind}": [
                _with_interval(row, "measured_step_ratio") for _, row in table.iterrows()
            ],
            "modelled ": [significant(value, 3) for value in table["modelled_step_ratio"]],
            "error ": [_percent(value) for value in table["step_ratio_error"]],
            "sent off rank, measured": [binary_bytes(value, 3) for value in table["measured_bytes"]],
            "modelled  ": [binary_bytes(value, 3) for value in table["modelled_bytes"]],
            f"val loss / {comparison.baseline}": [
                _with_interval(row, "val_loss_ratio", digits=5) for _, row in table.iterrows()
            ],
        }
    )
    lines = [aligned(cells)]
    told: dict[str, list[str]] = {}
    for system, status in table[["system", "status"]].itertuples(index=False):
        for reason in status.split(REASONS_END) if status != "ok" else []:
            told.setdefault(reason, []).append(system)
    lines += ["\nto be known:"] if told else []
    lines += [f"  {', '.join(systems)}: {reason}." for reason, systems in told.items()]
    lines.append(f"\nModelled: T = max over pairs of alpha + beta * bytes, four exchanges a layer; counts of {steps}.")
    lines += [
        f"Val loss at step {step:.0f}, in brackets the range of the seeds."
        for step in table["val_loss_step"].dropna().unique()
    ]
    return "\n".join(lines) + "\n"


def _with_interval(row: pd.Series, name: str, scale: float = 1.0, unit: str = "", digits: int = 3) -> str:
    numbers = [float(row[f"{name}{end}{unit}"]) * scale for end in ("", "_low", "_high")]
    if not np.isfinite(numbers[0]):
        return NOTHING
    value, low, high = (significant(number, digits) for number in numbers)
    return f"{value} [{low}, {high}]"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:+.0f} %" if np.isfinite(fraction) else NOTHING
