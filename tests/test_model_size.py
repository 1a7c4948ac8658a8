"""Sizes of known models, and the refusal of what can't fit."""

from __future__ import annotations

import re
from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from experiments import model_size
from experiments.cells import _expert_copies
from experiments.cli import compose
from experiments.config import RunConfig, load_run
from experiments.model import DTYPES, layer_spec
from experiments.model_size import (
    MemoryEstimate,
    activation_bytes,
    available_bytes,
    check_fits,
    count_parameters,
    describe,
    estimate_memory,
    num_moe_layers,
)
from methods import swiftmoe
from methods.swiftmoe import SwiftMoE, SwiftMoELayer
from moe.errors import ConfigError
from tests.lone import lone_mesh

GIB = 2**30


def run_of(*overrides: str) -> RunConfig:
    """A training run on the CPU, from conf/."""
    return load_run(compose("train", ["cluster.device=cpu", *overrides]))


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("mixtral_8x7b", 46.7e9, 12.9e9),  # Mixtral of Experts, section 2
        ("qwen3_30b_a3b", 30.5e9, 3.3e9),  # Qwen3 technical report, table 2
    ],
)
def test_published_sizes(name: str, total: float, active: float) -> None:
    count = count_parameters(run_of(f"model={name}").model)
    assert count.total == pytest.approx(total, rel=0.02)
    assert count.active == pytest.approx(active, rel=0.02)


def test_gpt_small_is_the_size_that_its_name_says() -> None:
    """With one expert in each block it is GPT-2 small, 124 million parameters without biases and positions."""
    count = count_parameters(run_of("model=gpt_small_moe", "model.num_experts=1", "cluster=local_1").model)
    assert count.total == count.active == pytest.approx(124e6, rel=0.01)


def test_every_part_by_hand() -> None:
    model = run_of("model.num_kv_heads=2", "model.activation=swiglu", "model.tie_embeddings=false").model
    count = count_parameters(model)
    assert count.embedding == 2 * 2048 * 128
    assert count.attention == 4 * (128 * 128 + 2 * 128 * 64 + 128 * 128)
    assert count.norms == 9 * 128
    assert count.gates == 2 * 128 * 8
    assert count.dense == 2 * 3 * 128 * 512
    assert count.experts == 2 * 8 * 3 * 128 * 256
    assert count.active_experts == 2 * 2 * 3 * 128 * 256
    assert count.total - count.experts == count.shared == count.active - count.active_experts
    assert count.per_rank(4) == count.shared + 2 * 2 * 3 * 128 * 256


def test_a_head_may_be_wider_than_its_share() -> None:
    attention = count_parameters(run_of("model.head_dim=64").model).attention
    assert attention == 2 * count_parameters(run_of().model).attention


def test_memory_is_sixteen_bytes_a_parameter_and_the_activations() -> None:
    run = run_of()
    parameters = count_parameters(run.model).per_rank(4)
    estimate = estimate_memory(run.model, run.trainer, 4)
    assert (estimate.weights, estimate.gradients, estimate.optimizer) == (
        4 * parameters,
        4 * parameters,
        8 * parameters,
    )
    assert estimate.activations == activation_bytes(run.model, 4 * 128, 4)
    assert estimate.total == 16 * parameters + estimate.activations


def test_bf16_keeps_a_copy_of_the_weights_and_halves_the_activations() -> None:
    full, half = (run_of(f"trainer.precision={precision}", "model.vocab_size=257") for precision in ("fp32", "bf16"))
    in_full = estimate_memory(full.model, full.trainer, 4)
    in_half = estimate_memory(half.model, half.trainer, 4)
    assert in_half.weights * 4 == in_full.weights * 6
    logits = 3 * 257 * 4 * 512
    assert (in_half.activations - logits) * 2 == in_full.activations - logits


def test_experts_on_every_rank_cost_more() -> None:
    run = run_of()
    spread = estimate_memory(run.model, run.trainer, 4)
    dense = estimate_memory(run.model, run.trainer, 4, expert_ranks=1)
    assert dense.weights - spread.weights == 4 * count_parameters(run.model).experts * 3 // 4


@pytest.mark.parametrize(("precision", "element_bytes"), [("fp32", 4), ("bf16", 2)])
def test_slots_are_beside_what_is_trained(precision: str, element_bytes: int) -> None:
    """As the layer has them: weights and gradients in the dtype of the arithmetic."""
    run = run_of(f"trainer.precision={precision}", "system=swiftmoe", "system.slots_per_rank=8")
    plain = estimate_memory(run.model, run.trainer, 4, 4.0)
    slotted = estimate_memory(run.model, run.trainer, 4, *_expert_copies(run))
    spec = layer_spec(run.model, 1, 0, DTYPES[precision])
    layer = SwiftMoE({"slots_per_rank": 32}).build_layer(spec, lone_mesh())
    assert isinstance(layer, SwiftMoELayer)
    slots = layer.experts
    assert len(slots.experts) == 32, "of one rank, which has them all"
    slots_bytes = num_moe_layers(run.model) * (slots.w_in.nbytes + slots.w_out.nbytes) // 4
    assert slots.w_in.element_size() == element_bytes
    assert slotted.weights - plain.weights == slotted.gradients - plain.gradients == slots_bytes
    assert (slotted.optimizer, slotted.activations) == (plain.optimizer, plain.activations)


def test_offloaded_shards_take_no_memory_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("system=swiftmoe", "system.offload=true")
    on_cpu = estimate_memory(run.model, run.trainer, 4, *_expert_copies(run))
    monkeypatch.setattr(swiftmoe, "ranks_are_on_cuda", lambda: True)
    on_gpu = estimate_memory(run.model, run.trainer, 4, *_expert_copies(run))
    assert on_cpu.optimizer - on_gpu.optimizer == 8 * count_parameters(run.model).experts // 4


def test_activations_grow_with_the_tokens_only() -> None:
    model = run_of().model
    assert activation_bytes(model, 300, 4) == 3 * activation_bytes(model, 100, 4)
    assert activation_bytes(run_of("model.top_k=4").model, 100, 4) > activation_bytes(model, 100, 4)


def test_refusal_holds_the_estimate() -> None:
    run = run_of("model=mixtral_8x7b")
    estimate = estimate_memory(run.model, run.trainer, 4)
    with pytest.raises(ConfigError) as caught:
        check_fits(run.model, run.trainer, run.cluster, 8 * GIB)
    (problem,) = caught.value.problems
    assert (problem.key, problem.value) == ("model", "mixtral_8x7b")
    assert problem.rule.startswith(f"needs about {estimate.total / GIB:.2f} GiB a rank (weights 47.98 GiB, gradients")
    assert problem.rule.endswith("on 4 ranks of cluster local_2x2, and a rank has 8.00 GiB")
    assert problem.fix.startswith("choose a smaller model or batch, or a cluster of more ranks")


def test_what_fits_exactly_is_not_refused() -> None:
    run = run_of()
    estimate = estimate_memory(run.model, run.trainer, 4)
    assert check_fits(run.model, run.trainer, run.cluster, estimate.total) == estimate
    with pytest.raises(ConfigError):
        check_fits(run.model, run.trainer, run.cluster, estimate.total - 1)


def test_ranks_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = namedtuple("machine", ["available"])
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine(8 * GIB))
    monkeypatch.setattr(model_size, "_control_group_bytes", lambda: [])
    spawned = run_of().cluster
    assert available_bytes(spawned) == 2 * GIB
    with monkeypatch.context() as launched:
        launched.setattr(model_size, "ranks_here", lambda env: SimpleNamespace(local_world_size=2))
        assert available_bytes(spawned) == 4 * GIB, "two of the ranks were launched on this node"
    monkeypatch.setattr(model_size, "_control_group_bytes", lambda: [4 * GIB])
    assert available_bytes(spawned) == GIB


def test_check_fits_asks_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of()
    monkeypatch.setattr(model_size, "available_bytes", lambda cluster: 1)
    with pytest.raises(ConfigError, match="a rank has 0.0 MiB"):
        check_fits(run.model, run.trainer, run.cluster)


@pytest.mark.parametrize("limit", ["max", "1000"])
def test_control_group_limit(limit: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "max").write_text(f"{limit}\n")
    (tmp_path / "current").write_text("400\n")
    monkeypatch.setattr(model_size, "CONTROL_GROUP_FILES", [(tmp_path / "max", tmp_path / "current")])
    assert model_size._control_group_bytes() == ([] if limit == "max" else [600])


def test_description() -> None:
    run = run_of("model=mixtral_8x7b")
    text = describe(run.model, run.trainer, run.cluster)
    first, second = text.splitlines()
    assert first == (
        "model mixtral_8x7b: 46.70 billion parameters, 12.88 billion active for a token "
        "(32 MoE layers of 8 experts, top 2)"
    )
    assert re.match(r"one of 4 ranks: 12.88 billion parameters, about \d+\.\d\d GiB \(weights 47.98 GiB, ", second)


def test_total_is_the_sum() -> None:
    assert MemoryEstimate(1, 2, 4, 8).total == 15
