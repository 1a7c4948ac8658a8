"""Why the ranks of a job ended, from what they, srun and Slurm's daemons left behind."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from experiments.failures import REASON_LENGTH, TIMED_OUT, Report, error_of, report_path, root_cause
from experiments.join import expand
from experiments.results import RunStatus
from moe.errors import SuiteError

OUT_OF_MEMORY = re.compile(
    r"exceeded (job |step )?memory limit|oom[-_ ]?kill event|out[- ]of[- ]memory handler|task.*: Out Of Memory",
    re.IGNORECASE,
)
"""Words of slurmstepd (with cgroups, or JobAcctGatherParams=OverMemoryKill) and of srun."""
NODE_LOST = re.compile(r"Node failure on (\S+)|(\S+): task\S* .*: Node Failure", re.IGNORECASE)
ENDED = re.compile(r"srun: error: (\S+): tasks? ([\d,\-]+): (.+)")
REPORTED = re.compile(r"Exited with exit code [12]$")
"""Of a task of `slurm.task` that failed and left a report; one that was asked to stop ends with another code."""
OWN_KINDS = ("config", "refused", "failed", "oom")
"""Of reports of ranks that failed by themselves, and not because another one went away."""
TAIL_BYTES = 1 << 16
LATE_S = 38.0
"""A file of another node shows up that late at most: clients of network file systems write back what lies about for
30 s, looking every 5 s, and believe for 30 s that a folder is as it was."""
POLL_S = 1.0
KINDS: dict[str, RunStatus] = {"oom": "oom", "timeout": "timeout", "interrupted": "interrupted"}


class Verdict(NamedTuple):
    """How the ranks ended: a status, and why in a sentence."""

    status: RunStatus
    reason: str


@dataclass
class Evidence:
    """What there is about one start of the ranks.

    Args:
        exit_code: of srun.
        folders: where ranks may have left reports; what earlier starts left there is gone.
        log_sizes: of the ranks' logs and srun's, in bytes, at the start.
        oom_kills: by how much this node's count of the kernel's out-of-memory kills rose.
        timeout_s: how long a rank may wait in a collective.
        late_s: how late a rank's report may show up here; 0 on one node.
    """

    exit_code: int
    folders: Sequence[Path]
    log_sizes: dict[Path, int]
    oom_kills: int
    timeout_s: float
    late_s: float

    @cached_property
    def lines(self) -> list[str]:
        """What was logged since the start."""
        return [line.strip() for path, start in self.log_sizes.items() for line in tail(path, start).splitlines()]

    @cached_property
    def deaths(self) -> list[Death]:
        """What srun says of tasks."""
        return [Death(found[1], found[2], found[3]) for line in self.lines if (found := ENDED.match(line))]

    @cached_property
    def reports(self) -> list[Report]:
        """The ranks'; those that srun says are there are waited for."""
        expected = [rank for death in self.deaths if REPORTED.match(death.how) for rank in death.ranks]
        return read_reports(self.folders, expected, self.late_s)


class Death(NamedTuple):
    """What srun says of a task, or several: `Killed`, `Segmentation fault`, `Exited with exit code 1`."""

    node: str
    task: str
    how: str

    @property
    def ranks(self) -> list[int]:
        """Of `task`, which may be `0-1,3`."""
        return [int(name[1:]) for name in expand(f"r[{self.task}]")]


def failed_by_itself(evidence: Evidence) -> bool:
    """Whether a rank said that it failed, or crashed without a word: the end of the others is a consequence."""
    return any(report.kind in OWN_KINDS for report in evidence.reports) or _crash(evidence.deaths) is not None


def _crash(deaths: Iterable[Death]) -> Death | None:
    """The first task that died by a signal of its own; srun ends the others by SIGTERM or SIGKILL."""
    consequences = ("Killed", "Terminated", "Exited")
    return next((death for death in deaths if not death.how.startswith((*consequences, "Out Of Memory"))), None)


def verdict(evidence: Evidence) -> Verdict:
    """The one cause that explains the rest: what a rank says of itself, then memory, a lost node, a killed task, and
    last what ranks say of one another."""
    reports, lines, deaths = evidence.reports, evidence.lines, evidence.deaths
    own = [report for report in reports if report.kind in OWN_KINDS]
    if own:
        return _told(root_cause(own), evidence)
    if evidence.exit_code and (memory := [line for line in lines if OUT_OF_MEMORY.search(line)]):
        return Verdict("oom", f"Slurm ended the ranks for want of memory: {memory[0]}")
    if lost := next((found for line in lines if (found := NODE_LOST.search(line))), None):
        return Verdict("failed", f"node {lost[1] or lost[2]} failed, says Slurm")
    if crash := _crash(deaths):
        said = next((line for line in lines if TIMED_OUT.search(line)), None)
        how = f"task {crash.task} on {crash.node}: {crash.how}"
        return Verdict("failed", how) if said is None else Verdict("timeout", f"{said[:REASON_LENGTH]} ({how})")
    if killed := next((death for death in deaths if death.how.startswith("Killed")), None):
        node, task, _ = killed
        if evidence.oom_kills > 0:
            meanwhile = "and the kernel killed for want of memory meanwhile"
            return Verdict("oom", f"task {task} on {node} was killed by signal 9, {meanwhile}")
        return Verdict("failed", f"task {task} on {node} was killed by signal 9, by nobody who left a word")
    if any(death.how.startswith("Terminated") for death in deaths):
        return Verdict("interrupted", "the ranks were ended by SIGTERM before they could save")
    if reports:
        return _told(root_cause(reports), evidence)
    how = f": task {deaths[0].task} on {deaths[0].node}: {deaths[0].how}" if deaths else ""
    last = next((line for line in reversed(lines) if line), "nothing")
    return Verdict("failed", f"srun ended with exit code {evidence.exit_code}{how}; the last line: {last}")


def _told(report: Report, evidence: Evidence) -> Verdict:
    error: SuiteError = error_of(report, None, evidence.timeout_s)
    if report.kind == "refused":
        return Verdict("refused", str(error))
    return Verdict(KINDS.get(report.kind, "failed"), str(error))


def report_paths(folders: Iterable[Path], ranks: Collection[int] = ()) -> list[Path]:
    """Files that hold ranks' reports: what the folders and those below them list, and what is not listed yet.

    Args:
        folders: where to look.
        ranks: whose reports are named whether they are listed or not: a network file system may show an old listing.
    """
    places = [place for folder in folders for place in (folder, *folder.rglob("*/"))]
    listed = [path for place in places for path in place.glob("error_rank*.json")]
    return sorted({*listed, *(report_path(place, rank) for place in places for rank in ranks)})


def read_reports(folders: Sequence[Path], expected: Collection[int] = (), late_s: float = 0.0) -> list[Report]:
    """What ranks reported of their ends.

    Args:
        folders: where to look, and below.
        expected: ranks that have left a report.
        late_s: how long to wait for those that are not here yet.
    """
    deadline = time.monotonic() + late_s
    while True:
        reports = []
        for path in report_paths(folders, expected):
            with suppress(FileNotFoundError):
                reports.append(Report(**json.loads(path.read_text())))
        missing = set(expected) - {report.rank for report in reports}
        if not missing or time.monotonic() >= deadline:
            return reports
        time.sleep(POLL_S)


def tail(path: Path, start: int = 0) -> str:
    """The end of a log, from byte `start` at the earliest; empty where there is none."""
    try:
        file = path.open("rb")  # asks a network file system how long it is; `stat` may give an old answer
    except FileNotFoundError:
        return ""
    with file:
        file.seek(max(start, file.seek(0, 2) - TAIL_BYTES))
        return file.read().decode(errors="replace")


def sizes(paths: Iterable[Path]) -> dict[Path, int]:
    """Of files, in bytes; 0 where there is none."""
    found = dict.fromkeys(paths, 0)
    for path in found:
        with suppress(FileNotFoundError), path.open("rb") as file:
            found[path] = file.seek(0, 2)
    return found
