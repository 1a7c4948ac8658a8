"""moe.costs: known lines are found again, impossible ones are bent to the nearest possible, r2 tells good from bad."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.costs import MIN_BETA_S_PER_BYTE, AlphaBeta, fit_alpha_beta, slowest_pair_s

SIZES = [2**exponent for exponent in range(10, 25, 2)]  # 1 KiB to 16 MiB


def times(alpha: float, beta: float, relative_noise: float = 0.0) -> list[float]:
    """Seconds of `SIZES` on that line, each a little off it."""
    noise = np.random.default_rng(0).uniform(-relative_noise, relative_noise, len(SIZES))
    return [(alpha + beta * size) * (1 + float(off)) for size, off in zip(SIZES, noise, strict=True)]


@given(alpha=st.floats(1e-6, 1e-2), beta=st.floats(1e-12, 1e-7))
def test_a_line_is_found_again(alpha: float, beta: float) -> None:
    fit = fit_alpha_beta(SIZES, times(alpha, beta))
    # Where latency is all there is even for 16 MiB (or even 1 KiB takes far longer than it) a parameter is lost in
    # rounding; the prediction is not.
    for size, expected in zip(SIZES, times(alpha, beta), strict=True):
        assert fit.predict(size) == pytest.approx(expected, rel=1e-9)


def test_both_parameters_survive_noise() -> None:
    """Latency decides the time of the smallest size and bandwidth that of the largest, 10 000 times as long; a fit of
    absolute errors would miss alpha here."""
    fit = fit_alpha_beta(SIZES, times(5e-6, 1e-9, relative_noise=0.03))
    assert fit.alpha_s == pytest.approx(5e-6, rel=0.05)
    assert fit.beta_s_per_byte == pytest.approx(1e-9, rel=0.05)
    assert fit.r2 is not None and 0.99 < fit.r2 < 1


def test_an_exact_line_explains_everything() -> None:
    assert fit_alpha_beta(SIZES, times(5e-6, 1e-9)).r2 == pytest.approx(1)


def test_a_negative_latency_becomes_zero_and_beta_is_fitted_again() -> None:
    sizes, seconds = [100, 1000, 10000], [0.5e-6, 1e-5, 1e-4]  # ten times the bytes take twenty times as long
    fit = fit_alpha_beta(sizes, seconds)
    assert fit.alpha_s == 0
    # By hand: beta = sum(n / t) / sum((n / t)^2), with n / t = 2e8, 1e8 and 1e8.
    assert fit.beta_s_per_byte == pytest.approx(4e8 / 6e16)
    # And r2 by hand: relative residuals 1/3, -1/3, -1/3 squared; weighted mean of t with weights 1 / t^2.
    weights = 1 / np.array(seconds) ** 2
    mean = np.sum(weights * seconds) / np.sum(weights)
    assert fit.r2 == pytest.approx(1 - (3 / 9) / np.sum(weights * (np.array(seconds) - mean) ** 2))


def test_times_that_fall_with_size_still_give_a_positive_beta() -> None:
    fit = fit_alpha_beta([1000, 2000, 4000], [4e-6, 2e-6, 1e-6])
    assert fit.beta_s_per_byte == MIN_BETA_S_PER_BYTE
    assert 1e-6 < fit.alpha_s < 4e-6
    assert fit.r2 is not None and fit.r2 <= 1e-6


def test_equal_times_are_all_latency() -> None:
    fit = fit_alpha_beta(SIZES, [3e-6] * len(SIZES))
    assert fit.alpha_s == pytest.approx(3e-6, rel=0.01)
    assert fit.r2 == 0


def test_nonsense_has_a_low_r2() -> None:
    seconds = [1e-3, 5e-6, 2e-4, 1e-5, 4e-3, 3e-6, 1e-4, 8e-6]
    r2 = fit_alpha_beta(SIZES, seconds).r2
    assert r2 is not None and r2 < 0.3


@given(st.lists(st.floats(1e-7, 10), min_size=8, max_size=8))
def test_any_times_give_a_possible_cost(seconds: list[float]) -> None:
    fit = fit_alpha_beta(SIZES, seconds)
    assert fit.alpha_s >= 0
    assert fit.beta_s_per_byte > 0
    assert fit.r2 is not None and fit.r2 <= 1


@pytest.mark.parametrize(
    ("sizes", "seconds"),
    [([], []), ([1024], [1e-5]), ([1024, 1024], [1e-5, 2e-5]), ([1, 2], [1.0]), ([1, 2], [0.0, 1.0])],
)
def test_what_cannot_be_fitted_is_refused(sizes: list[float], seconds: list[float]) -> None:
    with pytest.raises(AssertionError):
        fit_alpha_beta(sizes, seconds)


def test_an_all_to_all_takes_as_long_as_its_slowest_pair() -> None:
    near, far = AlphaBeta(2e-6, 1e-9), AlphaBeta(1e-6, 1e-8)
    assert slowest_pair_s([near, far], 10) == near.predict(10)  # latency decides
    assert slowest_pair_s([near, far], 1e6) == far.predict(1e6)
