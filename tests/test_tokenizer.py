"""The tokenizer: lossless, deterministic, and its separator can't be forged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments import tokenizer as module
from experiments.tokenizer import MIN_VOCAB_SIZE, SEPARATOR, encode_to_npy, token_dtype, train_tokenizer

DOCUMENTS = ["def f(x):\n\treturn  x\r\n" * 40, "Ünïcödé — 漢字 🙂\n" * 9, f"a {SEPARATOR} in the text", "no line end"]


def test_decoding_gives_the_documents_back(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(DOCUMENTS, 300)
    encoded = encode_to_npy(tokenizer, DOCUMENTS, tmp_path / "t.npy")
    ids = np.load(tmp_path / "t.npy")
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == "".join(text + SEPARATOR for text in DOCUMENTS)
    assert encoded.num_tokens == len(ids)
    assert encoded.num_bytes == sum(len(text.encode()) for text in DOCUMENTS)


def test_separator_stands_behind_every_document_and_nowhere_else(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(DOCUMENTS, 300)
    encode_to_npy(tokenizer, DOCUMENTS, tmp_path / "t.npy")
    ids = np.load(tmp_path / "t.npy")
    separator_id = tokenizer.token_to_id(SEPARATOR)
    assert (ids == separator_id).sum() == len(DOCUMENTS)  # Also though one document spells the separator out.
    assert ids[-1] == separator_id


def test_any_bytes_can_be_written_with_the_smallest_vocabulary(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["aaa"], MIN_VOCAB_SIZE)
    text = "".join(map(chr, range(1, 0x250))) + "\U0010ffff"
    encode_to_npy(tokenizer, [text], tmp_path / "t.npy")
    ids = np.load(tmp_path / "t.npy")
    assert tokenizer.get_vocab_size() == MIN_VOCAB_SIZE
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text + SEPARATOR


def test_long_documents_are_cut_without_losing_a_character(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_PIECE_CHARS", 7)
    monkeypatch.setattr(module, "_BATCH_PIECES", 3)
    documents = ["one\ntwo three\nfour", "x" * 50, "", "\n" * 20]
    tokenizer = train_tokenizer(documents, 260)
    encode_to_npy(tokenizer, documents, tmp_path / "t.npy")
    text = tokenizer.decode(np.load(tmp_path / "t.npy").tolist(), skip_special_tokens=False)
    assert text == "".join(document + SEPARATOR for document in documents)


def test_token_type_is_the_smallest_that_holds_the_ids() -> None:
    assert token_dtype(65536) == np.dtype("<u2")
    assert token_dtype(65537) == np.dtype("<u4")
