"""Triton kernels against the torch path: compiled on a GPU, interpreted on a CPU.

The interpreter cuts bfloat16 off instead of rounding it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe import ops
from moe.experts import GroupedExperts
from moe.gate import TopKGate
from moe.system import LayerSpec

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def fast() -> ModuleType:
    """`moe.kernels`; every tensor takes them while it is in use."""
    if sys.platform != "linux":
        pytest.skip("Triton has builds for Linux only")
    return ops.kernels()


@pytest.fixture
def on_kernels(fast: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the suite take the kernels wherever its tensors lie."""
    monkeypatch.setattr(ops, "is_fast", lambda _tensor: True)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def plan(num_tokens: int, num_experts: int, top_k: int, drop_every: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """chosen [T * K], order [S] and inverse [T, K] of a random routing; every so many copies are dropped."""
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices.flatten()
    if drop_every:
        ids[::drop_every] = num_experts
    num_kept = int((ids < num_experts).sum())
    order = torch.argsort(ids, stable=True)[:num_kept]
    inverse = ops.inverse_of(order, len(ids)).view(num_tokens, top_k)
    return ids.to(DEVICE), order.to(DEVICE), inverse.to(DEVICE)


CASES = [(1, 4, 1, 0), (7, 5, 1, 2), (33, 8, 2, 0), (130, 16, 2, 3), (65, 256, 8, 0), (40, 24, 3, 1)]
"""Tokens, experts, choices, and every how many copies one is dropped (1: all)."""


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k", "drop_every"), CASES)
def test_copies_are_sorted_as_a_stable_sort_does(
    fast: ModuleType, num_tokens: int, num_experts: int, top_k: int, drop_every: int
) -> None:
    chosen, order, inverse = plan(num_tokens, num_experts, top_k, drop_every)
    got_order, got_inverse = fast.sort_by_expert(chosen, num_experts, len(order))
    assert torch.equal(got_order, order)
    assert torch.equal(got_inverse, inverse.flatten())
    counts = fast.count_choices(chosen, num_experts + 1)
    assert torch.equal(counts, torch.bincount(chosen, minlength=num_experts + 1))


@pytest.mark.parametrize("hole", [0, 3])
@pytest.mark.parametrize("sizes", [[5, 0, 1, 1030, 7], [2050], [0, 0], []])
def test_orders_are_laid_by_pieces(fast: ModuleType, sizes: list[int], hole: int) -> None:
    """Pieces lie in turn here, each behind a hole, and in the other direction there; counted from where each began."""
    counts = np.array(sizes, dtype=np.int64)
    here, there = counts.cumsum() - counts + hole * np.arange(len(counts)), counts[::-1].cumsum()[::-1] - counts
    pieces_4N, num_rows = np.stack([here, there, counts, here]), int(counts.sum())
    num_here = num_rows + hole * len(counts)
    rows = [(piece, row) for piece, count in enumerate(sizes) for row in range(count)]
    expected_here = [row for _, row in sorted(rows, key=lambda one: (-one[0], one[1]))]
    expected_there = [num_rows] * num_here
    for piece, row in rows:
        expected_there[here[piece] + row] = int(there[piece] + row - here[piece])
    found = ops.lay_pieces(pieces_4N, num_here, num_rows, torch.device(DEVICE))
    kept = np.ascontiguousarray(pieces_4N[:, counts > 0])
    by_kernel = fast.lay_pieces(torch.from_numpy(kept).to(DEVICE), max(sizes, default=0), num_here, num_rows)
    for here_of, there_of in (found, by_kernel):
        assert here_of.tolist() == expected_here
        assert there_of.tolist() == expected_there


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k", "drop_every"), CASES)
def test_copies_go_out_and_come_back_weighted(
    fast: ModuleType, dtype: torch.dtype, num_tokens: int, num_experts: int, top_k: int, drop_every: int
) -> None:
    _, order, inverse = plan(num_tokens, num_experts, top_k, drop_every)
    x, weights = normal(num_tokens, 48, dtype=dtype), normal(num_tokens, top_k, seed=1)
    copies = fast.gather_rows(x, order, top_k)
    assert torch.equal(copies, x[order // top_k])
    copies = normal(len(order), 48, dtype=dtype, seed=2)
    rows = torch.cat([copies, copies.new_zeros(1, 48)]).double()[inverse]
    tolerance: dict[str, Any] = (
        {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-7}
    )
    for given in (None, weights):
        scale = torch.ones_like(weights) if given is None else weights
        expected = (rows * scale.double().unsqueeze(-1)).sum(1)
        torch.testing.assert_close(fast.sum_copies(copies, inverse, given).double(), expected, **tolerance)
    grad = normal(num_tokens, 48, dtype=dtype, seed=3)
    grad_copies, grad_weights = fast.weighted_sum_backward(grad, copies, inverse, weights)
    kept_weights = weights.flatten()[order].double().unsqueeze(1)
    expected = grad.double()[order // top_k] * kept_weights
    torch.testing.assert_close(grad_copies.double(), expected, **tolerance)
    torch.testing.assert_close(grad_weights.double(), (rows * grad.double().unsqueeze(1)).sum(2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("swiglu", [False, True])
def test_activations_and_their_gradients(fast: ModuleType, swiglu: bool) -> None:
    hidden = normal(37, 96 if swiglu else 48).requires_grad_()
    grad = normal(37, 48, seed=1)
    left, right = hidden.chunk(2, 1) if swiglu else (hidden, None)
    expected = F.gelu(left) if right is None else F.silu(left) * right
    expected.backward(grad)
    ends_L = torch.tensor([5, 5, 37], dtype=torch.int32, device=hidden.device)
    torch.testing.assert_close(fast.activate(hidden.detach(), ends_L, swiglu), expected.detach(), rtol=1e-5, atol=1e-6)
    overwritten = hidden.detach().clone()
    fast.activate_backward_(overwritten, grad, ends_L, swiglu)
    torch.testing.assert_close(grad, expected.detach(), rtol=1e-5, atol=1e-6)
    assert hidden.grad is not None
    torch.testing.assert_close(overwritten, hidden.grad, rtol=1e-5, atol=1e-5)


def test_rows_of_no_expert_are_left_as_they_are(fast: ModuleType) -> None:
    hidden, grad, weights = normal(9, 16), normal(9, 16, seed=1), normal(9, 1, seed=2)[:, 0]
    ends_L = torch.tensor([2, 6], dtype=torch.int32, device=hidden.device)
    before_hidden, before_grad = hidden.clone(), grad.clone()
    whole = fast.activate(hidden, ends_L, False, weights)
    torch.testing.assert_close(whole[:6], F.gelu(hidden[:6]) * weights[:6, None], rtol=1e-5, atol=1e-6)
    fast.activate_backward_(hidden, grad, ends_L, False, weights)
    assert torch.equal(hidden[6:], before_hidden[6:]) and torch.equal(grad[6:], before_grad[6:])
    assert not torch.equal(hidden[5], before_hidden[5]) and not torch.equal(grad[5], before_grad[5])


def test_copies_beyond_the_room_have_no_place(fast: ModuleType) -> None:
    ids_TK = torch.randint(0, 4, (90, 2), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    rows = fast.LocalRows(torch.zeros(1, dtype=torch.int64, device=DEVICE), 0, ids_TK, 0, range(4))
    whole_PTK, cut_PTK = rows.places(180), rows.places(50)
    assert sorted(whole_PTK.flatten().tolist()) == list(range(180))
    assert torch.equal(cut_PTK, torch.where(whole_PTK < 50, whole_PTK, -1))


@pytest.mark.parametrize(("num_tokens", "top_k"), [(0, 2), (7, 1), (1300, 3)])
def test_what_crosses_between_ranks_is_counted(fast: ModuleType, num_tokens: int, top_k: int) -> None:
    """Experts 0 to 11 on three ranks, 12 for a dropped copy."""
    numbers = torch.Generator().manual_seed(5)
    ids_TK = torch.randint(0, 13, (num_tokens, top_k), generator=numbers)
    places_PTK = torch.randint(-3, 3, (3, num_tokens, top_k), generator=numbers).clamp_min(-1).int()
    read = [(ids_TK // 4 == rank).any(1).sum() for rank in range(3)]
    here = [((places_PTK[rank] >= 0).any(1).sum(), (places_PTK[rank] >= 0).sum()) for rank in range(3)]
    expected = torch.stack([torch.stack(read), *(torch.stack(column) for column in zip(*here, strict=True))])
    assert torch.equal(fast.count_crossings(ids_TK.to(DEVICE), places_PTK.to(DEVICE), 4).cpu(), expected)


class Biased(TopKGate):
    """A gate with a bias."""

    def __init__(self, spec: LayerSpec, device: torch.device) -> None:
        super().__init__(spec, device, penalty_E=normal(spec.num_experts, seed=8).abs().to(device))
        self.own_E = torch.nn.Parameter(normal(spec.num_experts, seed=9).to(device))

    def bias(self) -> Tensor:
        return 3 * self.own_E


@pytest.mark.parametrize("num_terms", [1, 2, 3, 4])
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
def test_sums_of_tensors_round_once(on_kernels: None, num_terms: int, out: torch.dtype) -> None:
    terms = [normal(3, 1000, dtype=torch.bfloat16, seed=seed) for seed in range(num_terms)]
    found = ops.sum_terms(terms, out)
    exact = torch.stack(terms).double().sum(0)
    assert found.dtype == out
    torch.testing.assert_close(found.double(), exact, rtol=1e-6 if out == torch.float32 else 2**-7, atol=1e-5)
    assert all(torch.equal(term, normal(3, 1000, dtype=torch.bfloat16, seed=i)) for i, term in enumerate(terms))


@pytest.mark.parametrize("kind", [TopKGate, Biased])
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 1), (6, 2), (256, 8), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_routes_as_on_the_torch_path(
    on_kernels: None,
    monkeypatch: pytest.MonkeyPatch,
    num_experts: int,
    top_k: int,
    dtype: torch.dtype,
    kind: type[TopKGate],
) -> None:
    spec = LayerSpec(model_dim=32, hidden_dim=8, num_experts=num_experts, top_k=top_k)
    gate = kind(spec, torch.device(DEVICE))
    with torch.no_grad():
        gate.weight.copy_(normal(num_experts, 32, seed=4))
    x = normal(29, 32, dtype=dtype, seed=5)
    grad_weights, grad_probs = normal(29, top_k, seed=6), normal(29, num_experts, seed=7)

    def observed() -> dict[str, Tensor]:
        tokens = x.clone().requires_grad_()
        gate.zero_grad()
        routing = gate(tokens)
        (
            (routing.weights_TK * grad_weights).sum() + (routing.probs_TE * grad_probs).sum() + routing.aux_loss
        ).backward()
        assert tokens.grad is not None and gate.weight.grad is not None
        return {
            "ids": routing.expert_ids_TK,
            "weights": routing.weights_TK.detach(),
            "counts": routing.counts_E,
            "aux": routing.aux_loss.detach(),
            "x": tokens.grad,
            **{name: parameter.grad for name, parameter in gate.named_parameters()},
        }

    got = observed()
    monkeypatch.setattr(ops, "is_fast", lambda _tensor: False)
    expected = observed()
    assert torch.equal(got["ids"], expected["ids"])
    assert torch.equal(got["counts"], expected["counts"])
    assert got.keys() == expected.keys()
    for name in got.keys() - {"ids", "counts", "x"}:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=2e-5)
    near: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-5}
    torch.testing.assert_close(got["x"], expected["x"], **near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_experts", "model_dim"), [(4, 40), (24, 96), (130, 200)])
def test_logits_are_those_of_float32(fast: ModuleType, num_experts: int, model_dim: int, dtype: torch.dtype) -> None:
    x, gate = normal(70, model_dim, dtype=dtype), normal(num_experts, model_dim, seed=1) / 4
    probs, *_ = fast.route(x, gate, 2)
    expected = (x.double() @ gate.double().t()).softmax(1)
    torch.testing.assert_close(probs.double(), expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("swiglu", [False, True])
def test_grouped_experts_are_the_experts_one_after_the_other(
    on_kernels: None, monkeypatch: pytest.MonkeyPatch, swiglu: bool
) -> None:
    """In bfloat16, with an expert that has no row; twice, the memory of the first time dirtied in between."""
    spec = LayerSpec(64, 32, 4, 1, activation="swiglu" if swiglu else "gelu")
    experts = GroupedExperts(spec, range(4), torch.device(DEVICE))
    with torch.no_grad():
        for seed, parameter in enumerate(experts.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed) * parameter.shape[-1] ** -0.5)
    rows, grad, sizes = normal(41, 64, dtype=torch.bfloat16, seed=8), normal(41, 64, seed=9).bfloat16(), [7, 0, 33, 1]

    def observed() -> list[Tensor]:
        given = rows.clone().requires_grad_()
        for parameter in experts.parameters():
            parameter.grad = None
        output = experts(given, sizes)
        output.backward(grad, retain_graph=True)
        found = [output.detach(), given.grad, *[parameter.grad for parameter in experts.parameters()]]
        if ops.is_fast(rows):
            with pytest.raises(RuntimeError, match="a second backward through the same forward"):
                output.backward(grad)
        return [tensor.clone() for tensor in found if tensor is not None]

    first = observed()
    dirt = [torch.full_like(tensor, float("nan")) for tensor in first for _ in range(3)]
    del dirt
    second = observed()
    monkeypatch.setattr(ops, "is_fast", lambda _tensor: False)
    for got, again, expected in zip(first, second, observed(), strict=True):
        assert torch.equal(got, again)
        assert (got - expected).float().norm() <= 1e-2 * expected.float().norm()


@pytest.mark.usefixtures("fast")
def test_kernels_compile_and_move_sixteen_bytes_at_a_time() -> None:
    """For Hopper, also where there is none: what is read and written between ranks must not go two bytes at a time."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.compile_kernels"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    wide = json.loads(done.stdout)
    assert wide["pull"]["loads"] > 0 and wide["pull"]["stores"] > 0
    assert wide["push"]["loads"] > 0 and wide["push"]["stores"] > 0
    assert wide["activate backward"]["loads"] > 0 and wide["activate backward"]["stores"] > 0
    assert wide["sum replicas"]["loads"] > 0 and wide["sum replicas"]["stores"] > 0
    assert wide["repeat rows"]["loads"] > 0 and wide["repeat rows"]["stores"] > 0
    assert wide["fill replicas"]["loads"] > 0 and wide["fill replicas"]["stores"] > 0
    for name in ("gather rows", "sum copies", "weight copies"):
        assert wide[name]["loads"] > 0 and wide[name]["stores"] > 0
    assert {"sum", "route", "route 256", "count in queue", "take turns", "place copies", "lay pieces"} < wide.keys()
    assert {"place local", "count crossings", "activate"} < wide.keys()
