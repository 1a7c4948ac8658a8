"""experiments.measured_cluster: a cluster that asks for a profile has its costs before a run starts, and keeps them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from experiments.cells import refusals_of, run_dir_of
from experiments.config import RunConfig, cluster_from, load_run, run_id
from experiments.join import ranks_here
from experiments.measured_cluster import with_costs
from tests.test_comm import COLLECTIVE_LINES, canned
from tests.tiny import tiny_config

SRUN = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "MASTER_ADDR": "n0",
}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Puts `canned` in the place of the ranks; lists the folders of their logs."""
    folders: list[Path] = []

    def run_ranks(target: str, payload: dict[str, Any], *, log_dir: Path, **_: Any) -> list[list[Any]]:
        assert target == "experiments.comm_bench:measure"
        folders.append(log_dir)
        return canned(payload["config"], slope=1e-9 * len(folders))

    monkeypatch.setattr("experiments.bench_run.run_ranks", run_ranks)
    return folders


@pytest.fixture
def two_nodes() -> Iterator[None]:
    """This process as rank 0 of two nodes of two."""
    with mock.patch.dict(os.environ, SRUN):
        assert ranks_here(os.environ) is not None
        yield


def auto(tmp_path: Path, text: Path, *more: str) -> RunConfig:
    """A run of TA-MoE, which needs costs."""
    return tiny_config(tmp_path / "out", text, "cluster=auto", "system=ta_moe", *more)


@pytest.mark.usefixtures("two_nodes")
def test_costs_are_measured_once_and_are_no_part_of_the_id(tmp_path: Path, text: Path, launches: list[Path]) -> None:
    config = auto(tmp_path, text)
    assert refusals_of(config) != [], "without costs"
    measured = with_costs(config, [])
    assert refusals_of(measured) == []
    assert run_id(measured) == run_id(config) == run_id(load_run(measured.model_dump(mode="json")))
    itself, node, network = cluster_from(measured.cluster).levels
    costs = [level.beta_s_per_byte for level in (itself, node, network)]
    assert costs == pytest.approx([1e-10, 1e-9, 8e-9], rel=1e-3)
    collectives = cluster_from(measured.cluster).collectives
    assert collectives is not None
    assert collectives.standard.alpha_s == pytest.approx(COLLECTIVE_LINES["all_to_all", ""][0], rel=1e-3)
    assert [cost.alpha_s for cost in collectives.inter] == pytest.approx([COLLECTIVE_LINES["inter", "network"][0]])
    assert [cost.alpha_s for cost in collectives.intra] == pytest.approx([COLLECTIVE_LINES["intra", "node"][0]])
    assert with_costs(config, []) == measured, "a later start, on other nodes"
    assert with_costs(measured, []) is measured
    assert len(launches) == 1
    assert launches[0].is_relative_to(run_dir_of(config).measurements)
    assert not launches[0].is_relative_to(run_dir_of(config).path), "which may start anew"


@pytest.mark.usefixtures("two_nodes")
def test_every_run_measures_for_itself_and_anew_when_forced(tmp_path: Path, text: Path, launches: list[Path]) -> None:
    first = with_costs(auto(tmp_path, text), [])
    assert with_costs(auto(tmp_path, text, "seed=1"), []).cluster != first.cluster
    assert with_costs(auto(tmp_path, text, "force=true"), []).cluster != first.cluster
    assert len(launches) == 3


def test_one_rank_and_declared_clusters_are_not_measured(tmp_path: Path, text: Path, launches: list[Path]) -> None:
    for choice in ("auto", "local_2x2", "netns_2x2"):
        config = auto(tmp_path, text, f"cluster={choice}")
        assert with_costs(config, []) is config
    assert launches == []
