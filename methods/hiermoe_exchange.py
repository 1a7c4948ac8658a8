"""One crossing of a cluster level: rows are copied to the blocks that want them, travel, and come back as sums.

Dimensions: R rows of this rank before the crossing, M model, C choices told with a row, J blocks (one peer in each),
S copies sent, A copies that arrive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe import ops
from moe.collectives import all_to_all_v
from moe.dispatch import expand

WORD_BYTES = 4
"""What rows are packed in; what is told with a row takes whole words."""


def row_words(tensor: Tensor) -> int:
    """Words that a row of [S, W] takes in a packed message: its bytes, rounded up."""
    return -(-tensor.shape[1] * tensor.element_size() // WORD_BYTES)


def exchange_packed(
    tensors: Sequence[Tensor], receive_rows: list[int], send_rows: list[int], group: dist.ProcessGroup
) -> list[Tensor]:
    """Exchange the rows of several tensors in one message; not differentiable.

    Args:
        tensors: each [S, its width], of elements of at most 4 bytes.
        receive_rows, send_rows, group: as in `moe.collectives.all_to_all_v`.

    Returns:
        [A, its width] of each, in its dtype.
    """
    widths = [row_words(tensor) for tensor in tensors]
    packed = torch.empty(len(tensors[0]), sum(widths), dtype=torch.int32, device=tensors[0].device)
    for words, tensor in zip(packed.split(widths, dim=1), tensors, strict=True):
        words.view(tensor.dtype)[:, : tensor.shape[1]].copy_(tensor)
    received = all_to_all_v(packed, receive_rows, send_rows, group)
    parts = zip(received.split(widths, dim=1), tensors, strict=True)
    return [
        words.view(tensor.dtype)[:, : tensor.shape[1]].clone(memory_format=torch.contiguous_format)
        for words, tensor in parts
    ]


class _ExchangePacked(torch.autograd.Function):
    """`exchange_packed`; backward the gradients of floating tensors go the opposite way in one message."""

    @staticmethod
    def forward(ctx: Any, crossing: Crossing, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.crossing = crossing
        ctx.has_gradient = [tensor.is_floating_point() for tensor in tensors]
        received = exchange_packed(tensors, crossing.receive_rows, crossing.send_rows, crossing.group)
        ctx.mark_non_differentiable(*(tensor for tensor in received if not tensor.is_floating_point()))
        return tuple(received)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        crossing = ctx.crossing
        moving = [grad for grad, moves in zip(grads, ctx.has_gradient, strict=True) if moves]
        back = iter(exchange_packed(moving, crossing.send_rows, crossing.receive_rows, crossing.group))
        return None, *(next(back) if moves else None for moves in ctx.has_gradient)


class _SumCopies(torch.autograd.Function):
    """Copies [S, M] to the sums of each row's, [R, M]; backward every copy gets its row's gradient."""

    @staticmethod
    def forward(ctx: Any, copies_SM: Tensor, order: Tensor, inverse_RJ: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        ctx.copies_a_row = inverse_RJ.shape[1]
        return ops.sum_copies(copies_SM.contiguous(), inverse_RJ)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return ops.gather_rows(grads[0].contiguous(), order, ctx.copies_a_row), None, None


def sum_copies(copies_SM: Tensor, order: Tensor, inverse_RJ: Tensor) -> Tensor:
    """Copies [S, M] to the sum of each row's, [R, M], in their dtype; differentiable, the mirror of
    `moe.dispatch.expand` with its arguments. A row without copies is 0."""
    return _SumCopies.apply(copies_SM, order, inverse_RJ)


@dataclass(frozen=True)
class Crossing:
    """Where the rows of one layer call travel on one level.

    Attributes:
        group: one peer in each of J blocks, in the blocks' order.
        send_rows, receive_rows: copies to and from each peer.
        order: [S] int64, send position -> flat copy r * J + j, sorted by block.
        inverse_RJ: [R, J] int64, its inverse; S where the row has no business in the block. Where rows stand for
            several rows of what is told with them (C of one token that travel apart), [R / C, C * J].
    """

    group: dist.ProcessGroup
    send_rows: list[int]
    receive_rows: list[int]
    order: Tensor
    inverse_RJ: Tensor

    def there(self, rows_RM: Tensor, weights_RC: Tensor, ids_RC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Send a copy of every row, its weights and its choices to each block that wants it. Collective.

        Args:
            rows_RM: [R, M].
            weights_RC: [R, C] float32.
            ids_RC: [R, C] int32.

        Returns:
            [A, M], [A, C] and [A, C], those of the group's first peer first.
        """
        num_blocks = len(self.send_rows)
        copies_SM = expand(rows_RM, self.order, self.inverse_RJ)
        weights_SC = expand(weights_RC, self.order, self.inverse_RJ.view(-1, num_blocks))
        ids_SC = ops.gather_rows(ids_RC, self.order, num_blocks)
        return _ExchangePacked.apply(self, copies_SM, weights_SC, ids_SC)

    def back(self, partial_AM: Tensor) -> Tensor:
        """Send partial sums [A, M] back and sum those of each row, to [R, M]. Collective."""
        copies_SM = all_to_all_v(partial_AM, self.send_rows, self.receive_rows, self.group)
        return sum_copies(copies_SM, self.order, self.inverse_RJ)
