"""One spawned rank: `python -m experiments.worker <target> <job.json>`, started by `experiments.launch` only.

The target stands on the command line so that `ps` shows what a process does; the job file says everything. Nothing
heavy is imported here: a worker must be able to report an error before torch is loaded.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.failures import report_of, write_report
from experiments.ranks import RENDEZVOUS_TIMEOUT_S, Job, RankInfo, run_rank, write_result

if TYPE_CHECKING:
    from torch.distributed import Store

__all__ = ["RankInfo", "main"]

PARENT_PID = "MOE_SUITE_PARENT_PID"
STORE_FD = "MOE_SUITE_STORE_FD"
PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Make sure that this rank does not outlive its parent, however that one dies.

    Linux kills us with it (prctl); elsewhere a thread watches who our parent is.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    else:
        threading.Thread(target=_watch_parent, args=(parent_pid,), daemon=True).start()
    if os.getppid() != parent_pid:  # it died before we could ask
        os._exit(1)


def _watch_parent(parent_pid: int) -> None:
    pause = threading.Event()
    while os.getppid() == parent_pid:
        pause.wait(1.0)
    os._exit(1)


def leave_ctrl_c_to_parent() -> None:
    """Ignore SIGINT: a terminal sends Ctrl-C to us too, and the parent turns it into a stop request."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The parent started us with SIGINT blocked, so that none could arrive before the line above.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _meet() -> Store:
    """The store at which the ranks meet; rank 0 serves it, on the parent's listening socket if it got one."""
    from datetime import timedelta

    from torch.distributed import TCPStore

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    descriptor = os.environ.pop(STORE_FD, None)
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=rank == 0,
        timeout=timedelta(seconds=RENDEZVOUS_TIMEOUT_S),
        wait_for_workers=True,
        master_listen_fd=None if descriptor is None else int(descriptor),
    )


def main(arguments: list[str]) -> None:
    """Run one rank; never returns. Exit code 0, or 1 with `error_rank<r>.json` in the job's log folder."""
    die_with_parent(int(os.environ[PARENT_PID]))
    leave_ctrl_c_to_parent()
    faulthandler.enable()
    job = Job.load(Path(arguments[1]))
    log_dir = Path(job.log_dir)
    rank, world_size, local_rank, local_world_size, node_rank = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")
    )
    try:
        value = run_rank(job, rank, world_size, local_rank, local_world_size, node_rank, _meet)
        if rank == 0:
            write_result(log_dir, value)
    except BaseException as error:  # SystemExit and KeyboardInterrupt are failures here, too
        report = report_of(rank, error)
        print(report.traceback, file=sys.stderr, flush=True)
        try:
            write_report(log_dir, report)
        finally:
            # No interpreter shutdown: NCCL and thread pools may hang in it, and the other ranks are waiting.
            os._exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
