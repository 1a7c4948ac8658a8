"""Tokens of a run: text encoded once, cached, and mapped into memory by every rank."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from filelock import FileLock

from experiments.corpus import Corpus, DataConfig, TextFiles, scan_text, text_corpus
from experiments.hf_corpus import hf_corpus
from experiments.tokenizer import MIN_VOCAB_SIZE, SEPARATOR, encode_to_npy, train_tokenizer
from moe.errors import ConfigError, Problem

_CACHE_VERSION = 1  # Raise it when the same text and config no longer give the same tokens.
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Tokens of both splits, mapped from the cache.

    Args:
        folder: where they lie, with `tokenizer.json` and `meta.json` beside them.
        train: [N] uint16 or uint32, documents one after the other, the separator behind each.
        val: [N] likewise; from documents that the tokenizer never saw.
        vocab_size: ids are below it; fewer than asked for when the text is small.
        separator_id: id of the token behind every document.
        fingerprint: hex sha256 over the tokenizer and all tokens; equal iff a run would see the same tokens.
        bytes_per_token: UTF-8 bytes per token of the held-out text. A loss in nats per token divided by it (and by
            ln 2: bits) compares runs with different tokenizers.
        left_out: files that are not text and were passed over.
        origin: config key and value that messages about the text name.
    """

    folder: Path
    train: np.ndarray
    val: np.ndarray
    vocab_size: int
    separator_id: int
    fingerprint: str
    bytes_per_token: float
    left_out: tuple[str, ...]
    origin: tuple[str, str | None]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids [n], the separator spelled out; bytes that form no character become U+FFFD."""
        return self._tokenizer.decode([int(item) for item in ids], skip_special_tokens=False)

    @cached_property
    def _tokenizer(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str((self.folder / "tokenizer.json").read_text(encoding="utf-8"))


def prepare(data: DataConfig, vocab_size: int) -> TokenSet:
    """Tokens for a run: from the cache, or built into it.

    Any number of processes may call this at once: one builds, the others wait and read. The tokens are built in a
    temporary folder and then renamed, so an interrupted build leaves nothing that could be taken for whole. Text files
    are cached by their content. A dataset of the Hub is cached by its name, so a machine without internet can use what
    one with internet prepared; delete the cache folder to fetch it anew.

    Args:
        data: which text.
        vocab_size: most tokens of the vocabulary, >= 257.

    Raises:
        ConfigError: the text is missing, unreadable or not text, the vocabulary is too small, or the cache can't be
            written or is damaged.
    """
    problems = data.problems()
    if vocab_size < MIN_VOCAB_SIZE:
        rule = f"must be at least {MIN_VOCAB_SIZE} (256 bytes and a separator)"
        problems.append(Problem("model.vocab_size", vocab_size, rule, "model.vocab_size=2048"))
    if problems:
        raise ConfigError(*problems)
    files = scan_text(data) if data.source == "text" else None
    folder = Path(data.cache_dir).expanduser() / _cache_key(data, files, vocab_size)
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if not folder.exists():
                    _build(data, files, vocab_size, folder)
        except OSError as error:  # Reading the text raises ConfigError by itself; what is left is the cache's own disk.
            rule = f"must be a folder that can be written ({error.strerror or error})"
            fix = "free some space there, or name another folder"
            raise ConfigError(Problem("data.cache_dir", data.cache_dir, rule, fix)) from error
    return _load(data, folder)


def _cache_key(data: DataConfig, files: TextFiles | None, vocab_size: int) -> str:
    text = files.digest if files else [data.name, data.subset, data.text_field]
    versions = [_CACHE_VERSION, tokenizers.__version__]
    parts = json.dumps([data.source, text, data.val_fraction, vocab_size, versions])
    return hashlib.sha256(parts.encode()).hexdigest()[:20]


def _build(data: DataConfig, files: TextFiles | None, vocab_size: int, folder: Path) -> None:
    left_out = files.left_out if files else ()
    if left_out:
        _log.warning(
            "%s=%s: %d files are not UTF-8 text and left out: %s", *data.origin, len(left_out), ", ".join(left_out)
        )
    _log.info("%s=%s: training a tokenizer and encoding the text, once", *data.origin)
    corpus = text_corpus(files, data) if files else hf_corpus(data)
    # A temporary name of its own even under the lock: some network file systems grant a lock twice.
    with tempfile.TemporaryDirectory(
        prefix=f"{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True
    ) as temporary:
        built = Path(temporary) / "built"
        built.mkdir()
        _write(corpus, data, vocab_size, left_out, built)
        try:
            os.rename(built, folder)
        except OSError:
            if not folder.exists():
                raise
            # Someone else was first; the same text gave the same tokens.


def _write(corpus: Corpus, data: DataConfig, vocab_size: int, left_out: Sequence[str], folder: Path) -> None:
    tokenizer = train_tokenizer(corpus.train(), vocab_size)
    text = tokenizer.to_str()
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    train = encode_to_npy(tokenizer, corpus.train(), folder / "train.npy")
    val = encode_to_npy(tokenizer, corpus.val(), folder / "val.npy")
    if not (train.num_tokens and val.num_tokens):
        key, value = data.origin
        rule = "needs text both to train on and to hold out"
        raise ConfigError(Problem(key, value, rule, "give more text (two files, or two lines)"))
    meta = {
        "vocab_size": tokenizer.get_vocab_size(),
        "separator_id": tokenizer.token_to_id(SEPARATOR),
        "fingerprint": hashlib.sha256(f"{text}{train.sha256}{val.sha256}".encode()).hexdigest(),
        "bytes_per_token": val.num_bytes / val.num_tokens,
        "left_out": list(left_out),
        "train": asdict(train),
        "val": asdict(val),
        "data": data.model_dump(mode="json", exclude={"cache_dir"}),
        "tokenizers": tokenizers.__version__,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _load(data: DataConfig, folder: Path) -> TokenSet:
    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        splits = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("train", "val")}
        for name, tokens in splits.items():
            if len(tokens) != meta[name]["num_tokens"]:
                raise ValueError(f"{name}.npy has {len(tokens)} tokens, meta.json says {meta[name]['num_tokens']}")
    except (OSError, ValueError, KeyError) as error:
        rule = f"must hold what was written there, but {folder} is damaged ({error})"
        raise ConfigError(Problem("data.cache_dir", data.cache_dir, rule, f"rm -r {folder}")) from error
    return TokenSet(
        folder=folder,
        **splits,
        vocab_size=meta["vocab_size"],
        separator_id=meta["separator_id"],
        fingerprint=meta["fingerprint"],
        bytes_per_token=meta["bytes_per_token"],
        left_out=tuple(meta["left_out"]),
        origin=data.origin,
    )
