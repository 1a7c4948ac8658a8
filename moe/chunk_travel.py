"""The way of one direction's rows, out to the experts in chunks, through them and back: what each task does.

Where experts are cut over the ranks of a node, these gather what each of them received before they compute, and scatter
the sums of what their parts of the experts gave (`moe.expert_sharding`).

Dimensions: S copies this rank sends, R rows its experts compute, M model, n ranks of a node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe import ops
from moe.chunks import Chunks
from moe.collectives import gather_into, scatter_sums
from moe.expert_passes import ExpertRows
from moe.streams import Action

Compute = Callable[[int, Tensor, ExpertRows], Tensor]
"""What experts do with a chunk: its number, its rows [R_i, M] in the order of the experts, and how many each has."""


@dataclass(frozen=True)
class Links:
    """What rows travel over.

    Args:
        group: over whose ranks experts are spread.
        node: ranks that share these experts; None where each has its own.
        asynchronous: whether a collective returns at once, with a handle (`moe.streams.TaskRunner.asynchronous`).
    """

    group: dist.ProcessGroup
    node: dist.ProcessGroup | None
    asynchronous: bool

    def exchange(self, received: Tensor, sent: Tensor, receive: list[int], send: list[int]) -> dist.Work | None:
        """Start an all-to-all of so many rows."""
        return dist.all_to_all_single(received, sent, receive, send, group=self.group, async_op=self.asynchronous)

    def gather(self, whole: Tensor, part: Tensor) -> dist.Work | None:
        """Start an all-gather in the node; none where no rank has rows."""
        assert self.node is not None
        return gather_into(whole, part, self.node, self.asynchronous) if len(part) else None

    def scatter(self, part: Tensor, whole: Tensor) -> dist.Work | None:
        """Start a reduce-scatter in the node; none where no rank has rows."""
        assert self.node is not None
        return scatter_sums(part, whole, self.node, self.asynchronous) if len(part) else None


def travel(links: Links, chunks: Chunks, leaving_SM: Tensor, compute: Compute) -> Direction:
    """As the links are; arguments as of `Direction`."""
    return (Direction if links.node is None else ShardedDirection)(links, chunks, leaving_SM, compute)


class Direction:
    """Rows on their way through the experts, chunk by chunk; `compute` says what the experts do with a chunk's.

    Args:
        links: over which.
        chunks: of this direction.
        leaving_SM: what this rank sends, chunk by chunk.
        compute: rows of a chunk [R_i, M] in the order of the experts, to as many.
    """

    def __init__(
        self,
        links: Links,
        chunks: Chunks,
        leaving_SM: Tensor,
        compute: Compute,
    ) -> None:
        self.links, self.chunks, self.compute = links, chunks, compute
        # All buffers of collectives belong to the current stream, which waits for the others in the end.
        self.leaving_SM, self.back_SM = leaving_SM, torch.empty_like(leaving_SM)
        self.arrived_RM = leaving_SM.new_empty(chunks.queues.num_received, leaving_SM.shape[1])
        self.computed: list[Tensor | None] = [None] * chunks.degree

    @property
    def actions(self) -> dict[str, Action]:
        """By the kind of a task."""
        return {"dispatch": self.dispatch, "experts": self.experts, "combine": self.combine}

    def dispatch(self, chunk: int) -> dist.Work | None:
        rows = self.chunks.rows[chunk]
        arrived, leaving = self.arrived_RM[rows.receive_part], self.leaving_SM[rows.send_part]
        return self.links.exchange(arrived, leaving, rows.receive, rows.send)

    def experts(self, chunk: int) -> None:
        rows, orders = self.chunks.rows[chunk], self.chunks.orders
        rows_RM = self.arrived_RM[rows.receive_part]
        if orders is not None:
            rows_RM = ops.gather_rows(rows_RM, orders[0][rows.expert_part])
        y_RM = self.compute(chunk, rows_RM, ExpertRows(rows.experts, self.chunks.expert_ends[chunk]))
        self.computed[chunk] = y_RM if orders is None else ops.gather_rows(y_RM, orders[1][rows.expert_part])

    def combine(self, chunk: int) -> dist.Work | None:
        rows, computed = self.chunks.rows[chunk], self.computed[chunk]
        assert computed is not None
        return self.links.exchange(self.back_SM[rows.send_part], computed, rows.send, rows.receive)


class ShardedDirection(Direction):
    """The same with a gather in the node before the experts, and a scatter of sums behind them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        assert self.links.node is not None
        width, padded = self.leaving_SM.shape[1], [rows.padded for rows in self.chunks.rows]

        def buffers(times: int) -> list[Tensor]:
            return [self.leaving_SM.new_empty(times * num_rows, width) for num_rows in padded]

        self.arrived, self.gathered, self.summed = buffers(1), buffers(self.links.node.size()), buffers(1)

    @property
    def actions(self) -> dict[str, Action]:
        """By the kind of a task."""
        return super().actions | {"gather": self.gather, "scatter": self.scatter}

    def dispatch(self, chunk: int) -> dist.Work | None:
        rows = self.chunks.rows[chunk]
        arrived = self.arrived[chunk][: sum(rows.receive)]
        return self.links.exchange(arrived, self.leaving_SM[rows.send_part], rows.receive, rows.send)

    def gather(self, chunk: int) -> dist.Work | None:
        return self.links.gather(self.gathered[chunk], self.arrived[chunk])

    def experts(self, chunk: int) -> None:
        rows, (order, inverse) = self.chunks.rows[chunk], self.chunks.gathered_orders(chunk)
        rows_RM = ops.gather_rows(self.gathered[chunk], order)
        y_RM = self.compute(chunk, rows_RM, ExpertRows(rows.experts, self.chunks.expert_ends[chunk]))
        # Padding finds no row of the experts, and becomes zeros.
        self.computed[chunk] = ops.sum_copies(y_RM, inverse.unsqueeze(1)) if len(y_RM) else self.gathered[chunk]

    def scatter(self, chunk: int) -> dist.Work | None:
        computed = self.computed[chunk]
        assert computed is not None
        return self.links.scatter(self.summed[chunk], computed)

    def combine(self, chunk: int) -> dist.Work | None:
        rows = self.chunks.rows[chunk]
        summed = self.summed[chunk][: sum(rows.receive)]
        return self.links.exchange(self.back_SM[rows.send_part], summed, rows.send, rows.receive)
