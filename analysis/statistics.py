"""Point values with intervals. Every random draw comes from one fixed generator: the same data give the same digits.

Two kinds of spread are kept apart: over rounds of one interleaved measurement (many: bootstrap), and over seeds
(few: the range, with every point drawn in the figures).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 2000
GENERATOR_SEED = 20240607
FEW = 5
"""Up to this many values an interval is their range: a bootstrap of so few says little."""


class Interval(NamedTuple):
    """A value with its interval, all in the unit of the data: low <= value <= high up to resampling noise."""

    value: float
    low: float
    high: float


def _checked(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"a statistic needs a non-empty list of numbers, not shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("a statistic got NaN or infinity: mark the cell, don't average over it")
    return array


def median(values: ArrayLike) -> float:
    """Median of [n] values, n >= 1.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    return float(np.median(_checked(values)))


def resampled_indices(
    num_values: int, strata: Sequence[Hashable] | None = None, resamples: int = RESAMPLES
) -> NDArray[np.intp]:
    """Indices [resamples, num_values] drawn with replacement, within each stratum when `strata` [num_values] is given.

    A stratum is what was not drawn at random, such as the seed: each resample holds as many rounds of each seed as
    the data do.
    """
    return _drawn(num_values, None if strata is None else tuple(strata), resamples)


@lru_cache(maxsize=8)  # the metrics of one measurement share their rounds
def _drawn(num_values: int, strata: tuple[Hashable, ...] | None, resamples: int) -> NDArray[np.intp]:
    generator = np.random.default_rng(GENERATOR_SEED)
    if strata is None:
        return generator.integers(0, num_values, size=(resamples, num_values))
    indices = np.empty((resamples, num_values), dtype=np.intp)
    for stratum in dict.fromkeys(strata):
        members = np.flatnonzero([label == stratum for label in strata])
        indices[:, members] = members[generator.integers(0, len(members), size=(resamples, len(members)))]
    return indices


def _percentiles(statistics: NDArray[np.float64]) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(statistics, [tail, 100 - tail])
    return float(low), float(high)


def bootstrap_median(values: ArrayLike, strata: Sequence[Hashable] | None = None) -> Interval:
    """Median of [n] values with its 95 % percentile bootstrap interval, resampled within `strata` (see above).

    Raises:
        ValueError: no values, or one that is not finite.
    """
    array = _checked(values)
    resampled = np.median(array[resampled_indices(len(array), strata)], axis=1)
    return Interval(float(np.median(array)), *_percentiles(resampled))


def bootstrap_ratio(numerator: ArrayLike, denominator: ArrayLike, strata: Sequence[Hashable] | None = None) -> Interval:
    """Ratio of medians, median(numerator) / median(denominator), with its 95 % paired bootstrap interval.

    Item i of both lists was measured in the same round: a resample draws pairs, so that noise which hits both systems
    of a round (a busy machine) cancels.

    Args:
        numerator, denominator: [n] values each, in the same unit; the denominator positive.
        strata: [n] labels, such as the seed, within which pairs are drawn.

    Raises:
        ValueError: lengths differ, no values, one that is not finite, or a denominator that is not positive.
    """
    top, bottom = _checked(numerator), _checked(denominator)
    if len(top) != len(bottom):
        raise ValueError(f"a paired ratio needs equally many values, not {len(top)} and {len(bottom)}")
    if (bottom <= 0).any():
        raise ValueError("a ratio's denominator must be positive")
    indices = resampled_indices(len(top), strata)
    resampled = np.median(top[indices], axis=1) / np.median(bottom[indices], axis=1)
    return Interval(float(np.median(top) / np.median(bottom)), *_percentiles(resampled))


def over_seeds(values: ArrayLike, statistic: Callable[..., np.floating] = np.mean) -> Interval:
    """One number per seed, [n], to a value with an interval: the range when n <= 5, else a 95 % bootstrap.

    Args:
        values: [n], n >= 1.
        statistic: what is the value, a numpy reduction that takes `axis`.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    array = _checked(values)
    value = float(statistic(array, axis=0))
    if len(array) <= FEW:
        return Interval(value, float(array.min()), float(array.max()))
    return Interval(value, *_percentiles(np.asarray(statistic(array[resampled_indices(len(array))], axis=1))))


def worst(values: ArrayLike) -> Interval:
    """The largest of [n] values as the value, with the range: for errors and peaks, where the worst case counts.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    array = _checked(values)
    return Interval(float(array.max()), float(array.min()), float(array.max()))


def bootstrap_mean_ratio(
    pairs: Sequence[tuple[ArrayLike, ArrayLike]], strata: Sequence[Sequence[Hashable]] | None = None
) -> Interval:
    """Geometric mean of several ratios of medians, with its 95 % bootstrap interval.

    Args:
        pairs: (numerator, denominator) of each ratio, [n] values each, paired as in `bootstrap_ratio`; what was
            measured apart, such as another shape, is resampled apart.
        strata: for each ratio [n] labels, such as the seeds, within which its pairs are drawn.

    Raises:
        ValueError: no pairs, or as `bootstrap_ratio`.
    """
    if not pairs:
        raise ValueError("a mean needs at least one ratio")
    ratios = [bootstrap_ratio(*pair).value for pair in pairs]
    sides = [(_checked(top), _checked(bottom)) for top, bottom in pairs]
    own_strata = strata if strata is not None else [[None] * len(top) for top, _ in sides]
    labels = [(index, label) for index, own in enumerate(own_strata) for label in own]
    drawn = resampled_indices(len(labels), labels)
    logs, start = np.zeros(len(drawn)), 0
    for top, bottom in sides:
        own = drawn[:, start : start + len(top)] - start
        logs += np.log(np.median(top[own], axis=1) / np.median(bottom[own], axis=1))
        start += len(top)
    return Interval(float(np.exp(np.mean(np.log(ratios)))), *_percentiles(np.exp(logs / len(sides))))


def bootstrap_unpaired_ratio(
    numerator: ArrayLike, denominator: ArrayLike, statistic: Callable[..., np.floating] = np.median
) -> Interval:
    """Ratio of two statistics of values that were measured apart, with its 95 % bootstrap interval: both are resampled
    for themselves.

    Args:
        numerator, denominator: [n] and [m] values in the same unit; the denominator positive.
        statistic: a numpy reduction that takes `axis`.

    Raises:
        ValueError: no values, one that is not finite, or a denominator that is not positive.
    """
    top, bottom = _checked(numerator), _checked(denominator)
    if (bottom <= 0).any():
        raise ValueError("a ratio's denominator must be positive")
    drawn = resampled_indices(len(top) + len(bottom), [0] * len(top) + [1] * len(bottom))
    both = np.concatenate([top, bottom])[drawn]
    resampled = statistic(both[:, : len(top)], axis=1) / statistic(both[:, len(top) :], axis=1)
    return Interval(float(statistic(top, axis=0) / statistic(bottom, axis=0)), *_percentiles(np.asarray(resampled)))


def interquartile_mean(values: ArrayLike) -> float:
    """Mean of the middle half of [n] values: less swayed by a busy machine than the mean, by chance than the median.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    return float(stats.trim_mean(_checked(values), 0.25))


def performance_profile(times: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For each system the share of cases in which it is at most x times slower than the fastest (Dolan and More 2002).

    Args:
        times: [systems, cases] positive times; NaN or infinity where a system has none, which no x makes up for.

    Returns:
        x [n] ascending from 1, at every place where some share changes, and the shares [systems, n].

    Raises:
        ValueError: no case, or one without a time of any system.
    """
    finite = np.where(np.isfinite(times), times, np.inf)
    best = finite.min(axis=0, initial=np.inf)
    if not finite.size or not np.isfinite(best).all():
        raise ValueError("a performance profile needs a time in every case")
    slowdowns = finite / best
    at = np.unique(np.append(slowdowns[np.isfinite(slowdowns)], 1.0))
    return at, (slowdowns[:, :, None] <= at).mean(axis=1)


class Reach(NamedTuple):
    """Time to a target over several runs, some of which may have ended before.

    Attributes:
        median: the time by which half of the runs got there; infinite when more than half never did.
        reached: how many did.
        runs: how many there are.
        waited: the longest time for which a run that never got there was watched; NaN when all got there.
    """

    median: float
    reached: int
    runs: int
    waited: float


def time_to_target(times: Sequence[float | None], budgets: Sequence[float]) -> Reach:
    """Median time to a target by Kaplan and Meier's estimator: a run that ended before it got there says that it takes
    longer than it ran, and is neither left out nor taken for its end.

    Args:
        times: of each run, None where it never got there.
        budgets: how long each run was watched, in the same unit.

    Raises:
        ValueError: no runs, or lists of unlike length.
    """
    if not times or len(times) != len(budgets):
        raise ValueError(f"a time to a target needs as many budgets as runs, not {len(budgets)} for {len(times)}")
    there = [time for time in times if time is not None]
    left = [budget for time, budget in zip(times, budgets, strict=True) if time is None]
    waited = max(left, default=float("nan"))
    if not there:
        return Reach(float("inf"), 0, len(times), waited)
    survival = stats.ecdf(stats.CensoredData(uncensored=there, right=left)).sf
    half = survival.quantiles[survival.probabilities <= 0.5]
    return Reach(float(half[0]) if len(half) else float("inf"), len(there), len(times), waited)
