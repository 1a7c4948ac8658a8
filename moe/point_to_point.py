"""Batched point-to-point between all ranks, and several layers in turn.

Dimensions: R rows, F numbers of one, N ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moe.mesh import ranks_are_on_cuda


class Exchange:
    """Rows to and from every rank in one batch of point-to-point messages, one for each pair that has rows; those that
    stay are copied meanwhile. Started when made; collective over all ranks.

    Args:
        rows_RF: [R, F], contiguous; those for rank 0 first.
        send_rows, receive_rows: [N], to and from each rank.
        rank: of this one.
    """

    def __init__(self, rows_RF: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int], rank: int) -> None:
        self._sent = list(rows_RF.split(list(send_rows)))
        self._received_RF = rows_RF.new_empty(sum(receive_rows), *rows_RF.shape[1:])
        received = list(self._received_RF.split(list(receive_rows)))
        mine, of_mine = received[rank], self._sent[rank]
        self._sent[rank], received[rank] = of_mine[:0], mine[:0]
        self._works = _started(self._sent, received, rank)
        mine.copy_(of_mine)

    def wait(self) -> None:
        """Until the rows are there; on a GPU what is queued next waits, the host does not."""
        for work in self._works:
            work.wait()
        self._works, self._sent = [], []

    def received(self) -> Tensor:
        """Rows [R', F], those from rank 0 first, once they are there."""
        self.wait()
        return self._received_RF


def _started(sent: list[Tensor], received: list[Tensor], rank: int) -> list[dist.Work]:
    """Messages to and from each rank, empty ones left out; what there is to wait for."""
    if len(sent) > 1 and ranks_are_on_cuda():  # the same messages of NCCL, by one call of the host for all
        work = dist.all_to_all(received, sent, async_op=True)
        assert work is not None
        return [work]
    operations = []
    for step in range(1, len(sent)):  # each rank begins with another one
        after, before = (rank + step) % len(sent), (rank - step) % len(sent)
        if len(sent[after]):
            operations.append(dist.P2POp(dist.isend, sent[after], after))
        if len(received[before]):
            operations.append(dist.P2POp(dist.irecv, received[before], before))
    works: list[dist.Work] = dist.batch_isend_irecv(operations) if operations else []
    return works


@torch.no_grad()
def in_turn(works: Iterable[Iterator[None]]) -> None:
    """Do the layers' works, each an iterator over its parts: while a layer's messages travel, the next layer's are
    prepared and started. All ranks go through the parts in the same order."""
    active: list[Iterator[None]] = []
    for work in works:
        active = _advanced([work, *active])
    while active:
        active = _advanced(active)


def _advanced(works: list[Iterator[None]]) -> list[Iterator[None]]:
    return [work for work in works if next(work, work) is not work]
