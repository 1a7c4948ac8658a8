"""Replicas that come and go, with all that training knows of their expert: weights and optimizer state.

A rank that has no slot of an expert yet gets it from one that has, once for all of its new slots; a rank that has one
copies. What is replaced and what replaces it are in memory together until the layer is done, as SYMI says of FlexMoE.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from moe.experts import GroupedExperts
from moe.migration import packed, state_of, unpack
from moe.replica_table import ReplicaTable
from moe.step_parts import step_part


class Arrival(NamedTuple):
    """An expert that a rank gets its first slot of, and the rank that sends it."""

    expert: int
    source: int
    target: int


def arrivals(before: ReplicaTable, after: ReplicaTable) -> Iterator[Arrival]:
    """In the order that all ranks go through them; an expert's ranks share the sending."""
    for target in range(before.num_slots // before.slots_per_rank):
        for expert in after.local_slots(target):
            holders = before.holders[expert]
            if target not in holders:
                yield Arrival(expert, holders[target % len(holders)], target)


@torch.no_grad()
@step_part("migration")
def move_replicas(
    experts: GroupedExperts, before: ReplicaTable, after: ReplicaTable, rank: int, optimizer: Optimizer
) -> int:
    """Fill the slots of this rank as the new table has them; who stays in place is not touched. Collective, one batch
    of messages between pairs of ranks.

    Args:
        experts: in this rank's slots.
        before, after: tables of the layer, of one size.
        rank: this one.
        optimizer: of their parameters; state that it does not have yet does not move.

    Returns:
        Bytes that this rank sent.
    """
    here_before, here_after = before.local_slots(rank), after.local_slots(rank)
    operations: list[dist.P2POp] = []
    messages: dict[int, Tensor] = {}  # by expert, of those that this rank has new slots of
    sent_bytes = 0
    for expert, source, target in arrivals(before, after):
        if rank == source:
            message = packed(state_of(experts, here_before[expert][0], optimizer))
            operations.append(dist.P2POp(dist.isend, message, target))
            sent_bytes += message.numel()
        elif rank == target:
            size = sum(tensor.nbytes for tensor in state_of(experts, 0, optimizer))
            messages[expert] = torch.empty(size, dtype=torch.uint8, device=experts.w_in.device)
            operations.append(dist.P2POp(dist.irecv, messages[expert], source))
    new_slots = {expert: set(slots) - set(here_before.get(expert, [])) for expert, slots in here_after.items()}
    for expert, slots in new_slots.items():
        if slots and expert not in messages:
            messages[expert] = packed(state_of(experts, here_before[expert][0], optimizer))
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()
    for expert, message in messages.items():
        for slot in new_slots[expert]:
            unpack(message, state_of(experts, slot, optimizer))
    return sent_bytes
