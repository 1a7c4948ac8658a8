"""Initial weights depend on (seed, layer, global expert, name) and on nothing else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from baselines.reference import ReferenceLayer
from moe.layer import NativeMoE
from moe.system import LayerSpec, MoELayer
from moe.weights import expert_matrix, gate_matrix, load_layer
from tests.lone import lone_mesh

SPEC = LayerSpec(model_dim=48, hidden_dim=96, num_experts=8, top_k=2, activation="swiglu", seed=3, layer_index=1)


def experts_of(layer: MoELayer) -> dict[tuple[int, str], Tensor]:
    return {(view.expert, view.name): view.view(view.parameter.detach()) for view in layer.expert_views()}


@pytest.mark.parametrize(("num_ranks", "ep_size"), [(1, 1), (2, 2), (4, 4), (4, 2), (8, 8)])
def test_same_weights_on_any_rank_of_any_world(num_ranks: int, ep_size: int) -> None:
    whole = ReferenceLayer(SPEC, lone_mesh())
    load_layer(whole)
    expected = experts_of(whole)
    held: list[tuple[int, str]] = []
    for rank in range(num_ranks):
        layer = NativeMoE(SPEC, lone_mesh(num_ranks, rank, ep_size))
        load_layer(layer)
        assert torch.equal(layer.gate_weight, whole.gate_weight)
        for key, matrix in experts_of(layer).items():
            assert torch.equal(matrix, expected[key]), key
            held.append(key)
    assert sorted(held) == sorted(list(expected) * (num_ranks // ep_size))


def test_torch_seed_and_earlier_draws_do_not_matter() -> None:
    torch.manual_seed(1)
    before = expert_matrix(SPEC, 5, "w1", "cpu")
    torch.manual_seed(2)
    torch.rand(7)
    assert torch.equal(expert_matrix(SPEC, 5, "w1", "cpu"), before)


def test_seed_layer_expert_and_name_each_change_them() -> None:
    square = dataclasses.replace(SPEC, hidden_dim=SPEC.model_dim)
    drawn = [
        expert_matrix(square, 5, "w1", "cpu"),
        expert_matrix(square, 6, "w1", "cpu"),
        expert_matrix(square, 5, "w2", "cpu"),
        expert_matrix(square, 5, "w3", "cpu"),
        expert_matrix(dataclasses.replace(square, seed=4), 5, "w1", "cpu"),
        expert_matrix(dataclasses.replace(square, layer_index=2), 5, "w1", "cpu"),
    ]
    assert len({tuple(matrix.flatten().tolist()) for matrix in drawn}) == len(drawn)
    assert not torch.equal(gate_matrix(SPEC, "cpu"), gate_matrix(dataclasses.replace(SPEC, seed=4), "cpu"))


def test_scale_is_one_over_the_root_of_the_inputs() -> None:
    for name, fan_in in (("w1", 48), ("w2", 96), ("w3", 48)):
        matrix = expert_matrix(SPEC, 0, name, "cpu")
        assert tuple(matrix.shape) == SPEC.expert_shapes[name]
        assert matrix.std().item() == pytest.approx(fan_in**-0.5, rel=0.05)
    assert gate_matrix(SPEC, "cpu").std().item() == pytest.approx(48**-0.5, rel=0.15)


def test_experts_that_do_not_divide_over_the_ranks_are_never_cut_short() -> None:
    with pytest.raises(AssertionError, match="8 experts can't be spread over 3 ranks"):
        lone_mesh(3).local_experts(8)
