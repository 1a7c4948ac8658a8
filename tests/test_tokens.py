"""The token cache: same text, same tokens; built once, whole or not at all."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from experiments import tokens as module
from experiments.corpus import DataConfig
from experiments.tokenizer import SEPARATOR, train_tokenizer
from experiments.tokens import TokenSet, prepare
from moe.errors import ConfigError, Problem

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(30):
        (folder / f"{index}.txt").write_text(f"This is file {index}, said file {index}.\n" * 20)
    return folder


def config(tmp_path: Path, **fields: Any) -> DataConfig:
    return DataConfig(**{"path": str(tmp_path / "text"), "cache_dir": str(tmp_path / "cache"), **fields})


def problem_of(data: DataConfig, vocab_size: int = 300) -> Problem:
    with pytest.raises(ConfigError) as error:
        prepare(data, vocab_size)
    [problem] = error.value.problems
    return problem


@pytest.mark.usefixtures("text_folder")
def test_tokens_decode_to_the_files_of_their_split(tmp_path: Path) -> None:
    tokens = prepare(config(tmp_path, val_fraction=0.3), 300)
    documents = {split: tokens.decode(getattr(tokens, split)).split(SEPARATOR) for split in ("train", "val")}
    files = {path.read_text() for path in (tmp_path / "text").iterdir()}
    assert documents["train"].pop() == documents["val"].pop() == ""  # Behind the last separator.
    assert set(documents["train"]) | set(documents["val"]) == files
    assert not set(documents["train"]) & set(documents["val"])
    assert isinstance(tokens.train, np.memmap)
    assert tokens.train.dtype == np.uint16
    assert max(tokens.train.max(), tokens.val.max()) < tokens.vocab_size <= 300
    num_bytes = sum(len(text.encode()) for text in documents["val"])
    assert tokens.bytes_per_token == pytest.approx(num_bytes / len(tokens.val))


@pytest.mark.usefixtures("text_folder")
def test_tokenizer_never_sees_the_held_out_text(tmp_path: Path) -> None:
    data = config(tmp_path, val_fraction=0.3)
    before = prepare(data, 300)
    held_out = before.decode(before.val).split(SEPARATOR)[0]
    [path] = [path for path in (tmp_path / "text").iterdir() if path.read_text() == held_out]
    path.write_text("zyxw vuts " * 500)
    after = prepare(data, 300)
    assert (after.folder / "tokenizer.json").read_bytes() == (before.folder / "tokenizer.json").read_bytes()
    assert after.fingerprint != before.fingerprint


@pytest.mark.usefixtures("text_folder")
def test_second_call_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(config(tmp_path), 300)
    monkeypatch.setattr(module, "train_tokenizer", None)
    second = prepare(config(tmp_path), 300)
    assert second.fingerprint == first.fingerprint
    np.testing.assert_array_equal(second.train, first.train)


@pytest.mark.usefixtures("text_folder")
def test_what_changes_tokens_changes_the_fingerprint(tmp_path: Path) -> None:
    base = prepare(config(tmp_path), 300)
    assert prepare(config(tmp_path), 280).fingerprint != base.fingerprint
    assert prepare(config(tmp_path, val_fraction=0.4), 300).fingerprint != base.fingerprint
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "text", elsewhere / "text")
    moved = DataConfig(path=str(elsewhere / "text"), cache_dir=str(elsewhere / "cache"))
    assert prepare(moved, 300).fingerprint == base.fingerprint
    (tmp_path / "text" / "0.txt").write_text("changed\n")
    assert prepare(config(tmp_path), 300).fingerprint != base.fingerprint


@pytest.mark.usefixtures("text_folder")
def test_same_tokens_in_other_processes_with_other_hash_seeds_and_threads(tmp_path: Path) -> None:
    script = (
        "import sys; from experiments.tokens import prepare; from experiments.corpus import DataConfig\n"
        "print(prepare(DataConfig(path=sys.argv[1], cache_dir=sys.argv[2]), 300).fingerprint)"
    )
    fingerprints = {prepare(config(tmp_path), 300).fingerprint}
    for hash_seed, threads in (("1", "1"), ("2", "4")):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "RAYON_NUM_THREADS": threads}
        arguments = [str(tmp_path / "text"), str(tmp_path / f"cache_{hash_seed}")]
        command = [sys.executable, "-c", script, *arguments]
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        fingerprints.add(run.stdout.strip())
    assert len(fingerprints) == 1


def _prepare_and_count(data: DataConfig, builds: Path, barrier: Barrier, queue: Any) -> None:
    def counted(*args: Any) -> Any:
        with builds.open("a") as file:
            file.write("built\n")
        return train_tokenizer(*args)

    with mock.patch.object(module, "train_tokenizer", counted):
        barrier.wait()
        queue.put(prepare(data, 300).fingerprint)


@pytest.mark.usefixtures("text_folder")
def test_processes_that_prepare_at_once_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(2, timeout=60), context.Queue()
    arguments = (config(tmp_path), tmp_path / "builds", barrier, queue)
    processes = [context.Process(target=_prepare_and_count, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    fingerprints = {queue.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(fingerprints) == 1
    assert (tmp_path / "builds").read_text() == "built\n"


@pytest.mark.usefixtures("text_folder")
def test_losing_a_race_that_the_lock_did_not_stop_is_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(*args: Any) -> Any:
        monkeypatch.setattr(module, "train_tokenizer", train_tokenizer)
        winner = config(tmp_path, cache_dir=str(tmp_path / "winner"))
        built = prepare(winner, 300).folder
        shutil.copytree(built, tmp_path / "cache" / built.name)
        return train_tokenizer(*args)

    monkeypatch.setattr(module, "train_tokenizer", overtaken)
    tokens = prepare(config(tmp_path), 300)
    assert isinstance(tokens, TokenSet)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {tokens.folder.name, f"{tokens.folder.name}.lock"}


@pytest.mark.usefixtures("text_folder")
@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_interrupted_build_leaves_nothing_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: BaseException
) -> None:
    def interrupted(*args: Any) -> Any:
        (args[2].parent / "half.npy").write_bytes(b"half")
        raise interruption

    with monkeypatch.context() as patch:
        patch.setattr(module, "encode_to_npy", interrupted)
        with pytest.raises((ConfigError, KeyboardInterrupt)):
            prepare(config(tmp_path), 300)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    assert len(prepare(config(tmp_path), 300).train) > 0


@pytest.mark.usefixtures("text_folder")
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "encode_to_npy", full)
    problem = problem_of(config(tmp_path))
    assert (problem.key, problem.value) == ("data.cache_dir", str(tmp_path / "cache"))
    assert problem.rule == "must be a folder that can be written (No space left on device)"
    assert problem.fix == "free some space there, or name another folder"


@pytest.mark.usefixtures("text_folder")
def test_cache_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("I am a file")
    problem = problem_of(config(tmp_path))
    assert problem.key == "data.cache_dir"
    assert problem.rule == "must be a folder that can be written (File exists)"


@pytest.mark.usefixtures("text_folder")
@pytest.mark.parametrize("damage", ["truncated", "shorter", "removed", "meta"])
def test_damaged_cache(tmp_path: Path, damage: str) -> None:
    folder = prepare(config(tmp_path), 300).folder
    train = folder / "train.npy"
    if damage == "truncated":
        train.write_bytes(train.read_bytes()[:-10])
    elif damage == "shorter":
        np.save(train, np.load(train)[:-1])
    elif damage == "removed":
        train.unlink()
    else:
        (folder / "meta.json").write_text(json.dumps({}))
    problem = problem_of(config(tmp_path))
    assert (problem.key, problem.value) == ("data.cache_dir", str(tmp_path / "cache"))
    assert problem.rule.startswith(f"must hold what was written there, but {folder} is damaged (")
    assert problem.fix == f"rm -r {folder}"


def test_files_that_are_not_text_are_named(text_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (text_folder / "picture.png").write_bytes(b"\0")
    with caplog.at_level(logging.WARNING):
        tokens = prepare(config(text_folder.parent), 300)
    assert tokens.left_out == ("picture.png",)
    assert "1 files are not UTF-8 text and left out: picture.png" in caplog.text


def test_all_problems_of_the_config_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        prepare(config(tmp_path, path=str(tmp_path / "gone"), name="wikitext"), 256)
    assert [item.key for item in error.value.problems] == ["data.name", "data.path", "model.vocab_size"]
    problem = error.value.problems[-1]
    assert problem.value == 256
    assert problem.rule == "must be at least 257 (256 bytes and a separator)"
    assert problem.fix == "model.vocab_size=2048"


def test_one_character_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a")
    problem = problem_of(config(tmp_path))
    assert (problem.key, problem.value) == ("data.path", str(tmp_path / "text"))
    assert problem.rule == "needs text both to train on and to hold out"
    assert problem.fix == "give more text (two files, or two lines)"
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
