"""experiments.allocation and what follows from it: planned jobs, switches, the interface to other nodes."""

from __future__ import annotations

import os
import socket
from typing import Any
from unittest import mock

import pytest
import torch

from experiments.allocation import SWITCHES, Shape, interface_towards, nodes_per_switch, planned
from experiments.cli import compose
from experiments.cluster_config import derived_levels
from experiments.config import find_problems, load_run, run_id
from experiments.join import RanksHere, network_variables, ranks_here
from experiments.launch import is_main_process
from experiments.provenance import facts

SRUN = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "8",
    "SLURM_TASKS_PER_NODE": "2(x4)",
    "SLURM_JOB_NODELIST": "n[0-3]",
    "MASTER_ADDR": "n0",
}


def fanouts() -> list[tuple[str, int]]:
    """Of the levels that are derived here."""
    return [(level.name, level.fanout) for level in derived_levels()]


@pytest.mark.parametrize(
    ("switches", "size"),
    [
        (["a", "a", "b", "b"], 2),
        (["a", "a", "a", "b", "b", "b"], 3),
        (["a", "b"], None),  # a switch for each node is no level
        (["a", "a"], None),  # nor is one for all
        (["a", "a", "b"], None),  # unequal
        (["a", "b", "a", "b"], None),  # ranks of a switch must follow one another
        ([], None),
    ],
)
def test_switches_are_a_level_where_they_hold_blocks_of_nodes(switches: list[str], size: int | None) -> None:
    assert nodes_per_switch(switches) == size


def test_levels_of_an_allocation() -> None:
    with mock.patch.dict(os.environ, SRUN):
        assert fanouts() == [("node", 2), ("network", 4)]
        with mock.patch.dict(os.environ, {SWITCHES: "s0,s0,s1,s1"}):
            assert fanouts() == [("node", 2), ("switch", 2), ("network", 2)]
        with mock.patch.dict(os.environ, {SWITCHES: "s0,s0"}):  # of another allocation
            assert fanouts() == [("node", 2), ("network", 4)]


def test_a_manifest_says_on_how_many_machines_the_ranks_are() -> None:
    assert facts()["num_machines"] == 1
    with mock.patch.dict(os.environ, SRUN):
        assert facts()["num_machines"] == 4


def auto(**more: Any) -> dict[str, Any]:
    """A config on cluster=auto."""
    return {**compose("train", ["cluster=auto", "model.num_experts=16"]), **more}


def test_a_run_has_one_id_on_the_login_node_and_on_whatever_nodes_its_jobs_get() -> None:
    with planned(Shape(4, 2, "cpu")):
        assert is_main_process()
        assert find_problems("train", auto()) == []
        planned_id = run_id(load_run(auto()))
    with mock.patch.dict(os.environ, SRUN):
        assert run_id(load_run(auto())) == planned_id
        with mock.patch.dict(os.environ, {SWITCHES: "s0,s0,s1,s1"}):
            config = load_run(auto())
            assert run_id(config) == planned_id
            assert run_id(load_run(config.model_dump(mode="json"))) == planned_id
    with planned(Shape(2, 4, "cpu")):
        assert run_id(load_run(auto())) != planned_id


def test_a_planned_job_has_the_gpus_that_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with planned(Shape(2, 4, "cuda")):
        config = load_run(auto())
        assert (config.cluster.device, config.trainer.precision) == ("cuda", "bf16")
    with planned(Shape(2, 4, "cpu")):
        assert load_run(auto()).cluster.device == "cpu"
        (problem,) = find_problems("train", auto(cluster={**auto()["cluster"], "device": "cuda"}))
        assert problem.key == "cluster.device"
    assert ranks_here({}) is None


def test_a_planned_job_of_one_task_is_a_plain_start() -> None:
    with planned(Shape(1, 1, "cpu")):
        assert ranks_here(os.environ) is None
        assert fanouts() == [("node", 1)]


def test_shapes_in_words() -> None:
    assert str(Shape(4, 8, "cuda")) == "4 nodes x 8 GPUs"
    assert str(Shape(1, 1, "cpu")) == "1 node x 1 CPU rank"


def test_no_interface_leads_to_this_machine_or_to_nowhere() -> None:
    assert interface_towards("127.0.0.1") is None
    assert interface_towards("surely-no-such-host.invalid") is None


def test_gloo_and_nccl_take_the_interface_to_the_other_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def ib0(host: str) -> str:
        asked.append(host)
        return "ib0"

    monkeypatch.setattr("experiments.join.interface_towards", ib0)
    monkeypatch.setattr("experiments.join.hostnames", lambda text: ["n0", "n1"])
    step = {"SLURM_STEP_NODELIST": "n[0-1]"}
    ranks = [RanksHere("srun", rank, 2, 0, 1, rank, 2, "n0", "1") for rank in range(2)]
    for rank in ranks:
        expected = {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "=ib0"}
        assert network_variables(rank, step) == expected
        assert network_variables(rank, {**step, "NCCL_SOCKET_IFNAME": "mine"}) == {"GLOO_SOCKET_IFNAME": "ib0"}
    assert asked == ["n1", "n1", "n0", "n0"]
    assert network_variables(RanksHere("srun", 0, 2, 0, 2, 0, 1, "n0", "1"), step) == {}
    assert network_variables(RanksHere("torchrun", 0, 2, 0, 1, 0, 2, "n0", "1"), step) == {}


def test_the_interface_is_the_one_whose_address_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Probe:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> Probe:
            return self

        def __exit__(self, *_: object) -> None: ...
        def connect(self, address: tuple[str, int]) -> None:
            assert address == ("10.0.0.2", 9)

        def getsockname(self) -> tuple[str, int]:
            return "10.0.0.1", 4000

    found = [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("10.0.0.2", 9))]
    monkeypatch.setattr("experiments.allocation.socket.getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr("experiments.allocation.socket.socket", Probe)
    addresses = {"lo": [mock.Mock(address="127.0.0.1")], "ib0": [mock.Mock(address="10.0.0.1")]}
    monkeypatch.setattr("experiments.allocation.psutil.net_if_addrs", lambda: addresses)
    assert interface_towards("n1") == "ib0"
