"""slurm.status: what the table says of cells, whatever became of their jobs."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from experiments.allocation import Shape
from experiments.failures import Report, write_report
from experiments.progress_log import FILE, Line
from experiments.results import METRICS_FOOTER, RunDir, RunStatus
from slurm import status
from slurm.records import Cell, Event, EventName, SweepFolder
from slurm.scheduler import QueuedJob
from slurm.status import Row, eta, rows_of, table
from slurm.submission import Resources
from slurm.writers import Writer, writers

STEPS = 40
RESOURCES = {
    "shape": {"num_nodes": 1, "ranks_per_node": 2, "device": "cpu"},
    "gpus_per_node": 0,
    "cpus_per_task": None,
    "time": "10",
    "max_parallel": 2,
    "options": {"mem": "1"},
}
LIVE = QueuedJob("RUNNING", "None", None)


class Story:
    """A sweep of one cell, and what is written about it.

    Args:
        folder: for all of it.
        runs: training runs; more than one make it a comparison.
        name: of the sweep; what it runs has the same folders under every name.
    """

    def __init__(self, folder: Path, runs: int = 1, name: str = "sweep") -> None:
        self.sweep = SweepFolder(folder / name)
        names = [f"run{index}" for index in range(runs)] + ["compare"] * (runs > 1)
        kind = "train" if runs == 1 else "compare"
        folders = [str(folder / name) for name in names]
        cell = Cell(0, "seed=0", kind, {}, [], folders, STEPS, False, Shape(1, 2, "cpu"), str(folder))
        self.sweep.create([cell], RESOURCES)
        self.runs = [RunDir(path) for path in folders]

    def submit(self, job: str) -> Story:
        """Keep a job id."""
        self.sweep.add_submission({0: job})
        return self

    def event(self, event: EventName, job: str = "7", restarts: int = 0, outcome: str = "", reason: str = "") -> Story:
        """A line of the job, at second 100 of its life."""
        line = Event(100.0 + restarts, event, job, restarts, outcome, reason)
        with (self.sweep.cell_folder(0) / "events.jsonl").open("a") as file:
            file.write(json.dumps(line._asdict()) + "\n")
        return self

    def run(self, name: RunStatus, reason: str = "", step: int = 0, index: int = 0) -> Story:
        """A run's own status."""
        run = self.runs[index]
        run.path.mkdir(exist_ok=True)
        run.set_status(name, reason, step)
        if name == "done":
            run.write_metrics([], dict.fromkeys(METRICS_FOOTER))
        return self

    def progress(self, *lines: Line, index: int = 0) -> Story:
        """How far a run is."""
        self.runs[index].path.mkdir(exist_ok=True)
        (self.runs[index].path / FILE).write_text("".join(json.dumps(line._asdict()) + "\n" for line in lines))
        return self

    def row(self, queue: Mapping[str, QueuedJob] | None = None) -> Row:
        """The cell's."""
        return rows_of(self.sweep, queue or {}, {})[0]


@pytest.fixture
def story(tmp_path: Path) -> Story:
    """Of a training run."""
    return Story(tmp_path)


@pytest.fixture(autouse=True)
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty queue, and nobody knows of jobs that have left it."""
    monkeypatch.setattr(status, "queued", dict)
    monkeypatch.setattr(status, "final_state", lambda _job: "")
    monkeypatch.setattr(status, "settle_environment", lambda: None)
    monkeypatch.setenv("MOE_SWEEPS_DIR", str(tmp_path))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[int], Resources]]:
    """What is submitted: the sweep's name, cells, resources."""
    asked: list[tuple[str, list[int], Resources]] = []

    def submit(sweep: SweepFolder, numbers: list[int], resources: Resources) -> dict[int, str]:
        asked.append((sweep.path.name, numbers, resources))
        return {number: f"9_{number}" for number in numbers}

    monkeypatch.setattr(status, "submit", submit)
    return asked


def test_before_there_is_a_job(story: Story) -> None:
    assert story.row()[1:4] == ("-", "pending", f"0/{STEPS}")


def test_waiting(story: Story) -> None:
    row = story.submit("7").row({"7": QueuedJob("PENDING", "Priority", None)})
    assert (row.status, row.reason) == ("pending", "Priority")


def test_at_work(story: Story) -> None:
    told = [Line(101.0, 0, "starting", None), Line(103.0, 1, "training", 5.0), Line(123.0, 11, "training", 4.0)]
    row = story.submit("7").event("started").run("running").progress(*told).row({"7": LIVE})
    assert (row.status, row.step) == ("running", f"11/{STEPS}")
    assert row.eta_s == pytest.approx((STEPS - 11) * 2.0)
    assert "0:00:58" in table([row])


def test_a_later_life_knows_no_pace_before_its_own_first_steps(story: Story) -> None:
    told = [Line(50.0, 0, "starting", None), Line(60.0, 10, "training", 5.0)]
    story.submit("7").event("started").event("requeued").event("started", restarts=1).run("running").progress(*told)
    row = story.row({"7": LIVE})
    assert (row.status, row.step, row.eta_s, row.requeued) == ("running", f"10/{STEPS}", None, 1)
    assert "running, requeued once" in table([row])


def test_requeued_and_waiting(story: Story) -> None:
    story.submit("7").event("started").event("requeued").run("interrupted", step=10)
    assert story.row({"7": QueuedJob("PENDING", "BeginTime", None)}).status == "pending"


def test_done_counts_whatever_else_is_said(story: Story) -> None:
    story.submit("7").event("started").event("ended", outcome="failed", reason="old").run("done", step=STEPS)
    row = story.row({"7": LIVE})
    assert (row.status, row.step, row.reason) == ("done", f"{STEPS}/{STEPS}", "")


def test_a_failure_shows_the_end_of_its_traceback(story: Story) -> None:
    story.submit("7").event("started").event("ended", outcome="failed", reason="rank 1 failed: ValueError: boom")
    logs = story.run("failed").runs[0].logs
    logs.mkdir()
    write_report(logs, Report(0, "lost_peer", "closed", 1.0, traceback="RuntimeError: Connection closed"))
    write_report(logs, Report(1, "failed", "boom", 2.0, traceback="one\ntwo\nthree\nValueError: boom\n"))
    told = table([story.row()])
    assert (
        "      rank 1:\n      two\n      three\n      ValueError: boom\n      rank 1 failed: ValueError: boom\n" in told
    )
    assert "Connection closed" not in told
    assert told.endswith("1 failed")


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("TIMEOUT", "timeout"),
        ("OUT_OF_MEMORY", "oom"),
        ("CANCELLED", "interrupted"),
        ("NODE_FAIL", "failed"),
        ("COMPLETED", "failed"),
        ("", "failed"),
    ],
)
def test_a_job_that_left_without_a_word(
    story: Story, monkeypatch: pytest.MonkeyPatch, state: str, expected: str
) -> None:
    monkeypatch.setattr(status, "final_state", lambda _job: state)
    row = story.submit("7").event("started").run("running").row()
    assert row.status == expected
    assert row.reason


def test_the_latest_submission_counts(story: Story) -> None:
    story.submit("7").event("started").event("ended", outcome="oom", reason="too much")
    assert story.row().status == "oom"
    story.submit("8")
    assert story.row({"8": QueuedJob("PENDING", "None", None)})[1:3] == ("8", "pending")


def test_a_comparison_says_which_run_it_is_at(tmp_path: Path) -> None:
    story = Story(tmp_path, runs=3).submit("7").event("started")
    story.run("done", step=STEPS).run("running", index=1).run("running", index=2)
    story.progress(Line(101.0, 0, "starting", None), Line(103.0, 8, "training", 5.0), index=1)
    row = story.row({"7": LIVE})
    assert (row.status, row.step) == ("running", f"run 2 of 3: 8/{STEPS}")


def test_a_refused_cell(story: Story) -> None:
    row = story.run("refused", "It can't.").row()
    assert (row.status, row.reason) == ("refused", "It can't.")


@pytest.mark.parametrize(
    "lines", [[], [Line(1.0, 0, "starting", None)], [Line(1.0, 5, "starting", None), Line(9.0, 5, "saving", None)]]
)
def test_no_pace_no_guess(lines: list[Line]) -> None:
    assert eta(lines, STEPS) is None


def test_the_recent_pace_counts(story: Story) -> None:
    slow = [Line(float(10 * step), step, "training", None) for step in range(10)]
    fast = [Line(90.0 + step, 9 + step, "training", None) for step in range(1, 11)]
    assert eta([*slow, *fast], STEPS) == pytest.approx(STEPS - 19)


def test_only_what_ended_badly_is_submitted_again(
    story: Story, asked: list[tuple[str, list[int], Resources]], capsys: pytest.CaptureFixture[str]
) -> None:
    story.submit("7").event("started").event("ended", outcome="oom", reason="too much")
    status.main(["sweep", "--resubmit", "failed,timeout"])
    assert asked == []
    status.main(["sweep", "--resubmit", "oom", "--time", "20"])
    ((name, numbers, resources),) = asked
    assert (name, numbers) == ("sweep", [0])
    assert (resources.time, resources.options, resources.shape) == ("20", {"mem": "1"}, Shape(1, 2, "cpu"))
    assert "\nresubmitted: cell 0 as 9_0\n" in capsys.readouterr().out


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_a_run_that_another_sweep_has_is_not_submitted_again(
    tmp_path: Path,
    asked: list[tuple[str, list[int], Resources]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    state: str,
) -> None:
    Story(tmp_path).submit("7").event("started").event("ended", outcome="oom", reason="too much")
    Story(tmp_path, name="other").submit("8_3")
    queue = {"8_3": QueuedJob(state, "None", None)}
    monkeypatch.setattr(status, "queued", lambda: queue)
    status.main(["sweep", "--resubmit", "oom"])
    told = capsys.readouterr().out
    assert "      too much\n      its run is in job 8_3 of sweep other\n" in told
    assert told.endswith("not resubmitted: cell 0, whose run is in job 8_3 of sweep other\n")
    assert asked == []
    queue.clear()  # the other job is over
    status.main(["sweep", "--resubmit", "oom"])
    assert "other" not in capsys.readouterr().out
    assert [name for name, *_ in asked] == ["sweep"]


def test_sweeps_that_share_a_run_do_not_submit_it_twice_at_once(
    tmp_path: Path, asked: list[tuple[str, list[int], Resources]], capsys: pytest.CaptureFixture[str]
) -> None:
    for job, name in enumerate(("first", "second")):
        Story(tmp_path, name=name).submit(str(job)).event("ended", str(job), outcome="failed", reason="broken")
    status.main(["--resubmit", "failed"])
    assert [name for name, *_ in asked] == ["first"]
    assert capsys.readouterr().out.endswith("not resubmitted: cell 0, whose run is in job 9_0 of sweep first\n")


def test_a_sweeps_own_job_is_no_other(story: Story) -> None:
    story.submit("7").event("started")
    busy = writers({"7": LIVE})
    assert busy == {str(story.runs[0].path): Writer("7", "sweep")}
    (row,) = rows_of(story.sweep, {"7": LIVE}, busy)
    assert (row.status, row.elsewhere) == ("running", None)


def test_a_run_of_a_comparison_that_another_sweep_has(tmp_path: Path) -> None:
    shared, alone = Story(tmp_path, runs=3), Story(tmp_path / "alone")
    Story(tmp_path, runs=2, name="other").submit("8")
    busy = writers({"8": LIVE})
    assert [row.elsewhere for row in rows_of(shared.sweep, {}, busy)] == [Writer("8", "other")]
    assert [row.elsewhere for row in rows_of(alone.sweep, {}, busy)] == [None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--resubmit", "done"],
            r"--resubmit=done: is no status of a cell that can be resubmitted\. Fix: choose of fa",
        ),
        (["nope"], r"sweep=nope: there is no such sweep in .*\. Fix: the sweeps are none"),
        ([], r"sweep=: there is none in .*\. Fix: python -m slurm\.sweep submits one"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        status.main(arguments)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_what_was_submitted_by_hand_is_submitted_by_hand_again(
    story: Story, asked: list[tuple[str, list[int], Resources]], capsys: pytest.CaptureFixture[str]
) -> None:
    (story.sweep.path / "sweep.json").write_text("{}")
    story.event("started").event("ended", outcome="failed", reason="broken")
    status.main(["--resubmit", "failed"])
    assert "give the same sbatch command again" in capsys.readouterr().out
    assert asked == []


def test_a_number_that_is_taken_is_not_written_over(story: Story) -> None:
    folder = story.sweep.path / "submissions"
    folder.mkdir()
    (folder / "1.json").touch()  # taken by somebody who has not written it yet
    assert story.sweep.job_of(0) is None
    story.submit("7")
    assert story.sweep.job_of(0) == "7"
    assert {path.name: bool(path.read_text()) for path in folder.iterdir()} == {"1.json": False, "2.json": True}


def test_submissions_at_the_same_time_are_all_kept(story: Story) -> None:
    ready = threading.Barrier(8)

    def submit(job: int) -> None:
        ready.wait()
        story.sweep.add_submission({job: f"7_{job}"})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(submit, range(8)))
    assert [story.sweep.job_of(job) for job in range(8)] == [f"7_{job}" for job in range(8)]
    assert sorted(path.name for path in (story.sweep.path / "submissions").iterdir()) == [
        f"{number}.json" for number in range(8)
    ]
