"""moe.schedules and the named ones: what they launch, what they overlap, and ScheMoE's theorem by brute force."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.overlap_schedules import LINA_PIECE_BYTES, pipemoe_degree, pipemoe_s
from baselines.schemoe_schedule import Compression, ScheMoE
from experiments.fsmoe_tables import SCHEDULES
from methods.fsmoe_paper import TESTBED_A, TESTBED_B, Layer, layer_work
from moe.costs import AlphaBeta
from moe.schedules import (
    COMPUTE,
    INTER,
    INTRA,
    LayerPlan,
    LayerTimes,
    LayerWork,
    Part,
    StepPlan,
    layer_times,
    step_tasks,
)
from moe.simulator import MEASURED, Program, Task, makespan_s, overlap_s, simulate

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
    assert names(backward, INTRA) == ["sequence_reduce_scatter0", *gathers, *scatters, "sequence_all_gather0"]
    assert names(backward, COMPUTE) == ["experts0", "experts1", "experts2", "dense0"]
    forward = [task for task in tasks if not task.backward]
    assert names(forward, INTER) == ["dispatch0", "dispatch1", "combine0", "combine1"]
    assert sum(task.work for task in forward if task.kind == "experts") == WORK.expert_work
    assert sum(task.work for task in backward if task.kind == "experts") == 2 * WORK.expert_work
    assert [task.work for task in backward if task.kind == "all_reduce"] == [7, 2, 1]


def test_without_shards_or_tensor_parallelism_nothing_runs_in_the_node() -> None:
    work = LayerWork(4, 0, 8, 2, 0, 3, 5, 10)
    for name, schedule in SCHEDULES.items():
        tasks = schedule([work], UNIT, 0.0)
        assert not names(tasks, INTRA), name
        assert makespan_s(simulate(tasks, UNIT)) > 0


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("carried", [False, True])
def test_every_schedule_does_all_of_the_work(name: str, carried: bool) -> None:
    layers = [layer_work(layer_of(dim), TESTBED_B) for dim in (1024, 2048, 4096)]
    carried_bytes = layers[0].gradient_bytes if carried else 0.0
    tasks = SCHEDULES[name](layers, TESTBED_B.costs, carried_bytes)

    def done(*kinds: str, backward: bool | None = None) -> float:
        return sum(t.work for t in tasks if t.kind in kinds and backward in (None, t.backward))

    assert done("dispatch", "combine") == pytest.approx(4 * sum(work.all_to_all_bytes for work in layers))
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
    st.sampled_from([TESTBED_A, TESTBED_B]),
    st.integers(1, 3),
)
def test_fsmoe_is_the_fastest(model_dim: int, batch_size: int, gated: bool, testbed, num_layers: int) -> None:
    layers = [layer_work(layer_of(model_dim, batch_size, gated), testbed)] * num_layers
    seconds = {
        name: makespan_s(simulate(schedule(layers, testbed.costs, 0.0), testbed.costs))
        for name, schedule in SCHEDULES.items()
    }
    # The model that it plans by and the timeline differ a little where all-gather and reduce-scatter do.
    assert seconds["fsmoe"] <= 1.01 * min(seconds.values())
    assert seconds["tutel_improved"] <= seconds["tutel_overlap"] + 1e-12
    assert seconds["tutel_overlap"] <= seconds["sequential"] + 1e-12


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
    assert overlapped["fsmoe"][INTER, INTRA] > 2 * overlapped["fsmoe_no_iio"][INTER, INTRA] > 0
    assert overlapped["tutel_overlap"][INTER, INTRA] == 0, "collectives in the node wait for those between nodes"
    assert overlapped["tutel_improved"][INTER, COMPUTE] > overlapped["tutel_overlap"][INTER, COMPUTE] > 0


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


def test_no_order_of_two_chunks_beats_schemoes() -> None:
    """All 252 orders of the computations times 6 of the all-to-alls (theorem 1), random durations."""
    rng = np.random.default_rng(0)
    compute = ("compress", "decompress", "experts", "compress", "decompress")
    for _ in range(4):
        codec, exchange, experts = rng.uniform(0.1, 5, 3)
        work = LayerWork(exchange, 0, experts, 1, 0, 0, 0, 0)
        # Two chunks of half the work each.
        schedule = ScheMoE(compression=Compression(ratio=2.0, s_per_byte=codec / exchange))
        own = [task for task in two_chunks(schedule, work) if not task.backward]
        spans = simulate(own, UNIT)
        seconds = {"compute": (codec / 2, codec / 2, experts / 2, codec / 2, codec / 2), "link": (exchange / 4,) * 2}
        assert [t.kind for t in own if t.resource == COMPUTE and t.chunk == 0 and t.kind != "dense"] == list(compute)
        best = min(
            ordered_s(order, links, seconds)
            for order in interleavings(range(5), range(5, 10))
            for links in interleavings(range(2), range(2, 4))
        )
        assert makespan_s(spans) == pytest.approx(best)


def two_chunks(schedule: ScheMoE, work: LayerWork) -> list[Task]:
    program = Program()
    schedule.pipeline(program, Task("dense", COMPUTE, MEASURED, 0.0), work, degree=2)
    return program.tasks


def ordered_s(order: Sequence[int], links: Sequence[int], seconds: dict[str, tuple[float, ...]]) -> float:
    """End of two chunks with these orders on the computer (tasks 0-4 and 5-9) and the link (0-1 and 2-3); infinite
    where they wait for each other for ever."""
    done: dict[tuple[str, int], float] = {}
    queues = {"compute": list(order), "link": list(links)}
    free = {"compute": 0.0, "link": 0.0}
    while any(queues.values()):
        progress = False
        for resource, queue in queues.items():
            while queue and (before := waits_for(resource, queue[0])) and all(task in done for task in before[1:]):
                task = queue.pop(0)
                start = max([free[resource], *(done[earlier] for earlier in before[1:])])
                length = seconds[resource][task % (5 if resource == "compute" else 2)]
                free[resource] = done[resource, task] = start + length
                progress = True
        if not progress:
            return float("inf")
    return max(done.values())


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
