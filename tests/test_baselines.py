"""What the contract can't see of the baselines: the oracle's own formula, refusals, and fairscale's own gate."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.fairscale import UpstreamGate
from baselines.reference import ReferenceLayer
from experiments.registry import create, discover
from moe.gate import balance_loss
from moe.system import Activation, LayerSpec
from moe.topology import cluster_of
from moe.weights import expert_matrix, gate_matrix, load_layer
from tests.contract import is_plain_sentence
from tests.lone import lone_mesh

CLUSTER = cluster_of([2, 2])
SPEC = LayerSpec(model_dim=16, hidden_dim=24, num_experts=4, top_k=2)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_the_oracle_states_the_formula(activation: Activation, top_k: int) -> None:
    """y = sum over the K most probable experts of p_e / sum p * FFN_e(x), token by token in float64."""
    spec = LayerSpec(16, 24, 4, top_k, activation, seed=5)
    layer = ReferenceLayer(spec, lone_mesh())
    load_layer(layer)
    tokens = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))
    gate = gate_matrix(spec, "cpu").double()
    weights: dict[tuple[int, str], Tensor] = {
        (expert, name): expert_matrix(spec, expert, name, "cpu").double()
        for expert in range(4)
        for name in spec.expert_shapes
    }
    output = layer(tokens)
    for x, y in zip(tokens.double(), output.y_TM, strict=True):
        probs = torch.exp(gate @ x) / torch.exp(gate @ x).sum()
        chosen = sorted(range(4), key=lambda expert: -float(probs[expert]))[:top_k]
        total = sum(float(probs[expert]) for expert in chosen) if top_k > 1 else 1.0
        expected = torch.zeros(16).double()
        for expert in chosen:
            hidden = x @ weights[expert, "w1"]
            if activation == "gelu":
                hidden = F.gelu(hidden)
            else:
                hidden = hidden * torch.sigmoid(hidden) * (x @ weights[expert, "w3"])
            expected += float(probs[expert]) / total * (hidden @ weights[expert, "w2"])
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)


UPSTREAM = [name for name, system in discover().items() if system.implementation == "upstream"]


@pytest.mark.parametrize("name", UPSTREAM)
def test_a_missing_package_is_asked_for_with_its_page(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[discover()[name].__module__], "find_spec", lambda package: None)
    (reason,) = create(name).refusals(SPEC, CLUSTER)
    assert is_plain_sentence(reason)
    assert "is not installed; see https://" in reason


@pytest.mark.parametrize(
    ("name", "options", "changed", "sentence"),
    [
        ("fairscale", {}, {"dtype": torch.bfloat16}, "so it runs in float32 only."),
        ("fairscale", {"gate": "upstream"}, {"top_k": 1}, "fairscale's Top2Gate knows only top_k=2"),
        ("fairscale", {"gate": "upstream"}, {"capacity_factor": None}, "fairscale's Top2Gate knows only"),
        ("deepspeed", {"use_tutel": True}, {}, "use_tutel needs the package tutel; see https://"),
    ],
)
def test_what_a_system_cannot_do_it_refuses(
    name: str, options: dict[str, Any], changed: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {"fairscale", "deepspeed"}  # whatever this machine has
    module = sys.modules[discover()[name].__module__]
    monkeypatch.setattr(module, "find_spec", lambda package: package if package in here else None)
    spec = LayerSpec(**{"model_dim": 16, "hidden_dim": 24, "num_experts": 4, "top_k": 2} | changed)
    (reason,) = create(name, options).refusals(spec, CLUSTER)
    assert is_plain_sentence(reason)
    assert sentence in reason


def test_fairscales_own_gate_runs_on_its_own_terms() -> None:
    spec = LayerSpec(16, 24, 4, 2, capacity_factor=1.0)
    assert create("fairscale", {"gate": "upstream"}).refusals(spec, CLUSTER) == []


@pytest.mark.parametrize("seed", range(5))
def test_fairscales_sampled_choices_are_told_and_its_drops_counted(seed: int) -> None:
    """Upstream samples the second expert and hides it; the mask that it returns shows the copies it kept."""
    torch.manual_seed(seed)
    gate = UpstreamGate(SPEC, lone_mesh())
    gate.weight.data.normal_()
    tokens = torch.randn(32, 16)
    aux_loss, _, mask_TEC = gate(tokens)
    chosen_TE = F.one_hot(gate.expert_ids_TK, 4).sum(1)
    kept_TE = mask_TEC.any(2)
    assert (chosen_TE.max(), chosen_TE.sum()) == (1, 64)
    assert (kept_TE <= chosen_TE.bool()).all(), "every copy that was kept had been told"
    assert int(gate.num_dropped) == 64 - int(kept_TE.sum()) > 0
    best = (tokens @ gate.weight.t()).topk(2).indices
    assert not torch.equal(gate.expert_ids_TK, best), "the second choice is sampled"
    probs = (tokens @ gate.weight.t()).softmax(1)
    torch.testing.assert_close(aux_loss, balance_loss(probs, gate.expert_ids_TK))
