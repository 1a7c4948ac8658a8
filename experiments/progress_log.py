"""progress.jsonl: how far a run is, a line at a time, only ever appended; for whoever watches it from outside."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from experiments.results import write_error

FILE = "progress.jsonl"
EVERY_S = 5.0
"""Between two lines about training."""
TAIL_BYTES = 1 << 16

Phase = Literal["starting", "training", "validating", "saving"]


class Line(NamedTuple):
    """One line: seconds since the epoch, optimizer steps done, what the run does from here on, the last loss."""

    when: float
    step: int
    phase: Phase
    loss: float | None


class ProgressLog:
    """Appends lines to a run's file.

    Args:
        folder: of the run; it must exist.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._last = Line(0.0, 0, "starting", None)

    def note(self, step: int, phase: Phase, loss: float | None = None) -> None:
        """Say how far the run is, unless it did so in the same phase less than `EVERY_S` ago; ResultsWriteError."""
        line = Line(time.time(), step, phase, loss)
        if line.phase == self._last.phase and line.when - self._last.when < EVERY_S:
            return
        try:
            with self.path.open("a") as file:  # closed each time, so that other nodes of a network file system see it
                file.write(json.dumps(line._asdict()) + "\n")
        except OSError as error:
            raise write_error(self.path, error) from error
        self._last = line


def phases_of(folder: Path, rank: int) -> Callable[[Phase], None]:
    """Notes what a benchmark, which takes no optimizer steps, does: `training` after each timed round, and `starting`
    behind the last one, since the next shape's rounds may take any time. Rank 0 does it.

    Args:
        folder: of the run; it must exist.
        rank: this one.
    """
    if rank != 0:
        return lambda _phase: None
    log = ProgressLog(folder)
    log.note(0, "starting")
    return lambda phase: log.note(0, phase)


def read_progress(folder: Path) -> list[Line]:
    """The latest lines of a run, since its last start; empty where there are none.

    Args:
        folder: of the run.
    """
    path = folder / FILE
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
        texts = file.read().decode(errors="replace").split("\n")
    lines = [Line(**json.loads(text)) for text in texts[:-1] if text.startswith("{") and text.endswith("}")]
    starts = [index for index, line in enumerate(lines) if line.phase == "starting"]
    return lines[starts[-1] :] if starts else lines
