"""Submits a sweep: `python -m slurm.sweep system=flat,deepspeed seed=0,1 --nodes 4 --gpus-per-node 8 --time 4:00:00`.

Every cell is composed and validated first; what is complete is left out; the jobs go to Slurm as an array, and this
process returns. `python -m slurm.status` tells how they are.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from experiments.allocation import Shape
from experiments.cli import EXIT_CONFIG, EXIT_FAILED, error_text
from moe.errors import ConfigError, Problem, SuiteError
from slurm.planning import ENTRY_POINTS, PlannedCell, plan, write_refusals
from slurm.records import SweepFolder, sweeps_dir
from slurm.scheduler import queued
from slurm.submission import Resources, settle_environment, submit
from slurm.writers import Writer, writer_of, writers

TIME = "1:00:00"
"""Of a job that nobody said more about; a run that needs longer is requeued."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    try:
        settle_environment()
        _sweep(options)
    except SuiteError as error:
        print(error_text(error), file=sys.stderr, flush=True)
        sys.exit(EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m slurm.sweep", description="Submit a sweep as an array of jobs.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for the entry points; key=a,b sweeps")
    parser.add_argument("--entry", choices=ENTRY_POINTS, help="entry point; default: what the experiment is for")
    parser.add_argument("--nodes", type=_positive, default=1, help="of one job")
    parser.add_argument("--gpus-per-node", type=_positive, default=0, help="a task for each")
    parser.add_argument("--tasks-per-node", type=_positive, help="ranks of a node, without GPUs")
    parser.add_argument("--cpus-per-task", type=_positive)
    parser.add_argument(
        "--time", help=f"limit of one job, as sbatch takes it; default: SBATCH_TIMELIMIT of slurm/site.env, else {TIME}"
    )
    parser.add_argument("--max-parallel", type=_positive, default=16, help="jobs at once")
    parser.add_argument(
        "--share-allocation", action="store_true", help="the runs of one comparison in one job, timed in turn"
    )
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION[=VALUE]", help="partition=gpu, exclusive, mem=0, ..."
    )
    parser.add_argument("--name", help="of the sweep's folder; default: the time")
    parser.add_argument("--dry-run", action="store_true", help="show the cells, node hours and refusals")
    return parser


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _sweep(options: argparse.Namespace) -> None:
    resources = _resources(options)
    sweep = SweepFolder(sweeps_dir() / _name(options.name))
    cells = plan(options.overrides, resources.shape, options.entry, options.share_allocation)
    try:
        busy = writers(queued()) if shutil.which("squeue") else {}
    except SuiteError as error:
        if not options.dry_run:
            raise
        print(f"as if no job were in the queue: {error}", file=sys.stderr, flush=True)
        busy = {}
    print(table(cells, busy, resources), flush=True)
    waiting = [cell for cell in cells if cell.to_run and writer_of(cell.cell, busy) is None]
    if options.dry_run:
        return
    write_refusals(cells, resources.shape)
    if not waiting:
        print("nothing to submit")
        return
    sweep.create([cell.cell for cell in cells], asdict(resources))
    try:
        jobs = submit(sweep, [cell.cell.number for cell in waiting], resources)
    except SuiteError:
        shutil.rmtree(sweep.path)
        raise
    ids = list(jobs.values())
    print(f"submitted: job {ids[0].partition('_')[0]}, {len(ids)} cells in {sweep.path}")
    print(f"look: python -m slurm.status {sweep.path.name}")


def _resources(options: argparse.Namespace) -> Resources:
    if options.gpus_per_node and options.tasks_per_node not in (None, options.gpus_per_node):
        rule = f"one task a GPU, and --gpus-per-node is {options.gpus_per_node}"
        raise ConfigError(Problem("--tasks-per-node", options.tasks_per_node, rule, "leave it out"))
    size = options.gpus_per_node or options.tasks_per_node
    if not size:
        rule = "nobody said how many ranks a node has"
        raise ConfigError(Problem("--gpus-per-node", "", rule, "say --gpus-per-node, or on CPUs --tasks-per-node"))
    time = options.time or os.environ.get("SBATCH_TIMELIMIT") or TIME
    more = {name: value for name, _, value in (text.lstrip("-").partition("=") for text in options.sbatch)}
    shape = Shape(options.nodes, size, "cuda" if options.gpus_per_node else "cpu")
    return Resources(shape, options.gpus_per_node, options.cpus_per_task, time, options.max_parallel, more)


def _name(given: str | None) -> str:
    name = given or f"{datetime.now(UTC):%Y-%m-%d_%H-%M-%S}"
    if not re.fullmatch(r"[\w-][\w.-]*", name, re.ASCII):
        rule = "is the name of a folder: letters, digits, `_`, `-` and `.`"
        raise ConfigError(Problem("--name", name, rule, "choose another"))
    if (sweeps_dir() / name).exists():
        rule = f"there is such a sweep already ({sweeps_dir() / name})"
        raise ConfigError(Problem("--name", name, rule, f"choose another, or python -m slurm.status {name} --resubmit"))
    return name


def table(cells: Sequence[PlannedCell], busy: Mapping[str, Writer], resources: Resources) -> str:
    """What would run, on what, for how long at most, and which jobs have the rest already."""
    width = max(len(cell.cell.label) for cell in cells)
    lines, count = [], 0
    for planned, runs, refusals in ((cell, cell.cell.folders, cell.refusals) for cell in cells):
        writer = writer_of(planned.cell, busy)
        state = "complete" if planned.complete else f"refused: {' '.join(refusals)}" if refusals else "to run"
        if planned.to_run and writer is not None:
            state = f"in {writer} already"
        count += state == "to run"
        where = Path(runs[-1]).name + (f" and {len(runs) - 1} runs" if len(runs) > 1 else "")
        lines.append(f"{planned.cell.number:>4}  {planned.cell.label:<{width}}  {where}  {state}")
    hours = count * resources.node_hours
    lines.append(
        f"{count} of {len(cells)} cells to run, each on {resources.shape} for at most {resources.time}, up to "
        f"{resources.max_parallel} at once: at most {hours:.1f} node hours"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
