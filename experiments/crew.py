"""The spawned ranks of one run: started together, watched together, and ended together.

On a CPU under Linux they are forked from one process (`experiments.forking`), else each is started by itself.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from experiments.failures import Report, count_oom_kills, read_reports, silent_death
from experiments.forking import ForkedRank, ForkedRanks, RankStart
from experiments.netns import INTERFACE, Node
from experiments.ranks import Job
from experiments.split import split_variables
from experiments.stop import StopRequest
from experiments.worker import PARENT_PID, STORE_FD

JOB_FILE = "job.json"
POLL_S = 0.05
GRACE_S = 3.0  # after the first failure: time for the other ranks to say what they saw
TERMINATE_S = 5.0  # between SIGTERM and SIGKILL
NETNS_PORT = 29500  # a fresh namespace: nobody else is there
REPOSITORY = Path(__file__).resolve().parent.parent


class Crew:
    """The spawned ranks of one run.

    Args:
        job: what they do.
        num_ranks, ranks_per_node: how many.
        nodes: the network namespaces that they live in, None on plain loopback.
        gpus: entries of CUDA_VISIBLE_DEVICES, one per rank; empty on the CPU.
        env: environment variables on top of ours.
        split: NCCL takes the nodes for hosts of their own.
    """

    def __init__(
        self,
        job: Job,
        num_ranks: int,
        ranks_per_node: int,
        nodes: list[Node] | None,
        gpus: list[str],
        env: Mapping[str, str],
        split: bool = False,
    ) -> None:
        self.job = job
        self.logs = Path(job.log_dir)
        self.num_ranks = num_ranks
        self.ranks_per_node = ranks_per_node
        self.nodes = nodes
        self.gpus = gpus
        self.env = env
        self.split = split
        self.processes: Sequence[subprocess.Popen[bytes] | ForkedRank] = []
        self.log_starts: list[int] = []

    def start(self) -> None:
        """Start every rank; the ranks of plain loopback meet on a socket that we open, so no port can be lost."""
        self.job.save(self.logs / JOB_FILE)
        listener = socket.create_server(("127.0.0.1", 0)) if self.nodes is None else None
        # Blocked across the start, so that Ctrl-C can't hit a worker before it ignores SIGINT itself.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            starts = [self._prepare(rank, listener) for rank in range(self.num_ranks)]
            if self.job.device == "cpu" and sys.platform == "linux":
                job_file = self.logs / JOB_FILE
                self.processes = ForkedRanks(self.job.target, job_file, starts, starts[0].variables).ranks
            else:
                self.processes = started = []
                for start in starts:
                    started.append(self._start(start))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if listener is not None:
                listener.close()

    def _prepare(self, rank: int, listener: socket.socket | None) -> RankStart:
        """How to start a rank; its log gets a headline."""
        variables = self._variables(rank)
        descriptor = None
        if listener is not None:
            variables["MASTER_PORT"] = str(listener.getsockname()[1])
            if rank == 0:
                descriptor = listener.fileno()
                variables[STORE_FD] = str(descriptor)
        path = self.logs / f"rank{rank}.log"
        self.log_starts.append(path.stat().st_size if path.exists() else 0)
        with path.open("ab") as log:
            log.write(f"--- rank {rank} of {self.num_ranks}, {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n".encode())
        namespace = None if self.nodes is None else self.nodes[rank // self.ranks_per_node].namespace
        return RankStart(variables, str(path), rank == 0, namespace, descriptor)

    def _start(self, start: RankStart) -> subprocess.Popen[bytes]:
        """Start a rank by itself."""
        assert start.namespace is None, "network namespaces are for ranks on a CPU under Linux"
        command = [sys.executable, "-m", "experiments.worker", self.job.target, str(self.logs / JOB_FILE)]
        with Path(start.log).open("ab") as log:
            return subprocess.Popen(
                command,
                env=start.variables,
                stdin=subprocess.DEVNULL,
                stdout=None if start.keeps_stdout else log,
                stderr=log,
                pass_fds=[] if start.descriptor is None else [start.descriptor],
            )

    def _variables(self, rank: int) -> dict[str, str]:
        node, local_rank = divmod(rank, self.ranks_per_node)
        variables = dict(os.environ)
        paths = [str(REPOSITORY), *filter(None, [variables.get("PYTHONPATH")])]
        variables["PYTHONPATH"] = os.pathsep.join(paths)
        variables["PYTHONUNBUFFERED"] = "1"
        variables |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(self.num_ranks),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(self.ranks_per_node),
            "NODE_RANK": str(node),
            "MASTER_ADDR": "127.0.0.1" if self.nodes is None else self.nodes[0].address,
            "MASTER_PORT": str(NETNS_PORT),
            PARENT_PID: str(os.getpid()),
        }
        loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
        interface = loopback if self.nodes is None else INTERFACE
        if interface is not None:
            variables["GLOO_SOCKET_IFNAME"] = interface
        if self.job.device == "cpu" and self.num_ranks > 1:
            variables.setdefault("OMP_NUM_THREADS", "1")
        if self.job.device == "cpu":
            # glibc keeps what a step frees; else it goes back to the kernel, and the next step pays for fresh pages.
            variables.setdefault("MALLOC_TRIM_THRESHOLD_", str(4 * 1024**3))
            variables.setdefault("MALLOC_MMAP_THRESHOLD_", str(32 * 1024**2))  # older ones take no more
        if self.job.device == "cuda":
            # After a timeout NCCL's watchdog waits four times this long, for others to dump traces, before it speaks.
            variables.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "1000")
        if self.job.device == "cuda" and self.num_ranks > self.ranks_per_node:
            # Nodes that are only pretended: each sees its own GPUs, and NCCL takes sockets between them.
            first = node * self.ranks_per_node
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus[first : first + self.ranks_per_node])
            variables.setdefault("NCCL_HOSTID", f"node{node}")
            variables.setdefault("NCCL_SOCKET_IFNAME", interface or "lo")
        if self.split:
            variables |= split_variables(node)
        return variables | dict(self.env)

    def watch(self, stop: StopRequest, on_poll: Callable[[], None] | None) -> list[Report]:
        """Wait for the end of all ranks, and bring it about once one has failed.

        Returns:
            Reports of the ranks that failed by themselves; empty when all ended well.
        """
        oom_kills = count_oom_kills()
        deaths: dict[int, Report] = {}
        deadline: float | None = None
        while None in [process.poll() for process in self.processes]:
            for rank in self._failed():
                if rank not in deaths:
                    deaths[rank] = self._death(rank, oom_kills)
                    deadline = deadline or time.monotonic() + GRACE_S
            if stop.urgent or (deadline is not None and time.monotonic() > deadline):
                failed = self._failed()
                self.end()
                break
            if on_poll is not None:
                on_poll()
            time.sleep(POLL_S)
        else:
            failed = self._failed()
        spoken = {report.rank: report for report in read_reports(self.logs, self.num_ranks)}
        silent = [deaths.get(rank) or self._death(rank, oom_kills) for rank in failed if rank not in spoken]
        return [*spoken.values(), *silent]

    def _failed(self) -> list[int]:
        return [rank for rank, process in enumerate(self.processes) if process.returncode not in (None, 0)]

    def _death(self, rank: int, oom_kills: int) -> Report:
        code = self.processes[rank].returncode
        assert code is not None
        rise = count_oom_kills() - oom_kills
        return silent_death(rank, code, self.logs / f"rank{rank}.log", self.log_starts[rank], rise)

    def end(self) -> None:
        """End the ranks that still run: SIGTERM, then SIGKILL."""
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + TERMINATE_S
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
