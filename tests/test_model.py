"""experiments.model on four ranks of two nodes and on one: its size, its initial weights, its losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import registry
from experiments.cli import compose
from experiments.config import ModelConfig
from experiments.model import Attention, build_gpt, layer_spec, rotate, rotation
from experiments.model_size import count_parameters, num_moe_layers
from moe.mesh import create_mesh
from moe.topology import cluster_of
from moe.weights import expert_matrix
from tests.lone import lone_mesh
from tests.rank_models import MODELS, SEED, runnable
from tests.rank_models import models as facts_of
from tests.tiny import rank_here

SYSTEMS = runnable()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same facts of the oracle and of flat with this process as their only rank."""
    with rank_here(tmp_path_factory.mktemp("alone")) as info:
        mesh = create_mesh(cluster_of([1]), info.device)
        return {name: facts_of(registry.create(name), mesh) for name in ("reference", "flat")}


def facts(model_facts: tuple[Path, dict[str, Any]], system: str, model: str) -> dict[str, Any]:
    """What four ranks recorded of a system's model."""
    return model_facts[1]["models"][system][model]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_real_size_is_the_counted_one(system: str, model: str, model_facts: tuple[Path, dict[str, Any]]) -> None:
    count, ranks = count_parameters(MODELS[model]), facts(model_facts, system, model)["ranks"]
    shards, copies = registry.get(system).shards_experts, registry.create(system).expert_copies(8, 4)
    assert [rank["parameters"] for rank in ranks] == [count.per_rank(4 / copies)] * 4
    assert [rank["sharded"] for rank in ranks] == [count.experts * copies // 4 if shards else 0] * 4
    if copies == 1:
        assert sum(rank["sharded"] for rank in ranks) + count.shared == count.total


def test_the_default_models_real_size_is_the_counted_one() -> None:
    model = ModelConfig(**compose("train")["model"])
    assert model.name == "tiny"
    gpt = build_gpt(model, registry.create("reference"), lone_mesh(), 0, torch.float32)
    assert sum(parameter.numel() for parameter in gpt.parameters()) == count_parameters(model).total
    assert len(gpt.moe_layers) == num_moe_layers(model) == 2


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_initial_weights_are_the_same_for_every_system_and_world_size(
    system: str, model: str, model_facts: tuple[Path, dict[str, Any]], alone: dict[str, Any]
) -> None:
    digests = facts(model_facts, system, model)["digests"]
    assert digests == alone["reference"][model]["digests"] == alone["flat"][model]["digests"]
    experts = [key for key in digests if "/experts/" in key]
    assert len(experts) == num_moe_layers(MODELS[model]) * 8 * (2 if model == "plain" else 3)
    drawn = [digest for key, digest in digests.items() if "norm" not in key]
    assert len(set(drawn)) == len(drawn), "two matrices start alike"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_first_losses_are_the_oracles(system: str, model: str, model_facts: tuple[Path, dict[str, Any]]) -> None:
    got, expected = facts(model_facts, system, model)["ranks"], facts(model_facts, "reference", model)["ranks"]
    for rank, oracle in zip(got, expected, strict=True):
        assert rank["losses"] == pytest.approx(oracle["losses"], rel=1e-5)
    assert len({rank["losses"][0] for rank in got}) == 4, "every rank has tokens of its own"


def test_weights_depend_on_the_seed_and_are_scaled_to_their_width() -> None:
    reference, model = registry.create("reference"), MODELS["plain"]
    one, other = (build_gpt(model, reference, lone_mesh(), seed, torch.float32) for seed in (0, 1))
    assert not torch.equal(one.embedding.weight, other.embedding.weight)
    assert not torch.equal(one.moe_layers[0].gate_weight, other.moe_layers[0].gate_weight)
    assert float(one.embedding.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    query = one.get_parameter("blocks.0.attention.query.weight")
    assert float(query.detach().std()) == pytest.approx(32**-0.5, rel=0.1)
    assert one.head.weight is one.embedding.weight
    assert build_gpt(MODELS["other"], reference, lone_mesh(), 0, torch.float32).head.weight.shape == (300, 32)


def test_every_second_block_holds_experts_and_knows_its_number() -> None:
    gpt = build_gpt(MODELS["plain"], registry.create("reference"), lone_mesh(), SEED, torch.float32)
    assert [block.moe is not None for block in gpt.blocks] == [False, True, False, True]
    assert [layer.spec.layer_index for layer in gpt.moe_layers] == [1, 3]
    spec = layer_spec(MODELS["plain"], 3, SEED, torch.float32)
    view = next(view for view in gpt.moe_layers[1].expert_views() if (view.expert, view.name) == (2, "w1"))
    assert torch.equal(view.view(view.parameter.data), expert_matrix(spec, 2, "w1", "cpu"))


@torch.no_grad()
def test_a_token_sees_only_what_comes_before_it() -> None:
    for model in MODELS.values():
        attention = Attention(model, torch.device("cpu"))
        head_dim = model.head_dim or model.model_dim // model.num_heads
        x_BSM = torch.randn(2, 9, model.model_dim, generator=torch.Generator().manual_seed(0))
        changed = x_BSM.clone()
        changed[:, 5] += 1.0
        angles = rotation(9, head_dim, torch.device("cpu"))
        difference = (attention(x_BSM, angles) - attention(changed, angles)).abs().amax((0, 2))
        assert (difference[:5] == 0).all()
        assert (difference[5:] > 0).all()


def test_rotary_positions_tell_distances_only() -> None:
    """The product of a rotated query and a rotated key depends on how far apart they stand."""
    cos, sin = rotation(12, 8, torch.device("cpu"))
    query, key = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).expand(2, 1, 12, 1, 8)
    products = rotate(query, (cos, sin))[0, :, 0] @ rotate(key, (cos, sin))[0, :, 0].T
    for distance in range(12):
        diagonal = products.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-5)
    assert not torch.allclose(products.diagonal(1)[0], products.diagonal(5)[0], atol=1e-3)
