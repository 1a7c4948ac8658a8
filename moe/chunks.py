"""The cut of a layer's routed copies into chunks, each of which travels, is computed and comes back by itself.

Every queue, the copies that one rank sends to one expert, is cut into r nearly equal parts, and chunk i holds the i-th
part of all: what FSMoE and Tutel do to their padded slots, here to exactly the rows that are there. Any r does: parts
differ by one row at most, and are empty where a queue has fewer rows than there are chunks.

Where experts are cut over the n ranks of a node (`moe.expert_sharding`), each of these gathers what all of them have
received, and computes on it. Gathered rows lie by rank of the node, each rank's padded to the longest; without a cut a
rank is a node of its own.

Dimensions: T tokens of this rank, K choices, P ranks of the group, E experts, L experts a rank, S copies this rank
sends, n ranks that share experts, A = n P sources of copies, R copies that a rank computes, r chunks, N queues.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from moe import ops
from moe.gate import Routing

Counts = NDArray[np.int64]


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
        send_rPL = _parts(queues.send_PL, degree)
        node_rnPL = _parts(queues.node_nPL, degree)
        receive_rPL = node_rnPL[:, queues.place]
        slices = zip(*map(_slices, (send_rPL, receive_rPL, node_rnPL)), strict=True)
        self.rows = [
            ChunkRows(
                send_rPL[chunk].sum(1).tolist(),
                receive_rPL[chunk].sum(1).tolist(),
                node_rnPL[chunk].sum((1, 2)).tolist(),
                node_rnPL[chunk].sum((0, 1)).tolist(),
                *parts,
            )
            for chunk, parts in enumerate(slices)
        ]

    @cached_property
    def expert_ends(self) -> Tensor:
        """[r, L] int32, the row behind each expert's last, from the chunk's first."""
        return self._sizes_rAL.sum(1).cumsum(1, dtype=torch.int32)

    @cached_property
    def _sizes_rAL(self) -> Tensor:
        """[r, A, L] int64, rows of each chunk by source and expert."""
        arriving_AL = self.queues.arriving_AL
        return _bounds(arriving_AL.flatten(), self.degree).diff(dim=0).view(self.degree, *arriving_AL.shape)

    @cached_property
    def sent_places(self) -> Tensor | None:
        """[S] int64, where each copy, in the order of experts, lies among the chunks; None where that is its place."""
        if self.degree == 1:
            return None
        queues = self.queues
        return places(queues.counts_E, queues.num_sent, self.degree)

    @cached_property
    def _by_expert(self) -> tuple[Tensor, Tensor] | None:
        """[R] int64 twice: arrival order -> order of the experts in their chunk, and back; None where they agree."""
        queues = self.queues
        num_sources, num_local = queues.arriving_AL.shape
        if num_sources == 1 or num_local == 1:
            return None
        key_rL = torch.arange(self.degree * num_local, device=queues.arriving_AL.device)
        key_rAL = key_rL.view(self.degree, 1, num_local).expand(self.degree, num_sources, num_local)
        arriving_R = key_rAL.flatten().repeat_interleave(self._sizes_rAL.flatten(), output_size=queues.num_computed)
        return ops.sort_by_expert(arriving_R, self.degree * num_local, queues.num_computed)

    @cached_property
    def orders(self) -> tuple[Tensor, Tensor] | None:
        """[R] int64 twice: of each chunk, arrival order -> order of the experts, and back, each from its first row;
        None where they agree."""
        if self._by_expert is None or self.degree == 1:
            return self._by_expert
        queues, (order_R, inverse_R) = self.queues, self._by_expert
        sizes_r = self._sizes_rAL.flatten(1).sum(1)
        first_R = (sizes_r.cumsum(0) - sizes_r).repeat_interleave(sizes_r, output_size=queues.num_computed)
        return order_R - first_R, inverse_R - first_R

    def gathered_orders(self, chunk: int) -> tuple[Tensor, Tensor]:
        """For a chunk's rows that were gathered in the node, each rank's padded to n equal parts.

        Returns:
            [R_i] int64, order of the experts -> gathered row; [n * padded] int64, back, R_i where there is padding.
        """
        rows, device = self.rows[chunk], self.queues.arriving_AL.device
        sizes_n = self._sizes_rAL[chunk].view(len(rows.node), -1).sum(1)
        starts_n = torch.arange(len(rows.node), device=device) * rows.padded
        shift_n = starts_n - (sizes_n.cumsum(0) - sizes_n)
        num_rows = sum(rows.node)
        gathered_R = torch.arange(num_rows, device=device) + shift_n.repeat_interleave(sizes_n, output_size=num_rows)
        if self.orders is not None:
            gathered_R = gathered_R[self.orders[0][rows.expert_part]]
        return gathered_R, ops.inverse_of(gathered_R, len(rows.node) * rows.padded)

    @cached_property
    def expert_places(self) -> Tensor:
        """[R] int64, where each computed row, by source, expert and place in the queue, lies among the chunks when
        these are in the order of the experts."""
        queues = self.queues
        arrived_R = places(queues.arriving_AL.flatten(), queues.num_computed, self.degree)
        return arrived_R if self._by_expert is None else self._by_expert[1][arrived_R]


class Queues:
    """The copies of one layer call by source rank and expert; cut for each direction when that begins.

    Args:
        order: [S] int64, copy in the order of experts -> flat copy t * K + k.
        inverse_TK: [T, K] int64, its inverse; S where the copy is dropped.
        counts_E: [E] int64, this rank's copies for each expert.
        arriving_AL: [A, L] int64, copies that come to each rank of the node from each of the group, for each of its
            experts.
        send_PL: [P, L], the copies for each expert on the host.
        node_nPL: [n, P, L], those that come likewise.
        place: of this rank in its node.
    """

    def __init__(
        self,
        order: Tensor,
        inverse_TK: Tensor,
        counts_E: Tensor,
        arriving_AL: Tensor,
        send_PL: Counts,
        node_nPL: Counts,
        place: int = 0,
    ) -> None:
        self.order, self.inverse_TK = order, inverse_TK
        self.counts_E, self.arriving_AL = counts_E, arriving_AL
        self.send_PL, self.node_nPL, self.place = send_PL, node_nPL, place
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
        places_S = self.chunks(degree).sent_places
        if places_S is None:
            return self.order, self.inverse_TK
        order = torch.empty_like(self.order)
        order[places_S] = self.order
        dropped = places_S.new_full((1,), self.num_sent)
        return order, torch.cat([places_S, dropped])[self.inverse_TK]


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
    arriving_AL = arriving_nE.view(-1, send_PL.shape[1])
    inverse_TK, place = inverse.view_as(routing.expert_ids_TK), 0 if node is None else node.rank()
    return Queues(order, inverse_TK, counts_E, arriving_AL, send_PL, np.stack(node_nPL), place)


def _slices(counts_rN: Counts) -> list[slice]:
    """Of each chunk among the rows of all; counts [r, ...]."""
    ends = counts_rN.reshape(len(counts_rN), -1).sum(1).cumsum().tolist()
    return [slice(first, last) for first, last in zip([0, *ends], ends, strict=False)]


def _parts(counts: Counts, degree: int) -> Counts:
    """Counts of any shape to those of each part, [r, ...]."""
    steps = np.arange(degree + 1).reshape(-1, *[1] * counts.ndim)
    return np.diff(counts * steps // degree, axis=0)


def _bounds(counts_N: Tensor, degree: int) -> Tensor:
    """[r + 1, N], where each part of a queue begins."""
    steps = torch.arange(degree + 1, device=counts_N.device).unsqueeze(1)
    return (counts_N * steps).div(degree, rounding_mode="floor")


def places(counts_N: Tensor, num_rows: int, degree: int) -> Tensor:
    """Where the rows of some queues lie when their parts are put together into chunks.

    Args:
        counts_N: [N] int64, rows of each queue.
        num_rows: their sum.
        degree: r.

    Returns:
        [num_rows] int64, by queue and place in the queue.
    """
    device, num_queues = counts_N.device, len(counts_N)
    bounds = _bounds(counts_N, degree)
    sizes_rN = bounds.diff(dim=0)
    starts_rN = (sizes_rN.flatten().cumsum(0) - sizes_rN.flatten()).view_as(sizes_rN)
    shift_rN = starts_rN - bounds[:-1]
    queue = torch.arange(num_queues, device=device).repeat_interleave(counts_N, output_size=num_rows)
    place = torch.arange(num_rows, device=device) - (counts_N.cumsum(0) - counts_N)[queue]
    # The part i that begins at count * i // r holds place q iff i < (q + 1) r / count <= i + 1.
    chunk = ((place + 1) * degree - 1).div(counts_N[queue], rounding_mode="floor")
    return shift_rN[chunk, queue] + place


def reordered(rows: Tensor, come_from: Tensor, go_to: Tensor) -> Tensor:
    """Rows that lie where `come_from` says, to where `go_to` says; both [S] int64, by the same row."""
    index = torch.empty_like(go_to)
    index[go_to] = come_from
    return ops.gather_rows(rows.contiguous(), index)
