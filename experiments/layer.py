"""The micro-benchmark of one MoE layer: `python -m experiments.layer systems=[flat,deepspeed] workload=zipf`.

All systems take turns in one process group on the same tokens, weights and routing; forward and backward. Writes
samples.parquet (every round), summary.csv and summary.md into outputs/<run id>/. Each shape is kept as soon as it is
measured: after a stop the files tell of those, and the same command measures the others.
"""

from __future__ import annotations

import pandas as pd

from analysis.errors import ResultsError
from analysis.layer import format_table, write_layer
from experiments.bench_run import BenchRun
from experiments.cli import hydra_main
from experiments.config import LayerRunConfig
from experiments.launch import is_main_process
from experiments.layer_bench import KERNELS, TIMES
from experiments.measured_cluster import with_costs
from experiments.samples import SampleRow, SampleWriter, read_samples
from moe.errors import SuiteError

COLLECTIVE_TIMEOUT_S = 600.0
"""Longest wait for another rank: a slow system on a large shape, on a machine with few cores."""


@hydra_main("layer")
def main(config: LayerRunConfig, overrides: list[str]) -> None:
    """Measure, write, print the table."""
    config = with_costs(config, overrides)
    run = BenchRun(config, overrides)
    if run.must_run(config.force):
        target = "experiments.layer_bench:measure"
        try:
            rows = run.launch(target, {}, timeout_s=COLLECTIVE_TIMEOUT_S, keep=not config.force)
        except SuiteError:
            if is_main_process():
                _write_part(run, config)
            raise
        if is_main_process():
            run.write_samples(rows)
    if is_main_process():
        print(f"{format_table(_summarise(run, config))}results: {run.dir.path}", flush=True)


def _summarise(run: BenchRun, config: LayerRunConfig) -> pd.DataFrame:
    try:
        return write_layer(run.dir.path, baseline=config.systems[0].label)
    except ResultsError as error:
        raise SuiteError(str(error)) from error


def _write_part(run: BenchRun, config: LayerRunConfig) -> None:
    """Write what was measured before a stop, with a status row for each system under each other shape, and tell it."""
    measured, status = read_samples(run.dir.journal), run.dir.status()
    lacking = [shape.name for shape in config.shapes if (TIMES, shape.name) not in measured]
    if not measured or status is None:
        return
    told = f"{len(config.shapes) - len(lacking)} of {len(config.shapes)} shapes are measured"
    if config.profile:
        told += f", the kernels of {sum(what == KERNELS for what, _ in measured)}"
    run.dir.set_status(status.status, f"{status.reason}; {told}")
    rows = [SampleRow(*row) for own in measured.values() for row in own]
    cells = dict.fromkeys((row.system, row.implementation, row.workload, row.seed) for row in rows)
    for shape in lacking:
        for system, implementation, workload, seed in cells:
            writer = SampleWriter(system, implementation, shape, workload, seed)
            writer.add_status("missing", f"not measured yet, {told}")
            rows += writer.rows
    run.write_table(rows)
    _summarise(run, config)
    print(f"{told}, in {run.dir.path}; the same command goes on from there", flush=True)


if __name__ == "__main__":
    main()
