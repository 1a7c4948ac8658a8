"""From a comparison to summary.csv: a row per system and metric, a number with its interval or the reason for none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from analysis.comparison import Comparison
from analysis.statistics import Interval, bootstrap_median, bootstrap_ratio, over_seeds, worst

COLUMNS = ["system", "implementation", "metric", "value", "low", "high", "unit", "status"]
TRAIN_LOSS_STEPS = 10
"""train_loss is the mean over so many last recorded steps: one batch's loss says more about the batch."""

BYTE_CLASSES = ("alltoall", "reduction", "other")
DIRECTIONS = ("forward", "backward")
STAGES = ("gate", "dispatch", "experts", "combine")
STEP_PARTS = (
    *("popularity", "expert_gradients", "gradient_shards", "dense_gradients", "optimizer"),
    *("scheduler", "metadata", "weights", "migration"),
)
"""Of a training step outside its MoE layers, in order."""
ERROR_PARTS = ("output", "input_grad", "gate_grad", "expert_grad")
NO_NUMBER = Interval(float("nan"), float("nan"), float("nan"))


def summarise(comparison: Comparison) -> pd.DataFrame:
    """The rows of summary.csv, columns as COLUMNS; a row without a number has NaN and a status that says why.

    Metrics and their intervals: train_loss, val_loss, bytes/<level>/<class> (mean over seeds; range of the seeds),
    tokens_per_s, stage_time/<direction>/<stage>, part_time/<part of the step> (median over rounds; 95 % bootstrap),
    tokens_per_s_ratio (ratio of medians to the baseline; 95 % paired bootstrap), relative_error/<part>, peak_memory,
    dropped_copies/timed (worst; range), dropped_copies (mean copies per training step), and one `run` row per system
    and seed without numbers.
    """
    rows = [row for system in comparison.systems for row in _system_rows(comparison, system)]
    return pd.DataFrame(rows, columns=COLUMNS)


def _system_rows(comparison: Comparison, system: str) -> Iterator[dict[str, Any]]:
    yield _seed_row(comparison, system, "train_loss", "nats/token", *_last_losses(comparison, system))
    yield _seed_row(comparison, system, "val_loss", "nats/token", *_per_seed(comparison, system, "val_loss", _last))
    yield _rate_row(comparison, system)
    yield _ratio_row(comparison, system)
    source = byte_source(comparison)
    for part in byte_parts(comparison):
        numbers, flaw = _mean_bytes(comparison, system, part, source)
        yield _seed_row(comparison, system, f"bytes/{part}", "B/step", numbers, flaw, source)
    for part in stage_parts(comparison):
        yield _timed_row(comparison, system, "stage_time", part, "s", bootstrap_median)
    for part in _ordered(comparison.timed("part_time")["part"], STEP_PARTS):
        yield _timed_row(comparison, system, "part_time", part, "s", bootstrap_median)
    errors = comparison.timed("relative_error")
    compared = system != comparison.reference or system in set(errors["system"])  # a reference has no error to itself
    for part in _ordered(errors["part"], ERROR_PARTS) if compared else []:
        yield _timed_row(comparison, system, "relative_error", part, "1", worst)
    if len(comparison.timed("peak_memory")):
        yield _timed_row(comparison, system, "peak_memory", "", "B", worst)
    if source == "run" and len(comparison.trained("dropped_copies")):
        numbers, flaw = _per_seed(comparison, system, "dropped_copies", _mean)
        yield _seed_row(comparison, system, "dropped_copies", "copies/step", numbers, flaw)
    if len(comparison.timed("dropped_copies")):
        name = "dropped_copies/timed" if source == "run" else "dropped_copies"
        yield _timed_row(comparison, system, "dropped_copies", "", "copies/step", worst) | {"metric": name}
    for problem in comparison.problems_of(system):
        yield _row(comparison, system, "run", NO_NUMBER, "", str(problem))


def byte_source(comparison: Comparison) -> str:
    """Where byte counts come from: `run` (training steps) when any run has them, else `samples` (timed layer steps)."""
    return "run" if len(comparison.trained("bytes")) else "samples"


def byte_parts(comparison: Comparison) -> list[str]:
    """`<level>/<class>` of every byte count, innermost level first, without what stays on its rank."""
    read = comparison.trained if byte_source(comparison) == "run" else comparison.timed
    wanted = [f"{level}/{kind}" for level in comparison.levels for kind in BYTE_CLASSES]
    return [part for part in _ordered(read("bytes")["part"], wanted) if not part.startswith("self/")]


def stage_parts(comparison: Comparison) -> list[str]:
    """`<direction>/<stage>` of every stage time, in the order in which a step runs through them."""
    forward = [f"{DIRECTIONS[0]}/{stage}" for stage in STAGES]
    backward = [f"{DIRECTIONS[1]}/{stage}" for stage in STAGES]
    return _ordered(comparison.timed("stage_time")["part"], forward + backward)


def _ordered(met: Iterable[Any], wanted: Iterable[str]) -> list[str]:
    """Parts that occur, in the wanted order, unknown ones behind."""
    parts = list(dict.fromkeys(map(str, met)))
    known = [part for part in wanted if part in parts]
    return known + [part for part in parts if part not in known]


def _row(
    comparison: Comparison, system: str, metric: str, interval: Interval, unit: str, status: str
) -> dict[str, Any]:
    implementation = comparison.implementations[system]
    return dict(zip(COLUMNS, (system, implementation, metric, *interval, unit, status), strict=True))


def _status(comparison: Comparison, system: str, source: str) -> tuple[bool, str]:
    """Whether a system has usable numbers of a source at all, and the status of its rows."""
    problems = comparison.problems_of(system, source)
    expected = comparison.run_seeds if source == "run" else comparison.sample_seeds
    usable = comparison.usable_seeds(system, source)
    if not usable:
        told = dict.fromkeys(f"{problem.status}: {problem.reason}" for problem in problems)
        return False, "; ".join(told) or "missing: not part of this measurement"
    return True, "ok" if len(usable) == len(expected) else f"{len(usable)} of {len(expected)} seeds"


def _last(rows: pd.DataFrame) -> float:
    return float(rows.sort_values("step")["value"].iloc[-1])


def _mean(rows: pd.DataFrame) -> float:
    return float(rows["value"].mean())


def _last_losses(comparison: Comparison, system: str) -> tuple[dict[Any, float], str]:
    def mean_of_last(rows: pd.DataFrame) -> float:
        return float(rows.sort_values("step")["value"].iloc[-TRAIN_LOSS_STEPS:].mean())

    return _per_seed(comparison, system, "loss", mean_of_last)


def _per_seed(
    comparison: Comparison,
    system: str,
    metric: str,
    reduce: Callable[[pd.DataFrame], float],
) -> tuple[dict[Any, float], str]:
    """({seed: number} of a training metric over a system's usable seeds, what is wrong with them or "")."""
    everything = comparison.trained(metric)
    own = everything[everything["system"] == system]
    numbers: dict[Any, float] = {}
    for seed in comparison.usable_seeds(system, "run"):
        rows = own[own["seed"] == seed]
        if not len(rows):
            return {}, f"missing: not recorded (seed {seed})"
        bad = rows[~np.isfinite(rows["value"])]
        if len(bad):
            return {}, f"nan: not finite in step {bad['step'].iloc[0]} (seed {seed})"
        numbers[seed] = reduce(rows)
    return numbers, ""


def _mean_bytes(comparison: Comparison, system: str, part: str, source: str) -> tuple[dict[Any, float], str]:
    """({seed: mean bytes per metered step}, what is wrong or "").

    A metered step has no row for a class that sent nothing, so an absent row of a seed that has any is a zero.
    """
    everything, clock = comparison.trained("bytes"), "step"
    metered = comparison.trained("loss")
    if source != "run":
        everything = metered = comparison.timed("bytes")
        clock = "round"
    own = everything[everything["system"] == system]
    steps = metered[metered["system"] == system].groupby("seed")[clock].nunique()
    numbers: dict[Any, float] = {}
    for seed in comparison.usable_seeds(system, source):
        of_seed = own[own["seed"] == seed]
        values = of_seed.loc[of_seed["part"] == part, "value"]
        if not len(of_seed):
            return {}, f"missing: not recorded (seed {seed})"
        if not (np.isfinite(values) & (values >= 0)).all():
            return {}, f"nan: not a byte count (seed {seed})"
        numbers[seed] = float(values.sum() / steps[seed])
    return numbers, ""


def _seed_row(
    comparison: Comparison,
    system: str,
    metric: str,
    unit: str,
    numbers: dict[Any, float],
    flaw: str,
    source: str = "run",
) -> dict[str, Any]:
    usable, status = _status(comparison, system, source)
    if not usable or flaw:
        return _row(comparison, system, metric, NO_NUMBER, unit, flaw if usable else status)
    return _row(comparison, system, metric, over_seeds(list(numbers.values())), unit, status)


def _timed_row(
    comparison: Comparison, system: str, metric: str, part: str, unit: str, interval: Callable[..., Interval]
) -> dict[str, Any]:
    """A row over all timed rounds of a system; `interval` gets the values and, for a bootstrap, the seeds as strata."""
    name = f"{metric}/{part}" if part else metric
    usable, status = _status(comparison, system, "samples")
    everything = comparison.timed(metric)
    own = everything[(everything["system"] == system) & (everything["part"] == part)]
    if not usable:
        return _row(comparison, system, name, NO_NUMBER, unit, status)
    if not len(own):
        return _row(comparison, system, name, NO_NUMBER, unit, "missing: not recorded")
    if own["seed"].nunique() < len(comparison.sample_seeds):
        status = f"{own['seed'].nunique()} of {len(comparison.sample_seeds)} seeds"
    if not np.isfinite(own["value"]).all():
        bad = own[~np.isfinite(own["value"])].iloc[0]
        status = f"nan: not finite in round {bad['round']} (seed {bad['seed']})"
        return _row(comparison, system, name, NO_NUMBER, unit, status)
    strata = {"strata": list(own["seed"])} if interval is bootstrap_median else {}
    return _row(comparison, system, name, interval(own["value"].to_numpy(), **strata), unit, status)


def _rate_row(comparison: Comparison, system: str) -> dict[str, Any]:
    usable, status = _status(comparison, system, "samples")
    if not usable:
        return _row(comparison, system, "tokens_per_s", NO_NUMBER, "tokens/s", status)
    rates = comparison.rates
    own = rates[rates["system"] == system]
    interval = bootstrap_median(own["value"].to_numpy(), list(own["seed"]))
    return _row(comparison, system, "tokens_per_s", interval, "tokens/s", status)


def _ratio_row(comparison: Comparison, system: str) -> dict[str, Any]:
    unit = f"x {comparison.baseline}"
    usable, status = _status(comparison, system, "samples")
    if not usable:
        return _row(comparison, system, "tokens_per_s_ratio", NO_NUMBER, unit, status)
    if system == comparison.baseline:
        return _row(comparison, system, "tokens_per_s_ratio", Interval(1.0, 1.0, 1.0), unit, status)
    pairs = comparison.paired_rates(system)
    if not len(pairs):
        _, why = _status(comparison, comparison.baseline, "samples")
        why = f"missing: no round with {comparison.baseline} ({why})"
        return _row(comparison, system, "tokens_per_s_ratio", NO_NUMBER, unit, why)
    rates = comparison.rates
    rounds = int((rates["system"] == system).sum())
    if len(pairs) < rounds:
        status = f"{len(pairs)} of {rounds} rounds paired"
    interval = bootstrap_ratio(pairs["value"].to_numpy(), pairs["base"].to_numpy(), list(pairs["seed"]))
    return _row(comparison, system, "tokens_per_s_ratio", interval, unit, status)
