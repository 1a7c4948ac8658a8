"""A private Slurm of two nodes on this machine: real daemons, a network namespace a node, nothing of the machine's own.

The controller and the commands of a login node run in the namespace of the bridge that `experiments.netns` makes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from experiments.netns import INTERFACE, Node, existing_namespaces, shaped_nodes
from moe.errors import SuiteError

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "tc", "nsenter", "unshare")
LOGIN_ADDRESS = "10.77.0.254"
CPUS_PER_NODE, MEMORY_MIB = 4, 6000
LIMIT_S = 240.0
"""Of any wait; a machine of two busy cores takes a minute to start four ranks."""
STOP_S = 20.0
REVOKED_S = 3.0

SLURM_CONF = """\
ClusterName=private
SlurmctldHost=login({login})
SlurmctldPort=6817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
TopologyPlugin=topology/tree
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SlurmdTimeout=300
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
MinJobAge=600
InactiveLimit=0
PropagateResourceLimits=NONE
{nodes}
PartitionName=main Nodes=n[0-{last}] Default=YES MaxTime=INFINITE DefMemPerCPU=500 PriorityTier=1 GraceTime=300 State=UP
PartitionName=urgent Nodes=n[0-{last}] MaxTime=INFINITE DefMemPerCPU=500 PriorityTier=2 PreemptMode=OFF State=UP
"""
NODE = "NodeName=n{i} NodeAddr={address} Port=6818 CPUs={cpus} CoresPerSocket={cpus} RealMemory={memory} State=UNKNOWN"


class Slurm:
    """A running cluster.

    Args:
        folder: everything that it writes.
        nodes: their namespaces; node i is called n<i>.
        login: the namespace that commands run in.
    """

    def __init__(self, folder: Path, nodes: list[Node], login: str) -> None:
        self.folder, self.nodes, self.login = folder, nodes, login
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *words: str, env: Mapping[str, str] | None = None, code: int = 0) -> str:
        """What a command on the login node prints, started in the checkout; it must end with this exit code."""
        done = subprocess.run(
            ["nsenter", f"--net=/run/netns/{self.login}", *words],
            env={**self.environment, **(env or {})},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == code, f"{words}: exit code {done.returncode}\n{done.stdout}"
        return done.stdout

    def python(self, *words: str, env: Mapping[str, str] | None = None, code: int = 0) -> str:
        """Likewise `python -m <words>`."""
        return self.run(sys.executable, "-m", *words, env=env, code=code)

    def state(self, job: str) -> str:
        """Of a job, as squeue says."""
        return self.run("squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", "--format=%T").strip()

    def wait(self, *jobs: str) -> list[str]:
        """The states in which jobs end."""
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        for job in jobs:
            wait_for(partial(self._is_in, job, final), f"end of job {job}")
        return [self.state(job) for job in jobs]

    def _is_in(self, job: str, states: tuple[str, ...]) -> bool:
        return self.state(job) in states

    def release(self, job: str) -> None:
        """Start a job that was requeued soon, and not after the two minutes for which Slurm holds it back.

        It does so because a node refuses credentials from the seconds in which it revoked those of the earlier life.
        """
        wait_for(lambda: self.state(job) == "PENDING", f"requeue of job {job}")
        again_s = time.time() + REVOKED_S
        wait_for(lambda: time.time() > again_s, "time that passes")
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    @contextmanager
    def unplugged(self, node: int) -> Iterator[None]:
        """Inside, a node is as good as dead to the others."""
        link = ("ip", "-n", self.nodes[node].namespace, "link", "set", INTERFACE)
        subprocess.run([*link, "down"], check=True)
        try:
            yield
        finally:
            subprocess.run([*link, "up"], check=True)


def wait_for(condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    """Look again and again until it holds."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} after {limit_s:g} s"
        time.sleep(0.2)


def require() -> None:
    """Raise SuiteError, one sentence, where no private Slurm can be started."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if os.geteuid() != 0:
        raise SuiteError("a private Slurm in network namespaces needs root, and this user is not root")
    if missing:
        raise SuiteError(f"a private Slurm needs {', '.join(missing)}: make test-slurm installs Debian's packages")


@contextmanager
def private_slurm(folder: Path, num_nodes: int = 2) -> Iterator[Slurm]:
    """Start a cluster and wait until its nodes are idle; at the end stop its jobs and daemons, by pid."""
    require()
    login = f"moe{os.getpid()}switch"
    with ExitStack() as stack:
        nodes = stack.enter_context(shaped_nodes(num_nodes))
        stack.callback(_assert_empty, [login, *(node.namespace for node in nodes)])
        _configure(folder, nodes)
        subprocess.run(["ip", "-n", login, "addr", "add", f"{LOGIN_ADDRESS}/24", "dev", "bridge"], check=True)
        subprocess.run(["ip", "-n", login, "link", "set", "lo", "up"], check=True)
        slurm = Slurm(folder, nodes, login)
        _daemon(stack, slurm, login, "login", _munged(folder))
        wait_for((folder / "munge" / "socket").exists, "munged")
        _daemon(stack, slurm, login, "login", ["slurmctld", "-D"])
        for index, node in enumerate(nodes):
            _daemon(stack, slurm, node.namespace, f"n{index}", ["slurmd", "-D", "-N", f"n{index}"])
        stack.callback(_end_jobs, slurm)
        idle = ["idle"] * num_nodes
        wait_for(lambda: slurm.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split() == idle, "idle nodes")
        yield slurm
    assert not {login, *(node.namespace for node in nodes)} & set(existing_namespaces())


def _configure(folder: Path, nodes: list[Node]) -> None:
    for name in ("state", "munge", *(f"spool/n{index}" for index in range(len(nodes)))):
        (folder / name).mkdir(parents=True)
    key = folder / "munge" / "key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    sizes = {"cpus": CPUS_PER_NODE, "memory": MEMORY_MIB}
    lines = "\n".join(NODE.format(i=i, address=node.address, **sizes) for i, node in enumerate(nodes))
    text = SLURM_CONF.format(folder=folder, login=LOGIN_ADDRESS, nodes=lines, last=len(nodes) - 1)
    (folder / "slurm.conf").write_text(text)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "topology.conf").write_text(f"SwitchName=leaf Nodes=n[0-{len(nodes) - 1}]\n")
    names = {"127.0.0.1": "localhost", LOGIN_ADDRESS: "login"}
    names |= {node.address: f"n{index}" for index, node in enumerate(nodes)}
    (folder / "hosts").write_text("".join(f"{address} {name}\n" for address, name in names.items()))


def _munged(folder: Path) -> list[str]:
    at = folder / "munge"
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    return ["munged", "--foreground", "--force", *(f"--{option}={at / name}" for option, name in files.items())]


def _daemon(stack: ExitStack, slurm: Slurm, namespace: str, host: str, command: list[str]) -> None:
    """Start a daemon on a host of its own name, to be ended when the stack is left."""
    script = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'
    words = ["nsenter", f"--net=/run/netns/{namespace}", "unshare", "--uts", "--mount", "bash", "-c", script, "bash"]
    log = stack.enter_context((slurm.folder / f"{command[0]}.{host}.out").open("ab"))
    daemon = subprocess.Popen(
        [*words, host, str(slurm.folder / "hosts"), *command],
        env=slurm.environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    stack.callback(_end, daemon)


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(STOP_S)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _end_jobs(slurm: Slurm) -> None:
    """Until every node has its daemon and nothing else."""
    slurm.run("scancel", "--user=root")
    wait_for(lambda: all(len(processes(node.namespace)) == 1 for node in slurm.nodes), "end of all jobs")


def processes(namespace: str) -> list[str]:
    """Ids of those that run in a namespace."""
    return subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True).stdout.split()


def _assert_empty(namespaces: list[str]) -> None:
    """No process of the cluster outlives it."""
    left = {name: processes(name) for name in namespaces}
    assert not any(left.values()), f"still running: {left}"
