"""Routing workloads: what is asked for is what a gate chooses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe.errors import ConfigError
from moe.gate import TopKGate
from moe.system import LayerSpec
from moe.workload import MAX_TOP_K, Workload, expert_ids, gate_for, tokens_for

UNIFORM, ZIPF = Workload(), Workload("zipf", exponent=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("workload", [UNIFORM, ZIPF], ids=["uniform", "zipf"])
@pytest.mark.parametrize(
    ("num_experts", "top_k"), [(8, 1), (8, 2), (8, 8), (64, 2), (64, 64), (256, 1), (256, 2), (256, 8)]
)
def test_a_gate_chooses_what_the_workload_says(
    workload: Workload, num_experts: int, top_k: int, dtype: torch.dtype
) -> None:
    model_dim = max(64, num_experts)
    asked = expert_ids(workload, 500, num_experts, top_k, seed=1, rank=2)
    gate = TopKGate(LayerSpec(model_dim, 8, num_experts, top_k), torch.device("cpu"))
    gate.weight.data.copy_(gate_for(num_experts, model_dim, "cpu"))
    tokens = tokens_for(asked, model_dim, num_experts, seed=1, rank=2, dtype=dtype, device="cpu")
    assert tokens.dtype == dtype
    assert torch.equal(gate(tokens).expert_ids_TK, asked)


@pytest.mark.parametrize("workload", [UNIFORM, ZIPF], ids=["uniform", "zipf"])
def test_ids_are_a_function_of_seed_and_rank_alone(workload: Workload) -> None:
    first = expert_ids(workload, 300, 16, 2, seed=0, rank=0)
    torch.manual_seed(99)
    assert torch.equal(first, expert_ids(workload, 300, 16, 2, seed=0, rank=0))
    assert not torch.equal(first, expert_ids(workload, 300, 16, 2, seed=0, rank=1))
    assert not torch.equal(first, expert_ids(workload, 300, 16, 2, seed=1, rank=0))
    assert first.dtype == torch.int64
    assert (first.sort(1).values.diff(dim=1) > 0).all(), "an expert is chosen once a token"
    tokens = [tokens_for(first, 32, 16, 0, rank, torch.float32, "cpu") for rank in (0, 0, 1)]
    assert torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[2])


def shares(workload: Workload, top_k: int, seed: int = 0, rank: int = 0) -> torch.Tensor:
    """Share of the copies that each of 16 experts gets."""
    ids = expert_ids(workload, 100_000, 16, top_k, seed, rank)
    return torch.bincount(ids.flatten(), minlength=16).double() / ids.numel()


def test_uniform_is_uniform() -> None:
    for top_k in (1, 2):
        torch.testing.assert_close(shares(UNIFORM, top_k), torch.full((16,), 1 / 16).double(), rtol=0.05, atol=0)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
def test_zipf_follows_its_exponent(exponent: float) -> None:
    popularity = torch.arange(1, 17).double() ** -exponent
    measured = shares(Workload("zipf", exponent), 1).sort(descending=True).values
    torch.testing.assert_close(measured, popularity / popularity.sum(), rtol=0.06, atol=0)


def test_zipf_without_skew_is_uniform() -> None:
    torch.testing.assert_close(shares(Workload("zipf", 0.0), 2), shares(UNIFORM, 2))


def test_zipf_is_as_skewed_as_documented() -> None:
    busiest = [round(16 * shares(ZIPF, top_k).max().item(), 1) for top_k in (1, 2, 4)]
    assert busiest == [4.7, 4.2, 3.2]


def test_all_ranks_crowd_onto_the_experts_that_the_seed_picks() -> None:
    order = [
        shares(ZIPF, 1, seed, rank).argsort(descending=True)[:4].tolist() for seed, rank in ((0, 0), (0, 1), (1, 0))
    ]
    assert order[0] == order[1] != order[2]


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """Two layers, five tokens, two choices among four experts."""
    first = np.array([[0, 1], [2, 3], [1, 0], [3, 1], [0, 2]], dtype=np.int16)
    np.savez(tmp_path / "routing.npz", sample_expert_ids=np.stack([first, first[::-1]]))
    return tmp_path / "routing.npz"


def replayed(path: Path, num_tokens: int, **changed: Any) -> list[list[int]]:
    arguments = {"num_experts": 4, "top_k": 2, "seed": 0, "rank": 0} | changed
    return expert_ids(Workload("replay", path=str(path)), num_tokens, **arguments).tolist()


def test_replay_goes_through_the_recorded_tokens_rank_by_rank(recording: Path) -> None:
    assert replayed(recording, 2) == [[0, 1], [2, 3]]
    assert replayed(recording, 2, rank=1) == [[1, 0], [3, 1]]
    assert replayed(recording, 2, rank=2) == [[0, 2], [0, 1]], "it starts again when the recording ends"
    assert replayed(recording, 7) == [[0, 1], [2, 3], [1, 0], [3, 1], [0, 2], [0, 1], [2, 3]]
    assert replayed(recording, 2, seed=1) == [[0, 2], [3, 1]], "the seed picks the layer"
    assert replayed(recording, 2, seed=2) == replayed(recording, 2)
    assert replayed(recording, 2, top_k=1) == [[0], [2]]


@pytest.mark.parametrize(
    ("arrays", "changed", "message"),
    [
        (None, {}, "replay needs the routing.npz of a run"),
        ({"dispatch_counts": np.zeros((1, 2, 4), int)}, {}, "no readable array sample_expert_ids"),
        (
            {"sample_expert_ids": np.zeros((5, 2), int)},
            {},
            r"must hold integers \[layers, tokens, choices\], not .*\(5, 2\)",
        ),
        ({"sample_expert_ids": np.zeros((1, 5, 1))}, {}, "must hold integers"),
        ({"sample_expert_ids": np.zeros((1, 0, 1), int)}, {}, "must hold integers"),
        ({"sample_expert_ids": np.array([[[0, 1]]])}, {"top_k": 3}, "2 choices a token, top_k=3 asks for more"),
        ({"sample_expert_ids": np.array([[[0, 4]]])}, {}, "its experts are 0 to 4, the layer has 0 to 3"),
        ({"sample_expert_ids": np.array([[[-1, 1]]])}, {}, "its experts are -1 to 1"),
        ({"sample_expert_ids": np.array([[[1, 1]]])}, {}, "a token chooses one expert twice"),
    ],
)
def test_replay_of_a_wrong_file_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray] | None, changed: dict[str, int], message: str
) -> None:
    path = tmp_path / "routing.npz"
    if arrays is not None:
        np.savez(path, **arrays)  # type: ignore[arg-type]  # the stubs take them for `allow_pickle`
    with pytest.raises(ConfigError, match=message) as caught:
        replayed(path, 2, **changed)
    assert f"workload.path={path}" in str(caught.value)
    assert "Fix: " in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"])
def test_replay_of_a_corrupt_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "routing.npz"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="no readable array sample_expert_ids"):
        replayed(path, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expert_ids(UNIFORM, 4, 8, 9, 0, 0), "top_k=9: must be at most num_experts=8. Fix: use top_k <= 8"),
        (lambda: expert_ids(Workload("zipf"), 4, 8, 2, 0, 0), "workload.exponent=None: zipf needs a number >= 0"),
        (lambda: expert_ids(Workload("zipf", -1.0), 4, 8, 2, 0, 0), "workload.exponent=-1.0: zipf needs a number >= 0"),
        (lambda: expert_ids(Workload("replay"), 4, 8, 2, 0, 0), "workload.path=None: replay needs the routing.npz"),
        (
            lambda: gate_for(65, 64, "cpu"),
            "num_experts=65: a routing workload puts one logit per expert into the model_dim=64",
        ),
        (
            lambda: tokens_for(torch.zeros(1, 1, dtype=torch.int64), 64, 65, 0, 0, torch.float32, "cpu"),
            "num_experts=65: a routing workload puts",
        ),
        (
            lambda: tokens_for(torch.arange(128).unsqueeze(0), 128, 128, 0, 0, torch.float32, "cpu"),
            f"top_k=128: a routing workload holds at most {MAX_TOP_K} choices",
        ),
    ],
)
def test_what_cannot_be_made_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        call()
