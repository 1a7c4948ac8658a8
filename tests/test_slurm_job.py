"""slurm.job: what the batch step does about the ranks' end. Small programs stand for srun and its ranks."""

from __future__ import annotations

import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from experiments import layer, measured_cluster
from experiments.allocation import SWITCHES, Shape
from experiments.failures import Report, write_report
from experiments.ranks import GIVEN_UP, JOB_STOP_FILE
from experiments.results import RunDir
from experiments.samples import append_samples
from slurm import job as job_module
from slurm import scheduler
from slurm.diagnosis import LATE_S, Verdict
from slurm.job import Job, saved
from slurm.records import Cell, CellLog, read_events
from slurm.scheduler import Allocation, QueuedJob

HEAD = f"""
import json, os, sys, time
from pathlib import Path
from experiments.progress_log import ProgressLog
from experiments.results import RunDir
given_up = os.environ["{GIVEN_UP}"].split(",")
stop_file = Path(os.environ["{JOB_STOP_FILE}"])
runs = [RunDir(path) for path in sys.argv[1:]]
def say(run, *status):
    run.path.mkdir(parents=True, exist_ok=True)
    run.set_status(*status)
"""
DONE = "for run in runs: say(run, 'done', '', 8)"
STOPPED = "stop_file.touch(); say(runs[0], 'interrupted', 'stopped', 4); sys.exit(130)"
BROKEN = "print('srun: error: n1: task 1: Exited with exit code 3', file=sys.stderr); sys.exit(3)"
OTHERS = """
print("given up:", *given_up, file=sys.stderr)
for run in runs:
    if run.path.name == "run1":
        if "run1" in given_up: continue
        print("srun: error: n0: task 1: Out Of Memory", file=sys.stderr)
        sys.exit(1)
    say(run, "done", "", 8)
sys.exit(1)
"""
HANGS = """
say(runs[0], "running")
ProgressLog(runs[0].path).note(0, "starting")
ProgressLog(runs[0].path).note(1, "training")
time.sleep(1e6)
"""
Start = Callable[..., Job]


class Asked(list[str]):
    """Job ids that were requeued, and what the queue holds."""

    state: str | None = "RUNNING"
    reason = "None"
    objection = ""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """A scheduler that knows this job, and does what it is told."""
    asked = Asked()

    def queued(jobs: list[str]) -> dict[str, QueuedJob]:
        end = datetime.now() + timedelta(hours=1)
        return {} if asked.state is None else {job: QueuedJob(asked.state, asked.reason, end) for job in jobs}

    def requeue(job: str) -> str:
        asked.append(job)
        return asked.objection

    monkeypatch.setattr(scheduler, "queued", queued)
    monkeypatch.setattr(scheduler, "requeue", requeue)
    monkeypatch.setattr(scheduler, "leaf_switches", lambda _hosts: ["a", "a"])
    monkeypatch.setattr(scheduler, "signal_tasks", lambda _job, _name: None)
    for name in ("POLL_S", "DUMP_S", "END_S"):
        monkeypatch.setattr(job_module, name, 0.1)
    return asked


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A job takes signals; they are given back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def start(tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Makes a life of a job whose ranks do what a program says."""

    def make(program: str, num_runs: int = 1, force: bool = False, restarts: int = 0) -> Job:
        names = [f"run{index}" for index in range(num_runs)]
        folders = [str(tmp_path / "out" / name) for name in names]
        kind = "train" if num_runs == 1 else "compare"
        cell = Cell(0, "seed=0", kind, {}, [], folders, 8, force, Shape(1, 2, "cpu"), str(tmp_path))
        folder = tmp_path / "cell"
        cell.save(folder)
        text = textwrap.dedent(HEAD) + textwrap.dedent(program)
        monkeypatch.setattr(Job, "_command", lambda _job: [sys.executable, "-c", text, *folders])
        monkeypatch.setattr(Job, "_nodes_answer", lambda _job: True)
        return Job(folder, Allocation("7_0", restarts, ["n0"], [2], 0, None))

    return make


def last_word(job: Job) -> tuple[str, str, str]:
    """Of the job's events."""
    event = read_events(job.folder)[-1]
    return event.event, event.outcome, event.reason


def status_of(run: RunDir) -> tuple[str, str]:
    """Status and reason."""
    status = run.status()
    assert status is not None
    return status.status, status.reason


def test_all_is_done(start: Start) -> None:
    job = start(DONE)
    assert job.run() == 0
    assert last_word(job) == ("ended", "done", "")


def test_a_failure_is_the_runs_status_and_the_jobs_exit_code(start: Start, asked: Asked) -> None:
    job = start(BROKEN)
    assert job.run() == 1
    assert last_word(job)[:2] == ("ended", "failed")
    assert "task 1 on n1: Exited with exit code 3" in last_word(job)[2]
    assert status_of(job.runs[0]) == last_word(job)[1:]
    assert asked == []


def test_ranks_that_end_well_with_nothing_done_have_failed(start: Start) -> None:
    job = start("")
    assert job.run() == 1
    assert last_word(job)[:2] == ("ended", "failed")
    assert last_word(job)[2].endswith("run0 is not done")


def test_a_lone_task_knows_how_its_ranks_ended(start: Start) -> None:
    job = start("say(runs[0], 'oom', 'rank 0 was killed by the kernel'); " + BROKEN)
    job.allocation = replace(job.allocation, tasks=[1])
    assert job.run() == 1
    assert last_word(job) == ("ended", "oom", "rank 0 was killed by the kernel")


def test_a_run_that_fails_is_given_up_and_the_others_go_on(start: Start) -> None:
    job = start(OTHERS, num_runs=4)
    assert job.run() == 1
    assert [status_of(run)[0] for run in job.runs] == ["done", "oom", "done", "done"]
    assert last_word(job)[:2] == ("ended", "oom")
    assert last_word(job)[2].startswith("1 of 3 runs failed: run1: Slurm ended the ranks for want of memory")
    assert "given up: run1" in (job.folder / "srun.log").read_text()


def test_no_ranks_are_started_on_a_lost_node(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    job = start(OTHERS, num_runs=4)
    monkeypatch.setattr(Job, "_nodes_answer", lambda _job: False)
    assert job.run() == 1
    assert job.runs[2].status() is None


def test_ranks_that_were_stopped_are_requeued(start: Start, asked: Asked) -> None:
    job = start(STOPPED)
    assert job.run() == 0
    assert asked == ["7_0"]
    event = read_events(job.folder)[-1]
    assert (event.event, event.done_steps) == ("requeued", 4)
    later = start(DONE, restarts=1)
    assert later.run() == 0, "the wish to stop is of the earlier life"


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING"])
def test_a_cancelled_job_is_not(start: Start, asked: Asked, state: str) -> None:
    asked.state = state
    job = start(STOPPED)
    assert job.run() == 1
    assert asked == []
    assert last_word(job)[:2] == ("ended", "interrupted")


def test_a_job_at_its_limit_says_so_at_once(start: Start, asked: Asked) -> None:
    asked.state, asked.reason = "COMPLETING", "TimeLimit"
    job = start("stop_file.touch(); say(runs[0], 'running'); time.sleep(1); sys.exit(1)")
    assert job.run() == 1
    assert last_word(job)[:2] == ("ended", "timeout")
    assert status_of(job.runs[0])[0] == "timeout"


def test_a_site_may_not_requeue(start: Start, asked: Asked) -> None:
    asked.objection = "Requested operation is presently disabled"
    job = start(STOPPED)
    assert job.run() == 1
    assert last_word(job) == ("ended", "interrupted", f"saved, and can't be requeued: {asked.objection}")


def test_a_job_that_never_gets_further_ends(start: Start, asked: Asked) -> None:
    for life in range(2):
        assert start(STOPPED, restarts=life).run() == 0
    job = start(STOPPED, restarts=2)
    assert job.run() == 1
    assert asked == ["7_0", "7_0"]
    assert last_word(job)[:2] == ("ended", "timeout")
    assert "stopped 3 times at step 4 with nothing new saved" in last_word(job)[2]


def test_a_job_that_gets_further_goes_on(start: Start, asked: Asked) -> None:
    for life in range(4):
        assert start(STOPPED.replace("4)", f"{life})"), restarts=life).run() == 0
    assert len(asked) == 4


def test_measured_shapes_of_a_benchmark_are_saved(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "layer")
    assert saved(run) == 0
    run.path.mkdir()
    for shape in ("a", "b"):
        append_samples(run.journal, ["times", shape], [])
    assert saved(run) == 2


def test_ranks_that_hang_are_ended(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_WATCHDOG_S", "0.2")
    job = start(HANGS)
    assert job.run() == 1
    assert last_word(job)[:2] == ("ended", "timeout")
    assert last_word(job)[2].endswith("s (watchdog): ranks 0, 1 on n0 did not answer")


STACK = (
    "Current thread 0x00007f2 (most recent call first):\n"
    '  File "/repo/moe/gate.py", line 7 in gate\n  File "<frozen runpy>", line 198 in _run_module_as_main\n'
)


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_stacks_that_come_late_from_other_nodes_are_waited_for(
    start: Start, monkeypatch: pytest.MonkeyPatch, num_nodes: int
) -> None:
    """What a rank of another node writes shows up after some looks; on one node it is there at once."""
    start(DONE)
    job = start(DONE)
    job.cell = replace(job.cell, shape=Shape(num_nodes, 2 // num_nodes, "cpu"))
    clock = [0.0]

    def pause(seconds: float) -> None:
        clock[0] += seconds
        if clock[0] >= 30:
            job.rank_logs[1].write_text("words\n" + STACK)

    def signal_tasks(_job: str, _name: str) -> None:
        job.rank_logs[0].write_text(STACK)

    monkeypatch.setattr(job_module, "POLL_S", 1.0)
    monkeypatch.setattr(job_module, "DUMP_S", 5.0)
    monkeypatch.setattr(job_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(job_module.time, "sleep", pause)
    monkeypatch.setattr(scheduler, "signal_tasks", signal_tasks)
    job.rank_logs[1].write_text("words\n")
    assert job._stacks() == {0: STACK, 1: STACK if num_nodes == 2 else ""}
    assert clock[0] == (30 if num_nodes == 2 else 5)


def test_reports_of_an_earlier_start_are_none_of_this_one(start: Start) -> None:
    job = start(BROKEN)
    (job.folder / "nested").mkdir()
    for folder in (job.folder, job.folder / "nested"):
        write_report(folder, Report(1, "failed", "ValueError: long ago", 1.0))
    assert job.run() == 1
    assert "task 1 on n1: Exited with exit code 3" in last_word(job)[2]


def test_what_limits_a_benchmark_is_told() -> None:
    readme = (job_module.REPOSITORY / "slurm" / "README.md").read_text()
    (limit_s,) = {layer.COLLECTIVE_TIMEOUT_S, measured_cluster.COLLECTIVE_TIMEOUT_S, job_module.COLLECTIVE_TIMEOUT_S}
    assert f"{limit_s:g} s in\n  `experiments.layer` and `experiments.comm`" in readme
    assert f"up to {LATE_S:g} s for stacks" in readme


def test_force_removes_what_is_there_once(start: Start, tmp_path: Path) -> None:
    kept = tmp_path / "out" / "run0" / "checkpoint"
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert start(STOPPED, force=True).run() == 0
    assert not kept.exists()
    kept.touch()
    assert start(DONE, force=True, restarts=1).run() == 0
    assert kept.exists()


def test_what_the_ranks_are_told(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    job = start(DONE)
    environment = job._environment()
    assert environment["PYTHONPATH"] == f"{job_module.REPOSITORY}:/mine"
    assert (environment[SWITCHES], environment["OMP_NUM_THREADS"]) == ("a,a", "1")
    assert environment[JOB_STOP_FILE] == str(job.stop_file)


def test_the_command_of_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_SRUN", "--container-image='a b.sqsh'")
    monkeypatch.setenv("MOE_TASK", "apptainer exec --nv image.sif python")
    folder = tmp_path / "50% of it"
    Cell(0, "x", "train", {}, [], [str(tmp_path / "run")], 8, False, Shape(2, 4, "cuda"), str(tmp_path)).save(folder)
    command = Job(folder, Allocation("7", 0, ["n0", "n1"], [4, 4], 4, 8))._command()
    asked = ("--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--cpus-per-task=8", "--kill-on-bad-exit=1")
    for option in (*asked, "--distribution=block", f"--output={tmp_path}/50%% of it/rank%t.log"):
        assert option in command
    words = ["apptainer", "exec", "--nv", "image.sif", "python", "-m", "slurm.task", str(folder)]
    assert command[-9:] == ["--container-image=a b.sqsh", *words]


def test_the_batch_steps_own_mistake_is_told(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_job: Job) -> Verdict:
        raise OSError("disk quota exceeded")

    monkeypatch.setattr(Job, "_work", broken)
    job = start(DONE)
    with pytest.raises(OSError, match="disk quota"):
        job.run()
    assert last_word(job) == ("ended", "failed", "the batch step itself failed: OSError: disk quota exceeded")


def test_events_of_a_job_on_another_node_can_be_read_at_any_time(tmp_path: Path) -> None:
    CellLog(tmp_path, "7", 0).note("started")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"when": 1, "ev')
    assert [event.event for event in read_events(tmp_path)] == ["started"]
