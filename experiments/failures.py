"""What went wrong in a run of several ranks, and which rank was the cause.

One dead rank drags the others down: they report a closed connection or a timeout milliseconds later, sometimes
earlier. Every rank therefore leaves a report of its own failure, and the parent looks for the one that is not a mere
consequence.
"""

from __future__ import annotations

import json
import re
import signal
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from moe.errors import ConfigError, Problem, Refused, SuiteError

FailureKind = Literal["failed", "oom", "timeout", "interrupted"]

OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory", re.IGNORECASE)
# gloo, the c10d store and the NCCL watchdog each word a timeout in their own way.
TIMED_OUT = re.compile(
    r"timed out waiting|wait timeout after|timeout waiting for|before timing out|connect timeout"
    r"|watchdog caught collective operation timeout|timed out after \d+ ?(ms|milliseconds|seconds)",
    re.IGNORECASE,
)
LOST_PEER = re.compile(
    r"connection (was )?(likely )?(closed|reset|refused)|broken pipe|socket closed|remote process (has )?exited"
    r"|read error|write error|application timeout caused pair closure|communicator was aborted|failed to (recv|send)"
    r"|ncclRemoteError",
    re.IGNORECASE,
)
# How good a root cause a kind is: a smaller number wins, and the earlier report among equals.
RANKING = {"config": 0, "refused": 0, "failed": 0, "oom": 0, "interrupted": 1, "timeout": 2, "lost_peer": 3}
REASON_LENGTH = 1000
LOG_TAIL_BYTES = 65536


class RankFailure(SuiteError):
    """A run of several ranks ended without a result.

    Args:
        kind: `failed`, `oom`, `timeout` (a rank waited too long for another) or `interrupted` (Ctrl-C, SIGTERM).
        rank: the rank that was the cause, None when no single one was.
        reason: one line for status.json, e.g. `ValueError: boom (moe/gate.py:12)`.
        log: the log of that rank, None when there is none.
    """

    def __init__(self, kind: FailureKind, rank: int | None, reason: str, log: Path | None = None) -> None:
        self.kind: FailureKind = kind
        self.rank = rank
        self.reason = reason
        self.log = log
        where = "the run" if rank is None else f"rank {rank}"
        said = reason if reason.startswith("rank ") else f"{where} {_VERBS[kind]}: {reason}"
        super().__init__(said + (f" (log: {log})" if log else ""))


_VERBS = {"failed": "failed", "oom": "ran out of memory", "timeout": "timed out", "interrupted": "was interrupted"}


@dataclass(frozen=True)
class Report:
    """What one rank, or the parent about a rank that could not speak any more, says about its end.

    Args:
        rank: the rank.
        kind: a key of `RANKING`; `lost_peer` means that another rank went away first.
        reason: one line.
        when: seconds since the epoch.
        problems: those of a ConfigError, with values as text.
        reasons: those of a Refused.
        traceback: the whole of it, empty for a rank that was killed.
    """

    rank: int
    kind: str
    reason: str
    when: float
    problems: list[dict[str, str]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    traceback: str = ""


def classify(error: BaseException) -> str:
    """Kind of one exception, a key of `RANKING`; causes (`raise ... from`) count like the exception itself.

    torch is not imported: its classes are known by name.
    """
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__
    for item in chain:
        names = {base.__name__ for base in type(item).__mro__}
        text = str(item)
        if isinstance(item, ConfigError):
            return "config"
        if isinstance(item, Refused):
            return "refused"
        if isinstance(item, KeyboardInterrupt):
            return "interrupted"
        if isinstance(item, MemoryError) or "OutOfMemoryError" in names:
            return "oom"
        if isinstance(item, RuntimeError):  # also the base of torch's DistError family
            if OUT_OF_MEMORY.search(text):
                return "oom"
            if TIMED_OUT.search(text):
                return "timeout"
            if LOST_PEER.search(text) or names & {"DistNetworkError"}:
                return "lost_peer"
    return "failed"


def report_of(rank: int, error: BaseException) -> Report:
    """Report of an exception that is being handled in this rank."""
    reason = describe(error)
    problems, reasons = [], []
    if isinstance(error, ConfigError):
        problems = [{name: str(value) for name, value in asdict(problem).items()} for problem in error.problems]
    if isinstance(error, Refused):
        reasons = error.reasons
    text = "".join(traceback.format_exception(error))
    return Report(rank, classify(error), reason, time.time(), problems, reasons, text)


def describe(error: BaseException) -> str:
    """`Type: message (file:line)` on one line; the line is the innermost one of this repository."""
    last = " ".join("".join(traceback.format_exception_only(error)).split())
    root = Path(__file__).resolve().parent.parent
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_ours(frame.filename, root)]
    where = f" ({Path(frames[-1].filename).resolve().relative_to(root)}:{frames[-1].lineno})" if frames else ""
    return last[:REASON_LENGTH] + where


def _is_ours(filename: str, root: Path) -> bool:
    path = Path(filename).resolve()
    return path.is_relative_to(root) and "site-packages" not in path.parts


def report_path(log_dir: Path, rank: int) -> Path:
    """Where a rank leaves its report."""
    return log_dir / f"error_rank{rank}.json"


def write_report(log_dir: Path, report: Report) -> None:
    """Leave a report for the parent; raises OSError when the disk is full."""
    path = report_path(log_dir, report.rank)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(asdict(report), indent=1))
    draft.replace(path)


def read_reports(log_dir: Path, num_ranks: int) -> list[Report]:
    """Reports of all ranks that left one."""
    paths = [report_path(log_dir, rank) for rank in range(num_ranks)]
    return [Report(**json.loads(path.read_text())) for path in paths if path.exists()]


def silent_death(rank: int, exit_code: int, log: Path, log_start: int, oom_kills: int) -> Report:
    """Report about a rank that ended without leaving one itself.

    Args:
        rank: the rank.
        exit_code: as `Popen.returncode` gives it, negative for a signal.
        log: its log file.
        log_start: bytes that stood in the log before this run.
        oom_kills: how far the kernel's count of out-of-memory kills rose during the run.
    """
    tail = _tail(log, log_start)
    spoken = tail.partition("Fatal Python error")[0]  # what follows is faulthandler's list of frames and modules
    last_line = next((line.strip() for line in reversed(spoken.splitlines()) if line.strip()), "nothing")
    hint = f"; the last line of its log: {last_line[:REASON_LENGTH]}"
    if exit_code == -signal.SIGKILL:
        if oom_kills > 0:
            return Report(rank, "oom", f"rank {rank} was killed by the kernel for want of memory", time.time())
        return Report(rank, "failed", f"rank {rank} was killed by signal 9", time.time())
    watchdog = next((line.strip() for line in tail.splitlines() if TIMED_OUT.search(line)), None)
    if watchdog is not None:  # NCCL's takes the process down without a Python exception
        return Report(rank, "timeout", watchdog[:REASON_LENGTH], time.time())
    if exit_code < 0:
        return Report(rank, "failed", f"rank {rank} was killed by signal {-exit_code}{hint}", time.time())
    return Report(rank, "failed", f"rank {rank} ended with exit code {exit_code}{hint}", time.time())


def _tail(log: Path, start: int) -> str:
    if not log.exists():
        return ""
    with log.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(start, size - LOG_TAIL_BYTES))
        return file.read().decode(errors="replace")


def root_cause(reports: Sequence[Report]) -> Report:
    """The report that explains the others: a real failure before a timeout before a lost connection, then by time."""
    assert reports, "no report to choose from"
    return min(reports, key=lambda report: (RANKING[report.kind], report.when))


def error_of(report: Report, logs: Path | None, timeout_s: float) -> SuiteError:
    """The exception that the parent raises for a report: the suite's own errors come across as what they were."""
    if report.kind == "config":
        return ConfigError(*(Problem(**problem) for problem in report.problems))
    if report.kind == "refused":
        return Refused(*report.reasons)
    log = logs / f"rank{report.rank}.log" if logs is not None else None
    if report.kind == "timeout":
        reason = f"rank {report.rank} waited {timeout_s:g} s (timeout_s) for another rank: {report.reason}"
        return RankFailure("timeout", report.rank, reason, log)
    kinds: dict[str, FailureKind] = {"oom": "oom", "interrupted": "interrupted"}
    return RankFailure(kinds.get(report.kind, "failed"), report.rank, report.reason, log)


def count_oom_kills() -> int:
    """How often the kernel has killed a process of this control group for want of memory; the evidence behind `oom`.

    Without a readable control group the whole machine's counter stands in; 0 where there is none (not Linux).
    """
    for path in _oom_counters():
        if path.exists():
            match = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
            if match:
                return int(match.group(1))
    return 0


def _oom_counters() -> list[Path]:
    groups = Path("/proc/self/cgroup")
    found = []
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, group = line.split(":", 2)
        if controllers == "memory":
            found.append(Path(f"/sys/fs/cgroup/memory{group}/memory.oom_control"))
        if controllers == "":
            found.append(Path(f"/sys/fs/cgroup{group}/memory.events"))
    return [*found, Path("/proc/vmstat")]
