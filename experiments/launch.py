"""Running one function in every rank of a cluster.

Started plainly, `run_ranks` spawns the ranks on this machine, on plain loopback, in network namespaces or as a split
host; under torchrun or srun it joins the ranks that are there. Either way the caller gets rank 0's value, or one error
that names the cause.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments import join
from experiments.crew import Crew
from experiments.failures import (
    RankFailure,
    Report,
    error_of,
    read_reports,
    report_of,
    report_path,
    root_cause,
    write_report,
)
from experiments.netns import shaped_nodes
from experiments.ranks import (
    RENDEZVOUS_TIMEOUT_S,
    RESULT_FILE,
    STOP_FILE,
    DeviceKind,
    Job,
    abandon,
    read_result,
    run_rank,
    stop_file_in,
    write_result,
)
from experiments.split import split_variables
from experiments.stop import STOP_SIGNALS, StopRequest
from moe.errors import ConfigError, Problem, SuiteError

if TYPE_CHECKING:
    from torch.distributed import Store

__all__ = ["RankFailure", "is_main_process", "run_ranks"]

LaunchKind = Literal["spawn", "netns", "join", "split"]


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes for the whole run: any plain start, or joined rank 0."""
    here = join.ranks_here(os.environ)
    return here is None or here.rank == 0


def run_ranks(
    target: str,
    payload: dict[str, Any],
    *,
    num_ranks: int,
    ranks_per_node: int,
    launch: LaunchKind = "spawn",
    device: DeviceKind = "cpu",
    rate_mbit: float | None = None,
    log_dir: Path | str,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    on_poll: Callable[[], None] | None = None,
) -> Any:
    """Run `function(payload, rank_info)` in every rank and give rank 0's value.

    The first Ctrl-C or SIGTERM asks the ranks to end (`RankInfo.stop_requested`), the second ends them at once. When
    one rank dies, the others are ended. No rank outlives this process. Rank 0 writes to our stdout; everything else
    that the ranks print goes to `log_dir/rank<r>.log`.

    Args:
        target: `package.module:function`.
        payload: the function's first argument; JSON-able.
        num_ranks: ranks of the run, a multiple of `ranks_per_node`.
        ranks_per_node: ranks of one (real or pretended) node.
        launch: `spawn` on this machine, `netns` likewise with a network namespace per node, `join` insists on ranks
            that torchrun or srun started. `split` is `spawn` with every node a host of its own to NCCL, on CUDA only.
            Where ranks of torchrun or srun are, `spawn` and `split` join them, too.
        device: `cpu` (gloo) or `cuda` (NCCL, one rank a GPU).
        rate_mbit: rate of a node's link under `netns`, in Mbit/s; None is unshaped. Must be None otherwise.
        log_dir: made if missing; what an earlier run left in it is appended to (logs) or removed (reports).
        timeout_s: how long a rank may wait in one collective.
        env: environment variables for the ranks, on top of ours.
        on_poll: called by the parent some 20 times a second while it waits; not called when joining.

    Returns:
        What rank 0's function returned (JSON-able). Joining, the other ranks get None.

    Raises:
        RankFailure: a rank failed, ran out of memory or waited too long, or the run was stopped and rank 0 returned
            None. Joining, the process should then end: its process group may be beyond repair.
        ConfigError, Refused: raised by a rank, or by this function about `cluster.*`.
    """
    assert num_ranks >= 1 and num_ranks % ranks_per_node == 0, (num_ranks, ranks_per_node)
    assert rate_mbit is None or launch == "netns", "a rate without links to shape"
    logs = Path(log_dir).resolve()
    job = Job(target, payload, str(logs), device, timeout_s)
    if launch == "split" and device != "cuda":
        rule = f"splits a host for NCCL, which needs CUDA, and the device is {device}"
        raise ConfigError(Problem("cluster.launch", launch, rule, "use cluster=local_2x2, or cluster.device=cuda"))
    here = join.ranks_here(os.environ)
    if here is not None:
        return _join(job, here, num_ranks, ranks_per_node, launch, env or {})
    if launch == "join":
        rule = "no ranks are here to join: neither torchrun nor srun started this process"
        raise ConfigError(
            Problem("cluster.launch", launch, rule, "start with torchrun or srun, or use cluster.launch=spawn")
        )
    gpus = _visible_gpus(num_ranks) if device == "cuda" else []
    logs.mkdir(parents=True, exist_ok=True)
    _remove_traces(logs, range(num_ranks))
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest(stop_file_in(logs)))
        nodes = None
        if launch == "netns":
            nodes = stack.enter_context(shaped_nodes(num_ranks // ranks_per_node, rate_mbit))
        crew = Crew(job, num_ranks, ranks_per_node, nodes, gpus, env or {}, split=launch == "split")
        stack.callback(crew.end)
        crew.start()
        reports = crew.watch(stop, on_poll)
        return _outcome(job, reports, stop)


def _remove_traces(logs: Path, ranks: range) -> None:
    for path in [logs / STOP_FILE, logs / RESULT_FILE, *(report_path(logs, rank) for rank in ranks)]:
        path.unlink(missing_ok=True)


def _visible_gpus(num_ranks: int) -> list[str]:
    import torch

    count = torch.cuda.device_count()
    if count < num_ranks:
        rule = f"one rank needs one GPU, and this machine shows {count}"
        fix = "use a smaller cluster, more GPUs, or cluster.device=cpu"
        raise ConfigError(Problem("cluster.levels", f"{num_ranks} ranks", rule, fix))
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return chosen.split(",")[:count] if chosen else [str(index) for index in range(count)]


def _outcome(job: Job, reports: list[Report], stop: StopRequest) -> Any:
    """Rank 0's value, or the one error that explains the reports."""
    logs = Path(job.log_dir)
    if stop.urgent:
        raise RankFailure("interrupted", None, f"stopped at once by {' and '.join(stop.received)}")
    if reports:
        cause = root_cause(reports)
        if stop.requested and cause.kind in ("timeout", "lost_peer", "interrupted"):
            raise RankFailure("interrupted", None, f"stopped by {stop.by}; while ending, {cause.reason}")
        raise error_of(cause, logs, job.timeout_s)
    value = read_result(logs)
    if stop.requested and value is None:
        raise RankFailure("interrupted", None, f"stopped by {stop.by}")
    return value


_meetings: dict[str, Any] = {"store": None, "count": 0}


def _meet_here(here: join.RanksHere, ranks_per_node: int) -> Store:
    """A fresh part of this job's one store: a process may join several times, and each time the keys must be new."""
    import torch.distributed as dist

    if _meetings["store"] is None:
        limit = timedelta(seconds=RENDEZVOUS_TIMEOUT_S)
        _meetings["store"] = next(iter(dist.rendezvous("env://", here.rank, here.world_size, timeout=limit)))[0]
    _meetings["count"] += 1
    store = dist.PrefixStore(f"moe_suite/{_meetings['count']}", _meetings["store"])
    join.agree(here, ranks_per_node, store)
    return store


def _join(
    job: Job, here: join.RanksHere, num_ranks: int, ranks_per_node: int, launch: LaunchKind, env: Mapping[str, str]
) -> Any:
    if launch == "netns":
        rule = f"network namespaces are made by a plain start, and {here.starter} started this process"
        raise ConfigError(Problem("cluster.launch", launch, rule, "start without it, or use cluster=auto"))
    if launch == "split" and here.num_nodes > 1:
        rule = f"splits one host, and {here.starter} started the ranks on {here.num_nodes}"
        raise ConfigError(Problem("cluster.launch", launch, rule, "use cluster=auto, or start all ranks on one host"))
    join.check_size(here, num_ranks, ranks_per_node)
    split = split_variables(here.rank // ranks_per_node) if launch == "split" else {}
    os.environ.update({**here.variables(), **join.network_variables(here, os.environ), **split, **env})
    logs = Path(job.log_dir)
    logs.mkdir(parents=True, exist_ok=True)
    # All ranks meet before the function starts, and by then the traces are gone.
    report_path(logs, here.rank).unlink(missing_ok=True)
    if here.rank == 0:
        _remove_traces(logs, range(0))
    # SIGUSR1 is what `sbatch --signal=USR1@90` sends; left alone where somebody else already listens to it.
    extra = (signal.SIGUSR1,) if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL else ()
    with StopRequest(stop_file_in(logs), STOP_SIGNALS + extra, at_once=_interrupt, announce=here.rank == 0) as stop:
        try:
            value = run_rank(
                job,
                here.rank,
                num_ranks,
                here.local_rank,
                here.local_world_size,
                here.node_rank,
                lambda: _meet_here(here, ranks_per_node),
                keep_group=True,
            )
            if here.rank != 0:
                return None
            write_result(logs, value)
        except (Exception, KeyboardInterrupt) as error:
            write_report(logs, report_of(here.rank, error))
            if "torch" in sys.modules:
                abandon()
            if isinstance(error, SuiteError):
                raise
            raise _joint_error(job, num_ranks, stop) from error
        return _outcome(job, [], stop)


def _joint_error(job: Job, num_ranks: int, stop: StopRequest) -> SuiteError:
    """The error of the rank that was the cause, which may be another one: it left its report before it went away."""
    try:
        _outcome(job, read_reports(Path(job.log_dir), num_ranks), stop)
    except SuiteError as error:
        return error
    raise AssertionError("a failure without a report")


def _interrupt() -> None:
    raise KeyboardInterrupt
