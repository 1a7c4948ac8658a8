"""Whole-or-nothing writes of tables and figures: a full disk leaves the old file as it was, never half a new one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from analysis.errors import ResultsError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed to `path` when the block ends well, removed when it doesn't.

    Raises:
        ResultsError: the file system refused (full disk, no permission); `path` still holds what it held before.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ResultsError(
            f"{path}: could not be written ({error.strerror or error}); what it held before is untouched. "
            "Fix: free disk space or write elsewhere, then run `python -m analysis.compare` again."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def files_under(root: Path) -> list[Path]:
    """Every file under a folder, in order. A folder that vanishes meanwhile is passed over: runs may still write."""
    return sorted(Path(folder) / name for folder, _, names in os.walk(root) for name in names)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all (see `whole_file`)."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
