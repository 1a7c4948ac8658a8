"""Communication that is posted at one place of a program and awaited at another, exact under autograd.

What the forward awaits the backward posts, and the other way round, so that the backward communicates in the mirrored
order of the forward: autograd goes through operations in the reverse of the order in which they ran. On CUDA, NCCL
sends on a stream of its own, which waits by an event for what was queued before the post; awaiting makes the stream
that computes wait by an event in turn. On gloo the works' handles are waited for.

Dimensions: S rows sent, R rows received, M model, N experts whose weights travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe import metering


class _Flight:
    """Rows on their way from this rank to some ranks of a group and from some to it.

    Args:
        group: of all ranks.
        send, receive: (rank of the group, rows), in the order of the rows; both ends of a pair know its number.
    """

    def __init__(
        self, group: dist.ProcessGroup, send: Sequence[tuple[int, int]], receive: Sequence[tuple[int, int]]
    ) -> None:
        self.group, self.send, self.receive = group, send, receive
        self._works: list[Any] = []
        self._kept: tuple[Tensor, ...] = ()  # buffers must outlive the works

    def post(self, rows_SM: Tensor) -> Tensor:
        """Start; returns [R, M], to be read after `wait` only."""
        rows_SM = rows_SM.contiguous()
        rows_RM = rows_SM.new_empty(sum(rows for _, rows in self.receive), *rows_SM.shape[1:])
        me = dist.get_rank(self.group)
        parts = dict(zip((rank for rank, _ in self.send), rows_SM.split([rows for _, rows in self.send]), strict=True))
        places = dict(
            zip((rank for rank, _ in self.receive), rows_RM.split([rows for _, rows in self.receive]), strict=True)
        )
        operations = []
        for rank, part in parts.items():
            if rank == me:
                places[me].copy_(part)
                self._tell_meters(part)
            elif len(part):
                operations.append(dist.P2POp(dist.isend, part, group=self.group, group_peer=rank))
        operations += [
            dist.P2POp(dist.irecv, place, group=self.group, group_peer=rank)
            for rank, place in places.items()
            if rank != me and len(place)
        ]
        self._works = dist.batch_isend_irecv(operations) if operations else []
        self._kept = (rows_SM, rows_RM)
        return rows_RM

    def wait(self) -> Tensor:
        """The rows [R, M] that `post` gave, here now."""
        for work in self._works:
            work.wait()
        (_, rows_RM), self._works, self._kept = self._kept, [], ()
        return rows_RM

    def _tell_meters(self, part: Tensor) -> None:
        """Count rows that stay here as an all-to-all counts them."""
        num_bytes = [0] * self.group.size()
        num_bytes[dist.get_rank(self.group)] = part.numel() * part.element_size()
        for meter in metering.INSTALLED:
            meter.count_all_to_all(num_bytes, self.group)


class Exchange:
    """One exchange of rows, and in the backward that of their gradients; for one forward.

    Args:
        group, send, receive: (rank of the group, rows), see `_Flight`; a rank stands in each at most once, and this
            rank in both or none.
    """

    def __init__(
        self, group: dist.ProcessGroup, send: Sequence[tuple[int, int]], receive: Sequence[tuple[int, int]]
    ) -> None:
        self._there, self._back = _Flight(group, send, receive), _Flight(group, receive, send)

    def post(self, rows_SM: Tensor) -> Tensor:
        """Send [S, M]; returns a buffer [R, M] for `wait` alone. Collective over the ranks named."""
        return _Post.apply(rows_SM, self._there, self._back)

    def wait(self, buffer_RM: Tensor) -> Tensor:
        """What arrived, [R, M]."""
        return _Wait.apply(buffer_RM, self._there, self._back)


class _Post(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_SM: Tensor, there: _Flight, back: _Flight) -> Tensor:
        ctx.back = back
        return there.post(rows_SM)

    @staticmethod
    def backward(ctx: Any, *_buffers: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back.wait(), None, None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, buffer_RM: Tensor, there: _Flight, back: _Flight) -> Tensor:
        ctx.back = back
        there.wait()
        return buffer_RM

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.back.post(grads[0])
        return grads[0], None, None  # stands in for the gradient, which `_Post` awaits: autograd checks shapes


class WeightShare:
    """Weights of some experts from their owners to all ranks; in the backward, the sum of their gradients to the owner.

    Args:
        group: of all ranks.
        experts: global ids of the N experts, at least one.
        num_local: experts a rank, placed contiguously.
        dtype: in which weights and gradients travel.
    """

    def __init__(self, group: dist.ProcessGroup, experts: Sequence[int], num_local: int, dtype: torch.dtype) -> None:
        self.group, self.dtype = group, dtype
        self.owners = [expert // num_local for expert in experts]
        me = dist.get_rank(group)
        self.mine = [(index, expert % num_local) for index, expert in enumerate(experts) if expert // num_local == me]
        self._works: list[Any] = []
        self._grads: tuple[Tensor, ...] = ()

    def post(self, w_in: Tensor, w_out: Tensor) -> tuple[Tensor, Tensor]:
        """Send this rank's of the experts; returns buffers for `wait` alone. Collective.

        Args:
            w_in, w_out: of this rank's experts, [L, ...].

        Returns:
            [N, ...] each, in `dtype`.
        """
        return _PostWeights.apply(w_in, w_out, self)

    def wait(self, w_in: Tensor, w_out: Tensor) -> tuple[Tensor, Tensor]:
        """The weights [N, ...] of all N experts, from the buffers that `post` gave."""
        return _WaitWeights.apply(w_in, w_out, self)

    def broadcast(self, weights: Sequence[Tensor]) -> None:
        """Start for [N, ...] of which this rank's are filled."""
        self._works = [
            dist.broadcast(part, group=self.group, group_src=owner, async_op=True)
            for owner, *parts in zip(self.owners, *weights, strict=True)
            for part in parts
        ]

    def reduce(self, grads: Sequence[Tensor]) -> None:
        """Start the sum of [N, ...], which it overwrites, at the owners."""
        self._grads = tuple(grads)
        self._works = [
            dist.reduce(part, group=self.group, group_dst=owner, async_op=True)
            for owner, *parts in zip(self.owners, *grads, strict=True)
            for part in parts
        ]

    def finish(self) -> tuple[Tensor, ...]:
        """Wait for what was started last; returns what `reduce` was given, summed where this rank owns it."""
        for work in self._works:
            work.wait()
        grads, self._works, self._grads = self._grads, [], ()
        return grads


class _PostWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w_in: Tensor, w_out: Tensor, share: WeightShare) -> tuple[Tensor, Tensor]:
        ctx.share, ctx.like = share, [(weight.shape, weight.dtype, weight.device) for weight in (w_in, w_out)]
        shared = []
        for weight in (w_in, w_out):
            buffer = torch.empty(len(share.owners), *weight.shape[1:], dtype=share.dtype, device=weight.device)
            for index, slot in share.mine:
                buffer[index] = weight[slot]
            shared.append(buffer)
        share.broadcast(shared)
        return shared[0], shared[1]

    @staticmethod
    def backward(ctx: Any, *_buffers: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        share: WeightShare = ctx.share
        summed = share.finish()
        if not share.mine:
            return None, None, None
        grads = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like]
        for grad, total in zip(grads, summed, strict=True):
            for index, slot in share.mine:
                grad[slot] = total[index]
        return grads[0], grads[1], None


class _WaitWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w_in: Tensor, w_out: Tensor, share: WeightShare) -> tuple[Tensor, Tensor]:
        ctx.share = share
        share.finish()
        return w_in, w_out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        copies = [grad.clone(memory_format=torch.contiguous_format) for grad in grads]  # reduced in place
        ctx.share.reduce(copies)
        return copies[0], copies[1], None
