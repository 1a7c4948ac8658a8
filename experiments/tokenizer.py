"""The suite's tokenizer: a byte-level BPE trained on the run's own text, and text to token arrays on disk.

The same documents give the same tokenizer and the same tokens on every machine and with any number of threads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SEPARATOR = "<|endoftext|>"
"""The token behind every document. Text never makes it: a document that spells it out is encoded as plain text."""

MIN_VOCAB_SIZE = 257
"""256 bytes and the separator: with these any text can be written."""

_PIECE_CHARS = 1 << 16  # Long documents are encoded in pieces, so that memory stays small and all cores have work.
_BATCH_PIECES = 256


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE (GPT-2's pre-tokenization, no normalisation, so that decoding gives the text back).

    Args:
        documents: the training text; read once.
        vocab_size: most tokens wanted, separator included, >= `MIN_VOCAB_SIZE`. Little text gives fewer.
    """
    assert vocab_size >= MIN_VOCAB_SIZE, vocab_size
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


@dataclass(frozen=True)
class EncodedFile:
    """What `encode_to_npy` wrote.

    Args:
        num_tokens: tokens in the file, separators included.
        num_bytes: UTF-8 bytes of the documents.
        sha256: hex digest of the token data (without the file's header).
    """

    num_tokens: int
    num_bytes: int
    sha256: str


def token_dtype(vocab_size: int) -> np.dtype:
    """Smallest unsigned type for `vocab_size` ids: little-endian uint16 or uint32, the same bytes on every machine."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def encode_to_npy(tokenizer: Tokenizer, documents: Iterable[str], path: Path) -> EncodedFile:
    """Encode documents, each followed by the separator, into one `.npy` file of shape [num_tokens].

    The tokens are streamed to disk: memory holds a few pieces of text at a time.

    Args:
        tokenizer: from `train_tokenizer`.
        documents: text; read once.
        path: the file to write; must not exist.

    Raises:
        OSError: the file can't be written, e.g. the disk is full.
    """
    tokenizer.encode_special_tokens = True  # The separator's spelling inside a document is plain text.
    separator_id = tokenizer.token_to_id(SEPARATOR)
    dtype = token_dtype(tokenizer.get_vocab_size())
    digest, num_tokens, num_bytes = hashlib.sha256(), 0, 0
    pieces = _pieces(documents)
    with path.open("xb") as file:
        _write_header(file, dtype, 0)
        data_start = file.tell()
        while batch := list(islice(pieces, _BATCH_PIECES)):
            encodings = tokenizer.encode_batch_fast([text for text, _ in batch])
            for (text, is_last), encoding in zip(batch, encodings, strict=True):
                ids = encoding.ids + [separator_id] if is_last else encoding.ids
                raw = np.asarray(ids, dtype=dtype).tobytes()
                file.write(raw)
                digest.update(raw)
                num_tokens += len(ids)
                num_bytes += len(text.encode())
        # numpy pads its header for this very purpose: the length, known only now, fits in the same room.
        file.seek(0)
        _write_header(file, dtype, num_tokens)
        assert file.tell() == data_start, "the .npy header changed its size"
    return EncodedFile(num_tokens, num_bytes, digest.hexdigest())


def _write_header(file: BinaryIO, dtype: np.dtype, length: int) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


def _pieces(documents: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Cut documents into (piece, is the document's last), at a line's end where there is one."""
    for document in documents:
        start = 0
        while len(document) - start > _PIECE_CHARS:
            line_end = document.rfind("\n", start, start + _PIECE_CHARS) + 1
            end = line_end if line_end > start else start + _PIECE_CHARS
            yield document[start:end], False
            start = end
        yield document[start:], True
