"""Measuring what a cluster's levels and collectives cost: what `experiments.comm` does when asked, and every run on a
cluster with `profile: true` before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as pq

from experiments.bench_run import BenchRun
from experiments.cli import compose
from experiments.comm_bench import CommRow
from experiments.comm_fits import collective_fits, level_costs, rounded_cost
from experiments.config import (
    ClusterConfig,
    CommRunConfig,
    CompareConfig,
    LayerRunConfig,
    RunConfig,
    cluster_from,
    load_comm,
    run_id,
)
from experiments.launch import is_main_process
from experiments.results import RunDir, write_table
from experiments.samples import footer_of

COLLECTIVE_TIMEOUT_S = 600.0

Config = TypeVar("Config", RunConfig, CompareConfig, LayerRunConfig)


def measure(config: CommRunConfig, overrides: Sequence[str], timeout_s: float = COLLECTIVE_TIMEOUT_S) -> list[CommRow]:
    """The timings of a cluster: those of an earlier start if that is complete, else new ones, which are kept.

    Args:
        config: of the measurement.
        overrides: of the command line, for overrides.yaml.
        timeout_s: longest wait of one collective.

    Returns:
        The same rows on every rank that joined.
    """
    run = BenchRun(config, overrides)
    table = timings_of(run)
    if not run.must_run(config.force or not table.exists()):
        return read_rows(table)
    rows = [CommRow(*row) for row in run.launch("experiments.comm_bench:measure", {}, timeout_s=timeout_s) or ()]
    if is_main_process():
        cluster = cluster_from(config.cluster)
        told = [fit.told() for fit in collective_fits(rows, cluster)]
        write_table(table, CommRow, rows, footer_of("measured", cluster, run_id=run.dir.path.name, collectives=told))
        run.dir.set_status("done")
    return _from_rank_0(rows)


def timings_of(run: BenchRun) -> Path:
    """The file that holds them."""
    return run.dir.path / "comm.parquet"


def read_rows(table: Path) -> list[CommRow]:
    """The timings that a run wrote."""
    return [CommRow(**row) for row in pq.read_table(table, columns=list(CommRow._fields)).to_pylist()]


def with_costs(config: Config, overrides: Sequence[str]) -> Config:
    """The config with the costs of a cluster that asks for a profile; any other one as it is.

    What a run measured once holds for its later starts, on whatever nodes those are, so that it goes on as it began;
    levels, too.

    Args:
        config: validated.
        overrides: of the command line.
    """
    cluster = config.cluster
    if not cluster.profile or cluster.is_measured or cluster.world_size == 1:
        return config
    folder = RunDir(Path(config.output_dir) / run_id(config)).measurements
    content = {**compose("comm"), "cluster": cluster.model_dump(mode="json"), "force": config.force}
    comm = load_comm({**content, "output_dir": str(folder)})
    timeout_s = COLLECTIVE_TIMEOUT_S if isinstance(config, LayerRunConfig) else config.trainer.timeout_s
    measured = fitted(cluster, measure(comm, overrides, timeout_s))
    return config.model_copy(update={"cluster": measured})


def fitted(cluster: ClusterConfig, rows: Sequence[CommRow]) -> ClusterConfig:
    """A cluster with the costs that its timings give; a level without pairs keeps null."""
    costs = level_costs(rows)
    collectives = [rounded_cost(fit.cost) for fit in collective_fits(rows, cluster_from(cluster))]
    content = cluster.model_dump(mode="json")
    content["levels"] = [{**level, **rounded_cost(costs.get(level["name"]))} for level in content["levels"]]
    content["local_copy"] = rounded_cost(costs["self"])
    if collectives:
        depth = len(collectives) // 2  # of the levels that are crossed: standard, then inter and intra of all but one
        standard, inter, intra = collectives[0], collectives[1 : 1 + depth], collectives[1 + depth :]
        content["collectives"] = {"standard": standard, "inter": inter, "intra": intra}
    return ClusterConfig.model_validate(content)


def _from_rank_0(rows: list[CommRow]) -> list[CommRow]:
    """The rows on every rank that joined; a plain start has no others."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return rows
    told: list[list[list[Any]]] = [[list(row) for row in rows]]
    dist.broadcast_object_list(told, 0)
    return [CommRow(*row) for row in told[0]]
