"""Collectives that autograd can go back through. Bytes are counted by `moe.metering`, which stands in front of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe.metering import INSTALLED, uncounted


class _AllToAllV(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_RM: Tensor, receive_rows: list[int], send_rows: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.receive_rows, ctx.send_rows, ctx.group = receive_rows, send_rows, group
        received = rows_RM.new_empty(sum(receive_rows), *rows_RM.shape[1:])
        dist.all_to_all_single(received, rows_RM.contiguous(), receive_rows, send_rows, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grads[0].contiguous()
        sent_back = grad.new_empty(sum(ctx.send_rows), *grad.shape[1:])
        dist.all_to_all_single(sent_back, grad, ctx.send_rows, ctx.receive_rows, group=ctx.group)
        return sent_back, None, None, None


def all_to_all_v(rows_RM: Tensor, receive_rows: list[int], send_rows: list[int], group: dist.ProcessGroup) -> Tensor:
    """Exchange rows between the ranks of a group; differentiable, the backward is the opposite exchange.

    Args:
        rows_RM: [sum(send_rows), M], rows for the group's rank 0 first, then for rank 1, ...
        receive_rows: rows that come from each rank of the group.
        send_rows: rows that go to each.
        group: process group.

    Returns:
        [sum(receive_rows), M], rows from the group's rank 0 first.
    """
    return _AllToAllV.apply(rows_RM, receive_rows, send_rows, group)


class _GatherRows(torch.autograd.Function):
    """[T, ...] of every rank -> [P * T, ...]; the backward sums what the ranks say about each rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(rows) for _ in range(group.size())]
        dist.all_gather(parts, rows.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum_and_scatter(grads[0], ctx.group), None


class _SumAndScatterRows(torch.autograd.Function):
    """[P * T, ...] partial sums of every rank -> [T, ...], this rank's rows of their sum."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _sum_and_scatter(rows, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _GatherRows.apply(grads[0], ctx.group), None


def _sum_and_scatter(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = list(rows.contiguous().chunk(group.size()))
    summed = torch.empty_like(parts[0])
    dist.reduce_scatter(summed, parts, group=group)
    return summed


def gather_into(whole: Tensor, part: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> dist.Work | None:
    """Every rank's [N, ...] into [P * N, ...], the group's rank 0 first; not differentiable."""
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # renamed in 2.13
    work: dist.Work | None = getattr(dist, name)(whole, part, group=group, async_op=async_op)
    return work


def scatter_sums(part: Tensor, whole: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> dist.Work | None:
    """This rank's [N, ...] of the sum over ranks of [P * N, ...]; not differentiable.

    gloo's own reduces everything to everybody and cuts that up. So on a CPU each rank gets its parts and sums them, as
    many bytes as a ring's.
    """
    if not whole.is_cuda:
        sums = _PartsToSum(part, whole, group)
        if async_op:
            return sums
        sums.wait()
        return None
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    work: dist.Work | None = getattr(dist, name)(part, whole, group=group, async_op=async_op)
    return work


class _PartsToSum(dist.Work):
    """All ranks' parts on their way, to be summed in the order of ranks into `part`. Bytes are counted as a ring's."""

    def __init__(self, part: Tensor, whole: Tensor, group: dist.ProcessGroup) -> None:
        super().__init__()
        self._part, self._parts = part, torch.empty_like(whole).view(group.size(), *part.shape)
        with uncounted():
            self._work = dist.all_to_all_single(self._parts.view(whole.shape), whole, group=group, async_op=True)
        for meter in INSTALLED:
            meter.count_to_next((group.size() - 1) / group.size() * whole.nbytes, group, "reduction")

    def wait(self, *_timeout: Any) -> bool:
        """Until the sums are there."""
        assert self._work is not None
        self._work.wait()
        torch.sum(self._parts, 0, out=self._part)
        return True


def gather_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's rows on every rank; differentiable, the backward is `sum_and_scatter_rows`.

    Args:
        rows: [T, ...], T equal on all ranks of the group.
        group: of P ranks.

    Returns:
        [P * T, ...], the group's rank 0 first.
    """
    return _GatherRows.apply(rows, group)


def sum_and_scatter_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's rows of the sum over ranks; differentiable, the backward is `gather_rows`.

    Args:
        rows: [P * T, ...], partial sums for the group's rank 0 first.
        group: of P ranks.

    Returns:
        [T, ...].
    """
    return _SumAndScatterRows.apply(rows, group)
