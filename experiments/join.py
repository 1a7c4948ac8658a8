"""Which rank this very process is, when torchrun or srun started it, or a job is planned that srun will start."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.allocation import interface_towards, plan_here
from moe.errors import ConfigError, Problem

if TYPE_CHECKING:
    from torch.distributed import Store

FIRST_PORT, NUM_PORTS = 12000, 20000  # below the ports that Linux hands out by itself


@dataclass(frozen=True)
class RanksHere:
    """The ranks that were started for us, and which of them we are.

    Args:
        starter: `torchrun` or `srun`; the latter is also what a plan will be started by.
        rank, world_size, local_rank, local_world_size, node_rank: as in `experiments.ranks.RankInfo`.
        num_nodes: nodes that hold ranks.
        master_address, master_port: where rank 0 serves the store.
    """

    starter: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    num_nodes: int
    master_address: str
    master_port: str

    def variables(self) -> dict[str, str]:
        """The environment that torch.distributed, Lightning and upstream packages expect."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "NODE_RANK": str(self.node_rank),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": self.master_port,
        }


def ranks_here(env: Mapping[str, str]) -> RanksHere | None:
    """The ranks that torchrun (RANK and WORLD_SIZE) or srun (a job step of several tasks) started, else None.

    A batch script that Slurm runs without srun is a plain start: it is one process, whatever SLURM_NTASKS says. So is
    one that srun starts alone, in a plan, too.
    """
    if (plan := plan_here(env)) is not None:
        size = plan.ranks_per_node
        num_ranks = plan.num_nodes * size
        return RanksHere("srun", 0, num_ranks, 0, size, 0, plan.num_nodes, "", "") if num_ranks > 1 else None
    if "RANK" in env and "WORLD_SIZE" in env:
        return _from_torchrun(env)
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env and _num_tasks(env) > 1:
        return _from_srun(env)
    return None


def _from_torchrun(env: Mapping[str, str]) -> RanksHere:
    rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
    local_world_size = int(env.get("LOCAL_WORLD_SIZE", world_size))
    return RanksHere(
        starter="torchrun",
        rank=rank,
        world_size=world_size,
        local_rank=int(env.get("LOCAL_RANK", rank % local_world_size)),
        local_world_size=local_world_size,
        node_rank=int(env.get("GROUP_RANK", env.get("NODE_RANK", rank // local_world_size))),
        num_nodes=-(-world_size // local_world_size),
        master_address=env.get("MASTER_ADDR", "127.0.0.1"),
        master_port=env.get("MASTER_PORT", "29500"),
    )


def _num_tasks(env: Mapping[str, str]) -> int:
    # The step's own number first: a step may hold fewer tasks than its job.
    return int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))


def _from_srun(env: Mapping[str, str]) -> RanksHere:
    node_rank = int(env["SLURM_NODEID"])
    tasks = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", str(_num_tasks(env)))))
    step = int(env["SLURM_STEP_ID"])
    port = FIRST_PORT + (int(env.get("SLURM_JOB_ID", "0")) + 97 * step) % NUM_PORTS
    return RanksHere(
        starter="srun",
        rank=int(env["SLURM_PROCID"]),
        world_size=_num_tasks(env),
        local_rank=int(env["SLURM_LOCALID"]),
        local_world_size=tasks[node_rank],
        node_rank=node_rank,
        num_nodes=len(tasks),
        master_address=env.get("MASTER_ADDR") or _first_host(env),
        master_port=env.get("MASTER_PORT", str(port)),
    )


def _first_host(env: Mapping[str, str]) -> str:
    """Address of the node that holds rank 0.

    The step's first host if its name can be resolved; else SLURM_LAUNCH_NODE_IPADDR, which is that node only when srun
    was called inside a batch job (from a login node, it is the login node).
    """
    node_list = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    launch_node = env.get("SLURM_LAUNCH_NODE_IPADDR")
    if node_list:
        host = hostnames(node_list)[0]
        if launch_node is None or _resolves(host):
            return host
    return launch_node or "127.0.0.1"


def network_variables(here: RanksHere, env: Mapping[str, str]) -> dict[str, str]:
    """The interface that leads to the other nodes of a job step, for gloo and NCCL; nothing where the user says it.

    Left to themselves, gloo takes what the machine's own name resolves to, often loopback, and NCCL the first
    interface that it finds, which may be one that only containers use.
    """
    node_list = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if here.starter != "srun" or here.num_nodes == 1 or not node_list:
        return {}
    others = [host for node, host in enumerate(hostnames(node_list)) if node != here.node_rank]
    interface = interface_towards(others[0]) if others else None
    found = {} if interface is None else {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
    return {name: value for name, value in found.items() if name not in env}


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short form as one number per node: `2(x3),1` is [2, 2, 2, 1]."""
    counts: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item.strip())
        if match is None:
            raise ValueError(f"{text!r} is no list of tasks per node")
        counts += [int(match.group(1))] * int(match.group(2) or 1)
    return counts


def hostnames(node_list: str) -> list[str]:
    """Slurm's short form as host names: `n[0-2,7],login` is n0, n1, n2, n7, login.

    scontrol expands it where it is there; else we do, for at most one bracket per name.
    """
    if shutil.which("scontrol"):
        done = subprocess.run(["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()
    return expand(node_list)


def expand(node_list: str) -> list[str]:
    """`hostnames` without scontrol; raises ValueError for two brackets in one name."""
    names: list[str] = []
    for item in re.findall(r"[^,\[\]]+(?:\[[^\]]*\][^,]*)?", node_list):
        match = re.fullmatch(r"([^\[\]]*)\[([^\[\]]*)\]([^\[\]]*)", item)
        if match is None:
            if "[" in item:
                raise ValueError(f"{item!r} has more than one bracket: set MASTER_ADDR")
            names.append(item)
            continue
        prefix, ranges, suffix = match.groups()
        for part in ranges.split(","):
            first, _, last = part.partition("-")
            for number in range(int(first), int(last or first) + 1):
                names.append(f"{prefix}{number:0{len(first)}d}{suffix}")
    return names


def declared(num_ranks: int, ranks_per_node: int) -> str:
    """The arrangement that the cluster declares, for messages."""
    return f"{num_ranks // ranks_per_node} nodes x {ranks_per_node} ranks"


def check_size(here: RanksHere, num_ranks: int, ranks_per_node: int) -> None:
    """Hold the number of ranks that are here against the declared one; raises ConfigError, in every rank alike."""
    if here.world_size != num_ranks:
        rule = f"the cluster declares {num_ranks} ranks but {here.world_size} are here, started by {here.starter}"
        fix = f"start {num_ranks} ranks, declare {here.world_size}, or use cluster=auto"
        raise ConfigError(Problem("cluster.levels", declared(num_ranks, ranks_per_node), rule, fix))


def misplaced(here: RanksHere, ranks_per_node: int) -> str:
    """The rule that this rank's place breaks, empty when it stands where the declared levels say.

    Several declared nodes on one real one are fine (that is what `local_2x2` is); the other way round, the declared
    levels would not be the real ones.
    """
    node, number = divmod(here.rank, ranks_per_node)
    if here.num_nodes == 1 or (node, number) == (here.node_rank, here.local_rank):
        return ""
    return (
        f"rank {here.rank} should be number {number} on node {node}, but {here.starter} put it "
        f"there as number {here.local_rank} on node {here.node_rank}"
    )


def agree(here: RanksHere, ranks_per_node: int, store: Store) -> None:
    """Wait until every rank is here, and raise ConfigError in all of them when one is `misplaced`. Collective."""
    store.set(f"place/{here.rank}", misplaced(here, ranks_per_node))
    if here.rank == 0:
        rules = (store.get(f"place/{rank}").decode() for rank in range(here.world_size))
        store.set("verdict", next((rule for rule in list(rules) if rule), ""))
    rule = store.get("verdict").decode()
    if rule:
        fix = f"start {ranks_per_node} ranks per node in blocks (srun --distribution=block), or use cluster=auto"
        raise ConfigError(Problem("cluster.levels", declared(here.world_size, ranks_per_node), rule, fix))
