"""Intervals on cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.statistics import (
    Reach,
    bootstrap_mean_ratio,
    bootstrap_median,
    bootstrap_ratio,
    bootstrap_unpaired_ratio,
    interquartile_mean,
    median,
    over_seeds,
    performance_profile,
    resampled_indices,
    time_to_target,
    worst,
)


def noisy_pairs(ratio: float, count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Rounds that a busy machine slows together: the pairs' ratio is far less noisy than either side."""
    random = np.random.default_rng(5)
    busy = random.gamma(2, 0.5, count) + 0.5
    return ratio * 100 * busy * random.normal(1, 0.01, count), 100 * busy


def test_a_known_ratio_lies_in_a_narrow_interval() -> None:
    numerator, denominator = noisy_pairs(2.0)
    result = bootstrap_ratio(numerator, denominator)
    assert result.low <= 2.0 <= result.high
    assert result.value == pytest.approx(np.median(numerator) / np.median(denominator), rel=1e-15)
    assert result.high - result.low < 0.1


def test_pairing_is_what_makes_it_narrow() -> None:
    numerator, denominator = noisy_pairs(2.0)
    paired = bootstrap_ratio(numerator, denominator)
    shuffled = bootstrap_ratio(np.random.default_rng(1).permutation(numerator), denominator)
    assert shuffled.high - shuffled.low > 5 * (paired.high - paired.low)


def test_a_mean_of_ratios_is_geometric_and_of_one_ratio_it_is_that_ratio() -> None:
    two, eight = noisy_pairs(2.0), noisy_pairs(8.0, count=30)
    mean = bootstrap_mean_ratio([two, eight])
    expected = np.sqrt(bootstrap_ratio(*two).value * bootstrap_ratio(*eight).value)
    assert mean.value == pytest.approx(expected, rel=1e-12)
    assert mean.low <= 4.0 <= mean.high
    assert bootstrap_mean_ratio([two]) == pytest.approx(bootstrap_ratio(*two), rel=2e-3)
    with pytest.raises(ValueError, match="at least one ratio"):
        bootstrap_mean_ratio([])


def test_ratios_measured_apart_are_resampled_apart() -> None:
    """With one draw for both, every resample of the second would undo the first's noise, and the mean had no width."""
    random = np.random.default_rng(2).uniform(1, 2, 41)
    ones = np.ones(41)
    apart = bootstrap_mean_ratio([(random, ones), (ones, random)])
    assert apart.high - apart.low > 0.03


def test_a_constant_ratio_has_no_width() -> None:
    denominator = np.linspace(1, 3, 21)
    assert bootstrap_ratio(0.5 * denominator, denominator) == pytest.approx((0.5, 0.5, 0.5), rel=1e-12)


def test_the_interval_covers_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(11)
    samples = random.normal(10, 1, size=(120, 30))
    covered = sum(interval.low <= 10 <= interval.high for interval in map(bootstrap_median, samples))
    assert 0.88 <= covered / len(samples) <= 1.0


def test_the_same_data_give_the_same_digits() -> None:
    numerator, denominator = noisy_pairs(1.3)
    assert bootstrap_ratio(numerator, denominator) == bootstrap_ratio(numerator, denominator)
    assert bootstrap_median(numerator) == bootstrap_median(numerator)


def test_strata_keep_their_size() -> None:
    strata = ["a"] * 7 + ["b"] * 3
    indices = resampled_indices(10, strata, resamples=50)
    assert indices.shape == (50, 10)
    assert (indices[:, :7] < 7).all()
    assert (indices[:, 7:] >= 7).all()
    assert len(np.unique(indices[:, :7])) == 7


def test_strata_remove_the_spread_between_seeds() -> None:
    values = np.array([1.0, 1.1, 0.9] * 4 + [5.0, 5.1, 4.9] * 4)
    seeds = [0] * 12 + [1] * 12
    mixed, separate = bootstrap_median(values), bootstrap_median(values, seeds)
    assert separate.high - separate.low <= mixed.high - mixed.low


def test_few_seeds_give_their_range() -> None:
    assert over_seeds([3.0, 1.0, 2.6]) == pytest.approx((2.2, 1.0, 3.0))
    assert over_seeds([4.0]) == (4.0, 4.0, 4.0)
    assert over_seeds([3.0, 1.0, 2.6], np.median) == (2.6, 1.0, 3.0)


def test_many_seeds_give_a_bootstrap_inside_the_range() -> None:
    values = np.random.default_rng(2).normal(0, 1, 30)
    result = over_seeds(values)
    assert values.min() < result.low < result.value < result.high < values.max()
    assert result.value == pytest.approx(values.mean())


def test_the_worst_is_the_largest() -> None:
    assert worst([1e-7, 3e-7, 2e-7]) == (3e-7, 1e-7, 3e-7)


@pytest.mark.parametrize("function", [median, bootstrap_median, over_seeds, worst])
@pytest.mark.parametrize(("values", "message"), [([], "non-empty"), ([1.0, float("nan")], "NaN"), ([np.inf], "NaN")])
def test_what_is_not_a_number_is_an_error(function, values, message) -> None:
    with pytest.raises(ValueError, match=message):
        function(values)


def test_a_ratio_refuses_unpaired_and_empty_denominators() -> None:
    with pytest.raises(ValueError, match="equally many values, not 2 and 1"):
        bootstrap_ratio([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="must be positive"):
        bootstrap_ratio([1.0, 2.0], [1.0, 0.0])


def test_the_mean_of_one_ratio_is_that_ratio_also_within_strata() -> None:
    numerator, denominator = noisy_pairs(2.0)
    seeds = [0] * 20 + [1] * 20
    assert bootstrap_mean_ratio([(numerator, denominator)], [seeds]) == pytest.approx(
        bootstrap_ratio(numerator, denominator, seeds), rel=1e-12
    )


def test_what_was_measured_apart_is_resampled_apart() -> None:
    numerator, denominator = noisy_pairs(2.0)
    apart = bootstrap_unpaired_ratio(numerator, denominator)
    paired = bootstrap_ratio(numerator, denominator)
    assert apart.value == paired.value
    assert apart.high - apart.low > 5 * (paired.high - paired.low)
    assert bootstrap_unpaired_ratio([4.0, 4.0], [2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="positive"):
        bootstrap_unpaired_ratio([1.0], [0.0])


def test_the_interquartile_mean_is_of_the_middle_half() -> None:
    values = [1e6, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, -1e6]
    assert interquartile_mean(values) == pytest.approx(3.5)
    with pytest.raises(ValueError, match="NaN"):
        interquartile_mean([1.0, np.nan])


def test_a_performance_profile_counts_cases_within_a_factor_of_the_best() -> None:
    at, shares = performance_profile(np.array([[1.0, 2.0, 4.0], [2.0, 1.0, np.nan]]))
    assert list(at) == [1.0, 2.0]
    assert shares == pytest.approx(np.array([[2 / 3, 1.0], [1 / 3, 2 / 3]]))
    with pytest.raises(ValueError, match="in every case"):
        performance_profile(np.array([[1.0, np.nan]]))


def test_a_run_that_never_got_there_is_neither_left_out_nor_taken_for_its_end() -> None:
    assert time_to_target([10.0, 20.0, 30.0], [90.0] * 3) == (20.0, 3, 3, pytest.approx(np.nan, nan_ok=True))
    assert time_to_target([10.0, None, 30.0], [90.0] * 3) == Reach(30.0, 2, 3, 90.0)
    assert time_to_target([10.0, None, None], [90.0, 50.0, 90.0]) == Reach(float("inf"), 1, 3, 90.0)
    assert time_to_target([None], [7.0]) == Reach(float("inf"), 0, 1, 7.0)
    with pytest.raises(ValueError, match="as many budgets as runs"):
        time_to_target([1.0], [])
