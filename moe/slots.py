"""Experts for upstream layers that pad: every expert is called on equally many slots, filled or not.

Dimensions: L experts of this rank, R rows, C rows of each expert, S slots of each expert over all ranks, M model.
"""

from __future__ import annotations

import math
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moe import metering
from moe.experts import GroupedExperts, feed_forward


class BatchedExperts(GroupedExperts):
    """Experts with equally many rows, as batched matrix products; no weights of rows."""

    def forward(self, rows_RM: Tensor, *_: list[int] | Tensor | None) -> Tensor:
        """Run each expert on its R / L rows [R, M]; returns the same order and dtype."""
        w_in, w_out = self.w_in.to(rows_RM.dtype), self.w_out.to(rows_RM.dtype)
        x_LCM = rows_RM.view(len(w_in), len(rows_RM) // len(w_in), rows_RM.shape[1])
        y_LCM = feed_forward(x_LCM, w_in, w_out, self.activation, lambda rows, weight: rows @ weight.mT)
        return y_LCM.view_as(rows_RM)


class Slots(nn.Module):
    """What an upstream layer calls as its experts; it hands them the slots below `capacity`, starting at `first_slot`.

    Args:
        experts: kept out of `parameters()`, because upstream casts tokens to the dtype of what it finds there.
        group: expert-parallel group.
        meter: tell the byte meters, because upstream brings the tokens by a communicator of its own.
    """

    def __init__(self, experts: BatchedExperts, group: dist.ProcessGroup, meter: bool) -> None:
        super().__init__()
        self.hidden, self.group, self.meter = (experts,), group, meter
        self.capacity: float = math.inf
        self.first_slot = 0

    def forward(self, x_LSM: Tensor, _layer: Any) -> Tensor:
        """Slots of all ranks [L, ranks * slots, M] -> the same shape; an overlapping layer calls once for each part."""
        num_local, num_ranks = len(x_LSM), self.group.size()
        x_LRCM = x_LSM.unflatten(1, (num_ranks, -1))
        num_slots = x_LRCM.shape[2]
        kept = int(min(num_slots, max(0, self.capacity - self.first_slot)))
        self.first_slot += num_slots
        rows_RM = x_LRCM[:, :, :kept].reshape(-1, x_LSM.shape[2])
        y_RM = self.hidden[0](rows_RM, [num_ranks * kept] * num_local)
        y_LRCM = F.pad(y_RM.view(num_local, num_ranks, kept, x_LSM.shape[2]), (0, 0, 0, num_slots - kept))
        if self.meter:
            self._tell_meters(x_LSM)
            if y_LRCM.requires_grad:
                y_LRCM.register_hook(self._tell_meters)
        return y_LRCM.flatten(1, 2)

    def _tell_meters(self, slots: Tensor) -> None:
        """There and back, equally many to each rank."""
        for meter in metering.INSTALLED:
            num_bytes = 2 * slots.numel() * slots.element_size() // self.group.size()
            meter.count_all_to_all([num_bytes] * self.group.size(), self.group)
