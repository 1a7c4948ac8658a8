"""methods.fsmoe_solver: numbers by hand, against the simulated pipeline, and enumeration against the paper's SLSQP."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from methods.fsmoe_paper import TESTBED_B, Layer, layer_work
from methods.fsmoe_solver import (
    DEGREES,
    best_degree,
    case_of,
    case_seconds,
    chunk_of,
    layer_s,
    slsqp_degree,
    window_s,
)
from moe.costs import AlphaBeta
from moe.schedules import LayerPlan, LayerTimes, LayerWork, Part, StepPlan, layer_times, step_tasks
from moe.simulator import MEASURED, makespan_s, simulate

LAYER = Layer(
    batch_size=4, sequence_length=512, model_dim=2048, hidden_dim=8192, capacity_factor=1.2, gated=False
)  # on testbed B: N_ESP = 4


@st.composite
def layers(draw: st.DrawFn, equal: bool) -> LayerTimes:
    """Random times; with `equal` an all-gather takes as long as a reduce-scatter."""

    def part() -> Part:
        return Part(draw(st.floats(0, 0.5)), draw(st.floats(0.1, 10)))

    gather = part()
    return LayerTimes(part(), gather, gather if equal else part(), part())


def simulated_s(times: LayerTimes, degree: int, slice_s: float, one_link: bool = False) -> float:
    """The backward of one layer with that pipeline, by the simulator."""
    costs = {
        "all_to_all": AlphaBeta(times.all_to_all.alpha_s, 1.0),
        "all_gather": AlphaBeta(times.all_gather.alpha_s, times.all_gather.work_s),
        "reduce_scatter": AlphaBeta(times.reduce_scatter.alpha_s, times.reduce_scatter.work_s),
        "gemm": AlphaBeta(times.experts.alpha_s / 2, 1.0),
        "all_reduce": AlphaBeta(0.0, 1.0),
    }
    work = LayerWork(times.all_to_all.work_s, 1.0, times.experts.work_s / 2, 1, 0.0, 0.0, 0.0, 0.0)
    plan = StepPlan((LayerPlan(1, degree, moe_bytes=slice_s),), one_link=one_link)
    spans = simulate(step_tasks([work], plan, carried_bytes=slice_s), costs)
    forward = [span for span in spans if not span.task.backward]
    return makespan_s(spans) - makespan_s(forward)


@pytest.mark.parametrize(
    ("backward", "slice_ms", "expected_ms", "expected_cases"),
    [
        (False, 0, [22.078, 17.061, 15.663, 15.178], [2, 4, 4, 4]),
        (True, 0, [24.085, 17.061, 15.663, 15.178], [2, 4, 4, 4]),
        (True, 10, [24.085, 17.061, 17.561, 18.961], [2, 4, 1, 1]),
    ],
)
def test_a_layer_of_testbed_b(
    backward: bool, slice_ms: float, expected_ms: list[float], expected_cases: list[int]
) -> None:
    """By hand: a = 0.175 + 3.06e-7 * 4 * 2.4 * 512 * 4 * 2048 / 4 / r and so on, milliseconds."""
    times = layer_times(layer_work(LAYER, TESTBED_B), TESTBED_B.costs, backward)
    assert layer_s(times, np.array(DEGREES), slice_ms / 1e3) * 1e3 == pytest.approx(expected_ms, abs=5e-4)
    assert [case_of(times, degree, slice_ms / 1e3) for degree in DEGREES] == expected_cases
    best = best_degree(times, slice_ms / 1e3)
    assert (best.degree, best.case) == (DEGREES[np.argmin(expected_ms)], expected_cases[np.argmin(expected_ms)])
    found = slsqp_degree(times, slice_ms / 1e3)
    assert found.degree == best.degree
    assert found.seconds == pytest.approx(best.seconds)


@given(layers(equal=True), st.sampled_from([1, 2, 3, 4, 6, 8]), st.floats(0, 30))
def test_the_four_cases_are_the_largest_of_four_and_the_simulated_pipeline(
    times: LayerTimes, degree: int, slice_s: float
) -> None:
    expected = float(layer_s(times, degree, slice_s))
    assert case_seconds(times, degree, slice_s)[case_of(times, degree, slice_s) - 1] == pytest.approx(expected)
    assert simulated_s(times, degree, slice_s) == pytest.approx(expected)


@given(layers(equal=True), st.sampled_from([1, 2, 3, 4, 6, 8]), st.floats(0, 30))
def test_links_that_wait_for_each_other_are_one_longer_link(times: LayerTimes, degree: int, slice_s: float) -> None:
    expected = float(layer_s(times.on_one_link(), degree, slice_s))
    assert simulated_s(times, degree, slice_s, one_link=True) == pytest.approx(expected)


def test_unequal_collectives_in_the_node_are_nearly_the_largest_of_four() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        gather = Part(*rng.uniform((0, 0.1), (0.5, 10)))
        scatter = gather.scaled(rng.uniform(0.75, 1.25))
        times = LayerTimes(
            Part(*rng.uniform((0, 0.1), (0.5, 10))), gather, scatter, Part(*rng.uniform((0, 0.1), (0.5, 10)))
        )
        degree, slice_s = int(rng.choice([1, 2, 3, 4, 6, 8])), rng.uniform(0, 30) * rng.integers(2)
        largest = float(layer_s(times, degree, slice_s))
        case = case_seconds(times, degree, slice_s)[case_of(times, degree, slice_s) - 1]
        assert case == pytest.approx(largest, rel=0.085)
        assert simulated_s(times, degree, slice_s) == pytest.approx(largest, rel=0.042)


@given(layers(equal=False), st.sampled_from(DEGREES))
def test_a_slice_in_the_window_costs_nothing_and_a_longer_one_does(times: LayerTimes, degree: int) -> None:
    window = float(window_s(times, degree))
    a, g, s, _ = chunk_of(times, degree)
    assert window >= g + s - 1e-9
    assert layer_s(times, degree, window) == pytest.approx(float(layer_s(times, degree)))
    assert layer_s(times, degree, window + 1) == pytest.approx(float(layer_s(times, degree)) + 1)


@given(layers(equal=True), st.sampled_from(DEGREES))
def test_the_window_is_the_papers(times: LayerTimes, degree: int) -> None:
    """t_olp,moe by its three lines."""
    a, g, s, e = chunk_of(times, degree)
    r, case = degree, case_of(times, degree)
    lines = {2: r * e + g + s - 2 * (r - 1) * a, 3: g + s, 4: r * g + r * s - 2 * (r - 1) * a}
    assert window_s(times, degree) == pytest.approx(lines[case])


def test_slsqp_and_enumeration_agree() -> None:
    """With g = s the cases are the maximum, so SLSQP can't beat enumeration; on few layers it may miss the best degree,
    where that lies in another case than the real-valued optimum beside it."""
    rng = np.random.default_rng(1)
    worse = []
    for _ in range(16):
        gather = Part(*rng.uniform((0, 0.1), (0.5, 10)))
        times = LayerTimes(
            Part(*rng.uniform((0, 0.1), (0.5, 10))), gather, gather, Part(*rng.uniform((0, 0.1), (0.5, 10)))
        )
        slice_s = float(rng.uniform(0, 20) * rng.integers(2))
        best, found = best_degree(times, slice_s), slsqp_degree(times, slice_s)
        assert found.seconds == pytest.approx(float(layer_s(times, found.degree, slice_s)))
        assert found.seconds >= best.seconds * (1 - 1e-9)
        worse.append(found.seconds / best.seconds - 1)
    assert np.mean(np.array(worse) < 1e-9) >= 0.9
    assert max(worse) < 0.1


def test_enumeration_takes_any_degrees() -> None:
    times = LayerTimes(Part(0.1, 1.0), Part(0.0, 2.0), Part(0.0, 2.0), Part(0.0, 4.0))
    all_of_them = best_degree(times, degrees=range(1, 20))
    assert all_of_them.seconds <= best_degree(times).seconds
    assert best_degree(times, degrees=[3]).degree == 3
    assert slsqp_degree(times, degrees=[3]).degree == 3


def test_without_shards_it_is_pipemoe() -> None:
    """max(2 r a, 2 a + r e): PipeMoE's model (arXiv 2501.10714 compares with it)."""
    times = LayerTimes(Part(0.2, 3.0), Part(0, 0), Part(0, 0), Part(0.1, 5.0))
    for degree in DEGREES:
        a, _, _, e = chunk_of(times, degree)
        assert layer_s(times, degree) == pytest.approx(max(2 * degree * a, 2 * a + degree * e))


def test_measured_tasks_need_no_cost() -> None:
    work = LayerWork(0.0, 0.0, 0.0, 0, 0.0, 1.0, 2.0, 0.0)
    tasks = step_tasks([work], StepPlan((LayerPlan(),)))
    dense = [task for task in tasks if task.operation == MEASURED]
    assert [task.work for task in dense] == [1.0, 2.0]
