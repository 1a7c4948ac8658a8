"""slurm.scheduler: what is read out of Slurm's environment and out of what its commands print."""

from __future__ import annotations

import subprocess
from datetime import datetime

import pytest

from experiments.allocation import Shape
from moe.errors import ConfigError, SuiteError
from slurm import scheduler
from slurm.scheduler import QueuedJob, allocation_of, final_state, leaf_switches, parse_topology, queued
from tests.slurm.cluster import require

JOB = {
    "SLURM_JOB_ID": "44",
    "SLURM_JOB_NODELIST": "n[0-1]",
    "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_RESTART_COUNT": "2",
}
TOPOLOGY = """\
SwitchName=leaf0 Level=0 LinkSpeed=1 Nodes=n[0-1]
SwitchName=leaf1 Level=0 LinkSpeed=1 Nodes=n[2-3],m7
SwitchName=root Level=1 LinkSpeed=1 Nodes=n[0-3],m7 Switches=leaf[0-1]
"""


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, str, str]]:
    """What Slurm's commands answer: exit code, stdout, stderr."""
    answers: dict[str, tuple[int, str, str]] = {}

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(words, *answers[words[0]])

    monkeypatch.setattr(scheduler, "_command", command)
    return answers


def test_an_allocation() -> None:
    allocation = allocation_of(JOB)
    assert (allocation.job, allocation.restarts) == ("44", 2)
    assert allocation.hosts == ["n0", "n1"]
    assert allocation.shape == Shape(2, 4, "cpu")
    with_gpus = allocation_of({**JOB, "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "8"})
    assert with_gpus.shape == Shape(2, 4, "cuda")
    assert with_gpus.cpus_per_task == 8


def test_a_job_of_an_array_is_called_by_both_numbers() -> None:
    """The last job of an array has the array's own number, which alone would mean all of them."""
    assert allocation_of({**JOB, "SLURM_ARRAY_JOB_ID": "44", "SLURM_ARRAY_TASK_ID": "3"}).job == "44_3"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"SLURM_TASKS_PER_NODE": "4,2"},
            r"--ntasks-per-node=: every node needs as many tasks, and Slurm gives \[4, 2\]",
        ),
        (
            {"SLURM_GPUS_ON_NODE": "8"},
            r"--ntasks-per-node=4: one task a GPU, and a node has 8\. Fix: say --ntasks-per-n",
        ),
    ],
)
def test_allocations_that_hold_no_ranks(more: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _ = allocation_of({**JOB, **more}).shape


def test_no_allocation() -> None:
    with pytest.raises(ConfigError, match=r"must run in a job of Slurm.*Fix: sbatch slurm/train\.sbatch key=value"):
        allocation_of({})


def test_the_queue(says: dict[str, tuple[int, str, str]]) -> None:
    reason = "ReqNodeNotAvail, UnavailableNodes:n1"
    says["squeue"] = (0, f"16_0|RUNNING|None|2026-11-30T12:00:00\n16_1|PENDING|{reason}|N/A\n", "")
    assert queued() == {
        "16_0": QueuedJob("RUNNING", "None", datetime(2026, 11, 30, 12)),
        "16_1": QueuedJob("PENDING", reason, None),
    }
    says["squeue"] = (1, "", "slurm_load_jobs error: Invalid job id specified")
    assert queued(["9"]) == {}
    says["squeue"] = (1, "", "slurm_load_jobs error: Unable to contact slurm controller")
    with pytest.raises(SuiteError, match="squeue failed: .*Unable to contact slurm controller"):
        queued()


def test_how_a_job_ended(says: dict[str, tuple[int, str, str]]) -> None:
    says["sacct"] = (1, "", "Slurm accounting storage is disabled")
    says["scontrol"] = (0, "JobId=10 JobName=x\n   JobState=NODE_FAIL Reason=None Dependency=(null)\n", "")
    assert final_state("10") == "NODE_FAIL"
    says["sacct"] = (0, "CANCELLED by 1000\n", "")
    assert final_state("10") == "CANCELLED"
    says["sacct"], says["scontrol"] = (0, "", ""), (1, "", "Invalid job id specified")
    assert final_state("10") == ""


def test_leaf_switches(says: dict[str, tuple[int, str, str]]) -> None:
    leaves = {"n0": "leaf0", "n1": "leaf0", "n2": "leaf1", "n3": "leaf1", "m7": "leaf1"}
    assert parse_topology(TOPOLOGY) == leaves
    says["scontrol"] = (0, TOPOLOGY, "")
    assert leaf_switches(["n1", "n2", "m7"]) == ["leaf0", "leaf1", "leaf1"]
    assert leaf_switches(["n1", "elsewhere"]) == []
    says["scontrol"] = (1, "", "")
    assert leaf_switches(["n1"]) == []


def test_a_private_cluster_needs_root_and_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.slurm.cluster.os.geteuid", lambda: 1000)
    with pytest.raises(SuiteError, match="needs root, and this user is not root"):
        require()
    monkeypatch.setattr("tests.slurm.cluster.os.geteuid", lambda: 0)
    monkeypatch.setattr("tests.slurm.cluster.shutil.which", lambda name: None if "slurm" in name else name)
    with pytest.raises(SuiteError, match="needs slurmctld, slurmd: make test-slurm installs Debian's packages"):
        require()


def test_a_command_that_is_not_there() -> None:
    done = scheduler._command("surely-no-such-command")
    assert (done.returncode, done.stderr) == (127, "surely-no-such-command: no such command on this machine")
