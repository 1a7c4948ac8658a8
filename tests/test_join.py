"""experiments.join: which rank we are, from what torchrun and srun say."""

from __future__ import annotations

import dataclasses
import socket

import pytest

from experiments.join import RanksHere, check_size, expand, hostnames, misplaced, ranks_here, tasks_per_node
from moe.errors import ConfigError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "n0",
    "MASTER_PORT": "1234",
}
SRUN = {
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_NODELIST": "n[0-1]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9",
}


def test_torchrun() -> None:
    here = ranks_here(TORCHRUN)
    assert here == RanksHere("torchrun", 5, 8, 1, 4, 1, 2, "n0", "1234")
    assert here.variables()["NODE_RANK"] == "1"


def test_srun_where_the_first_host_has_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port: [host])
    here = ranks_here(SRUN)
    assert here == RanksHere("srun", 3, 4, 1, 2, 1, 2, "n0", "12041")
    assert here.variables() == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "NODE_RANK": "1",
        "MASTER_ADDR": "n0",
        "MASTER_PORT": "12041",
    }


def test_srun_where_no_host_has_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(host: str, port: None) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    here = ranks_here(SRUN)
    assert here is not None
    assert here.master_address == "10.0.0.9"


def test_what_the_user_says_about_the_master_counts() -> None:
    here = ranks_here({**SRUN, "MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "77"})
    assert here is not None
    assert (here.master_address, here.master_port) == ("10.1.1.1", "77")


@pytest.mark.parametrize("job", [1, 19999, 20000, 123456789])
@pytest.mark.parametrize("step", [0, 1, 4000])
def test_ports_are_below_those_that_linux_hands_out(job: int, step: int) -> None:
    here = ranks_here({**SRUN, "MASTER_ADDR": "n0", "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
    assert here is not None
    assert 1024 < int(here.master_port) < 32768


@pytest.mark.parametrize(
    "env",
    [
        {},
        {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"},  # a batch script without srun
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
        {"WORLD_SIZE": "4"},
    ],
)
def test_plain_starts(env: dict[str, str]) -> None:
    assert ranks_here(env) is None


def test_tasks_per_node() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(ValueError, match="no list of tasks per node"):
        tasks_per_node("2(3)")


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("n0", ["n0"]),
        ("n[0-2,7],login", ["n0", "n1", "n2", "n7", "login"]),
        ("gpu[008-010]-ib", ["gpu008-ib", "gpu009-ib", "gpu010-ib"]),
        ("a,b[1]", ["a", "b1"]),
    ],
)
def test_node_lists(short: str, long: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert expand(short) == long
    monkeypatch.setenv("PATH", "")  # no scontrol
    assert hostnames(short) == long


def test_two_brackets_are_left_to_scontrol() -> None:
    with pytest.raises(ValueError, match="more than one bracket"):
        expand("r[0-1]n[0-3]")


def test_the_declared_arrangement_must_be_the_real_one() -> None:
    here = ranks_here(TORCHRUN)
    assert here is not None
    check_size(here, 8, 4)
    assert misplaced(here, 4) == ""
    rule = "rank 5 should be number 1 on node 2, but torchrun put it there as number 1 on node 1"
    assert misplaced(here, 2) == rule
    message = r"cluster\.levels=1 nodes x 4 ranks: the cluster declares 4 ranks but 8 are here, started by torchrun\."
    with pytest.raises(ConfigError, match=message):
        check_size(here, 4, 4)


def test_several_declared_nodes_may_lie_on_one_real_one() -> None:
    here = ranks_here(TORCHRUN)
    assert here is not None
    assert misplaced(dataclasses.replace(here, local_world_size=8, local_rank=5, node_rank=0, num_nodes=1), 2) == ""
