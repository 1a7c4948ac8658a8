"""Which jobs write into which folders of results, over all sweeps: two must not write into one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from slurm.records import Cell, all_sweeps
from slurm.scheduler import QueuedJob, is_live


class Writer(NamedTuple):
    """A job that waits or works, and the name of its sweep."""

    job: str
    sweep: str

    def __str__(self) -> str:
        return f"job {self.job} of sweep {self.sweep}"


def writers(queue: Mapping[str, QueuedJob]) -> dict[str, Writer]:
    """By folder; of all sweeps in `slurm.records.sweeps_dir`.

    Args:
        queue: jobs in Slurm's queue, by id.
    """
    found: dict[str, Writer] = {}
    for sweep in all_sweeps():
        for cell in sweep.cells():
            job = sweep.job_of(cell.number)
            if job is not None and is_live(queue.get(job)):
                found.update(dict.fromkeys(cell.folders, Writer(job, sweep.path.name)))
    return found


def writer_of(cell: Cell, busy: Mapping[str, Writer]) -> Writer | None:
    """The job that has one of a cell's folders; None where none has.

    Args:
        cell: of any sweep.
        busy: what `writers` found.
    """
    return next((busy[folder] for folder in cell.folders if folder in busy), None)
