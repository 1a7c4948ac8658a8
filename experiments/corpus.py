"""Where a run's text comes from, and which part of it is held out.

By default it is the standard library of the running Python: real text that every machine has.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pydantic

from moe.errors import ConfigError, Problem

# Left out of the standard library: tests, what is no part of it, generated files, and packages that some distributions
# ship apart or newer Pythons dropped, so that two installs of one Python version read the same text.
_STDLIB_LEFT_OUT = frozenset(
    ["test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"]
    + ["pydoc_data", "idlelib", "tkinter", "turtledemo", "lib2to3", "distutils", "ensurepip"]
)
USE_TEXT = "data=text (offline: this Python's standard library, or data.path=FILE_OR_FOLDER)"


class DataConfig(pydantic.BaseModel, extra="forbid", frozen=True):
    """The text of a run.

    Args:
        source: `text` (files) or `hf` (a dataset of the Hugging Face Hub).
        path: text: a file or folder of UTF-8 text; None is the standard library of the running Python.
        name: hf: the dataset, e.g. `wikitext`.
        subset: hf: its configuration, e.g. `wikitext-103-raw-v1`.
        text_field: hf: the column that holds the text.
        val_fraction: share that is held out, 0 < .. < 0.5; unused where an hf dataset brings its own validation split.
        cache_dir: where the tokens are kept between runs; changes no result.
    """

    source: Literal["text", "hf"] = "text"
    path: str | None = pydantic.Field(default=None, min_length=1)
    name: str | None = pydantic.Field(default=None, min_length=1)
    subset: str | None = pydantic.Field(default=None, min_length=1)
    text_field: str = pydantic.Field(default="text", min_length=1)
    val_fraction: float = pydantic.Field(default=0.05, gt=0, lt=0.5)
    cache_dir: str = pydantic.Field(default=".cache/data", min_length=1)

    @property
    def origin(self) -> tuple[str, str | None]:
        """Key and value that a message about the text itself names: `data.path` or `data.name`."""
        return ("data.path", self.path) if self.source == "text" else ("data.name", self.name)

    def problems(self) -> list[Problem]:
        """What can be told wrong without reading any text: fields that don't go together, a path that isn't there."""
        if self.source == "text":
            alien, rule, fix = ["name", "subset"], "only source=hf reads it", "remove it, or choose data=hf"
        else:
            alien, rule, fix = ["path"], "only source=text reads it", "remove it, or choose data=text"
        found = [Problem(f"data.{key}", value, rule, fix) for key in alien if (value := getattr(self, key)) is not None]
        if self.source == "hf" and self.name is None:
            rule = "source=hf needs the name of a dataset"
            found.append(Problem("data.name", None, rule, f"data.name=wikitext, or {USE_TEXT}"))
        if self.source == "text" and self.path is not None:
            place = Path(self.path).expanduser()
            if not place.exists():
                rule = f"there is no such file or folder (looked at {place.absolute()})"
                fix = "check the spelling, or leave it out for the standard library"
                found.append(Problem("data.path", self.path, rule, fix))
            elif not (place.is_file() or place.is_dir()):
                rule, fix = "must be a file or a folder", "name a file or a folder of text"
                found.append(Problem("data.path", self.path, rule, fix))
        return found


@dataclass(frozen=True)
class Corpus:
    """Documents of a run, split. Each call of `train` or `val` starts a new pass, in the same order.

    Args:
        train: passes over the documents to train on (the tokenizer sees only these).
        val: passes over the held-out documents.
    """

    train: Callable[[], Iterator[str]]
    val: Callable[[], Iterator[str]]


@dataclass(frozen=True)
class TextFiles:
    """Files that hold text, found by `scan_text`.

    Args:
        root: the folder that `names` are relative to.
        names: text files, sorted, with `/` between folders.
        left_out: files that aren't text.
        digest: sha256 over names and content; the folder's own place doesn't enter.
    """

    root: Path
    names: tuple[str, ...]
    left_out: tuple[str, ...]
    digest: str


def scan_text(data: DataConfig) -> TextFiles:
    """Find the text files under `data.path`.

    Hidden files, `__pycache__`, linked folders and files of nothing but white space don't count.

    Args:
        data: a config of source `text` without `problems()`.

    Raises:
        ConfigError: `data.path` can't be read, holds no text, or most of it isn't UTF-8 text.
    """
    digest, names, left_out = hashlib.sha256(), [], []
    try:
        root, candidates = _standard_library() if data.path is None else _files_of(Path(data.path).expanduser())
        for name in candidates:
            raw = (root / name).read_bytes()
            text = _decode(raw)
            if text is None:
                left_out.append(name)
            elif text.strip():
                names.append(name)
                digest.update(b"%d %d " % (len(os.fsencode(name)), len(raw)) + os.fsencode(name) + raw)
    except OSError as error:
        raise _unreadable(data, error) from error
    if len(left_out) > len(names):
        share = f"{len(left_out)} of {len(left_out) + len(names)} files"
        rule = f"must be UTF-8 text, but {share} are not (first: {left_out[0]})"
        fix = "name a text file or folder, or convert it: iconv -t UTF-8"
        raise ConfigError(Problem("data.path", data.path, rule, fix))
    if not names:
        raise ConfigError(Problem("data.path", data.path, "holds no text", "name a file or folder with text in it"))
    return TextFiles(root, tuple(names), tuple(left_out), digest.hexdigest())


def split_by_file(names: Sequence[str], val_fraction: float) -> tuple[list[str], list[str]]:
    """Split relative paths into (train, val): a file is held out when the hash of its path falls under `val_fraction`.

    The choice depends on nothing but the path, so a file added to a folder moves no other. At least one file lands on
    either side: the one with the lowest hash in val, the one with the highest in train.

    Args:
        names: two or more relative paths.
        val_fraction: expected share of files in val.
    """
    assert len(names) >= 2, names
    hashes = {name: int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") / 2**64 for name in names}
    lowest, highest = min(names, key=hashes.__getitem__), max(names, key=hashes.__getitem__)
    val = {name for name in names if hashes[name] < val_fraction} - {highest} | {lowest}
    return [name for name in names if name not in val], [name for name in names if name in val]


def text_corpus(files: TextFiles, data: DataConfig) -> Corpus:
    """The documents of text files, one a file, split by file.

    A single file has nothing to split by, so there the tail, from the first line's end behind `1 - val_fraction` of its
    characters, is held out.
    """
    if len(files.names) > 1:
        train, val = split_by_file(files.names, data.val_fraction)
        return Corpus(lambda: _texts(files.root, train, data), lambda: _texts(files.root, val, data))
    [text] = _texts(files.root, files.names, data)
    cut = int(len(text) * (1 - data.val_fraction))
    line_end = text.find("\n", cut) + 1
    cut = line_end if 0 < line_end < len(text) else cut
    return Corpus(lambda: iter([text[:cut]] if cut else []), lambda: iter([text[cut:]]))


def _standard_library() -> tuple[Path, list[str]]:
    root = Path(sysconfig.get_path("stdlib"))
    # _sysconfigdata*.py and config-* describe the machine that Python was built on, not the library.
    names = [name for name in _walk(root, _STDLIB_LEFT_OUT) if name.endswith(".py")]
    return root, [name for name in names if not name.startswith(("_sysconfigdata", "config-"))]


def _files_of(place: Path) -> tuple[Path, list[str]]:
    if place.is_file():
        return place.parent, [place.name]
    return place, _walk(place, frozenset(["__pycache__"]))


def _walk(root: Path, left_out: frozenset[str]) -> list[str]:
    """Relative paths of the regular files under `root`, sorted; neither hidden ones nor those in folders `left_out`."""
    names = []
    for folder, folders, files in os.walk(root, onerror=_raise):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        visible = [Path(folder, name) for name in files if not name.startswith(".")]
        names += [path.relative_to(root).as_posix() for path in visible if path.is_file()]
    return sorted(names)


def _raise(error: OSError) -> None:
    raise error


def _texts(root: Path, names: Sequence[str], data: DataConfig) -> Iterator[str]:
    for name in names:
        try:
            text = _decode((root / name).read_bytes())
        except OSError as error:
            raise _unreadable(data, error) from error
        if text is None:  # It was text a moment ago, when it was scanned.
            rule = f"must not change while it is read, but {root / name} did"
            raise ConfigError(Problem("data.path", data.path, rule, "start again when nothing writes there"))
        yield text


def _unreadable(data: DataConfig, error: OSError) -> ConfigError:
    rule = f"must be readable, but {error.filename or 'a file in it'} is not ({error.strerror})"
    return ConfigError(Problem("data.path", data.path, rule, "check the permissions, or name another path"))


def _decode(raw: bytes) -> str | None:
    """The text, or None for bytes that aren't UTF-8 text."""
    if b"\0" in raw:
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
