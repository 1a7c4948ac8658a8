"""Reads tables and tells what is wrong with them; writes tables and figures whole or not at all: a full disk leaves the
old file as it was, never half a new one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.errors import ResultsError
from analysis.load import one_line


def read_csv(path: Path, columns: Sequence[str], fix: str, **options: Any) -> pd.DataFrame:
    """A CSV that has these columns and at least one row.

    Args:
        path: the file.
        columns: that it must have; it may have more.
        fix: sentence on how to get such a table, the end of every error.
        options: of `pandas.read_csv`.

    Raises:
        ResultsError: no such file, no CSV, a missing column, or no rows.
    """
    try:
        table: pd.DataFrame = pd.read_csv(path, **options)
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}: not a readable CSV ({one_line(error)[:80]}). {fix}") from error
    if missing := [name for name in columns if name not in table]:
        raise ResultsError(f"{path}: it has no column {', '.join(missing)}. {fix}")
    if table.empty:
        raise ResultsError(f"{path}: it has no rows. {fix}")
    return table


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
