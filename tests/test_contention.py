"""Factors of operations that run at the same time, and what the simulator makes of them."""

from __future__ import annotations

import pytest

from moe.contention import beside, contention_of
from moe.costs import AlphaBeta
from moe.schedules import COMPUTE, INTER, INTRA
from moe.simulator import MEASURED, Task, makespan_s, simulate

GEMM, EXCHANGE = AlphaBeta(1e-3, 1e-9), AlphaBeta(2e-3, 1e-8)
SIZES = {"gemm": 6e6, "all_to_all": 1e5, "all_gather": 2e5}
GEMM_S, EXCHANGE_S = 2 * 1e-3 + 6e-3, 2e-3 + 1e-3  # two products a pass pay their latency


def costs(both_s: float) -> dict[str, AlphaBeta]:
    """With a pair that takes so many seconds at any size."""
    return {"gemm": GEMM, "all_to_all": EXCHANGE, beside("gemm", "all_to_all"): AlphaBeta(both_s, 1e-15)}


@pytest.mark.parametrize("both_s", [0.008, 0.009, 0.011, 0.014])
def test_simulation_gives_what_was_measured_of_both(both_s: float) -> None:
    contention = contention_of(costs(both_s), SIZES)
    assert contention.keys() == {(COMPUTE, INTER)}
    tasks = [Task("exchange", INTER, MEASURED, EXCHANGE_S), Task("experts", COMPUTE, MEASURED, GEMM_S)]
    assert makespan_s(simulate(tasks, {}, contention)) == pytest.approx(both_s, rel=1e-6)


def test_a_pair_faster_than_its_longer_part_slows_nothing() -> None:
    assert contention_of(costs(0.005), SIZES) == {(COMPUTE, INTER): 1.0}


def test_every_measured_pair_has_its_resources() -> None:
    measured = costs(0.01) | {"all_gather": EXCHANGE}
    measured[beside("gemm", "all_gather")] = measured[beside("all_gather", "all_to_all")] = AlphaBeta(0.01, 1e-15)
    assert contention_of(measured, SIZES).keys() == {(COMPUTE, INTER), (COMPUTE, INTRA), (INTRA, INTER)}
    assert contention_of({"gemm": GEMM, "all_to_all": EXCHANGE}, SIZES) == {}
