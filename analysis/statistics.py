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


def bootstrap_mean_ratio(pairs: Sequence[tuple[ArrayLike, ArrayLike]]) -> Interval:
    """Geometric mean of several ratios of medians, with its 95 % bootstrap interval.

    Args:
        pairs: (numerator, denominator) of each ratio, [n] values each, paired as in `bootstrap_ratio`; what was
            measured apart, such as another shape, is resampled apart.

    Raises:
        ValueError: no pairs, or as `bootstrap_ratio`.
    """
    if not pairs:
        raise ValueError("a mean needs at least one ratio")
    ratios = [bootstrap_ratio(*pair).value for pair in pairs]
    sides = [(_checked(top), _checked(bottom)) for top, bottom in pairs]
    strata = [index for index, (top, _) in enumerate(sides) for _ in range(len(top))]
    drawn = resampled_indices(len(strata), strata)
    logs, start = np.zeros(len(drawn)), 0
    for top, bottom in sides:
        own = drawn[:, start : start + len(top)] - start
        logs += np.log(np.median(top[own], axis=1) / np.median(bottom[own], axis=1))
        start += len(top)
    return Interval(float(np.exp(np.mean(np.log(ratios)))), *_percentiles(np.exp(logs / len(sides))))
