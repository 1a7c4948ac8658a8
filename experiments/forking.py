"""Ranks forked from one process that has imported everything once: `python -m experiments.forking <target> <job.json>`.

On a CPU a rank's imports (torch, lightning) cost more than its work in a small run, and the ranks share its cores. Here
they are paid once for all ranks. Linux only: elsewhere a fork without exec is not safe. Never for CUDA: a process that
has touched the driver can't be forked.

The parent writes one line of JSON to this process' stdin, the ranks to start, and then lines `rank signal`, to pass on.
This process writes lines `pid rank number` and, as ranks end, `returncode rank number` to the descriptor that STATUS_FD
names. A rank dies with this process, and this process with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

STATUS_FD = "MOE_SUITE_STATUS_FD"
CLONE_NEWNET = 0x40000000
NAMESPACES = Path("/run/netns")


@dataclass(frozen=True)
class RankStart:
    """How one rank differs from the others.

    Args:
        variables: of its environment.
        log: file that its output is appended to.
        keeps_stdout: its stdout is the parent's, not the log.
        namespace: network namespace that it enters, None for the parent's.
        descriptor: that only this rank keeps, None where it has none.
    """

    variables: dict[str, str]
    log: str
    keeps_stdout: bool
    namespace: str | None
    descriptor: int | None


class ForkedRank:
    """The parent's handle of one rank, used like `subprocess.Popen`."""

    def __init__(self, ranks: ForkedRanks, rank: int) -> None:
        self.returncode: int | None = None
        self.pid: int | None = None
        self._ranks, self._rank = ranks, rank

    def poll(self) -> int | None:
        """Its return code, negative for a signal; None while it runs."""
        self._ranks.update(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired("rank", timeout or 0.0)
            self._ranks.update(left)
        return self.returncode

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._ranks.send(self._rank, signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._ranks.send(self._rank, signal.SIGKILL)


class ForkedRanks:
    """The parent's side: starts the process that forks, and learns from it what becomes of the ranks.

    Args:
        target, job_file: what `experiments.worker` gets.
        starts: the ranks, in order.
        variables: environment of the process that forks, and of all ranks.
    """

    def __init__(self, target: str, job_file: Path, starts: Sequence[RankStart], variables: Mapping[str, str]) -> None:
        self.ranks = [ForkedRank(self, rank) for rank in range(len(starts))]
        self._status, status_end = os.pipe()
        kept = [status_end, *(start.descriptor for start in starts if start.descriptor is not None)]
        with Path(starts[0].log).open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "experiments.forking", target, str(job_file)],
                env={**variables, STATUS_FD: str(status_end)},
                stdin=subprocess.PIPE,
                stderr=log,
                pass_fds=kept,
            )
        os.close(status_end)
        os.set_blocking(self._status, False)
        self._unread = b""
        self._say(json.dumps([asdict(start) for start in starts]))

    def send(self, rank: int, number: int) -> None:
        """Send a signal to a rank that still runs."""
        self._say(f"{rank} {int(number)}")

    def update(self, timeout_s: float | None) -> None:
        """Take in what has been said, waiting for something to be said for at most `timeout_s` (None: for ever)."""
        if self._status < 0 or not select.select([self._status], [], [], timeout_s)[0]:
            return
        said = os.read(self._status, 65536)
        if not said:
            self._close()
            return
        *lines, self._unread = (self._unread + said).split(b"\n")
        for line in lines:
            what, rank, number = line.decode().split()
            setattr(self.ranks[int(rank)], what, int(number))

    def _say(self, line: str) -> None:
        stream = self._process.stdin
        assert stream is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone, and `update` will find out
            stream.write(line.encode() + b"\n")
            stream.flush()

    def _close(self) -> None:
        """No more will be said: the process has ended, and no rank outlives it."""
        os.close(self._status)
        self._status = -1
        code = self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        for rank in self.ranks:
            if rank.returncode is None:
                rank.returncode = code or 1


def main(arguments: list[str]) -> None:
    """Import the target, fork the ranks, and stay until the last has ended; the ranks leave through here too."""
    from experiments.worker import PARENT_PID, die_with_parent, leave_ctrl_c_to_parent
    from experiments.worker import main as be_rank

    die_with_parent(int(os.environ[PARENT_PID]))
    leave_ctrl_c_to_parent()
    status = int(os.environ.pop(STATUS_FD))
    starts = [RankStart(**start) for start in json.loads(_read_line(0))]
    _import(arguments[0])
    # Threads by now: of jemalloc (pyarrow) and OpenBLAS (numpy), which take part in a fork (pthread_atfork).
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    pids: dict[int, int] = {}
    for rank, start in enumerate(starts):
        mine = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(status)
            _become(start, starts)
            os.environ[PARENT_PID] = str(mine)
            be_rank(arguments)
        pids[pid] = rank
        os.write(status, f"pid {rank} {pid}\n".encode())
    for start in starts:
        if start.descriptor is not None:
            os.close(start.descriptor)
    _attend(pids, status)


def _import(target: str) -> None:
    """Import what the ranks will need; where that fails, each rank will fail in the same way, and tell."""
    import importlib

    with contextlib.suppress(Exception):
        importlib.import_module(target.partition(":")[0])


def _become(start: RankStart, starts: Sequence[RankStart]) -> None:
    """Turn the forked process into that rank, as if it had been started by itself."""
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    with Path(start.log).open("ab") as log:
        os.dup2(log.fileno(), 2)
        if not start.keeps_stdout:
            os.dup2(log.fileno(), 1)
    for other in starts:
        if other is not start and other.descriptor is not None:
            os.close(other.descriptor)
    os.environ.update(start.variables)
    if start.namespace is not None:
        enter_network_namespace(start.namespace)


def enter_network_namespace(name: str) -> None:
    """Move this process into a network namespace that `ip netns add` made; raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    with (NAMESPACES / name).open("rb") as handle:
        if libc.setns(handle.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns to the network namespace {name} failed")


def _attend(pids: dict[int, int], status: int) -> None:
    """Pass signals on and tell of the ends of ranks, until there are no ranks."""
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    listening = [woken, 0]
    while True:
        while pids:
            pid, code = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            os.write(status, f"returncode {pids.pop(pid)} {os.waitstatus_to_exitcode(code)}\n".encode())
        if not pids:
            return
        ready, _, _ = select.select(listening, [], [])
        if woken in ready:
            os.read(woken, 4096)
        if 0 in ready:
            line = _read_line(0)
            if not line:
                listening.remove(0)
                continue
            rank, number = (int(word) for word in line.split())
            for pid, other in pids.items():
                if other == rank:
                    os.kill(pid, number)


def _read_line(descriptor: int) -> str:
    """One line, read byte by byte so that nothing behind it is taken from whoever reads next; empty at the end."""
    line = bytearray()
    while (byte := os.read(descriptor, 1)) not in (b"", b"\n"):
        line += byte
    return line.decode()


if __name__ == "__main__":
    main(sys.argv[1:])
