"""Data of a run: batches cut from tokens that were prepared once.

What a step trains on depends on (text, vocabulary, seed, step) and on nothing else: every system sees the same tokens
in the same order, on any number of ranks, whether the run was interrupted or not.

Shapes: N tokens of a split, S sequence length, G sequences in a global batch, W world size.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from experiments.corpus import DataConfig
from experiments.tokens import TokenSet, prepare
from moe.errors import ConfigError, Problem

__all__ = ["BatchStream", "DataConfig", "TokenSet", "ValBatches", "batch_problems", "prepare"]


def batch_problems(tokens: TokenSet, seq_len: int, global_batch_size: int, world_size: int) -> list[Problem]:
    """What keeps `tokens` from being cut into batches of [G, S + 1], for either split; empty if nothing."""
    found = []
    if global_batch_size % world_size:
        fitting = max(1, round(global_batch_size / world_size)) * world_size
        rule = f"must be divisible by the world size {world_size}"
        found.append(
            Problem("trainer.global_batch_size", global_batch_size, rule, f"trainer.global_batch_size={fitting}")
        )
    needed = global_batch_size * seq_len + 1
    size = f"one global batch of {global_batch_size} x {seq_len}"
    smaller = "lower trainer.global_batch_size or model.seq_len"
    for split, num_tokens in (("train", len(tokens.train)), ("val", len(tokens.val))):
        if num_tokens < needed:
            key, value = tokens.origin
            rule = f"must give at least {needed} {split} tokens ({size}), but gives {num_tokens}"
            more = "give more text" if split == "train" else "give more text, raise data.val_fraction"
            found.append(Problem(key, value, rule, f"{more}, or {smaller}"))
    return found


class BatchStream:
    """Training batches of the steps `start_step`, .., `start_step + num_steps - 1`.

    The train tokens are cut into windows of S + 1 tokens that start S apart. An epoch walks through all windows once,
    in an order drawn from (seed, epoch); what is left after its last whole global batch sits out until the next epoch.
    So the batch of a step is a function of (seed, step) alone, and a later start costs nothing.

    Args:
        tokens: from `prepare`.
        seq_len: S.
        global_batch_size: G, sequences over all ranks, divisible by `world_size`.
        rank: this rank takes rows `rank * G / W` to `(rank + 1) * G / W` of the global batch.
        world_size: W.
        seed: >= 0; the order of the windows.
        num_steps: how many batches to give.
        start_step: step of the first one.

    Raises:
        ConfigError: G is not divisible by W, or a split is smaller than one global batch.
    """

    def __init__(
        self,
        tokens: TokenSet,
        *,
        seq_len: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        num_steps: int,
        start_step: int = 0,
    ) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        assert min(seed, start_step, num_steps) >= 0, (seed, start_step, num_steps)
        if problems := batch_problems(tokens, seq_len, global_batch_size, world_size):
            raise ConfigError(*problems)
        self._tokens, self._seq_len, self._global_batch_size, self._seed = (
            tokens.train,
            seq_len,
            global_batch_size,
            seed,
        )
        self._rows = _rank_rows(rank, world_size, global_batch_size)
        self._num_windows = (len(tokens.train) - 1) // seq_len
        self._steps = range(start_step, start_step + num_steps)
        self._order: tuple[int, np.ndarray] | None = None
        self.steps_per_epoch = self._num_windows // global_batch_size

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.batch, self._steps)

    def batch(self, step: int) -> Tensor:
        """This rank's rows of the batch of `step`: int64 [G / W, S + 1]; inputs are `[:, :-1]`, targets `[:, 1:]`."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, _shuffled(self._num_windows, self._seed, epoch))
        first = index * self._global_batch_size
        windows = self._order[1][first : first + self._global_batch_size]
        return _cut(self._tokens, windows[self._rows], self._seq_len)


class ValBatches:
    """The same validation batches at every call, for every system, seed and world size.

    The windows are spread evenly over the held-out text. There are fewer batches than asked for when the text holds
    fewer; `len` tells.

    Args:
        tokens: from `prepare`.
        seq_len: S.
        global_batch_size: G, divisible by `world_size`.
        rank: takes its rows of each batch as in `BatchStream`.
        world_size: W.
        num_batches: most batches, >= 1.

    Raises:
        ConfigError: as `BatchStream`.
    """

    def __init__(
        self, tokens: TokenSet, *, seq_len: int, global_batch_size: int, rank: int, world_size: int, num_batches: int
    ) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        assert num_batches >= 1, num_batches
        if problems := batch_problems(tokens, seq_len, global_batch_size, world_size):
            raise ConfigError(*problems)
        num_windows = (len(tokens.val) - 1) // seq_len
        num_batches = min(num_batches, num_windows // global_batch_size)
        chosen = np.arange(num_batches * global_batch_size) * num_windows // (num_batches * global_batch_size)
        self._tokens, self._seq_len = tokens.val, seq_len
        self._windows = chosen.reshape(num_batches, global_batch_size)[
            :, _rank_rows(rank, world_size, global_batch_size)
        ]

    def __len__(self) -> int:
        return len(self._windows)

    def __iter__(self) -> Iterator[Tensor]:
        """int64 [G / W, S + 1], one a batch."""
        return (_cut(self._tokens, windows, self._seq_len) for windows in self._windows)


def _rank_rows(rank: int, world_size: int, global_batch_size: int) -> slice:
    rows = global_batch_size // world_size
    return slice(rank * rows, (rank + 1) * rows)


def _shuffled(num_windows: int, seed: int, epoch: int) -> np.ndarray:
    # Sorted raw draws, not Generator.permutation: numpy promises to keep the former the same in all its versions.
    return np.argsort(np.random.PCG64([seed, epoch]).random_raw(num_windows), kind="stable")


def _cut(tokens: np.ndarray, windows: np.ndarray, seq_len: int) -> Tensor:
    positions = windows[:, None] * seq_len + np.arange(seq_len + 1)
    return torch.from_numpy(np.asarray(tokens[positions], dtype=np.int64))
