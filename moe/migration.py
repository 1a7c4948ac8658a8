"""Moving experts between slots with all that training knows of them: weights and optimizer state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from moe.layer import NativeMoE
from moe.placement import Placement
from moe.step_parts import step_part
from moe.system import moe_layers


def movable_layers(model: nn.Module) -> list[tuple[NativeMoE, Placement]]:
    """The layers of a model whose experts can move, with their placements."""
    layers = [layer for layer in moe_layers(model) if isinstance(layer, NativeMoE)]
    return [(layer, layer.placement) for layer in layers if layer.placement is not None]


@torch.no_grad()
@step_part("migration")
def migrate(moves: Sequence[tuple[NativeMoE, Sequence[int]]], optimizer: Optimizer) -> int:
    """Move experts between slots: their weights, and the optimizer's state of each of them.

    Collective, the same on all ranks that hold the same experts. One batch of messages between pairs of ranks for each
    layer, whose experts that move are in memory twice meanwhile.

    Args:
        moves: layers with a placement, and their new expert_of_slot.
        optimizer: of their parameters; state that it does not have yet does not move.

    Returns:
        Bytes that this rank sent.
    """
    return sum(_migrate(layer, expert_of_slot, optimizer) for layer, expert_of_slot in moves)


def _migrate(layer: NativeMoE, expert_of_slot: Sequence[int], optimizer: Optimizer) -> int:
    incoming: list[tuple[list[Tensor], Tensor]] = []
    operations: list[dist.P2POp] = []
    sent_bytes = 0
    placement = layer.placement
    assert placement is not None, "a layer without a placement"
    old_slot = {expert: slot for slot, expert in enumerate(placement.expert_of_slot)}
    local = layer.mesh.local_experts(layer.spec.num_experts)
    for slot, expert in enumerate(expert_of_slot):
        source = old_slot[expert]
        if source == slot or not (source in local or slot in local):
            continue
        here = state_of(layer.experts, (source if source in local else slot) - local.start, optimizer)
        if source in local and slot in local:
            incoming.append((state_of(layer.experts, slot - local.start, optimizer), packed(here)))
            continue
        if source in local:
            message = packed(here)
            operations.append(dist.P2POp(dist.isend, message, layer.mesh.ep_ranks[slot // len(local)]))
            sent_bytes += message.numel()
        else:
            message = torch.empty(sum(tensor.nbytes for tensor in here), dtype=torch.uint8, device=here[0].device)
            operations.append(dist.P2POp(dist.irecv, message, layer.mesh.ep_ranks[source // len(local)]))
            incoming.append((here, message))
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()
    for tensors, message in incoming:
        unpack(message, tensors)
    layer.set_placement(expert_of_slot)
    return sent_bytes


def state_of(experts: nn.Module, slot: int, optimizer: Optimizer) -> list[Tensor]:
    """What training knows of the expert in a slot of this rank: views of its weights and of their optimizer state,
    those of the widest elements first, so that each part of a message is aligned."""
    found = []
    for parameter in experts.parameters():
        found.append(parameter.data[slot])
        state = optimizer.state.get(parameter, {})
        for name in sorted(state):
            if isinstance(state[name], Tensor) and state[name].shape == parameter.shape:
                found.append(state[name][slot])
    return sorted(found, key=lambda tensor: -tensor.element_size())


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """One message of bytes."""
    return torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors])


def unpack(message: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write a message of `packed` tensors into others of the same shapes and dtypes."""
    for tensor, part in zip(tensors, message.split([tensor.nbytes for tensor in tensors]), strict=True):
        tensor.copy_(part.view(tensor.dtype).view(tensor.shape))
