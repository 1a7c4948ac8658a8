"""Pipelined layers on four ranks: what is under way while experts compute, gradients in slices, measured costs.

That outputs and gradients are the oracle's, whatever the chunks, tests/test_contract.py holds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from baselines.pipelined import Pipelined
from experiments.launch import run_ranks
from methods.fsmoe import FSMoE
from moe.chunks import Queues
from moe.costs import fit_alpha_beta
from moe.expert_passes import ExpertRows, experts_backward, experts_forward
from moe.experts import GroupedExperts
from moe.schedules import LayerPlan, StepPlan
from moe.simulator import Span, Task
from moe.sliced_sync import LayerSlices, cut_slices
from moe.system import LayerSpec
from moe.trace import chrome_trace
from tests.rank_fsmoe import NUM_TOKENS, SPEC, SYSTEMS, TRACED

Facts = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks write."""
    return tmp_path_factory.mktemp("fsmoe")


@pytest.fixture(scope="module")
def facts(folder: Path) -> dict[str, list[Facts]]:
    """What the ranks recorded, by part and rank."""
    return run_ranks(
        "tests.rank_fsmoe:measure",
        {"folder": str(folder)},
        num_ranks=4,
        ranks_per_node=2,
        log_dir=folder / "logs",
        timeout_s=60,
    )


# Chunks


Row = tuple[int, int, int]
"""Rank, expert, place in the queue."""


def queues_of(send_PL: list[list[int]], receive_PL: list[list[int]]) -> Queues:
    """Of a rank that sends and receives so many copies, one of which is dropped; they are named by their places."""
    send, receive = np.array(send_PL), np.array(receive_PL)
    order = torch.arange(send.sum()) + 100
    inverse_TK = torch.tensor([*range(len(order)), len(order)]).unsqueeze(1)
    return Queues(order, inverse_TK, send, np.expand_dims(receive, 0))


def named(counts_PL: list[list[int]]) -> list[list[Row]]:
    """Rows of each queue."""
    return [
        [(rank, expert, place) for place in range(count)]
        for rank, counts in enumerate(counts_PL)
        for expert, count in enumerate(counts)
    ]


def chunk_rows(counts_PL: list[list[int]], degree: int) -> list[list[Row]]:
    """Rows of each chunk, in the order in which they travel."""
    return [
        [row for queue in named(counts_PL) for row in queue[len(queue) * i // degree : len(queue) * (i + 1) // degree]]
        for i in range(degree)
    ]


def by_expert(rows: list[Row]) -> list[Row]:
    """Rows of a chunk in the order of the experts."""
    return sorted(rows, key=lambda row: (row[1], row[0], row[2]))


some_counts = st.integers(1, 4).flatmap(
    lambda num_experts: st.lists(st.lists(st.integers(0, 20), min_size=num_experts, max_size=num_experts), min_size=1)
)


@given(some_counts, st.integers(1, 9))
def test_queues_are_cut_into_nearly_equal_parts_that_lie_by_chunk(send: list[list[int]], degree: int) -> None:
    queues = queues_of(send, send)
    order, inverse_TK = queues.travel_orders(degree)
    in_order = [row for queue in named(send) for row in queue]
    expected = [row for rows in chunk_rows(send, degree) for row in rows]
    assert [in_order[copy - 100] for copy in order.tolist()] == expected
    assert [expected[place] for place in inverse_TK[:-1, 0].tolist()] == in_order
    assert inverse_TK[-1, 0] == len(in_order), "the dropped copy"


@st.composite
def sends_and_receives(draw: st.DrawFn) -> tuple[list[list[int]], list[list[list[int]]], int]:
    """What a rank sends, what each rank of its node receives, and its place there."""
    num_ranks, num_experts, num_shards = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    row = st.lists(st.integers(0, 20), min_size=num_experts, max_size=num_experts)
    counts = st.lists(row, min_size=num_ranks, max_size=num_ranks)
    node = draw(st.lists(counts, min_size=num_shards, max_size=num_shards))
    return draw(counts), node, draw(st.integers(0, num_shards - 1))


@given(sends_and_receives(), st.integers(1, 9))
def test_received_rows_go_into_the_order_of_the_experts_and_back(
    drawn: tuple[list[list[int]], list[list[list[int]]], int], degree: int
) -> None:
    send, node, place = drawn
    order = torch.arange(np.array(send).sum())
    chunks = Queues(order, order.unsqueeze(1), np.array(send), np.array(node), place).chunks(degree)
    receive, num_experts = node[place], len(send[0])
    for index, (rows, leaving, arrived) in enumerate(
        zip(chunks.rows, chunk_rows(send, degree), chunk_rows(receive, degree), strict=True)
    ):
        of_node = [chunk_rows(each, degree)[index] for each in node]
        # Rows of the node lie by its ranks, whose names go behind those of the ranks before them.
        together = [
            (shard * len(receive) + rank, expert, row)
            for shard, each in enumerate(of_node)
            for rank, expert, row in each
        ]
        padded: list[Row | None] = []
        for shard, each in enumerate(of_node):
            start = sum(map(len, of_node[:shard]))
            padded += [*together[start : start + len(each)], *[None] * (rows.padded - len(each))]
        in_order, out_of_it = (found.tolist() for found in chunks.gathered_orders(index))
        assert [padded[place] for place in in_order] == by_expert(together)
        assert [by_expert(together)[place] if place < len(together) else None for place in out_of_it] == padded
        if chunks.orders is None:
            assert by_expert(together) == together
        else:
            order_R, inverse_R = (orders[rows.expert_part].tolist() for orders in chunks.orders)
            assert [together[place] for place in order_R] == by_expert(together)
            assert [by_expert(together)[place] for place in inverse_R] == together
        assert rows.experts == [sum(row[1] == expert for row in together) for expert in range(num_experts)]
        assert chunks.expert_ends[index].tolist() == [sum(rows.experts[: last + 1]) for last in range(num_experts)]
        assert rows.node == list(map(len, of_node))
        assert rows.receive == [sum(row[0] == rank for row in arrived) for rank in range(len(receive))]
        assert rows.send == [sum(row[0] == rank for row in leaving) for rank in range(len(send))]
        parts = (rows.send_part, rows.receive_part, rows.expert_part)
        assert [part.stop - part.start for part in parts] == list(map(len, (leaving, arrived, together)))


@given(some_counts, st.integers(1, 8), st.integers(1, 8))
def test_rows_move_from_one_cut_to_another(counts: list[list[int]], before: int, after: int) -> None:
    moved = queues_of(counts, counts).moved(before, after)
    if moved is None:
        assert before == after
        return
    (to_sent, from_sent), computed = moved
    old, new = (chunk_rows(counts, degree) for degree in (before, after))
    sent_before, sent_after = ([row for rows in chunks for row in rows] for chunks in (old, new))
    assert [sent_before[place] for place in to_sent.tolist()] == sent_after
    assert [sent_after[place] for place in from_sent.tolist()] == sent_before
    computed_before, computed_after = ([row for rows in chunks for row in by_expert(rows)] for chunks in (old, new))
    assert [computed_before[place] for place in computed.tolist()] == computed_after


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("rows", [[3, 0, 4], [0, 0, 0]])
def test_the_experts_backward_by_hand_is_autograd_s(activation: Any, rows: list[int]) -> None:
    spec = LayerSpec(8, 12, 3, 1, activation)
    experts = GroupedExperts(spec, range(3), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for weight in experts.parameters():
        weight.data.normal_(generator=generator)
    rows_RM = torch.randn(sum(rows), 8, generator=generator).requires_grad_()
    grad_RM = torch.randn(sum(rows), 8, generator=generator)
    expected = experts(rows_RM, rows)
    expected.backward(grad_RM)
    expert_rows = ExpertRows(rows, torch.tensor(rows).cumsum(0, dtype=torch.int32))
    weights = experts.w_in.detach(), experts.w_out.detach()
    y_RM, hidden = experts_forward(rows_RM.detach(), *weights, expert_rows, activation)
    found = experts_backward(grad_RM, rows_RM.detach(), hidden, *weights, expert_rows, activation)
    assert torch.equal(y_RM, expected)
    torch.testing.assert_close(found.rows_RM, rows_RM.grad)
    for weight, grad in ((experts.w_in, found.w_in), (experts.w_out, found.w_out)):
        torch.testing.assert_close(torch.zeros_like(weight) if grad is None else grad, weight.grad)


# Timelines


def chunks_of(name: str, direction: str) -> int:
    """Chunks that a traced system was told to take."""
    options = TRACED[name][1]
    return int(options.get("degree" if direction == "forward" else "backward_degree", 1))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", TRACED)
def test_exchanges_are_under_way_while_experts_compute(
    name: str, direction: str, facts: dict[str, list[Facts]]
) -> None:
    """By the order of issue and of completion, which no clock decides: the next chunk's dispatch is issued before a
    chunk's experts and awaited behind them, and a chunk's combine is under way during the next one's experts."""
    for found in facts["traces"]:
        at = {(event, task): index for index, (event, task) in enumerate(found[name]["events"])}
        degree = chunks_of(name, direction)

        def order(event: str, kind: str, chunk: int, at: Any = at) -> int:
            place: int = at[event, f"{direction} {kind} {chunk}"]
            return place

        for chunk in range(degree):
            assert order("complete", "dispatch", chunk) < order("issue", "experts", chunk)
            assert order("complete", "experts", chunk) < order("issue", "combine", chunk)
        for chunk in range(degree - 1):
            assert order("issue", "dispatch", chunk + 1) < order("issue", "experts", chunk)
            assert order("complete", "dispatch", chunk + 1) > order("complete", "experts", chunk)
            assert order("issue", "combine", chunk) < order("issue", "experts", chunk + 1)
            assert order("complete", "combine", chunk) > order("complete", "experts", chunk + 1)
        kinds = ("dispatch", "experts", "combine")
        tasks = {task for _, task in found[name]["events"] if task.startswith(direction)}
        assert tasks == {f"{direction} {kind} {chunk}" for kind in kinds for chunk in range(degree)}


@pytest.mark.parametrize("name", TRACED)
def test_the_trace_holds_the_last_step(name: str, folder: Path, facts: dict[str, list[Facts]]) -> None:
    for rank, found in enumerate(facts["traces"]):
        written = json.loads((folder / name / f"rank{rank}.json").read_text())["traceEvents"]
        rows = {event["args"]["name"]: event["tid"] for event in written if event["ph"] == "M"}
        assert set(rows) == {"compute", "inter"}
        tasks = [event for event in written if event["ph"] == "X"]
        spans = found[name]["spans"]
        assert [f"{event['args']['direction']} {event['name']}" for event in tasks] == [task for task, *_ in spans]
        for event, (_, start_s, end_s) in zip(tasks, spans, strict=True):
            assert (event["ts"], event["dur"]) == pytest.approx((start_s * 1e6, (end_s - start_s) * 1e6))
            assert event["dur"] >= 0 and event["pid"] == rank
            assert event["tid"] == rows["compute" if event["name"].startswith("experts") else "inter"]


def test_a_trace_is_chrome_s() -> None:
    task = Task("dispatch", "inter", "all_to_all", 1.0, layer=2, chunk=3, backward=True)
    written = chrome_trace([Span(task, 1.5, 2.0)], rank=7)
    assert written["traceEvents"] == [
        {"name": "thread_name", "ph": "M", "pid": 7, "tid": 0, "args": {"name": "inter"}},
        {
            "name": "dispatch 3",
            "cat": "inter,backward",
            "ph": "X",
            "ts": 1.5e6,
            "dur": 0.5e6,
            "pid": 7,
            "tid": 0,
            "args": {"layer": 2, "direction": "backward", "resource": "inter"},
        },
    ]


def test_a_layer_s_path_says_its_chunks(facts: dict[str, list[Facts]]) -> None:
    paths = {name: found["path"] for name, found in facts["traces"][0].items()}
    assert paths["fsmoe"] == "fsmoe, chunks 3 forward, 2 backward; expert by expert"
    assert paths["sequential"] == "sequential, chunks 1 forward, 1 backward; expert by expert"


# Gradients in slices


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("model", ["plain", "other"])
def test_sliced_gradients_are_those_of_one_reduction(model: str, name: str, facts: dict[str, list[Facts]]) -> None:
    for found in facts["slices"]:
        case = found[f"{model}, {name}"]
        assert case["unlike"] == []
        assert max(case["errors"].values()) < 1e-6, case["errors"]


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("model", ["plain", "other"])
def test_slices_follow_each_other_and_hold_what_exists(model: str, name: str, facts: dict[str, list[Facts]]) -> None:
    case = facts["slices"][0][f"{model}, {name}"]
    assert case["numbers"] == case["dense"], "every dense number has its place"
    reached = 0
    for (moe, dense), existing in zip(case["slices"][::-1], case["existing"][::-1], strict=True):
        for first, last in [*moe, *dense]:
            assert reached == first < last <= existing
            reached = last
    assert [4 * sum(b - a for a, b in moe) for moe, _ in case["slices"]] == case["planned"]
    assert all(found[f"{model}, {name}"]["slices"] == case["slices"] for found in facts["slices"])
    # A ring of four sends 3 / 2 of what it reduces; three exchanged numbers of drops and norms are no gradients.
    assert case["sent"]["early"] == 1.5 * 4 * reached > 0
    assert case["sent"]["all"] == 1.5 * 4 * case["numbers"]


def test_slices_of_a_plan_by_hand() -> None:
    """Two layers: 10 numbers exist before the second one's backward, 25 before the first one's."""
    plans = (LayerPlan(moe_bytes=40, dense_bytes=1000), LayerPlan(moe_bytes=24, dense_bytes=8))
    slices = cut_slices(StepPlan(plans), existing=[25, 10], element_bytes=4)
    assert slices == [LayerSlices(((8, 18),), ((18, 25),)), LayerSlices(((0, 6),), ((6, 8),))]
    pieces = cut_slices(StepPlan((LayerPlan(), LayerPlan()), filler_bytes=16), existing=[25, 10], element_bytes=4)
    assert pieces[1] == LayerSlices(((0, 4),), ((4, 8), (8, 10)))
    assert pieces[0] == LayerSlices(((10, 14),), ((14, 18), (18, 22), (22, 25)))
    assert cut_slices(StepPlan((LayerPlan(moe_bytes=3),)), existing=[9], element_bytes=4) == [LayerSlices()]


def test_gradients_that_are_sent_too_early_are_errors(facts: dict[str, list[Facts]]) -> None:
    for found in facts["misuse"]:
        assert "came after it was sent" in found["late"]
        assert "came after it was sent" in found["twice"]


# Measured costs


def test_every_module_is_measured_and_fitted(facts: dict[str, list[Facts]]) -> None:
    for found in facts["profiles"]:
        assert found == facts["profiles"][0] | {name: found[name] for name in ("plan", "sent")}, (
            "the ranks go by the same costs"
        )
        points, (exchanged_bytes, work) = found["points"], found["work"]
        outside, exchanged = {"outside", "outside_backward"}, {"all_to_all", "all_reduce", "gemm beside all_to_all"}
        assert set(points) == {"gemm", "gemm_backward"} | exchanged | outside
        largest = {name: max(size for size, _ in measured) for name, measured in points.items()}
        assert exchanged_bytes == 4 * SPEC.top_k * NUM_TOKENS * SPEC.model_dim == largest["all_to_all"]
        assert work == SPEC.top_k * NUM_TOKENS * 2 * SPEC.model_dim * SPEC.hidden_dim == largest["gemm"]
        assert largest["gemm_backward"] == 2 * work
        assert {largest[name] for name in outside} == {exchanged_bytes}
        calls_of = {"all_to_all": 1, "all_reduce": 1, "gemm": 2, "gemm_backward": 4, **dict.fromkeys(outside, 1)}
        for name, calls in calls_of.items():
            assert len(points[name]) >= 3
            fit = fit_alpha_beta(*zip(*points[name], strict=True))
            assert found["costs"][name] == [fit.alpha_s / calls, fit.beta_s_per_byte, fit.r2]
        degree, path = found["plan"]
        assert degree in (1, 2, 4, 8) and f"chunks {degree} forward" in path


def test_measuring_costs_sends_no_bytes_of_a_step(facts: dict[str, list[Facts]]) -> None:
    for found in facts["profiles"]:
        first, second, planning = found["sent"]
        assert first == second
        assert not planning
        assert sum(count for _, _, count in first) > 0


def test_a_file_of_profiles_is_kept_by_shapes(facts: dict[str, list[Facts]]) -> None:
    found = facts["profiles"][0]
    written = json.loads(found["written"])
    (key,) = written["profiles"]
    assert written["profiles"][key] == found["points"]
    for word in ("rows=80", "model_dim=32", "hidden_dim=48", "num_local=2", "activation=gelu", "dtype=float32"):
        assert word in key.split()
    assert written["fits"][key]["gemm"]["r2"] == found["costs"]["gemm"][2]


def test_a_profile_of_other_hardware_is_refused(facts: dict[str, list[Facts]]) -> None:
    for found in facts["profiles"]:
        assert "other.json: it was measured on other hardware: backend 'nccl', here 'gloo'. Fix: name" in found["other"]
        assert "it can't be read as profiles (IsADirectoryError" in found["broken"]


def test_options() -> None:
    assert FSMoE().options.model_dump() == {
        "degree": "auto",
        "backward_degree": "auto",
        "profile": None,
        "trace": None,
        "schedule": "fsmoe",
        "slices": True,
        "expert_sharding": False,
        "gate": "softmax",
        "gate_dim": None,
        "gate_temperature": 1.0,
        "gate_slots": 1,
        "order": "sparse",
    }
    for wrong in ({"degree": 0}, {"backward_degree": 65}, {"degree": "many"}, {"schedule": "pipemoe"}):
        with pytest.raises(ValidationError):
            FSMoE(wrong)
    with pytest.raises(ValidationError, match="schedule=sequential runs in one chunk"):
        Pipelined({"schedule": "sequential", "degree": 2})
