"""The cut of a layer's routed copies into chunks, each of which travels, is computed and comes back by itself.

Every queue, the copies that one rank sends to one expert, is cut into r nearly equal parts, and chunk i holds the i-th
part of all: what FSMoE and Tutel do to their padded slots, here to exactly the rows that are there. Any r does: parts
differ by one row at most, and are empty where a queue has fewer rows than there are chunks.

Where experts are cut over the n ranks of a node (`moe.expert_sharding`), each of these gathers what all of them have
received, and computes on it. Gathered rows lie by rank of the node, each rank's padded to the longest; without a cut a
rank is a node of its own.

What a cut looks like depends on numbers of rows alone, which the host has: it works out where the parts of queues lie,
and a GPU lays rows by these pieces (`moe.ops.lay_pieces`).

Dimensions: T tokens of this rank, K choices, P ranks of the group, E experts, L experts a rank, S copies this rank
sends, n ranks that share experts, A = n P sources of copies, R copies that a rank computes, r chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import lcm

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from moe import ops
from moe.gate import Routing

Counts = NDArray[np.int64]

AS_QUEUED = (2, 3, 0, 1)
AS_SENT = (0, 2, 3, 1)
BY_EXPERT = (0, 3, 2, 1)
"""Orders in which parts of queues lie, by axes of (chunk, part of the chunk, rank, expert), the slowest first."""


@dataclass(frozen=True)
class ChunkRows:
    """One chunk on the host.

    Attributes:
        send, receive: rows to and from each of P ranks.
        node: rows that each of the n ranks has received.
        experts: rows of each of L experts.
        send_part, receive_part: where the chunk lies among the S sent, and among those that this rank receives.
        expert_part: where it lies among the R that it computes.
    """

    send: list[int]
    receive: list[int]
    node: list[int]
    experts: list[int]
    send_part: slice
    receive_part: slice
    expert_part: slice

    @property
    def padded(self) -> int:
        """Rows of each rank of the node when they are gathered."""
        return max(self.node)


class Chunks:
    """A cut into r chunks, which lie one behind the other; inside one, sent rows are sorted by expert (so by the rank
    that they go to), received rows by the rank that they come from and then by expert, until they are brought into the
    order of the experts.

    Args:
        queues: of the layer call.
        degree: r.
    """

    def __init__(self, queues: Queues, degree: int) -> None:
        self.queues, self.degree = queues, degree
        self._node_rnPL = _parts(queues.node_nPL, degree)
        send_rP = _parts(queues.send_PL, degree).sum(2)
        node_rnP, experts_rL = self._node_rnPL.sum(3), self._node_rnPL.sum((1, 2))
        receive_rP, node_rn = node_rnP[:, queues.place], node_rnP.sum(2)
        self._ends_rL = experts_rL.cumsum(1)
        lists = [rows.tolist() for rows in (send_rP, receive_rP, node_rn, experts_rL)]
        slices = map(_slices, (send_rP, receive_rP, node_rn))
        self.rows = [ChunkRows(*rows) for rows in zip(*lists, *slices, strict=True)]

    @cached_property
    def expert_ends(self) -> Tensor:
        """[r, L] int32, the row behind each expert's last, from the chunk's first."""
        return ops.on_device(self._ends_rL.astype(np.int32), self.queues.order.device)

    @cached_property
    def orders(self) -> tuple[Tensor, Tensor] | None:
        """[R] int64 twice: of each chunk, arrival order -> order of the experts, and back, each from its first row;
        None where they agree."""
        queues = self.queues
        if 1 in queues.computed_AL.shape:
            return None
        sizes_rAL = self._node_rnPL.reshape(self.degree, *queues.computed_AL.shape)
        arrived, by_expert = (_first_rows(sizes_rAL, self.degree, order) for order in (AS_SENT, BY_EXPERT))
        begins = np.broadcast_to(arrived[:, :1, :1], arrived.shape)
        pieces_4N = _stacked(arrived, by_expert, sizes_rAL, begins)
        return queues.laid(pieces_4N, queues.num_computed, queues.num_computed)

    def gathered_orders(self, chunk: int) -> tuple[Tensor, Tensor]:
        """For a chunk's rows that were gathered in the node, each rank's padded to n equal parts.

        Returns:
            [R_i] int64, order of the experts -> gathered row; [n * padded] int64, back, R_i where there is padding.
        """
        queues, rows, sizes_nPL = self.queues, self.rows[chunk], self._node_rnPL[chunk]
        sizes_nQ = sizes_nPL.reshape(len(sizes_nPL), -1)
        gathered_nQ = sizes_nQ.cumsum(1) - sizes_nQ + np.arange(len(sizes_nQ))[:, None] * rows.padded
        by_expert = _first_rows(sizes_nPL.reshape(1, *queues.computed_AL.shape), 1, BY_EXPERT)
        pieces_4N = _stacked(gathered_nQ, by_expert, sizes_nQ, np.zeros_like(sizes_nQ))
        return queues.laid(pieces_4N, len(rows.node) * rows.padded, sum(rows.node))


class Queues:
    """The copies of one layer call by source rank and expert; cut for each direction when that begins.

    Args:
        order: [S] int64, copy in the order of experts -> flat copy t * K + k.
        inverse_TK: [T, K] int64, its inverse; S where the copy is dropped.
        send_PL: [P, L], this rank's copies for each expert, on the host.
        node_nPL: [n, P, L], those that come to each rank of the node from each of the group, for each of its experts.
        place: of this rank in its node.
    """

    def __init__(self, order: Tensor, inverse_TK: Tensor, send_PL: Counts, node_nPL: Counts, place: int = 0) -> None:
        self.order, self.inverse_TK = order, inverse_TK
        self.send_PL, self.node_nPL, self.place = send_PL, node_nPL, place
        self.computed_AL = node_nPL.reshape(-1, node_nPL.shape[2])
        self.num_sent, self.num_computed = int(send_PL.sum()), int(node_nPL.sum())
        self.num_received = int(node_nPL[place].sum())
        self._cut: dict[int, Chunks] = {}

    def chunks(self, degree: int) -> Chunks:
        """Cut into so many."""
        if degree not in self._cut:
            self._cut[degree] = Chunks(self, degree)
        return self._cut[degree]

    def travel_orders(self, degree: int) -> tuple[Tensor, Tensor]:
        """`order` [S] and `inverse_TK` [T, K] for copies that lie in chunks."""
        if degree == 1:
            return self.order, self.inverse_TK
        sizes_rPL = _parts(self.send_PL, degree)
        queued, sent = (_first_rows(sizes_rPL, degree, order) for order in (AS_QUEUED, AS_SENT))
        dropped = [self.num_sent, self.num_sent, 1, 0]  # stay behind all others
        pieces_4N = np.column_stack([_stacked(queued, sent, sizes_rPL, np.zeros_like(sizes_rPL)), dropped])
        of_chunks, chunked = self.laid(pieces_4N, self.num_sent + 1, self.num_sent + 1)
        return self.order[of_chunks[: self.num_sent]], chunked[self.inverse_TK]

    def moved(self, before: int, after: int) -> tuple[tuple[Tensor, Tensor], Tensor] | None:
        """From a cut into so many chunks to another; None where they are the same.

        Returns:
            [S] int64 twice: the place before of each copy that is sent, by its place after, and the other way round;
            [R] int64, the place before of each row that is computed, in the order of the experts, by its place after.
        """
        if before == after:
            return None
        found = []
        for counts_QL, order in ((self.send_PL, AS_SENT), (self.computed_AL, BY_EXPERT)):
            sizes = _parts(counts_QL, lcm(before, after))  # each lies in a row in both
            places = [_first_rows(sizes, degree, order) for degree in (before, after)]
            num_rows = int(counts_QL.sum())
            found.append(self.laid(_stacked(*places, sizes, np.zeros_like(sizes)), num_rows, num_rows))
        return found[0], found[1][0]

    def laid(self, pieces_4N: Counts, num_here: int, num_there: int) -> tuple[Tensor, Tensor]:
        """As `moe.ops.lay_pieces`, on the device of the copies."""
        return ops.lay_pieces(pieces_4N, num_here, num_there, self.order.device)


def exchange_counts(
    routing: Routing, num_experts: int, group: dist.ProcessGroup, node: dist.ProcessGroup | None = None
) -> Queues:
    """Sort the copies that are kept and tell every rank how many come. Collective; waits for the counts on the host.

    Args:
        routing: of this rank's tokens.
        num_experts: E, over the ranks of the group.
        group: of P ranks.
        node: of n ranks that share experts; None where each has its own.
    """
    chosen, counts_E, num_kept = routing.expert_ids_TK.flatten(), routing.counts_E, routing.expert_ids_TK.numel()
    if routing.kept_TK is not None:
        kept = routing.kept_TK.flatten()
        chosen = torch.where(kept, chosen, num_experts)  # dropped copies sort behind the last expert
        counts_E, num_kept = ops.count_choices(chosen, num_experts + 1)[:-1].contiguous(), int(kept.sum())
    order, inverse = ops.sort_by_expert(chosen, num_experts, num_kept)
    arriving_E = torch.empty_like(counts_E)
    dist.all_to_all_single(arriving_E, counts_E, group=group)
    arriving_nE = arriving_E.unsqueeze(0)
    if node is not None:
        arriving_nE = arriving_E.new_empty(node.size(), num_experts)
        dist.all_gather(list(arriving_nE.unbind()), arriving_E, group=node)
    told = torch.cat([counts_E.unsqueeze(0), arriving_nE]).cpu().numpy()  # one wait
    send_PL, *node_nPL = told.reshape(len(told), group.size(), -1)
    inverse_TK, place = inverse.view_as(routing.expert_ids_TK), 0 if node is None else node.rank()
    return Queues(order, inverse_TK, send_PL, np.stack(node_nPL), place)


def _stacked(*numbers: Counts) -> Counts:
    """Arrays of as many numbers, each a row."""
    return np.stack([each.ravel() for each in numbers])


def _slices(counts_rN: Counts) -> list[slice]:
    """Of each chunk among the rows of all; counts [r, N]."""
    ends = counts_rN.sum(1).cumsum().tolist()
    return [slice(first, last) for first, last in zip([0, *ends], ends, strict=False)]


def _parts(counts: Counts, num_parts: int) -> Counts:
    """Counts of any shape to those of each part of so many, which stand first."""
    bounds = np.multiply.outer(np.arange(num_parts + 1), counts) // num_parts
    return bounds[1:] - bounds[:-1]


def _first_rows(sizes: Counts, degree: int, order: tuple[int, ...]) -> Counts:
    """Where each part of a queue lies, [parts, ranks, experts], when the cut is into so many chunks.

    Args:
        sizes: [parts, ranks, experts], of each; a chunk has as many parts as any other.
        degree: r.
        order: `AS_QUEUED`, `AS_SENT` or `BY_EXPERT`.
    """
    laid = sizes.reshape(degree, -1, *sizes.shape[1:]).transpose(order)
    first = (laid.cumsum() - laid.ravel()).reshape(laid.shape)
    return first.transpose(np.argsort(order)).reshape(sizes.shape)
