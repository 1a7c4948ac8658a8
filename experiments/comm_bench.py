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
from moe.mesh import block_group, create_mesh
from moe.topology import Cluster

Pattern = Literal["copy", "exchange", "all_to_all", "inter", "intra"]
BYTES_PER_TIMING = 1 << 20
MAX_MESSAGES_PER_TIMING = 16
"""A small message is sent several times in a row and the mean taken, so that the ranks' leaving the barrier at slightly
different times does not count as latency."""


class CommRow(NamedTuple):
    """One timing: seconds of one message (of the slowest rank), the mean over the few that were sent in a row.

    `pattern` is `copy` (level `self`), `exchange` (pairs of that level), or an even all-to-all: `all_to_all` (level
    empty: all of them), `inter` (ranks at equal places, across that level) or `intra` (all ranks of one group of that
    level); `size_bytes` is what one rank sends to one other.
    """

    pattern: str
    level: str
    size_bytes: int
    repeat: int
    seconds: float


class Collective(NamedTuple):
    """An even all-to-all of a hierarchical dispatch, which all groups of ranks make at once.

    Attributes:
        name: `standard`, `Inter-1`, `Intra-1`, ...
        pattern, level: see `CommRow`.
        outer: consecutive ranks that it stays in.
        inner: consecutive ranks of which one takes part, the one at the caller's place.
    """

    name: str
    pattern: Pattern
    level: str
    outer: int
    inner: int

    @property
    def num_ranks(self) -> int:
        """Ranks that one of them joins."""
        return self.outer // self.inner


def collectives_to_measure(cluster: Cluster) -> list[Collective]:
    """The 2 D - 1 collectives of D levels of more than one group (see `moe.topology.CollectiveCosts`); none for one
    rank."""
    crossed = cluster.crossed_levels[::-1]  # outermost first
    if not crossed:
        return []
    found = [Collective("standard", "all_to_all", "", cluster.world_size, 1)]
    for number, level in enumerate(crossed[:-1], 1):
        size, name = cluster.group_size(level), cluster.levels[level].name
        found.append(Collective(f"Inter-{number}", "inter", name, size, cluster.group_size(level - 1)))
    for number, level in enumerate(crossed[1:], 1):
        size, name = cluster.group_size(level), cluster.levels[level].name
        found.append(Collective(f"Intra-{number}", "intra", name, size, 1))
    return found


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
    """Local copies, exchanges of every level that has pairs, and the even all-to-alls. Collective.

    An all-to-all cuts a buffer of each size into one part for every rank that it joins (sizes below their number are
    left out), so it needs no more memory than an exchange.
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
    mesh = create_mesh(cluster, info.device)
    for collective in collectives_to_measure(cluster):
        group = block_group(mesh, collective.outer, collective.inner)
        for part in sorted({size // collective.num_ranks for size in sizes_bytes} - {0}):
            whole, messages = part * collective.num_ranks, _messages(part)
            step = _all_to_all(sent[:whole], received[:whole], messages, group)
            yield Case(collective.pattern, collective.level, part, messages, step)


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


def _all_to_all(sent: torch.Tensor, received: torch.Tensor, messages: int, group: dist.ProcessGroup) -> Step:
    def step() -> None:
        for _ in range(messages):
            dist.all_to_all_single(received, sent, group=group)

    return step
