"""methods.fsmoe_partition: nothing is lost, nothing is sent before it exists, and it pays."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from methods.fsmoe_partition import (
    BackwardLayer,
    Partition,
    all_reduce_s,
    backward_s,
    greedy,
    hidden_bytes,
    in_whole_pairs,
    movable_bytes,
    partition,
)
from methods.fsmoe_solver import best_degree, window_s
from moe.costs import AlphaBeta
from moe.schedules import LayerTimes, Part

ALL_REDUCE = AlphaBeta(1.0, 0.5)
TIMES = LayerTimes(Part(1.0, 3.0), Part(1.0, 1.0), Part(1.0, 1.0), Part(0.0, 1.0))


@st.composite
def backwards(draw: st.DrawFn) -> tuple[list[BackwardLayer], float]:
    def part() -> Part:
        return Part(draw(st.floats(0, 0.5)), draw(st.floats(0.1, 10)))

    layers = [
        BackwardLayer(LayerTimes(part(), part(), part(), part()), draw(st.floats(0, 5)), draw(st.floats(0, 60)))
        for _ in range(draw(st.integers(1, 5)))
    ]
    return layers, draw(st.sampled_from([0.0, 7.0, 100.0]))


def check(layers: list[BackwardLayer], made: Partition, carried_bytes: float) -> None:
    """Conservation and prefix feasibility."""
    sizes = [*made.moe_bytes, *made.dense_bytes, made.tail_bytes]
    assert min(sizes) >= 0
    total = carried_bytes + sum(layer.gradient_bytes for layer in layers)
    assert sum(sizes) == pytest.approx(total)
    existing = accumulate((layer.gradient_bytes for layer in layers), initial=carried_bytes)
    sent = accumulate(m + d for m, d in zip(made.moe_bytes, made.dense_bytes, strict=True))
    assert all(out <= there + 1e-6 for there, out in zip(existing, sent, strict=False))
    assert made.tail_bytes >= layers[-1].gradient_bytes - 1e-6, "the last gradients exist when all windows are over"


def test_a_slice_hides_what_its_latency_leaves() -> None:
    assert hidden_bytes(5.0, ALL_REDUCE) == 8
    assert all_reduce_s(8, ALL_REDUCE) == 5
    assert hidden_bytes(0.9, ALL_REDUCE) == 0, "shorter than the latency"
    assert all_reduce_s(0, ALL_REDUCE) == 0


def test_greedy_by_hand() -> None:
    """One chunk is best: 2a + g + s + e = 13 s, the window g + s + e = 5 s hides (5 - 1) / 0.5 bytes."""
    assert best_degree(TIMES)[:2] == (1, 13)
    assert window_s(TIMES, 1) == 5
    hides = 8.0
    layers = [BackwardLayer(TIMES, dense_s=2.0, gradient_bytes=20.0), BackwardLayer(TIMES, 2.0, 20.0)]
    made = greedy(layers, ALL_REDUCE)
    assert made.moe_bytes == (0, hides), "nothing exists before the first layer's dense part has ended"
    assert made.dense_bytes == (0, 2)
    assert made.tail_bytes == pytest.approx(40 - hides - 2)
    with_more = greedy(layers, ALL_REDUCE, carried_bytes=1.0)
    assert with_more.moe_bytes[0] == min(1, hides)


def test_what_does_not_fit_is_carried_to_a_later_window() -> None:
    long = replace(TIMES, experts=Part(0.0, 100.0))
    layers = [BackwardLayer(TIMES, 0.0, 50.0), BackwardLayer(TIMES, 0.0, 0.0), BackwardLayer(long, 0.0, 0.0)]
    made = greedy(layers, ALL_REDUCE)
    assert 0 < made.moe_bytes[1] < 50
    assert made.moe_bytes[1] + made.moe_bytes[2] == pytest.approx(50)
    assert made.tail_bytes == 0


@settings(max_examples=25, deadline=None)
@given(backwards())
def test_nothing_is_lost_or_sent_early_and_it_pays(given_: tuple[list[BackwardLayer], float]) -> None:
    layers, carried_bytes = given_
    first = greedy(layers, ALL_REDUCE, carried_bytes)
    made = partition(layers, ALL_REDUCE, carried_bytes, generations=20)
    for each in (first, made, in_whole_pairs(made, element_bytes=1)):
        check(layers, each, carried_bytes)
    degrees = tuple(best_degree(layer.times).degree for layer in layers)
    zeros = (0.0,) * len(layers)
    total = carried_bytes + sum(layer.gradient_bytes for layer in layers)
    in_the_end = Partition(zeros, zeros, total, degrees)
    assert backward_s(layers, made, ALL_REDUCE) <= backward_s(layers, first, ALL_REDUCE) + 1e-9
    assert backward_s(layers, made, ALL_REDUCE) <= backward_s(layers, in_the_end, ALL_REDUCE) + 1e-9


def test_the_search_finds_what_greed_misses() -> None:
    """Another degree is hardly slower and has a far longer window; greed stays with the best one's. By trying all: the
    best extra slice, alone in the middle of the second mixture."""
    times = LayerTimes(Part(0.2, 1.0), Part(0.0, 8.0), Part(0.0, 8.0), Part(0.0, 8.0))
    layers = [BackwardLayer(times, 0.0, 60.0), BackwardLayer(times, 0.0, 0.0)]
    first = greedy(layers, ALL_REDUCE)
    assert movable_bytes(layers, first) == pytest.approx([0, first.tail_bytes])
    made = partition(layers, ALL_REDUCE)

    def with_extra(extra: float) -> float:
        moe = (0.0, first.moe_bytes[1] + extra)
        degrees = tuple(
            best_degree(layer.times, all_reduce_s(m, ALL_REDUCE)).degree for layer, m in zip(layers, moe, strict=True)
        )
        tried = replace(first, moe_bytes=moe, tail_bytes=first.tail_bytes - extra, degrees=degrees)
        return backward_s(layers, tried, ALL_REDUCE)

    best = min(with_extra(extra) for extra in np.linspace(0, first.tail_bytes, 2001))
    assert best < backward_s(layers, first, ALL_REDUCE) - 0.1
    assert backward_s(layers, made, ALL_REDUCE) == pytest.approx(best, rel=1e-3)


def test_the_search_is_the_same_every_time() -> None:
    layers = [BackwardLayer(TIMES, 0.1, 60.0)] * 3
    assert partition(layers, ALL_REDUCE) == partition(layers, ALL_REDUCE)


def test_whole_pairs_of_elements() -> None:
    made = Partition((3.0, 21.9), (9.5, 0.0), 10.6, (1, 2))
    whole = in_whole_pairs(made)
    assert whole.moe_bytes == (0, 24)
    assert whole.dense_bytes == (8, 0)
    assert whole.tail_bytes == pytest.approx(13.0)
    assert whole.degrees == (1, 2)
