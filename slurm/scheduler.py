"""What Slurm says and does, through its own commands; their output is read here and nowhere else."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from experiments.allocation import Shape
from experiments.join import hostnames, tasks_per_node
from moe.errors import ConfigError, Problem, SuiteError

WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
AT_WORK = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
COMMAND_TIMEOUT_S = 60.0
"""A controller that is restarted answers late."""


@dataclass(frozen=True)
class Allocation:
    """The job that this process is the batch step of.

    Args:
        job: Slurm's id, `12_3` in an array: the only form that means one job of an array to every command.
        restarts: how often it was requeued.
        hosts: names of its nodes, in the order of the ranks.
        tasks: tasks of each node, as asked for.
        gpus_per_node: of this node, 0 without.
        cpus_per_task: as asked for, None if nobody did.
    """

    job: str
    restarts: int
    hosts: list[str]
    tasks: list[int]
    gpus_per_node: int
    cpus_per_task: int | None

    @property
    def shape(self) -> Shape:
        """One task a rank; ConfigError where the nodes differ, or their tasks are not one for each GPU."""
        size, gpus = self.tasks[0], self.gpus_per_node
        if len(set(self.tasks)) > 1:
            rule = f"every node needs as many tasks, and Slurm gives {self.tasks}"
            raise ConfigError(Problem("--ntasks-per-node", "", rule, "say --nodes and --ntasks-per-node"))
        if gpus and gpus != size:
            fix = f"say --ntasks-per-node={gpus} --gpus-per-node={gpus}"
            raise ConfigError(Problem("--ntasks-per-node", size, f"one task a GPU, and a node has {gpus}", fix))
        return Shape(len(self.tasks), size, "cuda" if gpus else "cpu")


def allocation_of(env: Mapping[str, str]) -> Allocation:
    """This process's job; ConfigError where it is in none."""
    if "SLURM_JOB_ID" not in env:
        rule = "must run in a job of Slurm, and SLURM_JOB_ID is not set"
        raise ConfigError(Problem("python -m slurm.batch", "", rule, "sbatch slurm/train.sbatch key=value ..."))
    in_array = "SLURM_ARRAY_JOB_ID" in env
    return Allocation(
        job=f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}" if in_array else env["SLURM_JOB_ID"],
        restarts=int(env.get("SLURM_RESTART_COUNT", "0")),
        hosts=hostnames(env["SLURM_JOB_NODELIST"]),
        tasks=tasks_per_node(env["SLURM_TASKS_PER_NODE"]),
        gpus_per_node=int(env.get("SLURM_GPUS_ON_NODE", "0")),
        cpus_per_task=int(env["SLURM_CPUS_PER_TASK"]) if "SLURM_CPUS_PER_TASK" in env else None,
    )


class QueuedJob(NamedTuple):
    """A job in the queue: Slurm's state, why it waits or `None`, and when it ends at the latest, if that is known."""

    state: str
    reason: str
    end: datetime | None


def queued(jobs: Iterable[str] | None = None) -> dict[str, QueuedJob]:
    """Jobs in the queue by id; those of this user, or some of them.

    Raises:
        SuiteError: Slurm does not answer.
    """
    chosen = ["--jobs=" + ",".join(jobs)] if jobs is not None else [f"--user={os.geteuid()}"]
    done = _command("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r|%e", *chosen)
    if done.returncode != 0:
        if "Invalid job id" in done.stderr:  # it left the queue some minutes ago
            return {}
        raise SuiteError(f"squeue failed: {done.stderr.strip()}")
    return dict(map(_queued_job, done.stdout.splitlines()))


def is_live(job: QueuedJob | None) -> bool:
    """Whether a job waits or works."""
    return job is not None and job.state in (*WAITING, *AT_WORK)


def _queued_job(line: str) -> tuple[str, QueuedJob]:
    job, state, reason, end = line.split("|")
    return job, QueuedJob(state, reason, None if end[:1] not in "0123456789" else datetime.fromisoformat(end))


def final_state(job: str) -> str:
    """How a job that has left the queue ended, as accounting or the controller's memory say; empty if neither does."""
    told = _command("sacct", "--noheader", "--allocations", "--parsable2", "--format=State", f"--jobs={job}")
    if told.returncode == 0 and told.stdout.strip():
        return told.stdout.split()[0]
    told = _command("scontrol", "show", "job", job)
    found = re.search(r"\bJobState=(\w+)", told.stdout)
    return found[1] if told.returncode == 0 and found else ""


def requeue(job: str) -> str:
    """Send a job back to the queue, which ends this life of it; what Slurm objects, empty if nothing."""
    return _command("scontrol", "requeue", job).stderr.strip()


def signal_tasks(job: str, name: str) -> None:
    """Send a signal to all tasks of a job's steps, and not to its batch step. Of an array's job the id is `12_3`: its
    SLURM_JOB_ID can be the whole array's."""
    _command("scancel", f"--signal={name}", job)


def leaf_switches(hosts: Iterable[str]) -> list[str]:
    """The leaf switch of every node; empty where Slurm knows no topology, or not of all of them."""
    told = _command("scontrol", "show", "topology")
    leaves = parse_topology(told.stdout) if told.returncode == 0 else {}
    found = [leaves.get(host, "") for host in hosts]
    return found if all(found) else []


def parse_topology(text: str) -> dict[str, str]:
    """Leaf switches by node, from `scontrol show topology`."""
    leaves = {}
    for line in text.splitlines():
        found = re.match(r"SwitchName=(\S+) Level=0 .*\bNodes=(\S+)", line)
        if found:
            leaves.update(dict.fromkeys(hostnames(found[2]), found[1]))
    return leaves


def minutes_of(time_limit: str) -> int:
    """A time limit as Slurm takes it (`90`, `90:30`, `4:00:00`, `2-12`, `2-12:30`), in minutes, rounded up.

    Raises:
        ConfigError: it is none of these.
    """
    days, dash, rest = time_limit.rpartition("-")
    parts = rest.split(":")
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time_limit) or not time_limit.isascii():
        rule = "is no time limit that is known here"
        raise ConfigError(Problem("--time", time_limit, rule, "write minutes, hours:minutes:seconds or days-hours"))
    numbers = [int(part) for part in parts]
    if dash:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:  # minutes[:seconds]
        hours, (minutes, seconds) = 0, (*numbers, 0)[:2]
    return (int(days or 0) * 24 + hours) * 60 + minutes + (seconds > 0)


def _command(*words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            words,
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "SLURM_TIME_FORMAT": "standard"},
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess(words, 127, "", f"{words[0]}: no such command on this machine")
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(words, 124, "", f"{words[0]} did not answer in {COMMAND_TIMEOUT_S:g} s")
