"""moe.schedules and the named ones: what they launch, what they overlap, and ScheMoE's theorem by brute force."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from baselines.overlap_schedules import LINA_PIECE_BYTES, pipemoe_degree, pipemoe_s
from baselines.overlap_schedules import SCHEDULES as ONE_LINK
from baselines.schemoe_schedule import Compression, ScheMoE
from experiments.fsmoe_tables import SCHEDULES
from methods import fsmoe_paper
from methods.fsmoe_calibration import CALIBRATED, CONTENTION
from methods.fsmoe_paper import TESTBED_A, TESTBED_B, Layer, layer_work
from methods.fsmoe_schedule import dense_window_s
from moe.costs import AlphaBeta
from moe.schedules import (
    COMPUTE,
    INTER,
    INTRA,
    Builder,
    LayerPlan,
    LayerTimes,
    LayerWork,
    Part,
    StepPlan,
    layer_times,
    step_tasks,
)
from moe.simulator import MEASURED, Costs, Program, Task, makespan_s, overlap_s, simulate

UNIT = {
    "all_to_all": AlphaBeta(0.0, 1.0),
    "all_to_all_in_node": AlphaBeta(0.0, 1.0),
    "all_gather": AlphaBeta(0.0, 1.0),
    "reduce_scatter": AlphaBeta(0.0, 1.0),
    "all_reduce": AlphaBeta(0.0, 1.0),
    "gemm": AlphaBeta(0.0, 1.0),
}
WORK = LayerWork(
    all_to_all_bytes=4,
    shard_bytes=6,
    expert_work=8,
    expert_calls=2,
    sequence_bytes=1,
    dense_s=3,
    dense_backward_s=5,
    gradient_bytes=10,
)

WITH_SCHEMOE: dict[str, Builder] = {
    **SCHEDULES,
    "schemoe_compressed": ScheMoE(compression=Compression(ratio=4.0, s_per_byte=1e-10)),
    "schemoe_both_links": ScheMoE(node_share=0.25),
    "schemoe": ScheMoE(node_share=0.25, compression=Compression(ratio=4.0, s_per_byte=1e-10)),
}
RATIOS = {"schemoe_compressed": 4, "schemoe": 4}


def costs_of(testbed: fsmoe_paper.Testbed) -> Costs:
    """With Pipe-A2A's, on the link in the node."""
    return testbed.costs | {"all_to_all_in_node": testbed.costs["all_gather"]}


def layer_of(model_dim: int, batch_size: int = 2, gated: bool = False) -> Layer:
    return Layer(batch_size, 512, model_dim, 3 * model_dim, 1.2, gated)


def names(tasks: Sequence[Task], resource: str) -> list[str]:
    return [f"{task.kind}{task.chunk}" for task in tasks if task.resource == resource]


def test_one_layer_in_sequence_by_hand() -> None:
    forward = 3 + 1 + 4 + 6 + 8 + 6 + 4 + 1
    backward = 1 + 4 + 6 + 16 + 6 + 4 + 1 + 5
    tasks = SCHEDULES["sequential"]([WORK], UNIT, 0.0)
    assert makespan_s(simulate(tasks, UNIT)) == forward + backward + 10
    assert [task.layer for task in SCHEDULES["sequential"]([WORK] * 2, UNIT, 0.0) if not task.backward] == [0] * 8 + [
        1
    ] * 8


def test_launch_order_of_fsmoe() -> None:
    plan = StepPlan((LayerPlan(degree=2, backward_degree=3, moe_bytes=7, dense_bytes=2),), tail_bytes=1)
    tasks = step_tasks([WORK], plan, carried_bytes=9)
    backward = [task for task in tasks if task.backward]
    slices = ["dispatch0", "dispatch1", "dispatch2", "all_reduce0", "combine0", "combine1", "combine2"]
    assert names(backward, INTER) == [*slices, "all_reduce0", "all_reduce0"]
    gathers, scatters = [f"gather{i}" for i in range(3)], [f"scatter{i}" for i in range(3)]
    # A period: the reduce-scatter is the next one's.
    assert names(backward, INTRA) == [*gathers, *scatters, "sequence_all_gather0", "sequence_reduce_scatter0"]
    assert names(backward, COMPUTE) == ["experts0", "experts1", "experts2", "dense0"]
    forward = [task for task in tasks if not task.backward]
    assert names(forward, INTER) == ["dispatch0", "dispatch1", "combine0", "combine1"]
    assert sum(task.work for task in forward if task.kind == "experts") == WORK.expert_work
    assert sum(task.work for task in backward if task.kind == "experts") == 2 * WORK.expert_work
    assert [task.work for task in backward if task.kind == "all_reduce"] == [7, 2, 1]


def test_launch_order_on_one_link() -> None:
    """The gather before the slice, so that the dense part runs beside it; a whole backward begins with its scatter."""
    plan = StepPlan((LayerPlan(), LayerPlan(dense_bytes=10), LayerPlan(dense_bytes=10)), tail_bytes=10, one_link=True)
    tasks = [task for task in step_tasks([WORK] * 3, plan) if task.backward]
    mixture = ["dispatch0", "gather0", "scatter0", "combine0", "sequence_all_gather0"]
    first = ["sequence_reduce_scatter0", *mixture, "all_reduce0"]
    assert names(tasks, INTER) == [*first, *first, "sequence_reduce_scatter0", *mixture, "all_reduce0"]
    assert [task.layer for task in tasks if task.kind == "sequence_reduce_scatter"] == [2, 1, 0]
    assert not names(tasks, INTRA)


@pytest.mark.parametrize("one_link", [False, True])
def test_a_slice_as_long_as_the_dense_window_costs_nothing(one_link: bool) -> None:
    """In one period of many, where the window ends with the next one's reduce-scatter; a longer slice does."""
    window = dense_window_s(WORK, UNIT, one_link)
    assert window == WORK.dense_backward_s + (0 if one_link else 2)

    def seconds(dense_bytes: float) -> float:
        plan = StepPlan((LayerPlan(dense_bytes=dense_bytes),), one_link=one_link)
        return makespan_s(simulate(step_tasks([WORK], plan, carried_bytes=20), UNIT))

    assert seconds(window) == seconds(0)
    assert seconds(window + 1) == seconds(0) + 1


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(AssertionError, match="a layer in no chunk"):
        LayerPlan(backward_degree=0)
    with pytest.raises(AssertionError, match="into pieces, and 3.0 bytes of them into slices"):
        StepPlan((LayerPlan(moe_bytes=2.0),), tail_bytes=1.0, filler_bytes=5.0)
    with pytest.raises(AssertionError, match="pieces of 0 bytes"):
        StepPlan((LayerPlan(),), filler_bytes=0)


def test_without_shards_or_tensor_parallelism_nothing_runs_in_the_node() -> None:
    work = LayerWork(4, 0, 8, 2, 0, 3, 5, 10)
    for name, schedule in SCHEDULES.items():
        tasks = schedule([work], UNIT, 0.0)
        assert not names(tasks, INTRA), name
        assert makespan_s(simulate(tasks, UNIT)) > 0


@pytest.mark.parametrize("name", WITH_SCHEMOE)
@pytest.mark.parametrize("carried", [False, True])
def test_every_schedule_does_all_of_the_work(name: str, carried: bool) -> None:
    layers = [layer_work(layer_of(dim), TESTBED_B) for dim in (1024, 2048, 4096)]
    carried_bytes = layers[0].gradient_bytes if carried else 0.0
    tasks = WITH_SCHEMOE[name](layers, costs_of(TESTBED_B), carried_bytes)
    assert makespan_s(simulate(tasks, costs_of(TESTBED_B))) > 0

    def done(*kinds: str, backward: bool | None = None) -> float:
        return sum(t.work for t in tasks if t.kind in kinds and backward in (None, t.backward))

    exchanged = done("dispatch", "combine", "dispatch_in_node", "combine_in_node")
    assert exchanged == pytest.approx(4 * sum(work.all_to_all_bytes for work in layers) / RATIOS.get(name, 1))
    assert (done("dispatch_in_node") > 0) == (name in ("schemoe_both_links", "schemoe"))
    assert (done("compress") > 0) == (done("decompress") > 0) == (name in RATIOS)
    for operation in ("all_gather", "reduce_scatter"):
        assert done(f"sequence_{operation}") == pytest.approx(2 * sum(work.sequence_bytes for work in layers))
    assert done("gather") == pytest.approx(2 * sum(work.shard_bytes for work in layers))
    assert done("scatter") == pytest.approx(2 * sum(work.shard_bytes for work in layers))
    assert done("experts", backward=False) == pytest.approx(sum(work.expert_work for work in layers))
    assert done("experts", backward=True) == pytest.approx(2 * sum(work.expert_work for work in layers))
    gradients = sum(work.gradient_bytes for work in layers)  # carried: the first layer's stand in for its own
    assert done("all_reduce") == pytest.approx(gradients)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([512, 1024, 2048, 4096]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.sampled_from([TESTBED_A, TESTBED_B, *CALIBRATED.values()]),
    st.sampled_from([1.0, CONTENTION]),
    st.integers(1, 3),
)
def test_fsmoe_is_the_fastest(
    model_dim: int, batch_size: int, gated: bool, testbed: fsmoe_paper.Testbed, contention: float, num_layers: int
) -> None:
    layers = [layer_work(layer_of(model_dim, batch_size, gated), testbed)] * num_layers
    seconds = {
        name: makespan_s(simulate(schedule(layers, testbed.costs, 0.0), testbed.costs, {(INTER, INTRA): contention}))
        for name, schedule in SCHEDULES.items()
    }
    # The model that it plans by and the timeline differ a little where all-gather and reduce-scatter do. It knows no
    # contention: with that some of the smallest layers are faster on one link.
    assert seconds["fsmoe"] <= (1.01 if contention == 1 else 1.07) * min(seconds.values())
    assert seconds["fsmoe_no_iio"] <= seconds["tutel_overlap"] * (1 + 1e-6)
    # A layer's all-reduce beside its dense part pays a latency of its own, which for small layers is the longer one.
    latencies_s = (num_layers - 1) * testbed.costs["all_reduce"].alpha_s
    assert seconds["tutel_improved"] <= seconds["tutel_overlap"] + latencies_s + 1e-12
    assert seconds["tutel_overlap"] <= seconds["sequential"] + 1e-12
    assert seconds["schemoe_order_only"] == pytest.approx(seconds["pipemoe"])


def test_what_overlaps() -> None:
    layers = [layer_work(layer_of(2048), TESTBED_B)] * 2
    overlapped = {
        name: {
            pair: overlap_s(simulate(schedule(layers, TESTBED_B.costs, 0.0), TESTBED_B.costs), *pair)
            for pair in ((INTER, INTRA), (INTER, COMPUTE))
        }
        for name, schedule in SCHEDULES.items()
    }
    assert set(overlapped["sequential"].values()) == {0.0}
    assert overlapped["fsmoe"][INTER, INTRA] > 0
    for name in (*ONE_LINK, "schemoe_order_only", "fsmoe_no_iio"):
        assert overlapped[name][INTER, INTRA] == 0, f"{name}: collectives in the node wait for those between nodes"
    assert overlapped["tutel_improved"][INTER, COMPUTE] > overlapped["tutel_overlap"][INTER, COMPUTE] > 0


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("carried", [False, True])
def test_contention_changes_nothing_on_one_link(name: str, carried: bool) -> None:
    layers = [layer_work(layer_of(2048), TESTBED_B)] * 2
    tasks = SCHEDULES[name](layers, TESTBED_B.costs, layers[0].gradient_bytes if carried else 0.0)
    alone, slowed = (makespan_s(simulate(tasks, TESTBED_B.costs, {(INTER, INTRA): factor})) for factor in (1.0, 2.0))
    if name == "fsmoe":
        assert slowed > alone * 1.01
    else:
        assert slowed == alone


def test_schemoe_gains_by_compression_and_by_both_links() -> None:
    layers = [layer_work(layer_of(2048), TESTBED_B)] * 2
    seconds = {
        name: makespan_s(simulate(schedule(layers, costs_of(TESTBED_B), 0.0), costs_of(TESTBED_B)))
        for name, schedule in WITH_SCHEMOE.items()
    }
    assert seconds["schemoe_compressed"] < seconds["schemoe_order_only"]
    assert seconds["schemoe_both_links"] < seconds["schemoe_order_only"]


def test_lina_cuts_gradients() -> None:
    work = layer_work(Layer(1, 512, 8192, 8192, 1.2, False), TESTBED_B)
    tasks = [task for task in SCHEDULES["pipemoe_lina"]([work] * 2, TESTBED_B.costs, 0.0) if task.kind == "all_reduce"]
    assert all(task.background and task.work <= LINA_PIECE_BYTES for task in tasks)
    assert len(tasks) == 2 * -(-work.gradient_bytes // LINA_PIECE_BYTES)


@given(st.floats(0, 1), st.floats(0.1, 10), st.floats(0, 1), st.floats(0.1, 10), st.integers(1, 8))
def test_pipemoes_model_is_the_simulated_pipeline(a: float, x: float, b: float, y: float, degree: int) -> None:
    """Its four cases in one, against the timeline of a forward pass."""
    times = LayerTimes(Part(a, x), Part(0, 0), Part(0, 0), Part(b, y))
    costs = {"all_to_all": AlphaBeta(a, 1.0), "gemm": AlphaBeta(b, 1.0)}
    tasks = step_tasks([LayerWork(x, 0, y, 1, 0, 0, 0, 0)], StepPlan((LayerPlan(degree=degree),)))
    forward = [task for task in tasks if not task.backward]
    assert makespan_s(simulate(forward, costs)) == pytest.approx(pipemoe_s(times, degree))


def test_pipemoes_degree_is_the_best_of_those_tried() -> None:
    work = layer_work(layer_of(4096), TESTBED_A)
    both = [layer_times(work, TESTBED_A.costs, backward) for backward in (False, True)]
    seconds = [sum(pipemoe_s(times, degree) for times in both) for degree in range(1, 9)]
    assert pipemoe_degree(work, TESTBED_A.costs) == 1 + int(np.argmin(seconds))


def interleavings(first: Sequence[int], second: Sequence[int]) -> Iterator[list[int]]:
    """All orders of two rows that keep each one's own."""
    length = len(first) + len(second)
    for places in combinations(range(length), len(first)):
        ours, others = iter(first), iter(second)
        yield [next(ours) if place in places else next(others) for place in range(length)]


STEPS = ("compress", "decompress", "experts", "compress", "decompress")
"""Of a chunk on the computer: C1, D1, E, C2, D2."""


def test_no_order_of_two_chunks_beats_schemoes() -> None:
    """All 252 orders of the computations times 6 of the all-to-alls (theorem 1), 100 draws of seven durations."""
    schedule = ScheMoE(compression=Compression(ratio=2.0, s_per_byte=1.0))
    own = two_chunks(schedule, LayerWork(1, 0, 1, 1, 0, 0, 0, 0))
    assert [task.kind for task in own if task.resource == COMPUTE and task.chunk == 0] == list(STEPS)
    drawn = np.random.default_rng(0).uniform(0.1, 5, (7, 100))
    seconds = {"compute": drawn[:5], "link": drawn[5:]}
    best = np.minimum.reduce(
        [
            ordered_s(order, links, seconds)
            for order in interleavings(range(5), range(5, 10))
            for links in interleavings(range(2), range(2, 4))
        ]
    )
    places = {"compute": [0, 0], "link": [0, 0]}  # which of its row each chunk is at
    steps = []
    for task in own:
        row = "compute" if task.resource == COMPUTE else "link"
        steps.append((row, places[row][task.chunk]))
        places[row][task.chunk] += 1
    assert places == {"compute": [5, 5], "link": [2, 2]}
    for draw in range(drawn.shape[1]):
        measured = [
            replace(task, operation=MEASURED, work=float(seconds[row][step, draw]))
            for task, (row, step) in zip(own, steps, strict=True)
        ]
        assert makespan_s(simulate(measured, UNIT)) == pytest.approx(best[draw])


def two_chunks(schedule: ScheMoE, work: LayerWork) -> list[Task]:
    program = Program()
    schedule.pipeline(program, Task("mixture", COMPUTE, MEASURED, 0.0), work, LayerPlan(2, 2))
    return program.tasks


def ordered_s(order: Sequence[int], links: Sequence[int], seconds: dict[str, NDArray[np.float64]]) -> Any:
    """End of two chunks with these orders on the computer (tasks 0-4 and 5-9) and the link (0-1 and 2-3), durations
    [steps of a chunk, draws]; infinite where they wait for each other for ever."""
    done: dict[tuple[str, int], Any] = {}
    queues = {"compute": list(order), "link": list(links)}
    free: dict[str, Any] = {"compute": 0.0, "link": 0.0}
    while any(queues.values()):
        progress = False
        for resource, queue in queues.items():
            while queue and (before := waits_for(resource, queue[0])) and all(task in done for task in before[1:]):
                task = queue.pop(0)
                start = free[resource]
                for earlier in before[1:]:
                    start = np.maximum(start, done[earlier])
                length = seconds[resource][task % len(seconds[resource])]
                free[resource] = done[resource, task] = start + length
                progress = True
        if not progress:
            return np.full(seconds["link"].shape[1], np.inf)
    return np.maximum(free["compute"], free["link"])


def waits_for(resource: str, task: int) -> list[tuple[str, int]]:
    """Itself, then what it waits for: C1 -> A1 -> D1 -> E -> C2 -> A2 -> D2."""
    if resource == "link":
        chunk, second = divmod(task, 2)
        return [(resource, task), ("compute", 5 * chunk + (3 if second else 0))]
    chunk, step = divmod(task, 5)
    before = {0: [], 1: [("link", 2 * chunk)], 2: [("compute", task - 1)], 3: [("compute", task - 1)]}
    return [(resource, task), *before.get(step, [("link", 2 * chunk + 1)])]


def test_pipe_all_to_all_uses_both_links() -> None:
    """t = max(share in the node, share between nodes), each at its link's speed."""
    costs = UNIT | {"all_to_all_in_node": AlphaBeta(0.0, 2.0)}
    work = LayerWork(8, 0, 1, 1, 0, 0, 0, 0)
    split = [t for t in ScheMoE(node_share=0.25)([work], costs) if t.kind.startswith("dispatch") and not t.backward]
    by_resource = {resource: sum(t.work for t in split if t.resource == resource) for resource in (INTER, INTRA)}
    assert by_resource == {INTER: 6, INTRA: 2}
    whole = [t for t in ScheMoE()([work], costs) if t.kind.startswith("dispatch") and not t.backward]
    assert {t.resource for t in whole} == {INTER}
