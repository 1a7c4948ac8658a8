"""Batches: the same for every system and any number of ranks, resumable, and without repeats in an epoch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from experiments.data import BatchStream, DataConfig, TokenSet, ValBatches, batch_problems, prepare
from moe.errors import ConfigError

S, G = 8, 4
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenSet:
    folder = tmp_path_factory.mktemp("text")
    for index in range(12):
        (folder / f"{index}.txt").write_text("".join(f"{index} {word}\n" for word in range(60)))
    return prepare(DataConfig(path=str(folder), val_fraction=0.3, cache_dir=str(folder / ".cache")), 270)


def stream(tokens: TokenSet, **fields: Any) -> BatchStream:
    defaults = {"seq_len": S, "global_batch_size": G, "rank": 0, "world_size": 1, "seed": 0, "num_steps": 5}
    return BatchStream(tokens, **(defaults | fields))


def val_batches(tokens: TokenSet, **fields: Any) -> ValBatches:
    defaults = {"seq_len": S, "global_batch_size": G, "rank": 0, "world_size": 1, "num_batches": 3}
    return ValBatches(tokens, **(defaults | fields))


def test_shape_type_and_number(tokens: TokenSet) -> None:
    batches = list(stream(tokens, world_size=2, rank=1))
    assert [batch.shape for batch in batches] == [(G // 2, S + 1)] * 5
    assert {batch.dtype for batch in batches} == {torch.int64}
    assert len(stream(tokens)) == 5


def test_rows_are_windows_of_the_text(tokens: TokenSet) -> None:
    text = {tuple(tokens.train[start : start + S + 1].tolist()) for start in range(0, len(tokens.train) - S, S)}
    for batch in stream(tokens):
        assert {tuple(row) for row in batch.tolist()} <= text


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_of_any_world_size_make_up_the_same_batches(tokens: TokenSet, world_size: int) -> None:
    ranks = [list(stream(tokens, world_size=world_size, rank=rank)) for rank in range(world_size)]
    joined = [torch.cat(parts) for parts in zip(*ranks, strict=True)]
    torch.testing.assert_close(joined, list(stream(tokens)), rtol=0, atol=0)
    val_ranks = [list(val_batches(tokens, world_size=world_size, rank=rank)) for rank in range(world_size)]
    joined = [torch.cat(parts) for parts in zip(*val_ranks, strict=True)]
    torch.testing.assert_close(joined, list(val_batches(tokens)), rtol=0, atol=0)


def test_an_epoch_repeats_no_window_and_the_next_is_shuffled_anew(tokens: TokenSet) -> None:
    per_epoch = stream(tokens).steps_per_epoch
    assert per_epoch == ((len(tokens.train) - 1) // S) // G
    # Windows of one text may look alike; positions don't. So a text whose tokens are their own positions.
    positions = replace(tokens, train=np.arange(len(tokens.train), dtype=np.uint16))
    starts = torch.stack([batch[:, 0] for batch in stream(positions, num_steps=2 * per_epoch)]).view(2, -1)
    for epoch in starts:
        assert len(set(epoch.tolist())) == per_epoch * G
    assert starts[0].tolist() != starts[1].tolist()
    assert starts[0].tolist() != sorted(starts[0].tolist())


def test_every_window_comes_up_in_some_epoch(tokens: TokenSet) -> None:
    positions = replace(tokens, train=np.arange(6 * S + 1, dtype=np.uint16))
    starts = {start for batch in stream(positions, num_steps=40) for start in batch[:, 0].tolist()}
    assert starts == {index * S for index in range(6)}


def test_resumed_stream_goes_on_where_it_stopped(tokens: TokenSet) -> None:
    per_epoch = stream(tokens).steps_per_epoch
    whole = list(stream(tokens, num_steps=2 * per_epoch))
    for stop in (1, per_epoch - 1, per_epoch, per_epoch + 2):
        rest = list(stream(tokens, start_step=stop, num_steps=2 * per_epoch - stop))
        torch.testing.assert_close(rest, whole[stop:], rtol=0, atol=0)


def test_a_stream_can_be_read_twice(tokens: TokenSet) -> None:
    batches = stream(tokens, start_step=3)
    torch.testing.assert_close(list(batches), list(batches), rtol=0, atol=0)


def test_seed_orders_training_and_leaves_validation_alone(tokens: TokenSet) -> None:
    first, same, other = (torch.stack(list(stream(tokens, seed=seed))) for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_the_order_is_pinned(tokens: TokenSet) -> None:
    """Results are only comparable while this holds; a change here is a new version of the data."""
    positions = replace(tokens, train=np.arange(12 * S + 1, dtype=np.uint16))
    starts = [(batch[:, 0] // S).tolist() for batch in stream(positions, seed=3, num_steps=4)]
    assert starts == [[0, 4, 9, 7], [1, 10, 5, 6], [11, 3, 8, 2], [0, 11, 6, 2]]


def test_validation_is_spread_over_the_held_out_text(tokens: TokenSet) -> None:
    positions = replace(tokens, val=np.arange(30 * S + 1, dtype=np.uint16))
    starts = torch.cat([batch[:, 0] for batch in val_batches(positions)]) // S
    assert starts.tolist() == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27]


def test_validation_has_no_more_batches_than_the_text_holds(tokens: TokenSet) -> None:
    batches = val_batches(tokens, num_batches=10**6)
    assert len(batches) == len(list(batches)) == ((len(tokens.val) - 1) // S) // G


@pytest.mark.parametrize("make", [stream, val_batches])
@pytest.mark.parametrize(("batch_size", "fitting"), [(10, 8), (11, 12), (1, 4)])
def test_batch_not_divisible_over_the_ranks(tokens: TokenSet, make: Any, batch_size: int, fitting: int) -> None:
    with pytest.raises(ConfigError) as error:
        make(tokens, global_batch_size=batch_size, world_size=4)
    [problem] = error.value.problems
    assert (problem.key, problem.value) == ("trainer.global_batch_size", batch_size)
    assert problem.rule == "must be divisible by the world size 4"
    assert problem.fix == f"trainer.global_batch_size={fitting}"


@pytest.mark.parametrize("make", [stream, val_batches])
def test_too_little_text_for_a_batch(tokens: TokenSet, make: Any) -> None:
    with pytest.raises(ConfigError) as error:
        make(tokens, seq_len=10_000)
    train, val = error.value.problems
    assert (train.key, train.value) == (val.key, val.value) == tokens.origin
    sizes = "must give at least 40001 {} tokens (one global batch of 4 x 10000), but gives {}"
    assert train.rule == sizes.format("train", len(tokens.train))
    assert val.rule == sizes.format("val", len(tokens.val))
    assert train.fix == "give more text, or lower trainer.global_batch_size or model.seq_len"
    assert val.fix == "give more text, raise data.val_fraction, or lower trainer.global_batch_size or model.seq_len"


def test_just_enough_text_for_a_batch(tokens: TokenSet) -> None:
    exact = replace(tokens, train=tokens.train[: S * G + 1], val=tokens.val[: S * G + 1])
    assert batch_problems(exact, S, G, 1) == []
    assert len(list(stream(exact))) == 5
    assert len(val_batches(exact)) == 1
    short = replace(exact, train=exact.train[:-1])
    assert len(batch_problems(short, S, G, 1)) == 1


@pytest.mark.parametrize(("file", "source", "name"), [("text", "text", None), ("hf", "hf", "wikitext")])
def test_conf_files_hold_every_key_and_pass(file: str, source: str, name: str | None) -> None:
    fields = yaml.safe_load((ROOT / "conf" / "data" / f"{file}.yaml").read_text())
    data = DataConfig(**fields)
    assert set(fields) == set(DataConfig.model_fields)
    assert (data.source, data.name, data.path) == (source, name, None)
    assert data.problems() == []
