"""Routing workloads of the layer benchmark: the same expert choices for every system, made by its own gate.

No gate is replaced: the tokens are made such that any gate which computes softmax(x W^T) in float32 must choose what
the workload says. W is the identity on the first E features (`gate_for`), and these features of a token are its logits
(`tokens_for`).

Dimensions: T tokens of this rank, M model, E experts, K choices a token.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from moe.errors import ConfigError, Problem
from moe.weights import seeded_generator

# Logits of the chosen experts lie in (2, 4), where bfloat16 has steps of 1/64, so that they stay distinct and ordered
# in every dtype; the others' lie in [-0.5, 0.5].
BEST_LOGIT = 3.75
LOGIT_GRID = 1 / 64
LARGEST_STEP = 0.25
OTHER_LOGITS = 0.5
MAX_TOP_K = 64


@dataclass(frozen=True)
class Workload:
    """How often which expert is chosen.

    - `uniform`: K distinct experts, all equally likely.
    - `zipf`: the first choice is the expert of popularity rank i = 0, 1, ... with probability proportional to
      1 / (i + 1)^exponent, further choices likewise among the experts that are left (Gumbel top-k). Which expert has
      which popularity depends on the seed, not on the rank, so that all ranks crowd onto the same experts. With
      exponent 1 and E = 16 the busiest expert gets 4.7 times the mean load at K = 1; more choices flatten that (4.2
      times at K = 2, 3.2 at K = 4), since a token chooses an expert once at most.
    - `replay`: choices that a run recorded. Its tokens are repeated when it has fewer than are asked for; the seed
      picks the layer.

    Args:
        kind: one of these three.
        exponent: of `zipf`, >= 0 (0 is uniform).
        path: of `replay`, a run's routing.npz.
    """

    kind: Literal["uniform", "zipf", "replay"] = "uniform"
    exponent: float | None = None
    path: str | None = None


def expert_ids(workload: Workload, num_tokens: int, num_experts: int, top_k: int, seed: int, rank: int) -> Tensor:
    """The experts that this rank's tokens choose: a function of the arguments alone, different on every rank.

    Args:
        workload: how they are drawn.
        num_tokens: T.
        num_experts: E.
        top_k: K <= E.
        seed: of the repeat.
        rank: of this process.

    Returns:
        [T, K] int64 on the CPU, best choice first, distinct within a row.

    Raises:
        ConfigError: top_k > num_experts, a zipf without exponent, or a recording that is missing or doesn't fit.
    """
    if top_k > num_experts:
        raise ConfigError(
            Problem("top_k", top_k, f"must be at most num_experts={num_experts}", f"use top_k <= {num_experts}")
        )
    if workload.kind == "replay":
        return _replayed(workload.path, num_tokens, num_experts, top_k, seed, rank)
    log_popularity_E = torch.zeros(num_experts)
    if workload.kind == "zipf":
        if workload.exponent is None or not workload.exponent >= 0:
            raise ConfigError(
                Problem("workload.exponent", workload.exponent, "zipf needs a number >= 0", "use 1.0, for example")
            )
        order = torch.randperm(num_experts, generator=seeded_generator(("workload", seed, "popularity")))
        log_popularity_E[order] = -workload.exponent * torch.arange(1, num_experts + 1).log()
    draws = torch.empty(num_tokens, num_experts)
    draws.exponential_(generator=seeded_generator(("workload", seed, "choices", rank)))
    return (log_popularity_E - draws.log()).topk(top_k, dim=1).indices  # -log(exponential) is Gumbel noise


def _replayed(path: str | None, num_tokens: int, num_experts: int, top_k: int, seed: int, rank: int) -> Tensor:
    recorded_LTK = recording(path, num_experts, top_k)
    num_layers, num_recorded, _ = recorded_LTK.shape
    token_T = (rank * num_tokens + np.arange(num_tokens)) % num_recorded
    return torch.from_numpy(recorded_LTK[seed % num_layers, token_T, :top_k].astype(np.int64))


def recording(path: str | None, num_experts: int, top_k: int) -> np.ndarray:
    """`sample_expert_ids` [layers, T_global, K or more] of a routing.npz, checked against what is asked for.

    Raises:
        ConfigError: there is none, or it does not fit.
    """

    def refuse(rule: str, fix: str) -> ConfigError:
        return ConfigError(Problem("workload.path", path, rule, fix))

    if path is None or not Path(path).is_file():
        raise refuse("replay needs the routing.npz of a run", "name a file like outputs/<run id>/routing.npz")
    try:
        with np.load(path) as archive:
            recorded = archive["sample_expert_ids"]
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise refuse(
            f"the file has no readable array sample_expert_ids ({error})", "name a routing.npz that a run wrote"
        ) from error
    if recorded.ndim != 3 or not np.issubdtype(recorded.dtype, np.integer) or 0 in recorded.shape:
        raise refuse(
            f"sample_expert_ids must hold integers [layers, tokens, choices], not {recorded.dtype} {recorded.shape}",
            "name a routing.npz that a run wrote",
        )
    if recorded.shape[2] < top_k:
        raise refuse(
            f"it has {recorded.shape[2]} choices a token, top_k={top_k} asks for more", "lower top_k of the shape"
        )
    chosen = np.sort(recorded[:, :, :top_k], axis=2)
    if chosen.min() < 0 or chosen.max() >= num_experts:
        raise refuse(
            f"its experts are {chosen.min()} to {chosen.max()}, the layer has 0 to {num_experts - 1}",
            "replay it on a shape with the run's num_experts",
        )
    if (chosen[:, :, 1:] == chosen[:, :, :-1]).any():
        raise refuse("a token chooses one expert twice", "name a routing.npz that a run wrote")
    return recorded


def gate_for(num_experts: int, model_dim: int, device: torch.device | str) -> Tensor:
    """The gate's matrix under which the first E features of a token are its logits.

    Returns:
        [E, M] float32: the identity, then zeros.

    Raises:
        ConfigError: E > M; the tokens then have no room for the logits.
    """
    if num_experts > model_dim:
        raise ConfigError(
            Problem(
                "num_experts",
                num_experts,
                f"a routing workload puts one logit per expert into the model_dim={model_dim} features of a token",
                f"use num_experts <= {model_dim} or a larger model_dim",
            )
        )
    return torch.eye(num_experts, model_dim, device=device)


def tokens_for(
    expert_ids_TK: Tensor,
    model_dim: int,
    num_experts: int,
    seed: int,
    rank: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """Tokens that a gate with the matrix of `gate_for` sends to these experts, best choice first.

    The first E features are the logits, well apart in any dtype; the others are standard normal. All is drawn on the
    CPU, so that a GPU sees the same tokens.

    Args:
        expert_ids_TK: [T, K] int64, distinct within a row.
        model_dim: M >= E.
        num_experts: E.
        seed, rank: the random features depend on them.
        dtype: of the tokens.
        device: of the tokens.

    Returns:
        [T, M].

    Raises:
        ConfigError: E > M, or more choices than logits can be kept apart (64).
    """
    gate_for(num_experts, model_dim, "meta")
    num_tokens, top_k = expert_ids_TK.shape
    if top_k > MAX_TOP_K:
        raise ConfigError(
            Problem("top_k", top_k, f"a routing workload holds at most {MAX_TOP_K} choices a token", "lower top_k")
        )
    generator = seeded_generator(("workload", seed, "tokens", rank))
    x_TM = torch.empty(num_tokens, model_dim).normal_(generator=generator)
    x_TM[:, :num_experts].uniform_(-OTHER_LOGITS, OTHER_LOGITS, generator=generator)
    steps = max(1, int(min(LARGEST_STEP, (BEST_LOGIT - 2) / top_k) / LOGIT_GRID))
    logits_K = BEST_LOGIT - torch.arange(top_k) * steps * LOGIT_GRID
    x_TM.scatter_(1, expert_ids_TK.cpu(), logits_K.expand(num_tokens, top_k))
    return x_TM.to(device=device, dtype=dtype)
