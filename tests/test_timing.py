"""experiments.timing and experiments.attempt with this process as the only rank; four ranks are in test_layer.py."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from math import inf, nan
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from analysis.summary import STEP_PARTS
from baselines.flat import Flat
from baselines.reference import Reference
from experiments import timing
from experiments.attempt import attempt, stop_agreed
from experiments.ranks import RankInfo
from experiments.timing import Observed, interleave, peak_memory_bytes, relative_error, stage_rounds
from moe.errors import ConfigError, Problem, Refused
from moe.layer import NativeMoE
from moe.mesh import Mesh, create_mesh
from moe.stages import STAGES
from moe.step_parts import PARTS
from moe.system import LayerSpec
from moe.topology import cluster_of
from moe.weights import load_layer
from tests.tiny import rank_here

CPU = torch.device("cpu")
SPEC = LayerSpec(16, 24, 4, 2)


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankInfo]:
    with rank_here(tmp_path_factory.mktemp("rank")) as info:
        yield info


@pytest.fixture(scope="module")
def mesh(info: RankInfo) -> Mesh:
    return create_mesh(cluster_of([1]), info.device)


# Turns


@pytest.mark.usefixtures("info")
def test_candidates_take_turns_in_an_order_of_each_rounds_own(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0}
    taken: list[str] = []
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock["now"]))

    def step(name: str) -> Callable[[], None]:
        def take() -> None:
            taken.append(name)
            clock["now"] += len(taken)  # so that the seconds are the number of the step

        return take

    names, rounds, warmup = "abc", 20, 2
    told: list[int] = []
    seconds = interleave(
        {name: step(name) for name in names}, rounds, warmup, CPU, after_round=lambda: told.append(len(names))
    )
    assert len(told) == rounds + warmup
    orders = ["".join(taken[start : start + 3]) for start in range(0, len(taken), 3)]
    assert len(orders) == warmup + rounds
    assert {"".join(sorted(order)) for order in orders} == {names}  # each once a round
    assert len(set(orders)) == 6, "in every order"
    for name in names:
        turns = [index + 1 for index, taker in enumerate(taken) if taker == name]
        assert seconds[name] == turns[warmup:]

    first = list(orders)
    taken.clear()
    interleave({name: step(name) for name in names}, rounds, warmup, CPU)
    assert taken == list("".join(first)), "ranks draw the same orders"


@pytest.mark.usefixtures("info")
def test_several_steps_of_a_turn_are_timed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 6.0, 6.0, 18.0])  # start and end of a turn
    monkeypatch.setattr("experiments.timing.time.perf_counter", lambda: next(clock))
    taken: list[int] = []
    seconds = interleave({"a": lambda: taken.append(0)}, rounds=2, warmup=0, device=CPU, steps_per_round=3)
    assert seconds == {"a": [2.0, 4.0]}
    assert len(taken) == 6


@pytest.mark.usefixtures("info")
@pytest.mark.parametrize(("last", "timed"), [(1, 0), (2, 0), (3, 1), (4, 2), (5, 3)])
def test_a_stop_ends_the_timing_behind_the_round_in_hand(last: int, timed: int) -> None:
    taken: list[str] = []
    told: list[int] = []
    seconds = interleave(
        {name: functools.partial(taken.append, name) for name in "ab"},
        rounds=3,
        warmup=2,
        device=CPU,
        after_round=lambda: told.append(len(taken)),
        stop=lambda: len(told) == last,
    )
    assert told == list(range(2, 2 * last + 1, 2))
    assert {name: len(own) for name, own in seconds.items()} == {"a": timed, "b": timed}
    assert all(value > 0 for own in seconds.values() for value in own)


@pytest.mark.usefixtures("info")
def test_one_candidate_and_none() -> None:
    assert list(map(len, interleave({"a": lambda: None}, rounds=3, warmup=0, device=CPU).values())) == [3]
    assert interleave({}, rounds=3, warmup=1, device=CPU) == {}


def test_stage_rounds_are_the_eight_stages_of_every_round(mesh: Mesh) -> None:
    layer = Flat().build_layer(SPEC, mesh)
    load_layer(layer)
    steps: list[int] = []

    sync = Flat().gradient_sync(layer, mesh)

    def step() -> None:
        steps.append(1)
        layer(torch.randn(6, 16, requires_grad=True)).y_TM.sum().backward()
        sync.reduce()

    stages, parts = stage_rounds(step, [layer], 3, CPU)
    assert stages.keys() == {f"{direction}/{stage}" for direction in ("forward", "backward") for stage in STAGES}
    assert all(len(seconds) == 3 and min(seconds) >= 0 for seconds in stages.values())
    assert parts.keys() == set(PARTS) == set(STEP_PARTS)
    done = {"dense_gradients", "expert_gradients"}
    assert {part for part, seconds in parts.items() if min(seconds) > 0} == done
    assert all(seconds == [0.0] * 3 for part, seconds in parts.items() if part not in done)
    assert len(steps) == 3


# Memory


def allocate(*sizes_bytes: int) -> list[Tensor]:
    """Tensors of so many bytes."""
    return [torch.empty(size, dtype=torch.uint8) for size in sizes_bytes]


@pytest.mark.parametrize(
    ("held", "peak"),
    [
        ([], 0),
        ([[1 << 20]], 1 << 20),
        ([[1 << 20, 3 << 20]], 4 << 20),  # both at once
        ([[5 << 20], [2 << 20]], 5 << 20),  # one after the other
        ([[2 << 20], [1 << 20, 4 << 20]], 5 << 20),
    ],
)
def test_peak_memory_of_known_allocations(held: list[list[int]], peak: int) -> None:
    def step() -> None:
        for sizes_bytes in held:
            allocate(*sizes_bytes)

    for _ in range(2):  # exact, and again
        assert peak_memory_bytes(step, CPU) == peak


def test_what_was_there_before_does_not_count() -> None:
    before = allocate(8 << 20)
    assert peak_memory_bytes(lambda: allocate(6 << 20).clear(), CPU) == 6 << 20
    assert before


class Cyclic:
    """A step that leaves 4 MiB in a reference cycle, gives Python's collector cause to run, and takes 1 MiB more.

    Attributes:
        found: for every step, whether it began while the one before still held its memory.
    """

    def __init__(self) -> None:
        self.found: list[bool] = []
        self.last: weakref.ref[Tensor] | None = None

    def __call__(self) -> None:
        """The step."""
        self.found.append(self.last is not None and self.last() is not None)
        (memory,) = allocate(4 << 20)
        self.last = weakref.ref(memory)
        cycle: list[object] = [memory]
        cycle.append(cycle)
        del memory, cycle
        _ = [[] for _ in range(100_000)]  # the youngest generation is collected every few hundred or thousand
        allocate(1 << 20)


def test_memory_that_waits_for_the_collector_counts_in_its_own_step_only() -> None:
    step = Cyclic()
    assert [peak_memory_bytes(step, CPU) for _ in range(3)] == [5 << 20] * 3
    assert step.found == [False] * 3
    assert gc.isenabled()


def test_a_collector_that_is_off_stays_off() -> None:
    gc.disable()
    try:
        peak_memory_bytes(lambda: None, CPU)
        assert not gc.isenabled()
    finally:
        gc.enable()


class Keeping(NativeMoE):
    """Keeps 3 MiB where torch's allocator does not see them."""

    @property
    def workspace_bytes(self) -> int:
        """As if other ranks wrote there."""
        return 3 << 20


def test_what_layers_keep_outside_the_allocator_counts_once(mesh: Mesh) -> None:
    layers = [Keeping(SPEC, mesh), NativeMoE(SPEC, mesh), Keeping(SPEC, mesh)]
    assert peak_memory_bytes(lambda: allocate(2 << 20).clear(), CPU, layers) == 5 << 20


# Errors


def test_relative_error() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected, expected) == 0
    assert relative_error(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert relative_error(torch.tensor([0.3, 0.4]), torch.zeros(2)) == pytest.approx(0.5)  # absolute where it must be
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.tensor([3.0, 4.0 + 1e-7], dtype=torch.float64), expected.double()) > 0  # in float64
    assert relative_error(torch.tensor([3.0], requires_grad=True), torch.tensor([3.0])) == 0


@pytest.mark.parametrize("wrong", [nan, inf, -inf])
def test_what_is_not_finite_is_infinitely_wrong(wrong: float) -> None:
    """NaN itself would be lost in a maximum: max(1e-6, nan) is 1e-6."""
    assert relative_error(torch.tensor([3.0, wrong]), torch.tensor([3.0, 4.0])) == inf
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, wrong])) == inf


def test_a_system_is_compared_in_all_its_parts(mesh: Mesh) -> None:
    x_TM, grad_TM = torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(0))
    expected = Observed(Reference(), SPEC, mesh, x_TM, grad_TM)
    observed = Observed(Flat(), SPEC, mesh, x_TM, grad_TM)
    errors = observed.errors(expected)
    assert errors.keys() == {"output", "input_grad", "gate_grad", "expert_grad"}
    assert max(errors.values()) <= 1e-5
    assert len(observed.expert_grads) == 4 * 2
    observed.expert_grads[2, "w2"] += 1.0
    observed.gate_grad *= 1.5
    worse = observed.errors(expected)
    assert worse["expert_grad"] > 0.1
    assert worse["gate_grad"] == pytest.approx(0.5, rel=1e-4)
    assert worse["output"] == errors["output"]


def test_another_gate_gives_another_output(mesh: Mesh) -> None:
    x_TM, grad_TM = torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(0))
    gate_EM = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    expected = Observed(Reference(), SPEC, mesh, x_TM, grad_TM, gate_EM)
    assert max(Observed(Flat(), SPEC, mesh, x_TM, grad_TM, gate_EM).errors(expected).values()) <= 1e-5
    assert Observed(Flat(), SPEC, mesh, x_TM, grad_TM).errors(expected)["output"] > 0.1


# Attempts


def raising(error: Exception) -> Callable[[], None]:
    """An action that fails."""

    def act() -> None:
        raise error

    return act


@pytest.mark.usefixtures("info")
def test_an_attempt_gives_its_value_or_the_status_of_its_failure() -> None:
    assert attempt(lambda: 17) == (17, None)
    for error, status, reason in (
        (ValueError("no such kernel"), "failed", "ValueError: no such kernel"),
        (AssertionError("T % E"), "failed", "AssertionError: T % E"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "oom", "CUDA out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "oom", "can't allocate memory"),
        (MemoryError(), "oom", "MemoryError"),
        (Refused("It needs CUDA."), "refused", "It needs CUDA."),
    ):
        value, failure = attempt(raising(error))
        assert value is None and failure is not None
        assert failure[0] == status
        assert reason in failure[1]


@pytest.mark.usefixtures("info")
@pytest.mark.parametrize(
    "error",
    [
        ConfigError(Problem("workload.path", "x", "is no trace", "give one")),
        RuntimeError("[gloo] Timed out waiting 1800000ms for recv operation to complete"),
        RuntimeError("Connection closed by peer"),
    ],
)
def test_what_concerns_all_ranks_is_no_row(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        attempt(raising(error))
    assert caught.value is error


@pytest.mark.usefixtures("info")
def test_a_rank_that_failed_alone_is_the_cause_and_not_what_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(dist, "all_gather_object", lambda *_more: raising(RuntimeError("Timed out waiting"))())
    with pytest.raises(torch.OutOfMemoryError) as caught:
        attempt(raising(error))
    assert caught.value is error


def test_a_stop_is_agreed_on(info: RankInfo) -> None:
    assert not stop_agreed(info)
    info.stop_file.touch()
    assert stop_agreed(info)
    info.stop_file.unlink()
