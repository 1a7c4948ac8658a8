"""The runs and benchmarks of a folder of results, those that still write and those that broke among them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.errors import ResultsError
from analysis.load import STATUSES, Run, load_run, load_samples
from analysis.report.elements import details, table, text

_MARKS = {"status.json", "manifest.json", "metrics.parquet", "samples.parquet", "comm.parquet"}
"""A folder that holds one of these is a run or a benchmark."""

_INSIDE = {"checkpoints", "logs"}
"""Folders of a run in which there is none."""


@dataclass(frozen=True)
class Entry:
    """One run or benchmark.

    Attributes:
        name: its path from the folder of results on.
        what: `training` or `benchmark`.
        run: what there is of it; its metrics are the bytes alone.
        status, reason: as in `Run`, or of the samples of a benchmark.
    """

    name: str
    what: str
    run: Run
    status: str
    reason: str


def entries(root: Path) -> tuple[list[Entry], list[str]]:
    """(every run and benchmark under a folder, sentences on those whose files contradict one another)."""
    found, refused = [], []
    for folder in folders(root):
        try:
            name = folder.name if folder == root else folder.relative_to(root).as_posix()
            found.append(_entry(folder, name))
        except ResultsError as error:
            refused.append(str(error))
    return found, refused


def folders(root: Path) -> Iterator[Path]:
    """Folders of runs and benchmarks, in the order of their names. One that vanishes meanwhile is passed over."""
    for folder, inside, files in os.walk(root):
        inside[:] = sorted(name for name in inside if name not in _INSIDE and not name.startswith("."))
        if _MARKS & set(files):
            yield Path(folder)


def _entry(folder: Path, name: str) -> Entry:
    run = load_run(folder, metrics=("bytes",))
    if (folder / "samples.parquet").exists():
        samples = load_samples(folder)
        if samples.status == "done" and run.status in set(STATUSES) - {"done", "refused"}:  # a part of the shapes
            return Entry(name, "benchmark", run, run.status, run.reason)
        return Entry(name, "benchmark", run, samples.status, samples.reason)
    if (folder / "comm.parquet").exists():
        return Entry(name, "benchmark", run, "done", "")
    return Entry(name, "training", run, run.status, run.reason)


def runs_table(found: Sequence[Entry]) -> str:
    """All of them with status and manifest, as HTML."""
    head = ("run", "system", "seed", "status", "commit", "manifest and config")
    return table(head, map(_cells, found), "Runs and benchmarks", "runs")


def _cells(entry: Entry) -> list[str]:
    run, is_training = entry.run, entry.what == "training"
    git = run.manifest.get("git")
    commit = git.get("commit") if isinstance(git, dict) else None
    status = f'<span class="status {"done" if entry.status == "done" else "odd"}">{text(entry.status)}</span>'
    papers = [_text_of(run.path / name) for name in ("manifest.json", "config.yaml")]
    told = "".join(f"<pre>{text(paper)}</pre>" for paper in papers if paper)
    return [
        text(entry.name),
        text(f"{run.system} ({run.implementation})") if is_training else "benchmark",
        text(run.seed if is_training and run.seed is not None else ""),
        status + (f" {text(entry.reason)}" if entry.reason else ""),
        f"<code>{text(str(commit)[:10])}</code>" if commit else "",
        details("show", told) if told else "none",
    ]


def _text_of(path: Path) -> str:
    """A file as it is, "" where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
