"""Counts the bytes that cross each cluster level, for upstream packages and native code alike.

The meter stands in front of the functions of `torch.distributed`, which upstream packages look up at every call. Token
traffic (all-to-all, point-to-point) is counted exactly, from the split sizes. Reductions, gathers and broadcasts have
no single byte count: they are counted as a ring moves them, each rank sending to the next rank of the group.
"""

from __future__ import annotations

import inspect
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe.topology import Cluster

CLASSES = ("alltoall", "reduction", "other")
"""Byte classes: token traffic, gradient-like reductions, everything else (gathers, broadcasts)."""

INSTALLED: list[LinkMeter] = []
"""Meters that count now; code that sends without `torch.distributed` tells them (`LinkMeter.count_all_to_all`)."""


@contextmanager
def uncounted() -> Iterator[None]:
    """Meters forget what is sent inside the block, such as measurements that a system plans by: no part of a step."""
    before = [(meter, dict(meter.sent)) for meter in INSTALLED]
    try:
        yield
    finally:
        for meter, sent in before:
            meter.reset()
            meter.sent.update(sent)


class LinkMeter:
    """Bytes that this rank sent, by level and class.

    Args:
        cluster: levels of the ranks of the default process group.
        rank: this rank.
    """

    def __init__(self, cluster: Cluster, rank: int) -> None:
        self.cluster = cluster
        self.rank = rank
        self._sent: dict[tuple[int, str], int] = defaultdict(int)
        self._later: list[tuple[Tensor, int, dist.ProcessGroup | None]] = []
        self._inside = threading.local()
        self._levels_of: dict[tuple[int, ...], list[int]] = {}
        self._group_ranks: dict[int, tuple[dist.ProcessGroup | None, list[int]]] = {}

    @property
    def sent(self) -> dict[tuple[int, str], int]:
        """{(level index, class): bytes} since the meter was made or `reset`. Waits for what GPUs have counted."""
        later, self._later = self._later, []
        by_device: dict[torch.device, list[Tensor]] = {}
        for rows_P, _, _ in later:
            by_device.setdefault(rows_P.device, []).append(rows_P)
        numbers = {device: iter(torch.cat(rows).tolist()) for device, rows in by_device.items()}
        for rows_P, row_bytes, group in later:
            self._send_splits([row_bytes * rows for rows in islice(numbers[rows_P.device], len(rows_P))], group)
        return self._sent

    def reset(self) -> None:
        """Forget what was counted."""
        self._later.clear()
        self._sent.clear()

    def as_tensor(self) -> Tensor:
        """What was counted, as float64 [levels, classes], ready to be summed over ranks."""
        counted = torch.zeros(len(self.cluster.levels), len(CLASSES), dtype=torch.float64)
        for (level, kind), num_bytes in self.sent.items():
            counted[level, CLASSES.index(kind)] = num_bytes
        return counted

    @contextmanager
    def installed(self) -> Iterator[LinkMeter]:
        """Count every collective called through `torch.distributed` inside the block. Not re-entrant."""
        original = {name: getattr(dist, name) for name in _COUNTERS if hasattr(dist, name)}
        INSTALLED.append(self)
        try:
            for name, function in original.items():
                _replace(name, self._counting(function, _COUNTERS[name]))
            yield self
        finally:
            INSTALLED.remove(self)
            for name, function in original.items():
                _replace(name, function)

    def count_all_to_all(self, bytes_per_peer: list[int], group: dist.ProcessGroup | None) -> None:
        """Count token traffic that a package sent through a communicator of its own.

        Args:
            bytes_per_peer: that this rank sent to each rank of the group, itself included.
            group: process group of the same ranks; None for all.
        """
        self._send_splits(bytes_per_peer, group)

    def count_rows(self, rows_P: Tensor, row_bytes: int, group: dist.ProcessGroup | None) -> None:
        """As `count_all_to_all`, where a GPU knows how many: the host waits for that when the bytes are asked for.

        Args:
            rows_P: [P] int64, that this rank sent to each rank of the group; not to be written any more.
            row_bytes: of each.
            group: as there.
        """
        self._later.append((rows_P, row_bytes, group))

    def _counting(self, function: Callable[..., Any], count: Callable[[LinkMeter, dict[str, Any]], None]) -> Any:
        signature = inspect.signature(function)

        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._inside, "a_call", False):  # torch writes send with isend
                return function(*args, **kwargs)
            count(self, signature.bind(*args, **kwargs).arguments)
            self._inside.a_call = True
            try:
                return function(*args, **kwargs)
            finally:
                self._inside.a_call = False

        return counted

    def _ranks(self, group: dist.ProcessGroup | None) -> list[int]:
        # The group itself is kept beside its ranks, so that its id can't be given to another group.
        known = self._group_ranks.get(id(group))
        if known is None:
            known = (group, dist.get_process_group_ranks(group if group is not None else dist.group.WORLD))
            self._group_ranks[id(group)] = known
        return known[1]

    def _levels(self, group: dist.ProcessGroup | None) -> list[int]:
        ranks = self._ranks(group)
        key = tuple(ranks)
        if key not in self._levels_of:
            self._levels_of[key] = [self.cluster.level_of(self.rank, peer) for peer in ranks]
        return self._levels_of[key]

    def _send_splits(self, bytes_per_peer: list[int], group: dist.ProcessGroup | None) -> None:
        for level, num_bytes in zip(self._levels(group), bytes_per_peer, strict=True):
            self._sent[level, "alltoall"] += num_bytes

    def count_to_next(self, num_bytes: float, group: dist.ProcessGroup | None, kind: str) -> None:
        """Count what this rank sends to the next one of a ring.

        Args:
            num_bytes: how much.
            group: process group of the ring, in its order; None for all.
            kind: one of `CLASSES`.
        """
        ranks = self._ranks(group)
        if len(ranks) > 1:
            neighbour = ranks[(ranks.index(self.rank) + 1) % len(ranks)]
            self._sent[self.cluster.level_of(self.rank, neighbour), kind] += round(num_bytes)

    def _group_size(self, group: dist.ProcessGroup | None) -> int:
        return len(self._ranks(group))


def _replace(name: str, function: Callable[..., Any]) -> None:
    setattr(dist, name, function)
    if name == "isend":  # batch_isend_irecv compares with, and calls, the name in its own module
        dist.distributed_c10d.isend = function


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _all_to_all_single(meter: LinkMeter, call: dict[str, Any]) -> None:
    data, group = call["input"], call.get("group")
    splits = call.get("input_split_sizes")
    if splits is None or len(splits) == 0:
        size = meter._group_size(group)
        meter._send_splits([_bytes(data) // size] * size, group)
    else:
        row_bytes = _bytes(data) // data.shape[0] if data.shape[0] else 0
        meter._send_splits([rows * row_bytes for rows in splits], group)


def _all_to_all(meter: LinkMeter, call: dict[str, Any]) -> None:
    meter._send_splits([_bytes(tensor) for tensor in call["input_tensor_list"]], call.get("group"))


def _all_reduce(meter: LinkMeter, call: dict[str, Any]) -> None:
    group = call.get("group")
    size = meter._group_size(group)
    meter.count_to_next(2 * (size - 1) / size * _bytes(call["tensor"]), group, "reduction")


def _reduce_scatter(meter: LinkMeter, call: dict[str, Any]) -> None:
    group = call.get("group")
    size = meter._group_size(group)
    meter.count_to_next((size - 1) / size * _bytes(call["input"]), group, "reduction")


def _reduce_scatter_list(meter: LinkMeter, call: dict[str, Any]) -> None:
    num_bytes = sum(_bytes(tensor) for tensor in call["input_list"])
    size = meter._group_size(call.get("group"))
    meter.count_to_next((size - 1) / size * num_bytes, call.get("group"), "reduction")


def _gather(argument: str) -> Callable[[LinkMeter, dict[str, Any]], None]:
    def count(meter: LinkMeter, call: dict[str, Any]) -> None:
        group = call.get("group")
        meter.count_to_next((meter._group_size(group) - 1) * _bytes(call[argument]), group, "other")

    return count


def _broadcast(meter: LinkMeter, call: dict[str, Any]) -> None:
    group = call.get("group")
    ranks = meter._ranks(group)
    source = call.get("src") if call.get("src") is not None else ranks[call.get("group_src") or 0]
    if source is not None and ranks[(ranks.index(meter.rank) + 1) % len(ranks)] != source:
        meter.count_to_next(_bytes(call["tensor"]), group, "other")


def _reduce(meter: LinkMeter, call: dict[str, Any]) -> None:
    group = call.get("group")
    ranks = meter._ranks(group)
    target = call["dst"] if call.get("dst") is not None else ranks[call.get("group_dst") or 0]
    if meter.rank != target:
        meter.count_to_next(_bytes(call["tensor"]), group, "reduction")


def _send(meter: LinkMeter, call: dict[str, Any]) -> None:
    peer = call.get("dst")
    if peer is None:
        peer = meter._ranks(call.get("group"))[call["group_dst"]]
    meter._sent[meter.cluster.level_of(meter.rank, peer), "alltoall"] += _bytes(call["tensor"])


_COUNTERS: dict[str, Callable[[LinkMeter, dict[str, Any]], None]] = {
    "all_to_all_single": _all_to_all_single,
    "all_to_all": _all_to_all,
    "all_reduce": _all_reduce,
    "reduce": _reduce,
    "reduce_scatter": _reduce_scatter_list,
    "reduce_scatter_tensor": _reduce_scatter,
    "reduce_scatter_single": _reduce_scatter,
    "all_gather_into_tensor": _gather("input_tensor"),
    "all_gather_single": _gather("input_tensor"),
    "all_gather": _gather("tensor"),
    "broadcast": _broadcast,
    "send": _send,
    "isend": _send,
}
