"""The batch step of a job: starts the ranks by srun, watches them, says how they ended, and asks for the next life.

It is the one party that requeues. Slurm tells it of a limit to come (SIGUSR2), or tells the ranks of a preemption
(SIGTERM); the ranks save and end, and this process sends the job back to the queue.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from experiments.allocation import SWITCHES
from experiments.failures import count_oom_kills
from experiments.progress_log import read_progress
from experiments.ranks import GIVEN_UP, JOB_STOP_FILE
from experiments.results import RunDir, Status
from moe.errors import SuiteError
from slurm import scheduler
from slurm.diagnosis import LATE_S, Evidence, Verdict, failed_by_itself, report_paths, sizes, tail, verdict
from slurm.records import Cell, CellLog, read_events
from slurm.watchdog import WATCHDOG_S, place, silence_allowed_s, whereabouts

REPOSITORY = Path(__file__).resolve().parent.parent
POLL_S = 1.0
ATTEMPTS = 3
DUMP_S = 5.0
"""For the stacks of ranks that hang to be written, on one node."""
END_S = 20.0
"""For srun to end when it was told to; it can't reach the tasks of a node that is gone."""
MARGIN_S = 15.0
"""Before the job's end: what is not saved by then is not waited for."""
FRUITLESS_LIVES = 3
"""A job that was stopped that often in a row with nothing new saved is not requeued."""
COLLECTIVE_TIMEOUT_S = 600.0


def saved(run: RunDir) -> int:
    """Optimizer steps that a stopped run need not take again, or shapes that a stopped benchmark has measured."""
    status = run.status()
    shapes = run.journal.read_bytes().count(b"\n{") if run.journal.exists() else 0
    return shapes + (0 if status is None else status.step)


def run_cell(folder: str) -> None:
    """Run a cell in the job that this process is the batch step of; ends it with exit code 0 if all of it is done."""
    sys.exit(Job(Path(folder), scheduler.allocation_of(os.environ)).run())


class Job:
    """One life of a cell's job.

    Args:
        folder: of the cell.
        allocation: what Slurm gave.
    """

    def __init__(self, folder: Path, allocation: scheduler.Allocation) -> None:
        self.folder, self.allocation = folder.absolute(), allocation
        self.cell = Cell.load(folder)
        self.runs = [RunDir(path) for path in self.cell.folders]
        self.log = CellLog(self.folder, allocation.job, allocation.restarts)
        num_ranks = self.cell.shape.num_nodes * self.cell.shape.ranks_per_node
        self.rank_logs = [self.folder / f"rank{rank}.log" for rank in range(num_ranks)]
        self.stop_file = self.folder / "stop_requested"
        self.given_up: list[str] = []
        self.hang: Verdict | None = None
        self._received: list[str] = []
        self._said_to_end = False
        self._log_sizes: dict[Path, int] = {}
        self._started = 0.0

    def run(self) -> int:
        """All of it; the exit code of the job."""
        os.chdir(self.cell.working_dir)
        self.stop_file.unlink(missing_ok=True)
        if self.cell.force and not read_events(self.folder):
            for run in self.runs:
                shutil.rmtree(run.path, ignore_errors=True)
                shutil.rmtree(run.measurements, ignore_errors=True)
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        self.log.note("started")
        print(f"{self.cell.label}: job {self.allocation.job}, {self.cell.shape}, logs in {self.folder}", flush=True)
        try:
            outcome = self._work()
        except Exception as error:
            self.log.note("ended", "failed", f"the batch step itself failed: {type(error).__name__}: {error}")
            raise
        if outcome.status == "interrupted" and self._requeued():
            return 0
        self._end(outcome)
        return 0 if outcome.status in ("done", "refused") else 1

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._received.append(signal.Signals(number).name)
        self.stop_file.touch()

    def _work(self) -> Verdict:
        """Start the ranks until nothing is left that they could do."""
        while True:
            oom_kills, before = count_oom_kills(), [run.status() for run in self.runs]
            exit_code = self._watch(self._start())
            unfinished = self._unfinished()
            if unfinished is None:
                return self._summary()
            if exit_code == 0:
                return Verdict("failed", f"srun ended well, and {unfinished.path} is not done")
            evidence = self._evidence(exit_code, count_oom_kills() - oom_kills)
            # Ranks that srun ends after another one failed get SIGTERM, too, and take it for a request to stop.
            if self.stop_file.exists() and (self._received or not failed_by_itself(evidence)):
                return Verdict("interrupted", f"stopped by {self._stopped_by}")
            cause = self.hang or self._own_word(unfinished, before) or verdict(evidence)
            if cause.status == "interrupted":
                return cause
            unfinished.path.mkdir(parents=True, exist_ok=True)
            unfinished.set_status(cause.status, cause.reason)
            print(f"{unfinished.path.name}: {cause.status}: {cause.reason}", flush=True)
            self.given_up.append(unfinished.path.name)
            if self._unfinished() is None or unfinished is self.runs[-1] or not self._nodes_answer():
                return cause
            self.hang = None

    def _own_word(self, run: RunDir, before: list[Status | None]) -> Verdict | None:
        """What a task that is alone says of the run: it has started the ranks itself, and seen their end."""
        status = run.status()
        alone = sum(self.allocation.tasks) == 1
        if not alone or status is None or status in before or status.status in ("running", "interrupted"):
            return None
        return Verdict(status.status, status.reason)

    @property
    def _stopped_by(self) -> str:
        return " and ".join(dict.fromkeys(self._received)) or "SIGTERM, which the ranks got"

    def _start(self) -> subprocess.Popen[bytes]:
        for path in report_paths(self._report_folders(), range(len(self.rank_logs))):
            path.unlink(missing_ok=True)
        if not self._received:
            self.stop_file.unlink(missing_ok=True)
        srun_log = self.folder / "srun.log"
        self._log_sizes, self._started = sizes([*self.rank_logs, srun_log]), time.time()
        with srun_log.open("ab") as log:
            return subprocess.Popen(
                self._command(), env=self._environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _command(self) -> list[str]:
        shape, cpus = self.cell.shape, self.allocation.cpus_per_task
        logs = str(self.folder).replace("\\", "\\\\").replace("%", "%%")
        return [
            *self._srun(shape.ranks_per_node, "--kill-on-bad-exit=1", "--distribution=block"),
            *([f"--cpus-per-task={cpus}"] if cpus is not None else []),  # srun has not read it from sbatch since 22.05
            f"--output={logs}/rank%t.log",
            "--open-mode=append",
            *shlex.split(os.environ.get("MOE_SRUN", "")),
            *(shlex.split(os.environ.get("MOE_TASK", "")) or [sys.executable]),
            *("-m", "slurm.task", str(self.folder)),
        ]

    def _srun(self, tasks_per_node: int, *options: str) -> list[str]:
        num_nodes = self.cell.shape.num_nodes
        tasks = [f"--ntasks={num_nodes * tasks_per_node}", f"--ntasks-per-node={tasks_per_node}"]
        return ["srun", f"--nodes={num_nodes}", *tasks, "--export=ALL", "--input=none", *options]

    def _environment(self) -> dict[str, str]:
        variables = dict(os.environ)
        paths = [str(REPOSITORY), *filter(None, [variables.get("PYTHONPATH")])]
        variables |= {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            JOB_STOP_FILE: str(self.stop_file),
            GIVEN_UP: ",".join(self.given_up),
            SWITCHES: ",".join(scheduler.leaf_switches(self.allocation.hosts)),
        }
        variables.setdefault("OMP_NUM_THREADS", str(self.allocation.cpus_per_task or 1))
        # After a timeout NCCL's watchdog waits four times this long, for others to dump traces, before it speaks.
        variables.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "1000")
        return variables

    def _watch(self, srun: subprocess.Popen[bytes]) -> int:
        """Wait for the ranks' end, and bring it about when they hang or the job's own end is near."""
        deadline: float | None = None
        while True:
            try:
                return srun.wait(POLL_S)
            except subprocess.TimeoutExpired:
                pass
            if self.stop_file.exists():
                deadline = self._deadline() if deadline is None else deadline
                if time.time() > deadline:
                    return _end(srun)
            elif (hang := self._hang()) is not None:
                self.hang = hang
                return _end(srun)

    def _deadline(self) -> float:
        """When to wait no longer for ranks that save. A job that is about to be killed says so now: it may get no other
        turn."""
        known = self._known()
        if known is not None and known.state != "RUNNING":
            timed_out = known.reason == "TimeLimit"
            why = "the job's time limit came before a checkpoint" if timed_out else "the job was cancelled"
            self._end(Verdict("timeout" if timed_out else "interrupted", f"{why} ({self._stopped_by})"))
        if known is None or known.end is None:
            return time.time() + COLLECTIVE_TIMEOUT_S
        return known.end.timestamp() - MARGIN_S

    def _known(self) -> scheduler.QueuedJob | None:
        """What Slurm knows of this job; None when it does not answer, as during its controller's restart."""
        for _ in range(ATTEMPTS):
            try:
                return scheduler.queued([self.allocation.job]).get(self.allocation.job)
            except SuiteError as error:
                print(error, flush=True)
                time.sleep(POLL_S)
        return None

    def _hang(self) -> Verdict | None:
        run = self._unfinished()
        lines = read_progress(run.path) if run is not None else []
        watchdog_s = float(os.environ.get("MOE_WATCHDOG_S", WATCHDOG_S))
        allowed_s = silence_allowed_s(lines, watchdog_s)
        if allowed_s is None or lines[0].when < self._started or time.time() - lines[-1].when < allowed_s:
            return None
        silence_s = time.time() - lines[-1].when
        hosts = [host for host in self.allocation.hosts for _ in range(self.cell.shape.ranks_per_node)]
        return Verdict("timeout", f"no step for {silence_s:.0f} s (watchdog): {whereabouts(self._stacks(), hosts)}")

    def _stacks(self) -> dict[int, str]:
        """What each rank's log gains when it is asked for its stack."""
        before = sizes(self.rank_logs)
        scheduler.signal_tasks(self.allocation.job, "QUIT")
        deadline = time.monotonic() + (self._late_s or DUMP_S)
        while True:
            dumps = {rank: tail(path, before[path]) for rank, path in enumerate(self.rank_logs)}
            if all(map(place, dumps.values())) or time.monotonic() >= deadline:
                return dumps
            time.sleep(POLL_S)

    @property
    def _late_s(self) -> float:
        """How late a file that a rank wrote may show up here."""
        return LATE_S if self.cell.shape.num_nodes > 1 else 0.0

    def _unfinished(self) -> RunDir | None:
        """The run that is under way, or was when the ranks ended: they take them in order."""
        for run in self.runs:
            status = run.status()
            finished = status is not None and status.status in ("done", "refused")
            if not finished and run.path.name not in self.given_up:
                return run
        return None

    def _report_folders(self) -> list[Path]:
        return [self.folder, *(folder for run in self.runs for folder in (run.logs, run.measurements))]

    def _evidence(self, exit_code: int, oom_kills: int) -> Evidence:
        timeout_s = self.cell.config.get("trainer", {}).get("timeout_s", COLLECTIVE_TIMEOUT_S)
        return Evidence(exit_code, self._report_folders(), self._log_sizes, oom_kills, timeout_s, self._late_s)

    def _nodes_answer(self) -> bool:
        """Whether ranks can be started again on all nodes."""
        try:
            return subprocess.run(self._srun(1, "true"), timeout=END_S, check=False).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    def _summary(self) -> Verdict:
        """When every run is done, refused or given up."""
        told = [(run.path.name, status) for run in self.runs if (status := run.status()) is not None]
        failed = [(name, status) for name, status in told if name in self.given_up]
        if failed:
            reason = "; ".join(f"{name}: {status.reason}" for name, status in failed)
            trained = max(1, len(self.runs) - 1)  # the last folder of several is a benchmark's
            return Verdict(failed[0][1].status, f"{len(failed)} of {trained} runs failed: {reason}")
        refused = [status for _, status in told if status.status == "refused"]
        if len(refused) == len(self.runs):
            return Verdict("refused", refused[0].reason)
        return Verdict("done", "")

    def _requeued(self) -> bool:
        """Send the job back to the queue, if it is still ours to send and that has a use."""
        job, known = self.allocation.job, self._known()
        if self._said_to_end or (known is not None and known.state != "RUNNING"):
            return False
        done_steps = sum(map(saved, self.runs))
        lives = [event for event in read_events(self.folder) if event.event == "requeued" and event.job == job]
        fruitless = [event for event in lives[-FRUITLESS_LIVES + 1 :] if event.done_steps == done_steps]
        if len(fruitless) == FRUITLESS_LIVES - 1:
            why = f"stopped {FRUITLESS_LIVES} times at step {done_steps} with nothing new saved: ask for more time"
            self._end(Verdict("timeout", why))
            return False
        self.log.note("requeued", "interrupted", f"stopped by {self._stopped_by}", done_steps)
        if objection := scheduler.requeue(job):
            self._end(Verdict("interrupted", f"saved, and can't be requeued: {objection}"))
            return False
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(END_S)  # Slurm ends us
        return True

    def _end(self, outcome: Verdict) -> None:
        """The last words of the job, and of runs that had no word of their own; only the first call counts."""
        if self._said_to_end:
            return
        self._said_to_end = True
        for run in self.runs:
            status = run.status()
            if status is not None and status.status == "running":
                run.set_status(outcome.status if run is self._unfinished() else "interrupted", outcome.reason)
        self.log.note("ended", outcome.status, outcome.reason)
        print(f"{self.cell.label}: {outcome.status} {outcome.reason}".rstrip(), flush=True)


def _end(srun: subprocess.Popen[bytes]) -> int:
    """End a step; its exit code is of no interest."""
    srun.terminate()
    try:
        return srun.wait(END_S) or 1
    except subprocess.TimeoutExpired:
        srun.kill()
        return srun.wait() or 1
