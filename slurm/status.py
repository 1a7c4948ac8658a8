"""How the cells of sweeps are: `python -m slurm.status [sweep ...] [--resubmit failed,oom,timeout]`."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

from experiments.allocation import Shape
from experiments.failures import root_cause
from experiments.progress_log import Line, read_progress
from experiments.results import RunDir, RunStatus
from moe.errors import ConfigError, Problem, SuiteError
from slurm.diagnosis import OWN_KINDS, read_reports
from slurm.records import Cell, Event, SweepFolder, all_sweeps, read_events, sweeps_dir
from slurm.scheduler import AT_WORK, WAITING, QueuedJob, final_state, queued
from slurm.submission import Resources, settle_environment, submit
from slurm.writers import Writer, writer_of, writers

RESUBMITTABLE = ("failed", "oom", "timeout", "interrupted")
TRACEBACK_LINES = 3
STATUS_OF_STATE: dict[str, tuple[RunStatus, str]] = {
    "TIMEOUT": ("timeout", "its time limit came, and nobody was left to requeue it"),
    "DEADLINE": ("timeout", "its deadline came"),
    "OUT_OF_MEMORY": ("oom", "Slurm ended the job for want of memory"),
    "CANCELLED": ("interrupted", "the job was cancelled"),
    "PREEMPTED": ("interrupted", "the job was preempted and not requeued"),
    "NODE_FAIL": ("failed", "a node of the job failed"),
    "BOOT_FAIL": ("failed", "a node of the job did not boot"),
}
"""Of jobs that could leave no word themselves."""


class Row(NamedTuple):
    """A cell in the table.

    Attributes:
        cell: of a sweep.
        job: Slurm's id of its latest job, `-` before there is one.
        status: `pending`, or one of `experiments.results.RunStatus`.
        step: done and asked for, `120/500`, of the run under way; empty for a benchmark.
        eta_s: seconds until that run is done, None where nobody knows.
        requeued: how often the job was.
        reason: why it waits, or ended.
        traceback: last lines, of a failure in a rank.
        elsewhere: the job of another sweep that has the cell's run; None where none has.
    """

    cell: Cell
    job: str
    status: str
    step: str
    eta_s: float | None
    requeued: int
    reason: str
    traceback: list[str]
    elsewhere: Writer | None


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m slurm.status", description="How the cells of sweeps are.")
    parser.add_argument("sweeps", nargs="*", help="names of folders; default: all")
    parser.add_argument("--resubmit", metavar="STATUSES", help=f"cells of these: {', '.join(RESUBMITTABLE)}")
    parser.add_argument("--time", help="limit of jobs that are resubmitted; default: as before")
    options = parser.parse_args(arguments)
    try:
        chosen = _statuses(options.resubmit)
        settle_environment()
        sweeps, queue = _sweeps(options.sweeps), queued()
        busy = writers(queue)
        for sweep in sweeps:
            rows = rows_of(sweep, queue, busy)
            print(f"{sweep.path.name}\n{table(rows)}", flush=True)
            again = [row for row in rows if row.status in chosen]
            for row in again:
                if row.elsewhere is not None:
                    print(f"not resubmitted: cell {row.cell.number}, whose run is in {row.elsewhere}", flush=True)
            if cells := [row.cell for row in again if row.elsewhere is None]:
                _resubmit(sweep, cells, options.time, busy)
    except SuiteError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


def _statuses(text: str | None) -> list[str]:
    chosen = text.split(",") if text else []
    for status in chosen:
        if status not in RESUBMITTABLE:
            rule = "is no status of a cell that can be resubmitted"
            raise ConfigError(Problem("--resubmit", status, rule, f"choose of {', '.join(RESUBMITTABLE)}"))
    return chosen


def _sweeps(names: Sequence[str]) -> list[SweepFolder]:
    there = [sweep.path.name for sweep in all_sweeps()]
    for name in names:
        if name not in there:
            rule = f"there is no such sweep in {sweeps_dir()}"
            raise ConfigError(Problem("sweep", name, rule, f"the sweeps are {', '.join(there) or 'none'}"))
    if not there:
        raise ConfigError(Problem("sweep", "", f"there is none in {sweeps_dir()}", "python -m slurm.sweep submits one"))
    return [SweepFolder(sweeps_dir() / name) for name in names or there]


def rows_of(sweep: SweepFolder, queue: Mapping[str, QueuedJob], busy: Mapping[str, Writer]) -> list[Row]:
    """Every cell of a sweep.

    Args:
        sweep: to look at.
        queue: jobs in Slurm's queue, by id.
        busy: what `slurm.writers.writers` found.
    """
    return [_row(sweep, cell, queue, busy) for cell in sweep.cells()]


def _row(sweep: SweepFolder, cell: Cell, queue: Mapping[str, QueuedJob], busy: Mapping[str, Writer]) -> Row:
    folder, job = sweep.cell_folder(cell.number), sweep.job_of(cell.number)
    events = [event for event in read_events(folder) if event.job == job]
    requeued = max((event.restarts for event in events), default=0)
    known = queue.get(job) if job else None
    run = _under_way(cell)
    status, reason = _status(cell, job, known, events)
    step, eta_s = "", None
    if run is not None and cell.max_steps:
        lines = read_progress(run.path)
        told = run.status()
        done = lines[-1].step if lines else 0 if told is None else told.step
        step, life = f"{done}/{cell.max_steps}", max((event.when for event in events), default=0.0)
        eta_s = eta([line for line in lines if line.when > life], cell.max_steps) if status == "running" else None
        if len(cell.folders) > 1:
            step = f"run {cell.folders.index(str(run.path)) + 1} of {len(cell.folders) - 1}: {step}"
    elif status == "done" and cell.max_steps:
        step = f"{cell.max_steps}/{cell.max_steps}"
    last_lines = _traceback(folder, cell) if status in ("failed", "oom") else []
    writer = writer_of(cell, busy)
    elsewhere = writer if writer is not None and writer.sweep != sweep.path.name else None
    return Row(cell, job or "-", status, step, eta_s, requeued, reason, last_lines, elsewhere)


def _status(cell: Cell, job: str | None, known: QueuedJob | None, events: Sequence[Event]) -> tuple[str, str]:
    told = [RunDir(folder).status() for folder in cell.folders]
    if all(status is not None and status.status == "done" for status in told):
        return "done", ""
    if known is not None and known.state in WAITING:
        return "pending", known.reason
    ended = next((event for event in reversed(events) if event.event in ("started", "ended")), None)
    if ended is not None and ended.event == "ended":
        return ended.outcome, ended.reason
    if known is not None and known.state in AT_WORK:
        return "running", "" if events else "it has not started Python yet"
    if job is None:
        refused = next((status for status in told if status is not None and status.status == "refused"), None)
        return ("refused", refused.reason) if refused else ("pending", "not submitted")
    state = known.state if known is not None else final_state(job)
    said = f"the job left the queue without a word ({state or 'state unknown'}); look at the output of its batch step"
    return STATUS_OF_STATE.get(state, ("failed", said))


def _under_way(cell: Cell) -> RunDir | None:
    """The first training run that is not done: they are taken in order. The one that failed, if one did."""
    trained = cell.folders if cell.kind == "train" else cell.folders[:-1]
    for folder in trained:
        status = RunDir(folder).status()
        if status is None or status.status not in ("done", "refused"):
            return RunDir(folder)
    return None


def eta(lines: Sequence[Line], max_steps: int) -> float | None:
    """Seconds until a run is done, at the pace of its latest lines; validation and checkpoints count."""
    if len(lines) < 2 or lines[-1].step <= lines[0].step:
        return None
    recent = [line for line in lines if line.step >= lines[-1].step - max(1, max_steps // 5)]
    first = recent[0] if recent[-1].step > recent[0].step else lines[0]
    pace_s = (lines[-1].when - first.when) / (lines[-1].step - first.step)
    return (max_steps - lines[-1].step) * pace_s


def _traceback(folder: Path, cell: Cell) -> list[str]:
    """The last lines of what the rank says that was the cause; none where no rank was."""
    reports = read_reports([folder, *(RunDir(path).logs for path in cell.folders)])
    own = [report for report in reports if report.traceback and report.kind in OWN_KINDS]
    if not own:
        return []
    cause = root_cause(own)
    return [f"rank {cause.rank}:", *cause.traceback.rstrip().splitlines()[-TRACEBACK_LINES:]]


def table(rows: Sequence[Row]) -> str:
    """One line a cell, below it why it failed and which other sweep has its run, and a sum."""
    columns = [("cell", "job", "status", "step", "ETA", "what")]
    for row in rows:
        status = row.status + (f", requeued {_times(row.requeued)}" if row.requeued else "")
        columns.append((str(row.cell.number), row.job, status, row.step, _duration(row.eta_s), row.cell.label))
    widths = [max(len(line[index]) for line in columns) for index in range(5)]
    lines = []
    for texts, told in zip(columns, [None, *rows], strict=True):
        cells = [text.ljust(width) for text, width in zip(texts, widths, strict=False)]
        lines.append("  ".join([*cells, texts[-1]]).rstrip())
        if told is not None and told.reason:
            lines += [f"      {text}" for text in [*told.traceback, " ".join(told.reason.split())]]
        if told is not None and told.elsewhere is not None:
            lines.append(f"      its run is in {told.elsewhere}")
    counts = Counter(row.status for row in rows)
    order = ["pending", *get_args(RunStatus)]
    lines.append(", ".join(f"{counts[status]} {status}" for status in order if counts[status]))
    return "\n".join(lines)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _resubmit(
    sweep: SweepFolder, cells: Sequence[Cell], time_limit: str | None, busy: MutableMapping[str, Writer]
) -> None:
    """Submit cells again, and add their jobs to `busy`: the sweeps that follow may have the same runs."""
    asked = sweep.resources()
    if not asked:
        print("not resubmitted: it was submitted by hand; give the same sbatch command again", flush=True)
        return
    resources = Resources(**{**asked, "shape": Shape(**asked["shape"]), "time": time_limit or asked["time"]})
    jobs = submit(sweep, [cell.number for cell in cells], resources)
    for cell in cells:
        busy.update(dict.fromkeys(cell.folders, Writer(jobs[cell.number], sweep.path.name)))
    print(f"resubmitted: {', '.join(f'cell {number} as {job}' for number, job in jobs.items())}", flush=True)


if __name__ == "__main__":
    main()
