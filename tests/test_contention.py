"""Factors of operations that run at the same time, and what the simulator makes of them."""

from __future__ import annotations

import pytest

from moe.contention import Point, Points, beside, contention_of
from moe.schedules import COMPUTE, INTER, INTRA
from moe.simulator import MEASURED, Task, makespan_s, simulate

GEMM_S, EXCHANGE_S = 8.0, 3.0


def profile(*both_s: float) -> Points:
    """Experts and an exchange at a few sizes, each so many times as long as at the first, alone and at once."""
    sizes = range(1, len(both_s) + 1)
    return {
        "gemm": [Point(10.0 * size, GEMM_S * size) for size in sizes],
        "all_to_all": [Point(7.0 * size, EXCHANGE_S * size) for size in sizes],
        beside("gemm", "all_to_all"): [Point(10.0 * size, s * size) for size, s in zip(sizes, both_s, strict=True)],
    }


@pytest.mark.parametrize("both_s", [8.0, 9.0, 11.0])
def test_simulation_gives_what_was_measured_of_both(both_s: float) -> None:
    contention = contention_of([profile(both_s, both_s)])
    assert contention.keys() == {(COMPUTE, INTER)}
    tasks = [Task("exchange", INTER, MEASURED, EXCHANGE_S), Task("experts", COMPUTE, MEASURED, GEMM_S)]
    assert makespan_s(simulate(tasks, {}, contention)) == pytest.approx(both_s)


def test_profiles_and_sizes_are_taken_together_and_outliers_left_out() -> None:
    assert contention_of([profile(9.5, 20.0), profile(9.5, 1.0), profile(9.5)])[COMPUTE, INTER] == pytest.approx(1.5)


@pytest.mark.parametrize(("both_s", "factor"), [(5.0, 1.0), (14.0, 2.0)])
def test_what_can_not_be_is_noise(both_s: float, factor: float) -> None:
    assert contention_of([profile(both_s)]) == {(COMPUTE, INTER): factor}


def test_every_measured_pair_has_its_resources() -> None:
    measured = profile(9.0)
    measured["all_gather"] = measured["all_to_all"]
    measured[beside("gemm", "all_gather")] = measured[beside("all_gather", "all_to_all")] = [Point(1.0, 9.0)]
    assert contention_of([measured]).keys() == {(COMPUTE, INTER), (COMPUTE, INTRA), (INTRA, INTER)}
    assert contention_of([{"gemm": [Point(1.0, 1.0)]}]) == {}
