"""Tutel, FastMoE and its FasterMoE, which no registry holds: what they say where they are missing or can't run, and the
parts of their adapters that need neither the package nor a GPU."""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from baselines import fastmoe, fastmoe_smart, tutel
from experiments.registry import create
from moe.errors import Refused
from moe.system import LayerSpec
from moe.topology import Cluster, cluster_of
from tests.contract import CASES, is_plain_sentence
from tests.lone import lone_mesh

CLUSTER = cluster_of([2, 2])
SPEC = LayerSpec(model_dim=16, hidden_dim=24, num_experts=4, top_k=2)
MISSING = {
    "tutel": "The package tutel is not installed; see https://github.com/microsoft/Tutel.",
    "fastmoe": "The package fmoe (FastMoE) is not installed; see https://github.com/laekov/fastmoe.",
    "fastermoe_upstream": "The package fmoe (FastMoE) is not installed; see https://github.com/laekov/fastmoe.",
}
PACKAGES = {"tutel": "tutel", "fastmoe": "fmoe", "fastermoe_upstream": "fmoe"}
NO_BF16 = "FasterMoE's schedule has no backward in bf16; run it in fp32."


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Packages that can be found, whatever this machine has; empty at first."""
    names: set[str] = set()
    for module in (tutel, fastmoe, fastmoe_smart):
        monkeypatch.setattr(module, "find_spec", lambda name: name if name in names else None)
    return names


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with CUDA, whose ranks are not started."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize("name", MISSING)
@pytest.mark.usefixtures("gpus")
def test_a_package_is_found_when_installed_and_asked_for_when_not(name: str, installed: set[str]) -> None:
    refusals = {case.name: create(name).refusals(case.spec, CLUSTER) for case in CASES}
    assert set(map(tuple, refusals.values())) == {(MISSING[name],)}
    assert is_plain_sentence(MISSING[name])
    installed.add(PACKAGES[name])
    refusals = {case.name: create(name).refusals(case.spec, CLUSTER) for case in CASES}
    refusing = {case: reasons for case, reasons in refusals.items() if reasons}
    if name != "fastermoe_upstream":
        assert refusing == {}
        return
    assert refusing.pop("bf16") == [NO_BF16]
    drops = [case.name for case in CASES if case.spec.capacity_factor is not None]
    assert drops and refusing == {case: [fastmoe_smart.SHADOWS_DIFFER] for case in drops}
    plain = create(name, {"shadowing": False})
    assert not any(plain.refusals(case.spec, CLUSTER) for case in CASES if case.name in drops)


@pytest.mark.parametrize("name", ["fastmoe", "fastermoe_upstream"])
@pytest.mark.parametrize("backend", [None, "gloo"])
def test_fastmoe_refuses_ranks_on_a_cpu(
    backend: str | None, name: str, installed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a machine that has GPUs, when the ranks are on its CPU."""
    installed.add("fmoe")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: backend is not None)
    monkeypatch.setattr(dist, "is_initialized", lambda: backend is not None)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    (reason,) = create(name).refusals(SPEC, CLUSTER)
    assert is_plain_sentence(reason)
    assert reason == "FastMoE runs on CUDA and sends over NCCL only; these ranks are on a CPU."
    with pytest.raises(Refused, match="these ranks are on a CPU"):
        create(name).build_layer(SPEC, lone_mesh(num_ranks=2))


@pytest.mark.parametrize(
    ("options", "cluster", "sentence"),
    [
        ({}, cluster_of([1]), "upstream's crashes on one; use several, or fastmoe."),
        ({"group_size": 3}, CLUSTER, "group_size=3 doesn't divide 4 ranks; set one that does."),
    ],
)
@pytest.mark.usefixtures("gpus")
def test_fastermoe_refuses_ranks_that_its_groups_don_t_fit(
    options: dict[str, Any], cluster: Cluster, sentence: str, installed: set[str]
) -> None:
    installed.add("fmoe")
    (reason,) = create("fastermoe_upstream", options).refusals(SPEC, cluster)
    assert is_plain_sentence(reason)
    assert sentence in reason
    with pytest.raises(Refused, match=sentence):
        create("fastermoe_upstream", options).build_layer(SPEC, lone_mesh(cluster.world_size))


@pytest.mark.usefixtures("gpus")
def test_fastermoe_takes_fewer_ranks_than_a_group(installed: set[str]) -> None:
    installed.add("fmoe")
    assert create("fastermoe_upstream", {"group_size": 8}).refusals(SPEC, cluster_of([2])) == []


@pytest.mark.parametrize(
    ("options", "changed", "sentence"),
    [
        ({"gate": "gshard"}, {"top_k": 1}, "gate gshard knows only top_k=2; set that, or gate=naive."),
        ({"gate": "switch"}, {}, "gate switch knows only top_k=1"),
        ({"gate": "noisy"}, {"capacity_factor": 1.0}, "gate noisy drops nothing; set capacity_factor=null"),
        ({"random_routing": True}, {}, "gates gshard and dc only; set one of them."),
        ({"switch_eps": 0.1, "gate": "dc"}, {}, "gate switch only; set gate=switch."),
    ],
)
@pytest.mark.usefixtures("gpus")
def test_what_fastmoe_s_gates_cannot_do_they_refuse(
    options: dict[str, Any], changed: dict[str, Any], sentence: str, installed: set[str]
) -> None:
    installed.add("fmoe")
    (reason,) = create("fastmoe", options).refusals(dataclasses.replace(SPEC, **changed), CLUSTER)
    assert is_plain_sentence(reason)
    assert sentence in reason


@pytest.mark.parametrize(
    ("options", "cuda", "model_dim", "sentence"),
    [
        ({}, True, 15, "Tutel takes an even model_dim only."),
        ({"a2a_ffn_overlap_degree": 2}, False, 16, "a2a_ffn_overlap_degree works on CUDA only"),
        ({"adaptive_r": 0, "use_2dh": True}, True, 16, "adaptive_r=0 exchanges no tokens: leave use_2dh"),
        ({"batch_prioritized_routing": True}, True, 16, "where nothing drops: set capacity_factor."),
        ({"a2a_ffn_overlap_degree": 2, "use_2dh": True}, True, 16, "use one of use_2dh and a2a_ffn_overlap_degree."),
    ],
)
def test_what_tutel_cannot_do_it_refuses(
    options: dict[str, Any],
    cuda: bool,
    model_dim: int,
    sentence: str,
    installed: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed.add("tutel")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    (reason,) = create("tutel", options).refusals(LayerSpec(model_dim, 24, 4, 2), CLUSTER)
    assert is_plain_sentence(reason)
    assert sentence in reason


@pytest.mark.parametrize("overlapped", [{"use_2dh": True}, {"a2a_ffn_overlap_degree": 2}])
def test_tutel_refuses_replicated_experts_where_it_would_mix_up_ranks(overlapped: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="take all ranks for one expert-parallel group"):
        create("tutel", overlapped).build_layer(SPEC, lone_mesh(num_ranks=4, ep_size=2))


def test_tutel_refuses_more_slots_than_its_kernels_count(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = cast(Any, SimpleNamespace(spec=SPEC, mesh=lone_mesh()))
    monkeypatch.setattr(tutel, "LARGEST_INDEX", 4 * 9 * 16)
    ids_TK = torch.arange(24).view(12, 2) % 4
    tutel.TutelLayer._refuse_too_many_slots(layer, ids_TK)
    ids_TK[:10] = torch.tensor([0, 1])
    with pytest.raises(Refused, match="pad 4 experts to 11 slots, more than its kernels count"):
        tutel.TutelLayer._refuse_too_many_slots(layer, ids_TK)


def test_tutel_installed_without_cuda_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tutel_custom_kernel", cast(Any, object()))
    monkeypatch.setattr("baselines.tutel.os.environ", {})
    mesh = lone_mesh()
    tutel._prepare_upstream(mesh, "inject_source")
    object.__setattr__(mesh, "device", torch.device("cuda", 0))
    with pytest.raises(Refused, match="installed without its CUDA or NCCL parts; see https://github.com/microsoft/"):
        tutel._prepare_upstream(mesh, "inject_source")


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_fastmoe_s_gate_marks_the_copies_it_drops(capacity_factor: float | None) -> None:
    spec = LayerSpec(16, 24, 4, 2, capacity_factor=capacity_factor, dtype=torch.bfloat16)
    gate = fastmoe.SuiteGate(spec, torch.device("cpu"))
    torch.nn.init.normal_(gate.gate.weight, generator=torch.Generator().manual_seed(0))
    ids_TK, weights_TK = gate(_tokens(32).bfloat16())
    routing = gate.routing
    assert routing is not None
    kept_TK = torch.ones_like(ids_TK, dtype=torch.bool) if routing.kept_TK is None else routing.kept_TK
    assert bool(kept_TK.all()) == (capacity_factor is None)
    assert torch.equal(ids_TK, torch.where(kept_TK, routing.expert_ids_TK, -1))
    assert weights_TK.dtype == torch.bfloat16
    assert torch.equal(weights_TK == 0, ~kept_TK)


def _tokens(num_tokens: int) -> Tensor:
    return torch.randn(num_tokens, 16, generator=torch.Generator().manual_seed(1))
