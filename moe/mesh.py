"""All process groups of a run, made once, in the same order on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe.topology import Cluster


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands.

    Experts are spread over `ep_size` consecutive ranks (expert parallelism); ranks with the same position in their
    expert-parallel group hold the same experts (expert data parallelism).

    Args:
        cluster: the levels that ranks belong to.
        device: where this rank computes.
        rank: of the default group.
        ep_size: ranks in an expert-parallel group.
        ep_group, edp_group: this rank's process groups; `edp_group` holds `world_size / ep_size` ranks.
    """

    cluster: Cluster
    device: torch.device
    rank: int
    ep_size: int
    ep_group: dist.ProcessGroup
    edp_group: dist.ProcessGroup

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.cluster.world_size

    @property
    def ep_rank(self) -> int:
        """This rank's position in its expert-parallel group."""
        return self.rank % self.ep_size

    @property
    def ep_ranks(self) -> list[int]:
        """Ranks of this rank's expert-parallel group, in order."""
        return list(range(self.rank - self.ep_rank, self.rank - self.ep_rank + self.ep_size))

    @property
    def edp_size(self) -> int:
        """Ranks that hold the same experts as this one."""
        return self.world_size // self.ep_size

    def local_experts(self, num_experts: int) -> range:
        """Global ids of the experts of this rank under the contiguous placement: E / ep_size of them."""
        assert num_experts % self.ep_size == 0, f"{num_experts} experts can't be spread over {self.ep_size} ranks"
        per_rank = num_experts // self.ep_size
        return range(self.ep_rank * per_rank, (self.ep_rank + 1) * per_rank)

    def tensor(self, values: Sequence[Any], dtype: torch.dtype = torch.int64) -> Tensor:
        """Numbers of the host, nested or not, on this rank's device. What `torch.tensor` puts on a GPU lets the host
        wait for all that is queued there; from pinned memory it goes while the host goes on."""
        if self.device.type != "cuda":
            return torch.tensor(values, dtype=dtype, device=self.device)
        return torch.tensor(values, dtype=dtype, pin_memory=True).to(self.device, non_blocking=True)


def ranks_are_on_cuda() -> bool:
    """Whether this process' ranks compute on CUDA; before they are started, whether this machine could."""
    return "nccl" in dist.get_backend() if dist.is_initialized() else torch.cuda.is_available()


def create_mesh(cluster: Cluster, device: torch.device, ep_size: int | None = None) -> Mesh:
    """Make the groups; collective over all ranks of an initialised default process group.

    Args:
        cluster: its world size must be the process group's.
        device: of this rank.
        ep_size: ranks that share one set of experts, dividing the world size; None means all.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    assert world_size == cluster.world_size, f"{cluster.name} has {cluster.world_size} ranks, {world_size} are here"
    ep_size = ep_size or world_size
    assert world_size % ep_size == 0, f"{world_size} ranks can't be cut into groups of {ep_size}"
    ep_ranks = [list(range(start, start + ep_size)) for start in range(0, world_size, ep_size)]
    edp_ranks = [list(range(start, world_size, ep_size)) for start in range(ep_size)]
    ep_group = dist.new_subgroups_by_enumeration(ep_ranks)[0]
    edp_group = dist.new_subgroups_by_enumeration(edp_ranks)[0]
    assert ep_group is not None and edp_group is not None
    return Mesh(cluster, device, rank, ep_size, ep_group, edp_group)


_BLOCK_GROUPS: dict[tuple[dist.ProcessGroup, int, int], dist.ProcessGroup] = {}


def block_group(mesh: Mesh, outer: int, inner: int) -> dist.ProcessGroup:
    """The ranks of this rank's block of `outer` that stand in their blocks of `inner` where it does, in order.

    Made when first asked for, which is collective over all ranks of the run; then the same group again.

    Args:
        mesh: of the run.
        outer: ranks of a block, dividing those of an expert-parallel group.
        inner: ranks of the blocks that it consists of, dividing `outer`.
    """
    assert mesh.ep_size % outer == 0 and outer % inner == 0, (mesh.ep_size, outer, inner)
    if (outer, inner) == (mesh.ep_size, 1):
        return mesh.ep_group
    key = (mesh.ep_group, outer, inner)  # a mesh's own, so that another run in this process makes others
    if key not in _BLOCK_GROUPS:
        starts = [block + place for block in range(0, mesh.world_size, outer) for place in range(inner)]
        ranks = [list(range(start, start + outer, inner)) for start in starts]
        group = dist.new_subgroups_by_enumeration(ranks)[0]
        assert group is not None
        _BLOCK_GROUPS[key] = group
    return _BLOCK_GROUPS[key]
