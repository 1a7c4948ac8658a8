"""moe.simulator: timelines by hand, and what holds of every timeline."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.costs import AlphaBeta
from moe.simulator import MEASURED, Program, Span, Task, busy_s, makespan_s, overlap_s, simulate, task_s

COSTS = {"all_to_all": AlphaBeta(1.0, 0.5), "gemm": AlphaBeta(2.0, 0.25)}


def task(resource: str, seconds: float, *after: int, background: bool = False) -> Task:
    return Task("work", resource, MEASURED, seconds, after=after, background=background)


def starts(tasks: list[Task]) -> list[float]:
    return [span.start_s for span in simulate(tasks, COSTS)]


def test_a_task_takes_its_calls_and_its_work() -> None:
    assert task_s(Task("dispatch", "inter", "all_to_all", 10), COSTS) == 1 + 5
    assert task_s(Task("experts", "compute", "gemm", 8, calls=3), COSTS) == 3 * 2 + 2
    assert task_s(task("compute", 7.5), COSTS) == 7.5
    with pytest.raises(KeyError, match="all_reduce"):
        task_s(Task("gradient", "inter", "all_reduce", 1), COSTS)


def test_a_recorded_profile_takes_the_place_of_costs() -> None:
    spans = simulate([Task("dispatch", "inter", "all_to_all", 10), task("inter", 1.0)], lambda _task: 3.0)
    assert [(span.start_s, span.end_s) for span in spans] == [(0, 3), (3, 6)]


def test_a_resource_takes_its_tasks_in_launch_order() -> None:
    # The second on the link is free at once, but the first one waits for the computation.
    assert starts([task("compute", 4), task("link", 1, 0), task("link", 1)]) == [0, 4, 5]


def test_different_resources_overlap() -> None:
    tasks = [task("link", 2), task("compute", 3, 0), task("link", 2), task("compute", 3, 2)]
    spans = simulate(tasks, COSTS)
    assert [span.start_s for span in spans] == [0, 2, 2, 5]
    assert makespan_s(spans) == 8
    assert busy_s(spans) == {"link": 4, "compute": 6}
    assert overlap_s(spans, "link", "compute") == overlap_s(spans, "compute", "link") == 2


def test_background_fills_gaps_and_yields_to_what_is_ready() -> None:
    compute, link = task("compute", 4), task("link", 2, 1)
    filler = task("link", 3, background=True)
    assert starts([filler, compute, link]) == [0, 0, 4], "a gap of four seconds"
    assert starts([filler, task("link", 4), task("compute", 1)]) == [4, 0, 0], "no gap before the end"
    # Two of them: the second begins in the gap and isn't interrupted, so the link's own task is late.
    assert starts([filler, compute, link, filler]) == [0, 0, 6, 3]
    # What ends at the same moment counts as ready before anything is chosen.
    assert starts([task("link", 4), task("compute", 4), task("link", 1, 1), filler]) == [0, 0, 4, 5]


def test_background_in_launch_order() -> None:
    tasks = [task("link", 1), task("link", 5, 0, background=True), task("link", 2, background=True)]
    assert starts(tasks) == [0, 1, 6], "both are free when the link is: the first launched goes first"


def test_contention_slows_while_both_work() -> None:
    tasks = [task("inter", 4), task("intra", 2), task("compute", 9)]
    contention = {("inter", "intra"): 1.5}
    spans = simulate(tasks, COSTS, contention)
    # Together until the shorter has done its 2 s in 3; by then the longer has done 2 of 4.
    assert [span.end_s for span in spans] == pytest.approx([5, 3, 9])
    late = simulate([task("compute", 1), task("inter", 4), task("intra", 2, 0)], COSTS, contention)
    assert [span.end_s for span in late] == pytest.approx([1, 5, 4])
    two = {("inter", "intra"): 2.0}
    assert makespan_s(simulate(tasks[:2], COSTS, two)) == pytest.approx(6), "as one after the other"


def test_contention_of_three_multiplies() -> None:
    pairs = {("a", "b"): 2.0, ("b", "c"): 2.0}
    spans = simulate([task("a", 1), task("b", 1), task("c", 1)], COSTS, pairs)
    # a and c at half speed, b at a quarter; after 2 s b has half a second left, alone.
    assert [span.end_s for span in spans] == pytest.approx([2, 2.5, 2])


def test_contention_below_one_is_refused() -> None:
    with pytest.raises(AssertionError, match="contention of a and b"):
        simulate([task("a", 1)], COSTS, {("a", "b"): 0.5})


def test_nothing_to_do() -> None:
    assert simulate([], COSTS) == []
    assert makespan_s([]) == 0


def test_waiting_for_a_later_task_is_refused() -> None:
    program = Program()
    assert program.add(task("link", 1)) == 0
    with pytest.raises(AssertionError, match="not launched yet"):
        program.add(task("link", 1, 1))
    with pytest.raises(AssertionError, match="launched later"):
        simulate([task("link", 1, 1), task("link", 1)], COSTS)


@st.composite
def programs(draw: st.DrawFn) -> list[Task]:
    tasks: list[Task] = []
    for index in range(draw(st.integers(1, 12))):
        after = draw(st.lists(st.integers(0, index - 1), max_size=3, unique=True)) if index else []
        seconds = draw(st.sampled_from([0.0, 0.5, 1.0, 3.0]))
        tasks.append(task(draw(st.sampled_from("abc")), seconds, *after, background=draw(st.booleans())))
    return tasks


@given(programs())
def test_every_timeline_is_possible(tasks: list[Task]) -> None:
    spans = simulate(tasks, COSTS)
    assert [span.task for span in spans] == tasks
    for span in spans:
        assert span.end_s == pytest.approx(span.start_s + span.task.work)
        assert all(spans[earlier].end_s <= span.start_s for earlier in span.task.after)
    for resource in "abc":
        own = sorted((s for s in spans if s.task.resource == resource), key=lambda s: (s.start_s, s.end_s))
        assert all(first.end_s <= second.start_s for first, second in zip(own, own[1:], strict=False))
        in_order = [s.start_s for s in spans if s.task.resource == resource and not s.task.background]
        assert in_order == sorted(in_order)
    assert makespan_s(spans) >= max([*busy_s(spans).values(), critical_path_s(tasks)]) - 1e-9
    assert simulate(tasks, COSTS) == spans


@given(programs(), st.floats(1, 3))
def test_contention_only_lengthens(tasks: list[Task], factor: float) -> None:
    spans = simulate(tasks, COSTS, {("a", "b"): factor})
    both_s = overlap_s(spans, "a", "b")
    for resource, alone_s in busy_s(simulate(tasks, COSTS)).items():
        lost_s = 0.0 if resource == "c" else both_s * (1 - 1 / factor)
        assert busy_s(spans)[resource] - lost_s == pytest.approx(alone_s, abs=1e-6)


@given(programs())
def test_no_time_is_wasted(tasks: list[Task]) -> None:
    """Some resource works at every moment until the end."""
    spans = sorted(simulate(tasks, COSTS), key=lambda s: s.start_s)
    covered_s = 0.0
    for span in spans:
        assert span.start_s <= covered_s + 1e-9
        covered_s = max(covered_s, span.end_s)


def critical_path_s(tasks: list[Task]) -> float:
    ends: list[float] = []
    for item in tasks:
        ends.append(max((ends[earlier] for earlier in item.after), default=0.0) + item.work)
    return max(ends)


def test_a_span_is_readable() -> None:
    (span,) = simulate([task("link", 1)], COSTS)
    assert span == Span(task("link", 1), 0.0, 1.0)
