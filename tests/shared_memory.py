"""Memory that ranks of one machine share on a CPU, in the place of what GPUs map into one another."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe.mesh import Mesh
from moe.peer_dispatch import PeerDispatcher
from moe.peers import Workspace
from moe.system import LayerSpec


class FileMemory:
    """A `moe.peers.PeerMemory` of one mapped file a rank. Collective.

    Args:
        num_bytes: of each block.
        mesh: its expert-parallel group is used.

    Attributes:
        barriers: how many were taken.
    """

    def __init__(self, num_bytes: int, mesh: Mesh) -> None:
        self.group, self.barriers = mesh.ep_group, 0
        with tempfile.NamedTemporaryFile(delete=False) as file:
            file.truncate(num_bytes)
        names: list[Any] = [None] * mesh.ep_size
        dist.all_gather_object(names, file.name, group=self.group)
        self.blocks = [torch.from_file(name, shared=True, size=num_bytes, dtype=torch.uint8) for name in names]
        self.local = self.blocks[mesh.ep_rank]
        self.local.fill_(0x7F)  # what nobody wrote must not pass for zeros
        self.pointers = torch.tensor([block.data_ptr() for block in self.blocks])
        self.barrier()
        Path(file.name).unlink()

    def barrier(self) -> None:
        """All ranks have come here."""
        self.barriers += 1
        dist.barrier(group=self.group)


def cpu_peers(mesh: Mesh, spec: LayerSpec, max_tokens: int) -> PeerDispatcher:
    """The dispatcher over such memory, or over none on a rank alone. Collective."""
    if mesh.ep_size == 1:
        return PeerDispatcher(mesh, spec)
    slots = min(spec.top_k, mesh.ep_size)
    workspace = Workspace(
        lambda size: FileMemory(size, mesh), max_tokens, spec.top_k, slots, spec.model_dim, spec.dtype
    )
    return PeerDispatcher(mesh, spec, workspace)
