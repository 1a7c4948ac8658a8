"""What the adapters of FastMoE do around the package: switches, meters, gates and the schedule, on stand-ins for it."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from baselines import fastmoe, fastmoe_smart, fmoe_package
from baselines.fastmoe_gates import Options, UpstreamGate
from baselines.fmoe_package import COUNTERS, PLAIN, Switches, import_upstream, other_switches
from experiments.registry import create
from moe import metering
from moe.errors import Refused
from moe.gate import balance_loss
from moe.metering import LinkMeter
from moe.stages import StageClock
from moe.system import LayerSpec
from moe.topology import cluster_of
from moe.weights import load_layer
from tests.contract import is_plain_sentence
from tests.lone import lone_mesh

SPEC = LayerSpec(model_dim=16, hidden_dim=24, num_experts=4, top_k=2)
SMART = Switches(schedule=True, shadowing=True, group_size=2)


class Gate(nn.Module):
    """Upstream's interface of a gate: routes by `gate`, sets a loss, prunes by `capacity` where there is one."""

    capacity: tuple[float, float]

    def __init__(self, model_dim: int, num_local: int, num_ranks: int, top_k: int, **choices: Any) -> None:
        super().__init__()
        self.gate = nn.Linear(model_dim, num_local * num_ranks, bias=choices.pop("gate_bias", True))
        self.sizes, self.top_k, self.choices = (num_local, num_ranks), top_k, choices
        self.loss: Tensor | None = None

    def get_loss(self) -> Tensor | None:
        loss, self.loss = self.loss, None
        return loss

    def route(self, x_TM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = self.gate(x_TM)
        best = logits_TE.topk(self.top_k)
        return logits_TE.softmax(1), best.indices, best.values.softmax(1)

    def forward(self, x_TM: Tensor) -> tuple[Tensor, Tensor]:
        probs_TE, ids_TK, weights_TK = self.route(x_TM)
        self.loss = torch.zeros(1, requires_grad=True)
        return ids_TK, weights_TK


class GShard(Gate):
    """With the loss that upstream computes, and room for capacity * T * K // E of a rank's copies."""

    def forward(self, x_TM: Tensor) -> tuple[Tensor, Tensor]:
        probs_TE, ids_TK, weights_TK = self.route(x_TM)
        self.loss = balance_loss(probs_TE, ids_TK) * self.sizes[0] ** 2 / probs_TE.shape[1] ** 2
        room = math.ceil(self.capacity[0] * len(x_TM)) * self.top_k // probs_TE.shape[1]
        cuda = sys.modules["fmoe_cuda"]
        return cuda.prune_gate_by_capacity(ids_TK, torch.full((probs_TE.shape[1],), room), *self.sizes), weights_TK


class Noisy(nn.Module):
    """Upstream's names of parameters, and its flat results."""

    def __init__(self, model_dim: int, num_local: int, num_ranks: int, top_k: int) -> None:
        super().__init__()
        self.w_gate = nn.Parameter(torch.zeros(model_dim, num_local * num_ranks))
        self.w_noise = nn.Parameter(torch.zeros(model_dim, num_local * num_ranks))
        self.top_k = top_k

    def _prob_in_top_k(self, clean_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor, best: Tensor) -> Tensor:
        return ((clean_TE - best[:, -1:]) / std_TE).sigmoid()

    def get_loss(self) -> Tensor:
        return self.load_E.square().mean()

    def forward(self, x_TM: Tensor) -> tuple[Tensor, Tensor]:
        logits_TE = x_TM @ self.w_gate
        std_TE = (x_TM @ self.w_noise).exp() * self.training
        best = logits_TE.topk(self.top_k + 1)
        self.load_E = self._prob_in_top_k(logits_TE, logits_TE, std_TE, best.values).sum(0)
        weights_TK = best.values[:, : self.top_k].softmax(1)
        return best.indices[:, : self.top_k].contiguous().view(-1), weights_TK.unsqueeze(1)


class FMoE(nn.Module):
    """Upstream's layer with all experts in this process; `fmoe.layers` holds the function that runs them."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        ranks, local, width = (arguments[name] for name in ("world_size", "num_expert", "d_model"))
        self.gate = arguments["gate"](width, local, ranks, arguments["top_k"])
        self.experts = nn.ModuleList([arguments["expert"](width) for _ in range(local)])

    def forward(self, x_TM: Tensor) -> Tensor:
        ids_TK, weights_TK = self.gate(x_TM)
        run = sys.modules["fmoe.layers"]._fmoe_general_global_forward
        y_CM = run(x_TM, ids_TK, None, len(self.experts), 2, experts=self.experts)
        return (y_CM.view(*ids_TK.shape, -1) * weights_TK.unsqueeze(2)).sum(1)


def _prune(ids_TK: Tensor, room_E: Tensor, *_sizes: int) -> Tensor:
    left = room_E.tolist()
    kept = []
    for expert in ids_TK.flatten().tolist():
        left[expert] -= 1
        kept.append(expert if left[expert] >= 0 else -1)
    return torch.tensor(kept).view_as(ids_TK)


def _module(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(members)
    return module


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Puts stand-ins in the place of the package, as its import would: with the schedule that the environment says."""
    for variable in [*PLAIN.environment, *fastmoe_smart.Options().policy(SPEC)]:
        monkeypatch.setenv(variable, "1")
    for name in [name for name in sys.modules if name.split(".")[0] in ("fmoe", "fmoe_cuda")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(fmoe_package, "_imported_with", None)

    def first_choice(x_TM: Tensor, ids_TK: Tensor, *_: Any, experts: nn.ModuleList) -> Tensor:
        return experts[0](x_TM.repeat_interleave(ids_TK.shape[1], 0))

    def put() -> None:
        schedule = os.environ["FMOE_FASTER_SCHEDULE_ENABLE"] == "1"
        layers = _module("fmoe.layers", fmoe_faster_schedule=schedule, _fmoe_general_global_forward=first_choice)
        functions = _module("fmoe.functions", get_moe_group=lambda: None)
        gates = _module("fmoe.gates", NaiveGate=Gate, GShardGate=GShard, NoisyGate=Noisy)
        fmoe = _module("fmoe", FMoE=FMoE, layers=layers, functions=functions, gates=gates, __path__=[])
        for module in (fmoe, layers, functions, gates, _module("fmoe_cuda", prune_gate_by_capacity=_prune)):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    return put


# Switches


@pytest.mark.parametrize(("first", "second"), [(PLAIN, SMART), (SMART, PLAIN), (SMART, Switches(True, True, 4))])
def test_a_process_runs_one_set_of_switches(
    first: Switches, second: Switches, package: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert other_switches(first) == other_switches(second) == []
    package()
    monkeypatch.setattr(fmoe_package, "_imported_with", first)
    import_upstream(first)
    assert other_switches(first) == []
    (reason,) = other_switches(second)
    assert is_plain_sentence(reason)
    assert f"imported it with {first}, not with {second}: give each a run of its own." in reason
    with pytest.raises(Refused, match="give each a run of its own"):
        import_upstream(second)
    assert {name: os.environ[name] for name in first.environment} == first.environment


def test_the_user_s_environment_does_not_make_fastmoe_fastermoe() -> None:
    assert set(PLAIN.environment.values()) == {"0", "4"}
    assert SMART.environment == {
        "FMOE_FASTER_SCHEDULE_ENABLE": "1",
        "FMOE_FASTER_SHADOW_ENABLE": "1",
        "FMOE_FASTER_GROUP_SIZE": "2",
    }


@pytest.mark.parametrize("enabled", ["0", "1"])
def test_a_package_that_somebody_else_imported(
    enabled: str, package: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMOE_FASTER_SCHEDULE_ENABLE", enabled)
    package()
    assert bool(other_switches(PLAIN)) == (enabled == "1")
    assert "unknown switches" in other_switches(SMART)[0]


def test_both_systems_look_at_what_the_process_has_imported(
    package: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (fastmoe, fastmoe_smart):
        monkeypatch.setattr(module, "find_spec", lambda name: name)
        monkeypatch.setattr(module, "ranks_are_on_cuda", lambda: True)
    package()
    for first, refusing in ((PLAIN, "fastermoe_upstream"), (fastmoe_smart.Options().switches, "fastmoe")):
        monkeypatch.setattr(fmoe_package, "_imported_with", first)
        systems = ("fastmoe", "fastermoe_upstream")
        assert [name for name in systems if create(name).refusals(SPEC, cluster_of([2, 2]))] == [refusing]


@pytest.mark.parametrize(("activation", "alpha"), [("gelu", 1.5), ("swiglu", 2.25)])
def test_the_policy_knows_the_layer(activation: Any, alpha: float) -> None:
    """Model size 2 alpha M^2 and FLOP 4 alpha M^2 a row, as upstream computes them, are those of the experts."""
    spec = dataclasses.replace(SPEC, activation=activation)
    policy = fastmoe_smart.Options(network_bytes_per_s=1e9, gemm_flop_per_s=2e12).policy(spec)
    told = {name.removeprefix("FMOE_FASTER_GLBPLC_"): float(value) for name, value in policy.items()}
    assert told == {"NETBW": 1e9, "GPUTP": 2e12, "ALPHA": alpha, "DMODEL": 16}
    assert 2 * alpha * 16**2 == sum(rows * columns for rows, columns in spec.expert_shapes.values())


# Meters: rank 0 of four, two a node (level 1), the network (level 2) between; two experts a rank, rows of 4 bytes.

ROUTED_E = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8])
ARRIVING_E = torch.tensor([1, 2, 10, 20, 100, 200, 1000, 2000])
ROWS = torch.zeros(36, 1)


def _sent(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: Any, rank: int = 0) -> dict[tuple[int, str], int]:
    """What a meter of that rank counts when upstream calls the kernel; the kernel gets what it was given."""
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [0, 1, 2, 3])
    group = cast(Any, SimpleNamespace(size=lambda: 4, rank=lambda: rank))
    meter = LinkMeter(cluster_of([2, 2]), rank)
    monkeypatch.setattr(metering, "INSTALLED", [meter])
    assert COUNTERS[name](lambda *given: given, group)(*arguments) == arguments
    return {key: num_bytes for key, num_bytes in meter.sent.items() if num_bytes}


def test_plain_kernels_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {(0, "alltoall"): 4 * 3, (1, "alltoall"): 4 * 7, (2, "alltoall"): 4 * 26}
    back = {(0, "alltoall"): 4 * 3, (1, "alltoall"): 4 * 30, (2, "alltoall"): 4 * 3300}
    assert _sent(monkeypatch, "global_scatter", ROWS, ROUTED_E, ARRIVING_E, 1, 4) == there
    assert _sent(monkeypatch, "global_gather", ROWS, ROUTED_E, ARRIVING_E, 1, 4) == back
    counts = {(0, "alltoall"): 16, (1, "alltoall"): 16, (2, "alltoall"): 32}
    assert _sent(monkeypatch, "expert_exchange", ROUTED_E, 2, 4) == counts


@pytest.mark.parametrize("kernel", ["smart_sch_forward", "smart_sch_backward"])
def test_a_schedule_sends_there_and_back(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_E = torch.zeros(8, dtype=torch.bool)
    sent = _sent(monkeypatch, kernel, ROWS, ROUTED_E, ARRIVING_E, nothing_E, 3333, 0, 4)
    assert sent == {(0, "alltoall"): 4 * 6, (1, "alltoall"): 4 * 37, (2, "alltoall"): 4 * 3326}


def test_shadows_travel_instead_of_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts 1, of rank 0, and 6, of rank 3, are shadowed: rows for them stay, and what came for 1 did not."""
    shadowed_E = torch.tensor([0, 1, 0, 0, 0, 0, 1, 0]).bool()
    rows = {(0, "alltoall"): 4 * 2, (1, "alltoall"): 4 * (7 + 10), (2, "alltoall"): 4 * (5 + 6 + 8 + 1100)}
    sent = [
        _sent(monkeypatch, "smart_sch_forward", ROWS, ROUTED_E, ARRIVING_E, shadowed_E, 9, 50, 4, rank=rank)
        for rank in range(4)
    ]
    assert sent[0] == rows | {(1, "other"): 2 * 200}
    # A ring from each root: rank 3 is the last of expert 1's, rank 2 of expert 6's.
    others = [{level: num for (level, kind), num in facts.items() if kind == "other"} for facts in sent]
    assert others == [{1: 400}, {2: 400}, {1: 200}, {2: 200}]
    backward = _sent(monkeypatch, "smart_sch_backward", ROWS, ROUTED_E, ARRIVING_E, shadowed_E, 36, 9, 4)
    assert backward == rows


def test_gradients_of_shadows_go_to_their_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = [_sent(monkeypatch, "reduce_grad", torch.zeros(50), 1, 50, rank=rank) for rank in range(4)]
    assert sent == [{(1, "reduction"): 200}, {}, {(1, "reduction"): 200}, {(2, "reduction"): 200}]


# Gates


def _gate(kind: Any, spec: LayerSpec, num_ranks: int = 2) -> UpstreamGate:
    gate = UpstreamGate(spec, lone_mesh(num_ranks), Options(gate=kind))
    nn.init.normal_(gate.weight, generator=torch.Generator().manual_seed(0))
    return gate


def _tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(32, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize(("capacity_factor", "num_ranks"), [(None, 1), (None, 2), (0.5, 2), (1.3, 4)])
def test_gshard_tells_choices_drops_and_a_loss_on_the_suite_s_scale(
    capacity_factor: float | None, num_ranks: int, package: Callable[[], None]
) -> None:
    package()
    spec = dataclasses.replace(SPEC, capacity_factor=capacity_factor)
    gate = _gate("gshard", spec, num_ranks)
    assert (gate.upstream.gate.bias, gate.upstream.choices) == (None, {"random_routing": False})
    ids_TK, weights_TK = gate(_tokens(torch.bfloat16))
    output = gate.tell(_tokens())
    probs_TE = (_tokens(torch.bfloat16).float() @ gate.weight.t()).softmax(1)
    chosen_TK = probs_TE.topk(2).indices
    assert output.expert_ids_TK is not None and torch.equal(output.expert_ids_TK, chosen_TK)
    assert torch.equal(output.counts_E, torch.bincount(chosen_TK.flatten(), minlength=4))
    capacity = 64 if capacity_factor is None else spec.capacity(32)
    over = int((output.counts_E - capacity).clamp_min(0).sum())
    assert int(output.num_dropped) == int((ids_TK < 0).sum()) == over
    assert (over > 0) == (capacity_factor == 0.5)
    assert weights_TK.dtype == torch.bfloat16
    torch.testing.assert_close(output.aux_loss, balance_loss(probs_TE, chosen_TK))
    with pytest.raises(AssertionError, match="no call to tell of"):
        gate.tell(_tokens())


@pytest.mark.parametrize(("kind", "top_k"), [("dc", 2), ("switch", 1)])
def test_gates_that_limit_all_ranks_together_have_their_room(kind: Any, top_k: int) -> None:
    """Upstream rounds up capacity * T, and for `switch` capacity * T / experts a rank."""
    spec = dataclasses.replace(SPEC, top_k=top_k, capacity_factor=1.1)
    gate = cast(Any, SimpleNamespace(spec=spec, kind=kind, num_ranks=2, num_local=2))
    for num_tokens in (1, 7, 32, 4096):
        rate = UpstreamGate._capacity_rate(gate, num_tokens)
        room = math.ceil(rate * num_tokens / (2 if kind == "switch" else 1))
        assert room == 2 * spec.capacity(num_tokens)


def test_naive_has_no_loss_and_still_a_gradient(package: Callable[[], None]) -> None:
    package()
    gate = _gate("naive", SPEC)
    _, weights_TK = gate(_tokens())
    output = gate.tell(_tokens())
    assert (output.aux_loss.shape, float(output.aux_loss.detach()), int(output.num_dropped)) == ((), 0.0, 0)
    (weights_TK[:, 0].sum() + output.aux_loss).backward()
    assert gate.weight.grad is not None and gate.weight.grad.any()


@pytest.mark.parametrize("training", [True, False])
def test_noisy_takes_the_suite_s_matrix_and_evaluates_without_noise(
    training: bool, package: Callable[[], None]
) -> None:
    package()
    gate, twin = (_gate("noisy", SPEC).train(training) for _ in range(2))
    assert gate.weight.shape == (4, 16)
    noise = gate.upstream.parametrizations.w_noise.original
    assert noise.any() and torch.equal(noise, twin.upstream.parametrizations.w_noise.original), "alike on all ranks"
    noise.data = noise.data.bfloat16()  # as the benchmark of layers does with all but the gate's matrix
    ids_TK, weights_TK = gate(_tokens())
    assert torch.equal(ids_TK, (_tokens() @ gate.weight.t()).topk(2).indices)
    assert weights_TK.shape == (32, 2)
    output = gate.tell(_tokens())
    assert torch.isfinite(output.aux_loss)
    if not training:
        assert torch.equal(gate.upstream.load_E, output.counts_E.float())
    output.aux_loss.backward() if training else weights_TK[:, 0].sum().backward()
    assert gate.weight.grad is not None and gate.weight.grad.any()


# The schedule


def test_fastermoe_s_schedule_is_seen_as_the_experts_stage(
    package: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastmoe, "require_cuda", lambda device: None)
    monkeypatch.setattr(fastmoe, "send_over", lambda group, functions: None)
    package()
    options = fastmoe_smart.Options(group_size=8, gemm_flop_per_s=5e12)
    monkeypatch.setattr(fmoe_package, "_imported_with", options.switches)
    layer = create("fastermoe_upstream", options.model_dump()).build_layer(SPEC, lone_mesh(num_ranks=2))
    load_layer(layer)
    assert layer.path == "groups of 2, shadowing; stage experts holds the exchange too"
    os.environ["FMOE_FASTER_GLBPLC_DMODEL"] = "99"  # left by a layer of another width
    x_TM = _tokens().requires_grad_()
    clock = StageClock([layer])
    with clock.timed():
        output = layer(x_TM)
        (output.y_TM.sum() + output.aux_loss).backward()
    times_s = clock.stage_times_s()
    for stage in ("forward/gate", "forward/experts", "backward/gate", "backward/experts"):
        assert times_s[stage] > 0, times_s
    assert {name: os.environ[name] for name in options.policy(SPEC)} == options.policy(SPEC)
    run = sys.modules["fmoe.layers"]._fmoe_general_global_forward
    assert run is cast(Any, layer).schedule.function, "upstream's own is back in its place"
    assert x_TM.grad is not None and layer.gate_weight.grad is not None
