"""Systems side by side: `python -m experiments.compare`, or `make compare`.

Trains every system with every seed on the same text, times whole training steps of all systems in turn in one process
group, and writes table and figures to outputs/compare/. Each is timed going on from its own last checkpoint
(`timing.weights=initial`: from the first weights, which all share). A stop amid the timed rounds keeps those that were
timed: table and figures are made of them, and captions say how many; the same command times all rounds anew.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from analysis.compare import FIGURES, format_table, write
from analysis.errors import ResultsError
from experiments.bench_run import BenchRun
from experiments.cells import announce_and_check, is_current, run_cells, run_dir_of
from experiments.cli import hydra_main
from experiments.config import CompareConfig
from experiments.join import ranks_here
from experiments.launch import RankFailure, is_main_process
from experiments.measured_cluster import with_costs
from experiments.samples import SampleRow, SampleWriter, read_samples
from moe.errors import SuiteError


@hydra_main("compare")
def main(config: CompareConfig, overrides: list[str]) -> None:
    """Train, time, write, print. What fails is a row of the table, and the exit code is 1 then."""
    config = with_costs(config, overrides)
    runs = config.runs()
    announce_and_check(runs)
    stale = [run for run in runs if not is_current(run)]
    failures = run_cells(runs, overrides)
    trained_now = any(is_current(run) for run in stale)
    failed = {failure.config.system.label: str(failure.error) for failure in failures}
    timing = BenchRun(config, overrides)
    try:
        timed = _time(config, timing, failed, trained_now)
    except RankFailure as error:
        if error.kind == "interrupted" and is_main_process() and (told := _keep_rounds(config, timing)):
            _tabulate(config, timing.dir.path, f"{told}; the same command times all of them anew\n")
        raise
    if not is_main_process():
        return
    _tabulate(config, timing.dir.path if timed else None)
    if failures or not timed:
        sys.exit(1)


def _tabulate(config: CompareConfig, timing_dir: Path | None, told: str = "") -> None:
    """Write table and figures, print the table and, below it, what is `told`."""
    out_dir, run_dirs = Path(config.output_dir) / "compare", [run_dir_of(run).path for run in config.runs()]
    try:
        table = write(out_dir, run_dirs, timing_dir, baseline=config.systems[0].label)
    except ResultsError as error:
        raise SuiteError(str(error)) from error
    written = f"written: {out_dir}/summary.csv, summary.md and {', '.join(FIGURES)} as PNG and PDF"
    print(f"\n{format_table(table)}\n{told}{written}", flush=True)


def _keep_rounds(config: CompareConfig, timing: BenchRun) -> str:
    """Write the rounds that were timed before a stop, and a status row for each system under each other seed; say in
    the status, and return, how many rounds there are. Without any: nothing, and ""."""
    status = timing.dir.status()
    rows = [SampleRow(*row) for own in read_samples(timing.dir.journal).values() for row in own]
    num_rounds = len({(row.seed, row.round) for row in rows if row.metric == "step_time"})
    if status is None or not num_rounds:
        return ""
    told = f"{num_rounds} of {config.timing.rounds * len(config.seeds)} rounds were timed"
    if {row.seed for row in rows} - {row.seed for row in rows if row.metric == "peak_memory"}:
        told += ", and not all of bytes, memory and stages read"  # they come behind the rounds
    cells = dict.fromkeys((row.system, row.implementation, row.shape, row.workload) for row in rows)
    begun = {row.seed for row in rows}
    for seed in [seed for seed in config.seeds if seed not in begun]:
        for cell in cells:
            writer = SampleWriter(*cell, seed)
            writer.add_status("missing", f"not timed before the stop; {told}")
            rows += writer.rows
    timing.write_table(rows, stopped=told)
    timing.dir.set_status(status.status, f"{status.reason}; {told}")
    return told


def _time(config: CompareConfig, timing: BenchRun, failed: dict[str, str], trained_now: bool) -> bool:
    """Time all systems that could be trained, unless that was done after the last training; False when it failed."""
    if not timing.must_run(config.force or trained_now):
        return True
    payload = {"failed": failed, "run_dirs": [str(run_dir_of(run).path) for run in config.runs()]}
    try:
        rows = timing.launch("experiments.compare_bench:time_training", payload, timeout_s=config.trainer.timeout_s)
    except RankFailure as error:
        if error.kind == "interrupted" or ranks_here(os.environ) is not None:
            raise
        if is_main_process():
            print(f"the timing failed, so the table has no times: {error}", file=sys.stderr, flush=True)
        return False
    if is_main_process():
        timing.write_samples(rows, known=failed)
    return True


if __name__ == "__main__":
    main()
