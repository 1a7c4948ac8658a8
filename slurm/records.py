"""What a sweep leaves on disk: a folder a sweep, in it a folder a cell. Files are written once by one process, or are
lines that one job appends, so that nothing on a shared file system has two writers."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from experiments.allocation import Shape
from experiments.results import atomic_write

EventName = Literal["started", "requeued", "ended"]


def sweeps_dir() -> Path:
    """Where the folders of sweeps are: MOE_SWEEPS_DIR, else outputs/slurm."""
    return Path(os.environ.get("MOE_SWEEPS_DIR", "outputs/slurm")).absolute()


def all_sweeps() -> list[SweepFolder]:
    """What `sweeps_dir` holds, by name."""
    return [SweepFolder(path.parent) for path in sorted(sweeps_dir().glob("*/sweep.json"))]


@dataclass(frozen=True)
class Cell:
    """One job's work: an entry point with one config.

    Args:
        number: in its sweep, from 0.
        label: what a table calls it.
        kind: of the entry point, `python -m experiments.<kind>`.
        config: composed, not yet settled: the job's own nodes settle it.
        overrides: as they were typed.
        folders: absolute; of the training runs in their order, then of a benchmark. Their names hold the run ids.
        max_steps: optimizer steps of each of its training runs, 0 for a benchmark.
        force: run anew what is complete, at the first start.
        shape: what the job asks for.
        working_dir: absolute; what relative paths of the config are meant from.
    """

    number: int
    label: str
    kind: str
    config: dict[str, Any]
    overrides: list[str]
    folders: list[str]
    max_steps: int
    force: bool
    shape: Shape
    working_dir: str

    def save(self, folder: Path) -> None:
        """Write cell.json; the folder is made."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "cell.json", asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Cell:
        """What `save` wrote."""
        content = read_json(folder / "cell.json")
        return cls(**{**content, "shape": Shape(**content["shape"])})


class Event(NamedTuple):
    """A line of events.jsonl, which the cell's job appends to.

    Attributes:
        when: seconds since the epoch.
        event: a life of the job started, asked for another one, or was the last.
        job: Slurm's id of the job, `12_3` in an array.
        restarts: how often Slurm has started this job before.
        outcome: with `ended`, a status of `experiments.results.RunStatus`; with `requeued`, why.
        reason: in a sentence.
        done_steps: with `requeued`, optimizer steps, or measured shapes, of all its runs that are saved.
    """

    when: float
    event: EventName
    job: str
    restarts: int
    outcome: str = ""
    reason: str = ""
    done_steps: int = 0


class CellLog:
    """events.jsonl of a cell.

    Args:
        folder: of the cell.
        job: Slurm's id.
        restarts: of the job.
    """

    def __init__(self, folder: Path, job: str, restarts: int) -> None:
        self.folder, self.job, self.restarts = folder, job, restarts

    def note(self, event: EventName, outcome: str = "", reason: str = "", done_steps: int = 0) -> None:
        """Append an event."""
        line = Event(time.time(), event, self.job, self.restarts, outcome, reason, done_steps)
        with (self.folder / "events.jsonl").open("a") as file:
            file.write(json.dumps(line._asdict()) + "\n")


def read_events(folder: Path) -> list[Event]:
    """The events of a cell, in their order."""
    path = folder / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [Event(**json.loads(line)) for line in lines if line.endswith("}")]


@dataclass(frozen=True)
class Submission:
    """One call of sbatch for some cells of a sweep: submissions/<n>.json.

    Args:
        when: seconds since the epoch.
        jobs: Slurm's job ids by the cells' numbers, as text.
    """

    when: float
    jobs: dict[str, str]


class SweepFolder:
    """outputs/slurm/<name>/.

    Args:
        path: of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def cell_folder(self, number: int) -> Path:
        """Of a cell."""
        return self.path / "cells" / str(number)

    def create(self, cells: Sequence[Cell], resources: Mapping[str, Any]) -> None:
        """Write the cells, and what their jobs ask for."""
        self.path.mkdir(parents=True)
        for cell in cells:
            cell.save(self.cell_folder(cell.number))
        write_json(self.path / "sweep.json", dict(resources))

    def resources(self) -> dict[str, Any]:
        """What the jobs ask for; empty for a job that was submitted by hand."""
        path = self.path / "sweep.json"
        return read_json(path) if path.exists() else {}

    def cells(self) -> list[Cell]:
        """All cells, by number."""
        folders = (self.path / "cells").glob("*/cell.json")
        return sorted((Cell.load(path.parent) for path in folders), key=lambda cell: cell.number)

    def add_submission(self, jobs: Mapping[int, str]) -> None:
        """Keep the job ids of cells that were submitted. Each of two calls at once finds a number of its own."""
        folder = self.path / "submissions"
        folder.mkdir(exist_ok=True)
        content = Submission(time.time(), {str(number): job for number, job in jobs.items()})
        for number in itertools.count(len(list(folder.glob("*.json")))):
            path = folder / f"{number}.json"
            try:
                path.open("x").close()
            except FileExistsError:
                continue
            write_json(path, asdict(content))
            return

    def job_of(self, number: int) -> str | None:
        """Slurm's id of the latest job of a cell, None before there is one."""
        texts = [path.read_text() for path in (self.path / "submissions").glob("*.json")]
        found = [Submission(**json.loads(text)) for text in texts if text]  # one without is about to be written
        latest = [(item.when, item.jobs[str(number)]) for item in found if str(number) in item.jobs]
        latest += [(event.when, event.job) for event in read_events(self.cell_folder(number))]
        return max(latest)[1] if latest else None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file whole or not at all."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """What `write_json` wrote."""
    return json.loads(path.read_text())
