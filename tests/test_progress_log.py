"""experiments.progress_log: what an onlooker reads of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import progress_log
from experiments.progress_log import FILE, Phase, ProgressLog, read_progress
from experiments.results import ResultsWriteError
from tests.tiny import Configure, train


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ProgressLog:
    """A log whose clock advances by a second with every line."""
    seconds = iter(range(1000, 2000))
    monkeypatch.setattr(progress_log.time, "time", lambda: float(next(seconds)))
    return ProgressLog(tmp_path)


def test_lines_about_training_are_some_seconds_apart(log: ProgressLog, tmp_path: Path) -> None:
    log.note(0, "starting")
    for step in range(1, 12):
        log.note(step, "training", 2.0)
    assert [(line.when, line.step) for line in read_progress(tmp_path)] == [(1000, 0), (1001, 1), (1006, 6), (1011, 11)]


def test_another_phase_is_told_at_once(log: ProgressLog, tmp_path: Path) -> None:
    phases: list[Phase] = ["starting", "training", "saving", "training", "validating", "training"]
    for phase in phases:
        log.note(1, phase)
    assert [line.phase for line in read_progress(tmp_path)] == phases


def test_only_the_last_start_counts_and_half_a_line_does_not(log: ProgressLog, tmp_path: Path) -> None:
    log.note(0, "starting")
    log.note(3, "training")
    again = ProgressLog(tmp_path)
    again.note(2, "starting")
    again.note(3, "training")
    with (tmp_path / FILE).open("a") as file:
        file.write('{"when": 1, "st')
    assert [(line.step, line.phase) for line in read_progress(tmp_path)] == [(2, "starting"), (3, "training")]


def test_no_run_no_lines(tmp_path: Path) -> None:
    assert read_progress(tmp_path) == []
    with pytest.raises(ResultsWriteError, match=r"progress\.jsonl could not be written"):
        ProgressLog(tmp_path / "missing").note(0, "starting")


def test_a_run_tells_its_phases(config: Configure) -> None:
    run = train(config("trainer.val_every=3", "trainer.checkpoint_every=4"))
    lines = read_progress(run.path)
    assert [(line.step, line.phase) for line in lines if line.phase != "training"] == [
        (0, "starting"),
        (3, "validating"),
        (4, "saving"),
        (6, "validating"),
        (6, "saving"),
    ]
    assert [line.when for line in lines] == sorted(line.when for line in lines)
    assert lines[-1].phase == "training"
    assert (lines[1].step, lines[1].phase) == (1, "training")
    assert lines[1].loss is not None
