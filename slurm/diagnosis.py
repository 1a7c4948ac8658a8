"""Why the ranks of a job ended, from what they, srun and Slurm's daemons left behind."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from experiments.failures import REASON_LENGTH, TIMED_OUT, Report, error_of, root_cause
from experiments.results import RunStatus
from moe.errors import SuiteError

OUT_OF_MEMORY = re.compile(
    r"exceeded (job |step )?memory limit|oom[-_ ]?kill event|out[- ]of[- ]memory handler|task.*: Out Of Memory",
    re.IGNORECASE,
)
"""Words of slurmstepd (with cgroups, or JobAcctGatherParams=OverMemoryKill) and of srun."""
NODE_LOST = re.compile(r"Node failure on (\S+)|(\S+): task\S* .*: Node Failure", re.IGNORECASE)
ENDED = re.compile(r"srun: error: (\S+): tasks? ([\d,\-]+): (.+)")
OWN_KINDS = ("config", "refused", "failed", "oom")
"""Of reports of ranks that failed by themselves, and not because another one went away."""
TAIL_BYTES = 1 << 16
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
        logs: of the ranks and of srun, with the sizes that they had at the start.
        oom_kills: by how much this node's count of the kernel's out-of-memory kills rose.
        timeout_s: how long a rank may wait in a collective.
    """

    exit_code: int
    folders: Sequence[Path]
    logs: dict[Path, int]
    oom_kills: int
    timeout_s: float


def failed_by_itself(evidence: Evidence) -> bool:
    """Whether a rank said that it failed, or crashed without a word: the end of the others is a consequence."""
    reports = read_reports(evidence.folders)
    return any(report.kind in OWN_KINDS for report in reports) or _crash(_deaths(_lines(evidence))) is not None


class _Death(NamedTuple):
    """What srun says of a task: `Killed`, `Segmentation fault`, `Exited with exit code 1`."""

    node: str
    task: str
    how: str


def _lines(evidence: Evidence) -> list[str]:
    return [line.strip() for path, start in evidence.logs.items() for line in tail(path, start).splitlines()]


def _deaths(lines: Iterable[str]) -> list[_Death]:
    return [_Death(found[1], found[2], found[3]) for line in lines if (found := ENDED.match(line))]


def _crash(deaths: Iterable[_Death]) -> _Death | None:
    """The first task that died by a signal of its own; srun ends the others by SIGTERM or SIGKILL."""
    consequences = ("Killed", "Terminated", "Exited")
    return next((death for death in deaths if not death.how.startswith((*consequences, "Out Of Memory"))), None)


def verdict(evidence: Evidence) -> Verdict:
    """The one cause that explains the rest: what a rank says of itself, then memory, a lost node, a killed task, and
    last what ranks say of one another."""
    reports = read_reports(evidence.folders)
    own = [report for report in reports if report.kind in OWN_KINDS]
    if own:
        return _told(root_cause(own), evidence)
    lines = _lines(evidence)
    if evidence.exit_code and (memory := [line for line in lines if OUT_OF_MEMORY.search(line)]):
        return Verdict("oom", f"Slurm ended the ranks for want of memory: {memory[0]}")
    if lost := next((found for line in lines if (found := NODE_LOST.search(line))), None):
        return Verdict("failed", f"node {lost[1] or lost[2]} failed, says Slurm")
    deaths = _deaths(lines)
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


def report_files(folders: Iterable[Path]) -> list[Path]:
    """Reports that ranks left in these folders and below them."""
    return sorted({path for folder in folders if folder.is_dir() for path in folder.rglob("error_rank*.json")})


def read_reports(folders: Iterable[Path]) -> list[Report]:
    """What ranks reported of their ends."""
    return [Report(**json.loads(path.read_text())) for path in report_files(folders)]


def tail(path: Path, start: int = 0) -> str:
    """The end of a log, from byte `start` at the earliest; empty where there is none."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(start, file.seek(0, 2) - TAIL_BYTES))
        return file.read().decode(errors="replace")


def sizes(folder: Path) -> dict[Path, int]:
    """The ranks' and srun's logs in a cell's folder, with their sizes."""
    return {path: path.stat().st_size for path in sorted(folder.glob("*.log"))}
