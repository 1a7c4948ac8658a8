"""The micro-benchmark of one MoE layer: `python -m experiments.layer systems=[flat,deepspeed] workload=zipf`.

All systems take turns in one process group on the same tokens, weights and routing; forward and backward. Writes
samples.parquet (every round), summary.csv and summary.md into outputs/<run id>/.
"""

from __future__ import annotations

from analysis.errors import ResultsError
from analysis.layer import format_table, write_layer
from experiments.bench_run import BenchRun
from experiments.cli import hydra_main
from experiments.config import LayerRunConfig
from experiments.launch import is_main_process
from experiments.measured_cluster import with_costs
from moe.errors import SuiteError

COLLECTIVE_TIMEOUT_S = 600.0
"""Longest wait for another rank: a slow system on a large shape, on a machine with few cores."""


@hydra_main("layer")
def main(config: LayerRunConfig, overrides: list[str]) -> None:
    """Measure, write, print the table."""
    config = with_costs(config, overrides)
    run = BenchRun(config, overrides)
    if run.must_run(config.force):
        rows = run.launch("experiments.layer_bench:measure", {}, timeout_s=COLLECTIVE_TIMEOUT_S)
        if is_main_process():
            run.write_samples(rows)
    if is_main_process():
        try:
            table = write_layer(run.dir.path, baseline=config.systems[0].label)
        except ResultsError as error:
            raise SuiteError(str(error)) from error
        print(f"{format_table(table)}results: {run.dir.path}", flush=True)


if __name__ == "__main__":
    main()
