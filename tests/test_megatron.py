"""The adapter of Megatron-Core: what it says where that is missing or can't run, and, on a stand-in for the package,
that what it asks for and takes from it is the suite's layer."""

from __future__ import annotations

import dataclasses
import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from baselines import megatron
from baselines.reference import Reference
from experiments.registry import create
from moe.errors import Refused
from moe.system import LayerSpec, MoELayer
from moe.topology import cluster_of
from moe.weights import load_layer
from tests.comparing import relative_error
from tests.contract import CASES, is_plain_sentence
from tests.lone import lone_mesh

CLUSTER = cluster_of([2, 2])
SPEC = LayerSpec(model_dim=16, hidden_dim=24, num_experts=4, top_k=2)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Packages that can be found, whatever this machine has; the first of Megatron-Core's known versions."""
    names: set[str] = set()
    monkeypatch.setattr(megatron, "find_spec", lambda name: name if name in names else None)
    monkeypatch.setattr(megatron, "version", lambda name: "0.16.1")
    return names


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with CUDA, whose ranks are not started."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("gpus")
def test_the_package_is_found_when_installed_and_asked_for_when_not(installed: set[str]) -> None:
    def refusals() -> set[tuple[str, ...]]:
        return {tuple(create("megatron").refusals(case.spec, CLUSTER)) for case in CASES}

    missing = "The package megatron-core is not installed; see https://github.com/NVIDIA/Megatron-LM."
    assert refusals() == {(missing,)}
    installed.add("megatron")  # there are others of that name
    assert refusals() == {(missing,)}
    installed.add("megatron.core")
    assert refusals() == {()}


@pytest.mark.parametrize(
    ("options", "found", "backend", "sentence"),
    [
        ({}, "0.20.0", "nccl", "knows megatron-core 0.16.x, and 0.20.0 is installed: install 0.16.1."),
        ({}, "0.16.1", "gloo", "runs on CUDA only; these ranks are on a CPU."),
        ({"moe_grouped_gemm": True}, "0.16.0", "nccl", "moe_grouped_gemm needs the package transformer_engine"),
    ],
)
def test_what_it_cannot_do_it_refuses(
    options: dict[str, Any],
    found: str,
    backend: str,
    sentence: str,
    installed: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed |= {"megatron", "megatron.core"}
    monkeypatch.setattr(megatron, "version", lambda name: found)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    (reason,) = create("megatron", options).refusals(SPEC, CLUSTER)
    assert is_plain_sentence(reason)
    assert sentence in reason


def test_it_builds_no_layer_on_a_cpu() -> None:
    with pytest.raises(Refused, match="these ranks are on a CPU"):
        create("megatron").build_layer(SPEC, lone_mesh())


# A stand-in for the package: its interfaces, its arithmetic, and one rank with all experts.


class Router(nn.Module):
    """Upstream's, without the gather of a routing group."""

    def __init__(self, *, config: Any, pg_collection: Any) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_moe_experts, config.hidden_size, dtype=config.params_dtype))

    def gating(self, x: Tensor) -> Tensor:
        raise AssertionError("the adapter has its own")

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        config = self.config
        logits_TE = logits.view(-1, config.num_moe_experts)
        scores_TE = logits_TE.softmax(1) if config.moe_router_pre_softmax else logits_TE
        best = scores_TE.topk(config.moe_router_topk, dim=1)
        weights_TK = best.values if config.moe_router_pre_softmax else best.values.softmax(1)
        weights_TE = torch.zeros_like(logits_TE).scatter(1, best.indices, weights_TK)
        chosen_TE = torch.zeros_like(logits_TE).scatter(1, best.indices, 1.0).bool()
        if config.moe_expert_capacity_factor is not None:
            num_tokens, num_experts = logits_TE.shape
            capacity = math.ceil(num_tokens * config.moe_router_topk / num_experts * config.moe_expert_capacity_factor)
            kept = weights_TE.topk(min(capacity, num_tokens), dim=0).indices
            chosen_TE = chosen_TE & torch.zeros_like(chosen_TE).scatter(0, kept, torch.ones(()).bool().expand_as(kept))
            weights_TE = weights_TE * chosen_TE
        return weights_TE, chosen_TE

    def forward(self, x_T1M: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.routing(self.gating(x_T1M), padding_mask=padding_mask)


class Linear(nn.Module):
    """One map, `weight`, or several in one module, `weight0` and so on; returns a bias, which is None."""

    def __init__(self, num_in: int, num_out: int, config: Any, names: list[str]) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Parameter(torch.empty(num_out, num_in, dtype=config.params_dtype)))

    def forward(self, x: Tensor, num_rows: list[int] | None = None) -> tuple[Tensor, None]:
        rows = [x] if num_rows is None else x.split(num_rows)
        names = ["weight"] if num_rows is None else [f"weight{index}" for index in range(len(num_rows))]
        assert all(getattr(self, name).dtype == x.dtype for name in names), "upstream's products take one dtype"
        return torch.cat([part @ getattr(self, name).t() for part, name in zip(rows, names, strict=True)]), None


class Network(nn.Module):
    """Upstream's MLP, or its grouped one of several experts."""

    def __init__(self, config: Any, names: list[str]) -> None:
        super().__init__()
        self.config = config
        width = config.moe_ffn_hidden_size
        self.linear_fc1 = Linear(config.hidden_size, width * (1 + config.gated_linear_unit), config, names)
        self.linear_fc2 = Linear(width, config.hidden_size, config, names)

    def forward(self, rows_RM: Tensor, num_rows: list[int] | None, weights_R: Tensor) -> tuple[Tensor, None]:
        hidden, _ = self.linear_fc1(rows_RM, num_rows)
        if self.config.gated_linear_unit:
            left, right = hidden.chunk(2, -1)
            hidden = self.config.activation_func(left) * right
        else:
            hidden = self.config.activation_func(hidden)
        return self.linear_fc2((hidden * weights_R.unsqueeze(1)).to(rows_RM.dtype), num_rows)


class SequentialMLP(nn.Module):
    """Upstream's: a network for each expert."""

    def __init__(self, num_local: int, config: Any) -> None:
        super().__init__()
        self.local_experts = nn.ModuleList(Network(config, ["weight"]) for _ in range(num_local))

    def forward(self, rows_RM: Tensor, num_rows_L: Tensor, weights_R: Tensor) -> tuple[Tensor, None]:
        parts = zip(
            self.local_experts, rows_RM.split(num_rows_L.tolist()), weights_R.split(num_rows_L.tolist()), strict=True
        )
        return torch.cat([expert(rows, None, weights)[0] for expert, rows, weights in parts]), None


class GroupedMLP(Network):
    """Upstream's with Transformer Engine: one network of all experts."""

    def __init__(self, num_local: int, config: Any) -> None:
        super().__init__(config, [f"weight{index}" for index in range(num_local)])

    def forward(self, rows_RM: Tensor, num_rows_L: Any, weights_R: Tensor) -> tuple[Tensor, None]:
        return super().forward(rows_RM, num_rows_L.tolist(), weights_R)


class Layer(nn.Module):
    """Upstream's layer on one rank."""

    def __init__(self, config: Any, submodules: Any, pg_collection: Any) -> None:
        super().__init__()
        self.config, self.groups = config, pg_collection
        self.router = submodules.router(config=config, pg_collection=pg_collection)
        self.experts = submodules.experts(config.num_moe_experts, config)

    def forward(self, x_T1M: Tensor) -> tuple[Tensor, None]:
        weights_TE, chosen_TE = self.router(x_T1M, None)
        assert weights_TE.dtype == torch.float32 and chosen_TE.dtype == torch.bool
        x_TM = x_T1M.flatten(0, 1)
        token_R = torch.arange(len(x_TM)).expand_as(chosen_TE.t()).masked_select(chosen_TE.t())
        weights_R = weights_TE.t().masked_select(chosen_TE.t())
        rows_RM, _ = self.experts(x_TM[token_R], chosen_TE.sum(0), weights_R)
        return torch.zeros_like(x_TM).index_add(0, token_R, rows_RM).view_as(x_T1M), None


@pytest.fixture
def package(installed: set[str], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Puts the stand-in in the place of the package; returns the packages that can be found."""

    def module_spec(*, num_experts: int, use_te: bool, moe_grouped_gemm: bool) -> SimpleNamespace:
        assert num_experts == SPEC.num_experts and use_te == moe_grouped_gemm
        experts = GroupedMLP if moe_grouped_gemm else SequentialMLP
        return SimpleNamespace(submodules=SimpleNamespace(experts=experts, router=None))

    members: dict[str, dict[str, Any]] = {
        "megatron.core.models.gpt.moe_module_specs": {"get_moe_module_spec": module_spec},
        "megatron.core.process_groups_config": {"ProcessGroupCollection": SimpleNamespace},
        "megatron.core.tensor_parallel": {},
        "megatron.core.tensor_parallel.mappings": {"dist_all_gather_func": "upstream's"},
        "megatron.core.transformer.moe.moe_layer": {"MoELayer": Layer},
        "megatron.core.transformer.moe.router": {"TopKRouter": Router},
        "megatron.core.transformer.transformer_config": {"TransformerConfig": SimpleNamespace},
    }
    for name in [name for name in sys.modules if name.split(".")[0] == "megatron"]:
        monkeypatch.delitem(sys.modules, name)
    for full_name, content in members.items():
        parts = full_name.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
                vars(sys.modules[name])["__path__"] = []
        vars(sys.modules[full_name]).update(content)
    parent = sys.modules["megatron.core.tensor_parallel"]
    vars(parent)["mappings"] = sys.modules["megatron.core.tensor_parallel.mappings"]
    monkeypatch.setattr(megatron, "require_cuda", lambda device: None)
    installed |= {"megatron", "megatron.core"}
    return installed


def run(layer: MoELayer, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients of one forward and backward."""
    load_layer(layer)
    generator = torch.Generator().manual_seed(1)
    x_TM = torch.randn(30, 16, generator=generator).to(dtype).requires_grad_()
    probe_TM = torch.randn(30, 16, generator=generator)
    output = layer(x_TM)
    assert output.y_TM.dtype == dtype and output.y_TM.shape == x_TM.shape
    ((output.y_TM * probe_TM).sum() + 10 * output.aux_loss).backward()
    assert x_TM.grad is not None and layer.gate_weight.grad is not None and output.expert_ids_TK is not None
    found = {"output": output.y_TM, "loss": output.aux_loss, "input": x_TM.grad, "gate": layer.gate_weight.grad}
    for view in layer.expert_views():
        assert view.parameter.dtype == torch.float32 and view.parameter.grad is not None
        found[f"{view.expert} {view.name}"] = view.view(view.parameter.grad)
    ids_TK = output.expert_ids_TK
    return found | {"counts": output.counts_E, "ids": ids_TK, "dropped": output.num_dropped}


@pytest.mark.parametrize("engine", [False, True], ids=["sequential", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_what_it_makes_of_the_package_is_the_oracle_s_layer(
    top_k: int, activation: Any, dtype: torch.dtype, engine: bool, package: set[str]
) -> None:
    if engine:
        package.add("transformer_engine")
    spec = dataclasses.replace(SPEC, top_k=top_k, activation=activation, dtype=dtype)
    layer = create("megatron").build_layer(spec, lone_mesh())
    assert layer.path == ("grouped GEMM of Transformer Engine" if engine else "SequentialMLP, expert by expert")
    got, expected = run(layer, dtype), run(Reference().build_layer(spec, lone_mesh()), dtype)
    errors = {name: relative_error(value, expected[name]) for name, value in got.items()}
    assert got.keys() == expected.keys()
    assert max(errors.values()) < (1e-5 if dtype == torch.float32 else 2e-2), errors
    assert vars(sys.modules["megatron.core.tensor_parallel.mappings"])["dist_all_gather_func"] == "upstream's"


def test_drops_are_counted_as_upstream_drops(package: set[str]) -> None:
    spec = dataclasses.replace(SPEC, capacity_factor=1.0)
    layer = create("megatron").build_layer(spec, lone_mesh())
    found = run(layer, torch.float32)
    assert int(found["counts"].sum()) == 60
    assert int(found["dropped"]) == int((found["counts"] - spec.capacity(30)).clamp_min(0).sum()) > 0


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_upstream_is_asked_for_the_suite_s_function(activation: Any, package: set[str]) -> None:
    spec = dataclasses.replace(SPEC, activation=activation, capacity_factor=1.25)
    system = create("megatron", {"moe_token_drop_policy": "position"})
    layer: Any = system.build_layer(spec, lone_mesh())
    config = vars(layer.upstream.config)
    gated = activation == "swiglu"
    assert config["activation_func"] is (F.silu if gated else F.gelu)
    assert config["gated_linear_unit"] == config["bias_activation_fusion"] == gated
    wanted = {
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_token_drop_policy": "position",
        "moe_expert_capacity_factor": 1.25,
        "add_bias_linear": False,
        "moe_grouped_gemm": False,
    }
    assert {name: config[name] for name in wanted} == wanted
    stages = layer.stage_modules()
    assert stages[0] is layer.upstream.router and stages[1] is layer.upstream.experts
