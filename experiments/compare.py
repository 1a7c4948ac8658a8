"""Systems side by side: `python -m experiments.compare`, or `make compare`.

Trains every system with every seed on the same text, times whole training steps of all systems in turn in one process
group, and writes table and figures to outputs/compare/. Each is timed going on from its own last checkpoint
(`timing.weights=initial`: from the first weights, which all share).
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
    timed = _time(config, overrides, failed, trained_now)
    if not is_main_process():
        return
    out_dir, timing_dir = Path(config.output_dir) / "compare", BenchRun(config, overrides).dir.path
    run_dirs = [run_dir_of(run).path for run in runs]
    try:
        table = write(out_dir, run_dirs, timing_dir if timed else None, baseline=config.systems[0].label)
    except ResultsError as error:
        raise SuiteError(str(error)) from error
    print(
        f"\n{format_table(table)}\nwritten: {out_dir}/summary.csv, summary.md and {', '.join(FIGURES)} as PNG and PDF"
    )
    if failures or not timed:
        sys.exit(1)


def _time(config: CompareConfig, overrides: list[str], failed: dict[str, str], trained_now: bool) -> bool:
    """Time all systems that could be trained, unless that was done after the last training; False when it failed."""
    timing = BenchRun(config, overrides)
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
