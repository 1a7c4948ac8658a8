"""Turning one process into one rank: device, process group, the rank's function, and its orderly end."""

from __future__ import annotations

import atexit
import importlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moe.errors import ConfigError, Problem

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

DeviceKind = Literal["cpu", "cuda"]
STOP_FILE = "stop_requested"
JOB_STOP_FILE = "MOE_SUITE_STOP_FILE"
"""Environment: a file that whoever started all ranks makes to stop them, in place of STOP_FILE in the log folder."""
GIVEN_UP = "MOE_SUITE_GIVEN_UP"
"""Environment of joined ranks: ids of runs that failed in this job already. Joined ranks can't outlive a failure, so
the job starts them again; these runs are passed over then, and count as failed."""
RESULT_FILE = "result.json"
# Ranks may start far apart (imports on a cold disk, a busy node), so meeting each other has a limit of its own.
RENDEZVOUS_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class RankInfo:
    """Who this rank is.

    Args:
        rank: 0 .. world_size - 1.
        world_size: ranks of the run.
        local_rank: index among the ranks of this node, also the index of its GPU.
        local_world_size: ranks on this node.
        node_rank: index of the node.
        device: `cpu` or `cuda:<index>`.
        stop_file: exists as soon as the user asked the run to stop.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    device: torch.device
    stop_file: Path

    def stop_requested(self) -> bool:
        """Whether the user (Ctrl-C) or the scheduler (SIGTERM) asked the run to save and end.

        Two ranks may see it one step apart: agree on the answer (say, all-reduce its maximum) before leaving a loop
        that holds collectives.
        """
        return self.stop_file.exists()


@dataclass(frozen=True)
class Job:
    """What a rank is to do; travels to spawned workers as a JSON file.

    Args:
        target: `package.module:function`, called as `function(payload, rank_info)`.
        payload: its JSON-able argument.
        log_dir: folder of the logs, the reports and the result.
        device: `cpu` (gloo) or `cuda` (NCCL).
        timeout_s: how long a rank may wait in one collective.
    """

    target: str
    payload: dict[str, Any]
    log_dir: str
    device: DeviceKind
    timeout_s: float

    def save(self, path: Path) -> None:
        """Write the job; raises TypeError for a payload that JSON can't hold."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Job:
        """Read what `save` wrote."""
        return cls(**json.loads(path.read_text()))


def stop_file_in(log_dir: Path) -> Path:
    """What `RankInfo.stop_requested` looks for."""
    return Path(os.environ.get(JOB_STOP_FILE) or log_dir / STOP_FILE)


def resolve(target: str) -> Callable[[dict[str, Any], RankInfo], Any]:
    """The function named by `package.module:function`; raises ImportError or AttributeError."""
    module, _, name = target.partition(":")
    function: Callable[[dict[str, Any], RankInfo], Any] = getattr(importlib.import_module(module), name)
    return function


def run_rank(
    job: Job,
    rank: int,
    world_size: int,
    local_rank: int,
    local_world_size: int,
    node_rank: int,
    meet: Callable[[], Store],
    keep_group: bool = False,
) -> Any:
    """Be one rank: make the process group, call the job's function, wait for the others, take the group down.

    Args:
        job: what to do.
        rank, world_size, local_rank, local_world_size, node_rank: see `RankInfo`.
        meet: makes the store at which the ranks meet; called once the function's module is imported.
        keep_group: leave the process group to the next job of this process, with the timeout that it was made with:
            upstream packages keep the groups that they made in it.

    Returns:
        The function's value. Whatever it raises passes through; on CUDA the process should then end, because NCCL
        may still wait for collectives that will never finish.
    """
    function = resolve(job.target)
    device = _device(job.device, local_rank)
    if device.type == "cuda":
        import torch

        # Backward on the thread that calls it: to hand a step to another and back can take longer than its launches.
        torch.autograd.set_multithreading_enabled(False)
    info = RankInfo(rank, world_size, local_rank, local_world_size, node_rank, device, stop_file_in(Path(job.log_dir)))
    with _process_group(info, meet(), job.timeout_s, keep_group):
        return function(job.payload, info)


def _device(kind: DeviceKind, local_rank: int) -> torch.device:
    import torch  # only here: a worker that fails before this point should fail at once

    if kind == "cpu":
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    index = 0 if visible == 1 else local_rank  # a scheduler may show each rank nothing but its own GPU
    if index >= visible:
        raise ConfigError(
            Problem(
                "cluster.device",
                "cuda",
                f"local rank {local_rank} needs a GPU of its own and this node shows {visible}",
                "start at most one rank per GPU, or use cluster.device=cpu",
            )
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


@contextmanager
def _process_group(info: RankInfo, store: Store, timeout_s: float, keep: bool) -> Iterator[None]:
    import torch.distributed as dist

    on_cuda = info.device.type == "cuda"
    if not (keep and dist.is_initialized()):
        dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            store=store,
            rank=info.rank,
            world_size=info.world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=info.device if on_cuda else None,
        )
        if keep:
            atexit.register(_take_down)
    yield  # after an exception the group is left as it is: see `abandon`
    if dist.is_initialized():
        dist.barrier()  # nobody takes the store or a connection away while another rank still works
        if not keep:
            dist.destroy_process_group()


def _take_down() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def abandon() -> None:
    """Give up a process group after a failure, when the report is written: the other ranks notice from here on.

    NCCL's is left to the end of the process: taking it down may wait for a collective that will never finish.
    """
    import torch.distributed as dist

    atexit.unregister(_take_down)
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def write_result(log_dir: Path, value: Any) -> None:
    """Keep rank 0's value for the parent; raises TypeError when JSON can't hold it."""
    draft = log_dir / f"{RESULT_FILE}.tmp"
    draft.write_text(json.dumps(value))
    draft.replace(log_dir / RESULT_FILE)


def read_result(log_dir: Path) -> Any:
    """Rank 0's value."""
    return json.loads((log_dir / RESULT_FILE).read_text())
