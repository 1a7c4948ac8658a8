"""Systems side by side: `python -m experiments.compare`, or `make compare`.

Trains every system with every seed on the same text, times whole training steps of all systems in turn in one process
group, and writes table and figures to outputs/compare/.
"""

from __future__ import annotations

import sys
from pathlib import Path

from analysis.compare import FIGURES, format_table, write
from experiments.bench_run import BenchRun
from experiments.cells import announce_and_check, run_cells, run_dir_of
from experiments.cli import hydra_main
from experiments.config import CompareConfig
from experiments.launch import is_main_process


@hydra_main("compare")
def main(config: CompareConfig, overrides: list[str]) -> None:
    """Train, time, write, print. What fails is a row of the table, and the exit code is 1 then."""
    runs = config.runs()
    announce_and_check(runs)
    failures = run_cells(runs, overrides)
    timing = BenchRun(config, overrides)
    if timing.must_run(config.force):
        rows = timing.launch("experiments.compare_bench:time_training", {}, timeout_s=config.trainer.timeout_s)
        if is_main_process():
            timing.write_samples(rows)
    if not is_main_process():
        return
    out_dir = Path(config.output_dir) / "compare"
    table = write(out_dir, [run_dir_of(run).path for run in runs], timing.dir.path, baseline=config.systems[0].name)
    print(
        f"\n{format_table(table)}\nwritten: {out_dir}/summary.csv, summary.md and {', '.join(FIGURES)} as PNG and PDF"
    )
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
