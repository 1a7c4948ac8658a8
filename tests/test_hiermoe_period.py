"""methods.hiermoe_period: swapping more often helps sooner, and never swapping not at all."""

from __future__ import annotations

import pytest

from methods.hiermoe_paper import FIGURE_9, PERIOD_GAINS, QWEN3_30B_A3B
from methods.hiermoe_period import period_gains, period_rows

SETTING = QWEN3_30B_A3B.setting(FIGURE_9)


def test_without_a_swap_nothing_is_gained() -> None:
    gains = period_gains(SETTING, 32, [5], iterations=3, spread=0.7)
    assert gains == {5: pytest.approx(1.0)}


def test_more_swaps_gain_sooner() -> None:
    gains = period_gains(SETTING, 64, [1, 4], iterations=8, spread=0.7)
    assert gains[1] > gains[4] > 1


def test_rows_stand_beside_the_paper_s() -> None:
    rows = period_rows(num_tokens=16, iterations=2)
    assert [row["paper"] for row in rows] == list(PERIOD_GAINS.values())
    assert all(row["kind"] == "modelled" and "(ours)" in row["source"] for row in rows)
    assert rows[-1]["ours"] == pytest.approx(1.0), "two iterations, a swap every eight"
