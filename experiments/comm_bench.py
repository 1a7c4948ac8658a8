"""The ranks' part of `experiments.comm`: messages of every level and size, in turn, in one process group."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from experiments.config import cluster_from, load_comm
from experiments.ranks import RankInfo
from experiments.timing import Step, interleave
from moe.topology import Cluster

Pattern = Literal["copy", "exchange", "all_to_all"]
BYTES_PER_TIMING = 1 << 20
MAX_MESSAGES_PER_TIMING = 16
"""A small message is sent several times in a row and the mean taken, so that the ranks' leaving the barrier at slightly
different times does not count as latency."""


class CommRow(NamedTuple):
    """One timing: seconds of one message (of the slowest rank), the mean over the few that were sent in a row.

    `pattern` is `copy` (level `self`), `exchange` (pairs of that level) or `all_to_all` (level empty: all of them);
    `size_bytes` is what one rank sends to one other.
    """

    pattern: str
    level: str
    size_bytes: int
    repeat: int
    seconds: float


@dataclass(frozen=True)
class Case:
    """One pattern between ranks of one level at one message size.

    Args:
        pattern, level, size_bytes: see `CommRow`.
        messages: how many `step` sends in a row.
        step: sends them, and returns when they are here (on a GPU: when they are queued).
    """

    pattern: Pattern
    level: str
    size_bytes: int
    messages: int
    step: Step


def measure(payload: dict[str, Any], info: RankInfo) -> list[list[Any]]:
    """Time every pattern, level and size in turn, in this rank. Collective.

    Args:
        payload: `config`: of the run.
        info: of this rank.

    Returns:
        `CommRow`s, the same on every rank.
    """
    config = load_comm(payload["config"])
    cases = list(build_cases(cluster_from(config.cluster), config.sizes_bytes, info))
    if info.rank == 0:
        print(f"comm: {info.world_size} ranks, {len(cases)} cases x {config.repeats} repeats", flush=True)
    steps = {f"{case.pattern}/{case.level}/{case.size_bytes}": case.step for case in cases}
    seconds = interleave(steps, config.repeats, config.warmup, info.device)
    return [
        list(CommRow(case.pattern, case.level, case.size_bytes, repeat, value / case.messages))
        for case, values in zip(cases, seconds.values(), strict=True)
        for repeat, value in enumerate(values)
    ]


def build_cases(cluster: Cluster, sizes_bytes: Sequence[int], info: RankInfo) -> Iterator[Case]:
    """Local copies, exchanges of every level that has pairs, and an even all-to-all over all ranks.

    The all-to-all cuts a buffer of each size into one part for every rank (sizes below the number of ranks are left
    out), so it needs no more memory than an exchange.
    """
    sent, received = torch.zeros(2, max(sizes_bytes), dtype=torch.uint8, device=info.device)
    for size in sizes_bytes:
        messages = _messages(size)
        yield Case("copy", "self", size, messages, _copy(sent[:size], received[:size], messages))
    for index, level in enumerate(cluster.levels[1:], 1):
        rounds = partners(cluster, info.rank, index)
        for size in sizes_bytes if rounds else ():
            messages = _messages(size)
            yield Case(
                "exchange", level.name, size, messages, _exchange(sent[:size], received[:size], rounds, messages)
            )
    if info.world_size > 1:
        for part in sorted({size // info.world_size for size in sizes_bytes} - {0}):
            whole, messages = part * info.world_size, _messages(part)
            yield Case("all_to_all", "", part, messages, _all_to_all(sent[:whole], received[:whole], messages))


def partners(cluster: Cluster, rank: int, level: int) -> list[tuple[int, int]]:
    """Whom `rank` sends to and whom it receives from in each permutation round of `level` (1 or above).

    In round k a rank sends to the rank at its own place k groups of the level below further on, and receives from the
    one k groups before, round the ring: all ranks are busy in every round, for every fan-out, and after fanout - 1
    rounds every such pair has met. With two groups the two are one partner, a plain exchange.

    Returns:
        (destination, source) for every round; empty when the level is one group of the level below.
    """
    inner, fanout = cluster.group_size(level - 1), cluster.levels[level].fanout
    place = rank // inner % fanout
    first = rank - place * inner
    return [
        (first + (place + shift) % fanout * inner, first + (place - shift) % fanout * inner)
        for shift in range(1, fanout)
    ]


def _messages(size_bytes: int) -> int:
    """How many messages of this size one timing sends."""
    return min(MAX_MESSAGES_PER_TIMING, max(1, BYTES_PER_TIMING // size_bytes))


def _copy(sent: torch.Tensor, received: torch.Tensor, messages: int) -> Step:
    def step() -> None:
        for _ in range(messages):
            received.copy_(sent)

    return step


def _exchange(sent: torch.Tensor, received: torch.Tensor, rounds: list[tuple[int, int]], messages: int) -> Step:
    """Each call is one permutation round, the next call the next one; the ranks stay in step."""
    turns = itertools.cycle(
        [
            [dist.P2POp(dist.isend, sent, destination), dist.P2POp(dist.irecv, received, source)]
            for destination, source in rounds
        ]
    )

    def step() -> None:
        operations = next(turns)
        for _ in range(messages):
            for work in dist.batch_isend_irecv(operations):
                work.wait()

    return step


def _all_to_all(sent: torch.Tensor, received: torch.Tensor, messages: int) -> Step:
    def step() -> None:
        for _ in range(messages):
            dist.all_to_all_single(received, sent)

    return step
