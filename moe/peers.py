"""Memory that the GPUs of one node map into one another, and the regions that dispatch and combine keep in it.

Dimensions: T tokens of a rank, K choices, P ranks, M model, J slots of a token's partial sums.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moe.mesh import Mesh

ALIGNMENT = 256


class PeerMemory(Protocol):
    """A block of equal size on every rank of a group, which each can read and write.

    Attributes:
        local: [bytes] uint8, this rank's block.
        pointers: [P] int64, where every rank's block begins for kernels of this rank.
    """

    local: Tensor
    pointers: Tensor

    def barrier(self) -> None:
        """Work queued after it sees what all ranks queued before it."""


class SymmetricMemory:
    """Blocks from torch's symmetric memory: over NVLink, or whatever lets the GPUs of a node address one another.

    Collective.

    Args:
        num_bytes: of the block, equal on all ranks.
        mesh: its expert-parallel group is used.
    """

    def __init__(self, num_bytes: int, mesh: Mesh) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        self.local = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=mesh.device)
        handle = symmetric_memory.rendezvous(self.local, mesh.ep_group)
        self.pointers = torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=mesh.device)
        self.barrier: Callable[[], None] = handle.barrier


def peers_reach_each_other(mesh: Mesh) -> bool:
    """Whether a mesh's expert-parallel group can share memory: CUDA ranks of one node, by the cluster's own levels.

    A cluster that declares several levels over one host (an emulated one) keeps to them. A process that is shown its
    own GPU only can't tell, and takes messages. Collective: ranks agree.
    """
    if mesh.device.type != "cuda":
        return False
    if mesh.ep_size == 1:
        return True
    agreed = torch.tensor([int(_reaches_its_peers(mesh))], device=mesh.device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=mesh.ep_group)
    return bool(agreed)


def _reaches_its_peers(mesh: Mesh) -> bool:
    first = mesh.rank - mesh.ep_rank
    one_node = mesh.cluster.level_of(first, first + mesh.ep_size - 1) == 1
    devices = range(torch.cuda.device_count())
    here = mesh.device.index if mesh.device.index is not None else torch.cuda.current_device()
    reach = all(torch.cuda.can_device_access_peer(here, peer) for peer in devices if peer != here)
    return one_node and len(devices) >= mesh.ep_size and reach


class Workspace:
    """The regions of one block that a layer's exchanges go through; layers of one shape share it, one after the other.

    Tokens, choices and weights are read by other ranks; slots and gradients of weights are written by them. Who writes
    a region must know that nobody reads it any more. A pull that is followed by a push, and a sum by a stage, as they
    are in a layer, have a barrier in between for another reason; where the order is another one (two layers' dispatches
    in a row, a gradient that nobody asks for, a forward computed anew), `before_staging` and `before_pushing` wait.

    Args:
        memory: makes the block from its size in bytes.
        max_tokens: most tokens of any rank.
        top_k, num_slots, model_dim: K, J, M.
        dtype: of tokens and slots.

    Attributes:
        tokens_TM, ids_TK (int64), weights_TK (float32), slots_TJM, weight_grads_TK (float32): this rank's.
        tokens_at, ids_at, weights_at, slots_at, weight_grads_at: their offsets in every rank's block, in bytes.
    """

    def __init__(
        self,
        memory: Callable[[int], PeerMemory],
        max_tokens: int,
        top_k: int,
        num_slots: int,
        model_dim: int,
        dtype: torch.dtype,
    ) -> None:
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
            ((max_tokens, model_dim), dtype),
            ((max_tokens, top_k), torch.int64),
            ((max_tokens, top_k), torch.float32),
            ((max_tokens, num_slots, model_dim), dtype),
            ((max_tokens, top_k), torch.float32),
        ]
        sizes = [prod(shape) * kind.itemsize for shape, kind in shapes]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
        self.max_tokens, self.num_bytes = max_tokens, starts[-1]
        self.memory = memory(max(self.num_bytes, ALIGNMENT))
        local = self.memory.local
        views = [
            local[start : start + size].view(kind).view(shape)
            for start, size, (shape, kind) in zip(starts, sizes, shapes, strict=False)
        ]
        self.tokens_TM, self.ids_TK, self.weights_TK, self.slots_TJM, self.weight_grads_TK = views
        self.tokens_at, self.ids_at, self.weights_at, self.slots_at, self.weight_grads_at, _ = starts
        self.tokens_in_use = self.slots_in_use = False

    def barrier(self) -> None:
        """Work queued after it sees what all ranks queued before it, and nobody reads what was read before it."""
        self.memory.barrier()
        self.tokens_in_use = self.slots_in_use = False

    def before_staging(self) -> None:
        """Wait, if need be, until no rank reads this one's tokens. All ranks agree, since all do the same in turn."""
        if self.tokens_in_use:
            self.barrier()

    def before_pushing(self) -> None:
        """Wait, if need be, until no rank reads its own slots."""
        if self.slots_in_use:
            self.barrier()


_WORKSPACES: dict[tuple[object, ...], Workspace] = {}


def shared_workspace(mesh: Mesh, x_TM: Tensor, top_k: int) -> Workspace:
    """The workspace of this process for a group and shape, made when first asked for. Collective.

    Args:
        mesh: its expert-parallel group.
        x_TM: [T, M], tokens of this rank; room is made for the largest T of all ranks.
        top_k: K.
    """
    largest = torch.tensor([len(x_TM)], device=mesh.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=mesh.ep_group)
    max_tokens, model_dim = int(largest), x_TM.shape[1]
    key = (mesh.ep_group, max_tokens, top_k, model_dim, x_TM.dtype)
    if key not in _WORKSPACES:
        _WORKSPACES[key] = Workspace(
            lambda num_bytes: SymmetricMemory(num_bytes, mesh),
            max_tokens,
            top_k,
            min(top_k, mesh.ep_size),
            model_dim,
            x_TM.dtype,
        )
    return _WORKSPACES[key]
