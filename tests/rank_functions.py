"""Tiny functions for ranks to run in tests: `function(payload, rank_info)`."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from experiments.ranks import RankInfo
from moe.errors import ConfigError, Problem, Refused


def introduce(payload: dict[str, Any], info: RankInfo) -> list[dict[str, Any]]:
    """Everyone's RankInfo, as rank 0 gathered it; each rank prints its name."""
    print(f"{payload['greeting']} from rank {info.rank}")
    print(f"complaint from rank {info.rank}", file=sys.stderr)
    mine = {
        "rank": info.rank,
        "world_size": info.world_size,
        "local_rank": info.local_rank,
        "local_world_size": info.local_world_size,
        "node_rank": info.node_rank,
        "device": str(info.device),
        "stop": info.stop_requested(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "allocator": os.environ.get("MALLOC_TRIM_THRESHOLD_"),
        "extra": os.environ.get("EXTRA"),
        "ctrl_c_ignored": signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
        "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    }
    gathered: list[dict[str, Any]] = [{} for _ in range(info.world_size)]
    dist.all_gather_object(gathered, mine)
    return gathered


def exchange(payload: dict[str, Any], info: RankInfo) -> list[float]:
    """All-to-all of `numbers` float32 per pair, value 100 * sender + receiver; sums of what rank 0 received."""
    return _exchange(payload["numbers"], info, None)


def exchange_in_kept_group(payload: dict[str, Any], info: RankInfo) -> list[float]:
    """`exchange` in a group that the first job of this process made, as upstream packages keep theirs."""
    if not _KEPT:
        _KEPT.append(dist.new_group())
    return _exchange(payload["numbers"], info, _KEPT[0])


_KEPT: list[dist.ProcessGroup] = []


def _exchange(numbers: int, info: RankInfo, group: dist.ProcessGroup | None) -> list[float]:
    world = len(dist.get_process_group_ranks(group or dist.group.WORLD))
    sent = torch.cat([torch.full((numbers,), 100.0 * info.rank + other) for other in range(world)])
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return [float(part.sum()) / numbers for part in received.chunk(world)]


def fail(payload: dict[str, Any], info: RankInfo) -> None:
    """Rank `payload["rank"]` ends as `payload["how"]` says, while the others wait for it in a collective."""
    dist.barrier()
    if info.rank == payload["rank"]:
        _end(payload["how"])
    dist.all_reduce(torch.ones(1))


def _end(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "exit":
        os._exit(7)
    elif how == "hang":
        threading.Event().wait()
    elif how == "memory":
        raise MemoryError
    elif how == "config":
        raise ConfigError(Problem("model.top_k", 9, "top_k is at most num_experts", "model.top_k=4"))
    elif how == "refused":
        raise Refused("This system needs CUDA.")
    raise ValueError("boom")


def value_that_json_cannot_hold(payload: dict[str, Any], info: RankInfo) -> object:
    """Something that can't travel to the parent."""
    return object()


def work_until_stopped(payload: dict[str, Any], info: RankInfo) -> Any:
    """Steps until all ranks agree that a stop was asked for, then `payload["value"]`; never, when not `obedient`.

    At its third step a rank sends itself the SIGINT that a terminal sends to a whole group, and says that it works:
    with a file `ready/rank<r>` that it keeps locked as long as it lives.
    """
    lock = (Path(payload["ready"]) / f"rank{info.rank}.new").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    step = 0
    while True:
        stop = torch.tensor([float(info.stop_requested())])
        dist.all_reduce(stop)
        if stop.item() and payload["obedient"]:
            return payload["value"]
        step += 1
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            Path(lock.name).rename(Path(lock.name).with_suffix(""))
            print("at work", flush=True)
