"""The top-k gate, its balance loss and its drop rule, against values worked out by hand or by the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe.gate import Routing, TopKGate, balance_loss, combine_weights, queue_positions
from moe.system import LayerSpec


def route(logits_TE: Tensor, top_k: int, capacity_factor: float | None = None) -> Routing:
    """Route tokens whose logits are given: the gate's matrix is the identity."""
    num_experts = logits_TE.shape[1]
    spec = LayerSpec(num_experts, 8, num_experts, top_k, capacity_factor=capacity_factor)
    gate = TopKGate(spec, torch.device("cpu"))
    gate.weight.data.copy_(torch.eye(num_experts))
    return gate(logits_TE)


PROBS = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]])


def test_first_choice_is_weighted_by_its_probability() -> None:
    routing = route(PROBS.log(), top_k=1)
    assert routing.expert_ids_TK.tolist() == [[0], [3]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[0.5], [0.4]]))
    torch.testing.assert_close(routing.probs_TE, PROBS)
    assert routing.counts_E.tolist() == [1, 0, 0, 1]
    assert routing.kept_TK is None


def test_several_choices_are_normalised_best_first() -> None:
    routing = route(PROBS.log(), top_k=2)
    assert routing.expert_ids_TK.tolist() == [[0, 1], [3, 2]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[5 / 8, 3 / 8], [4 / 7, 3 / 7]]))
    assert routing.counts_E.tolist() == [1, 1, 1, 1]


def test_balance_loss_by_hand() -> None:
    # First choices 0 and 3; mean probabilities (.3, .25, .225, .225); 4 * (.5 * .3 + .5 * .225).
    assert balance_loss(PROBS, torch.tensor([[0, 1], [3, 2]])).item() == pytest.approx(1.05)
    # With three choices all of them count: shares (1, 2, 2, 1) / 6.
    three = torch.tensor([[0, 1, 2], [3, 2, 1]])
    assert balance_loss(PROBS, three).item() == pytest.approx(4 * (0.3 + 2 * 0.25 + 2 * 0.225 + 0.225) / 6)


@pytest.mark.parametrize("num_experts", [2, 16])
def test_balance_loss_is_one_when_uniform_and_e_when_collapsed(num_experts: int) -> None:
    everyone = torch.arange(num_experts).unsqueeze(1)
    uniform = torch.full((num_experts, num_experts), 1 / num_experts)
    assert balance_loss(uniform, everyone).item() == pytest.approx(1)
    collapsed = torch.zeros(5, num_experts).index_fill(1, torch.tensor([1]), 1.0)
    assert balance_loss(collapsed, torch.ones(5, 1, dtype=torch.int64)).item() == pytest.approx(num_experts)


def test_balance_loss_sends_its_gradient_through_the_probabilities() -> None:
    probs = PROBS.clone().requires_grad_()
    balance_loss(probs, torch.tensor([[0], [3]])).backward()
    # d/dp_te = E / T * share_e
    torch.testing.assert_close(probs.grad, torch.tensor([[1.0, 0.0, 0.0, 1.0]] * 2))


def test_queue_positions_by_hand() -> None:
    # First choices 0, 0, 1 queue before second choices 1, 1, 0.
    assert queue_positions(torch.tensor([[0, 1], [0, 1], [1, 0]]), 2).tolist() == [[0, 1], [1, 2], [0, 2]]


@given(st.integers(1, 12), st.integers(1, 3), st.integers(3, 6), st.integers(0, 2**31))
def test_queue_positions_by_definition(num_tokens: int, top_k: int, num_experts: int, seed: int) -> None:
    noise = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    ids_TK = noise.topk(top_k).indices
    waiting = [0] * num_experts
    expected = torch.empty_like(ids_TK)
    for choice in range(top_k):
        for token in range(num_tokens):
            expert = int(ids_TK[token, choice])
            expected[token, choice] = waiting[expert]
            waiting[expert] += 1
    assert torch.equal(queue_positions(ids_TK, num_experts), expected)


def test_drops_beyond_the_capacity_and_renormalises_what_is_kept() -> None:
    # capacity = ceil(1 * 2 * 3 / 4) = 2; first choices 0, 0, 0; second 1, 1, 1.
    routing = route(PROBS[:1].log().expand(3, 4), top_k=2, capacity_factor=1.0)
    assert routing.kept_TK is not None
    assert routing.kept_TK.tolist() == [[True, True], [True, True], [False, False]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[5 / 8, 3 / 8], [5 / 8, 3 / 8], [0, 0]]))
    assert routing.counts_E.tolist() == [3, 3, 0, 0], "choices are counted before drops"
    only_second = combine_weights(PROBS[:1], torch.tensor([[0, 1]]), torch.tensor([[False, True]]))
    torch.testing.assert_close(only_second, torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize(
    ("factor", "top_k", "num_tokens", "num_experts", "capacity"),
    [(1.0, 1, 16, 8, 2), (1.0, 1, 17, 8, 3), (1.25, 2, 24, 8, 8), (1.1, 2, 400, 8, 110), (0.7, 1, 30, 3, 7)],
)
def test_capacity_is_the_ceiling_without_float_noise(
    factor: float, top_k: int, num_tokens: int, num_experts: int, capacity: int
) -> None:
    assert LayerSpec(16, 16, num_experts, top_k, capacity_factor=factor).capacity(num_tokens) == capacity


def test_computes_in_float32_whatever_the_tokens() -> None:
    spec = LayerSpec(32, 8, 8, 2)
    gate = TopKGate(spec, torch.device("cpu"))
    torch.manual_seed(0)
    gate.weight.data.normal_()
    tokens = torch.randn(64, 32).bfloat16()
    in_bf16, in_fp32 = gate(tokens), gate(tokens.float())
    assert in_bf16.weights_TK.dtype == torch.float32
    assert torch.equal(in_bf16.weights_TK, in_fp32.weights_TK)
    assert torch.equal(in_bf16.expert_ids_TK, in_fp32.expert_ids_TK)
