"""The micro-benchmark of one MoE layer: `python -m experiments.layer systems=[flat,deepspeed] workload=zipf`.

All systems take turns in one process group on the same tokens, weights and routing; forward and backward. Writes
samples.parquet (every round), summary.csv and summary.md into outputs/<run id>/.
"""

from __future__ import annotations

from typing import Any

from analysis.errors import ResultsError
from analysis.layer import format_table, write_layer
from experiments import registry
from experiments.attempt import stop_agreed
from experiments.bench_run import BenchRun
from experiments.cli import hydra_main
from experiments.config import LayerRunConfig, LayerShape, WorkloadConfig, cluster_from, load_layer
from experiments.launch import is_main_process
from experiments.layer_bench import Case, measure_case
from experiments.model import DTYPES
from experiments.ranks import RankInfo
from moe.errors import SuiteError
from moe.mesh import Mesh, create_mesh
from moe.system import LayerSpec
from moe.workload import Workload, expert_ids, gate_for, tokens_for

COLLECTIVE_TIMEOUT_S = 1800.0
"""Longest wait for another rank: a slow system on a large shape, on a machine with few cores."""


def measure(payload: dict[str, Any], info: RankInfo) -> list[list[Any]] | None:
    """Measure every shape, in this rank.

    Args:
        payload: `config`: of the run.
        info: of this rank.

    Returns:
        Sample rows, the same on every rank; None when a stop was asked for before all shapes were measured.
    """
    config = load_layer(payload["config"])
    mesh = create_mesh(cluster_from(config.cluster), info.device)
    systems = {s.name: registry.create(s.name, s.options) for s in config.systems}
    rows: list[list[Any]] = []
    for shape in config.shapes:
        if stop_agreed(info):
            return None
        case = build_case(config, shape, mesh)
        rows += map(
            list, measure_case(case, systems, mesh, rounds=config.rounds, warmup=config.warmup, check=config.check)
        )
        if info.rank == 0:
            print(f"layer {shape.name}: measured {', '.join(systems)}", flush=True)
    return rows


def build_case(config: LayerRunConfig, shape: LayerShape, mesh: Mesh) -> Case:
    """The layer, and tokens of this rank that its gate routes as the workload says."""
    dtype = DTYPES[config.dtype]
    spec = LayerSpec(
        model_dim=shape.model_dim,
        hidden_dim=shape.hidden_dim,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        activation=shape.activation,
        capacity_factor=config.capacity_factor,
        dtype=dtype,
        seed=config.seed,
    )
    drawn = Workload(config.workload.kind, config.workload.exponent, config.workload.path)
    ids_TK = expert_ids(drawn, shape.tokens_per_rank, shape.num_experts, shape.top_k, config.seed, mesh.rank)
    x_TM = tokens_for(ids_TK, shape.model_dim, shape.num_experts, config.seed, mesh.rank, dtype, mesh.device)
    gate_EM = gate_for(shape.num_experts, shape.model_dim, mesh.device)
    return Case(shape.name, workload_name(config.workload), spec, x_TM, gate_EM, config.seed)


def workload_name(workload: WorkloadConfig) -> str:
    """What results call it: `uniform`, `zipf 1.0`, `replay`."""
    return f"zipf {workload.exponent}" if workload.kind == "zipf" else workload.kind


@hydra_main("layer")
def main(config: LayerRunConfig, overrides: list[str]) -> None:
    """Measure, write, print the table."""
    run = BenchRun(config, overrides)
    if run.must_run(config.force):
        rows = run.launch("experiments.layer:measure", {}, timeout_s=COLLECTIVE_TIMEOUT_S)
        if is_main_process():
            run.write_samples(rows)
    if is_main_process():
        try:
            table = write_layer(run.dir.path, baseline=config.systems[0].name)
        except ResultsError as error:
            raise SuiteError(str(error)) from error
        print(f"{format_table(table)}results: {run.dir.path}", flush=True)


if __name__ == "__main__":
    main()
