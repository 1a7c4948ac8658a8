"""Expert-data parallelism, which DeepSpeed-MoE has and SYMI's baseline is (arXiv 2504.19925, section 5): blocks of
N / r consecutive ranks share a set of all experts, and a block's tokens stay in it; gradients of an expert are summed
over the r ranks that hold it.

Dimensions: N ranks, r replicas of every expert, E experts.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import ClassVar

import torch.distributed as dist
from torch import nn

from moe.layer_simulation import LayerModel, RoutedLayer
from moe.mesh import Mesh, create_mesh
from moe.sync import GradientSync
from moe.system import LayerSpec, MoELayer, System, moe_layers
from moe.topology import Cluster


def fits(replicas: int, num_experts: int, num_ranks: int) -> bool:
    """Whether the ranks can be cut into that many blocks of which each holds all experts, as many a rank."""
    return num_ranks % replicas == 0 and num_experts % (num_ranks // replicas) == 0


def replicas_of(layer: MoELayer) -> list[int] | None:
    """[E] of a layer on a `mesh_of_blocks`: as many of each expert; None for one."""
    return [layer.mesh.edp_size] * layer.spec.num_experts if layer.mesh.edp_size > 1 else None


class ReplicaBlocks(System):
    """A system whose layers are built on a mesh of blocks.

    Attributes:
        pads: whether every expert is padded to the fullest one.
    """

    pads: ClassVar[bool] = False

    @abstractmethod
    def replicas(self, num_experts: int, num_ranks: int) -> int:
        """r of a run."""

    def refusals(self, spec: LayerSpec, cluster: Cluster) -> list[str]:
        """Replicas that the ranks can't be cut into."""
        num_ranks, num_experts = cluster.world_size, spec.num_experts
        replicas = self.replicas(num_experts, num_ranks)
        if fits(replicas, num_experts, num_ranks):
            return []
        fitting = [r for r in range(1, num_ranks + 1) if fits(r, num_experts, num_ranks)]
        return [
            f"{self.name} can't have replicas={replicas} of {num_experts} experts on {num_ranks} ranks: replicas must "
            f"divide the ranks, and the ranks of a block the experts; set it to one of {fitting}, or to null."
        ]

    def expert_copies(self, num_experts: int, num_ranks: int) -> float:
        """r."""
        return float(self.replicas(num_experts, num_ranks))

    def simulated_layer(self, layer: RoutedLayer) -> LayerModel:
        """One block stands for all; behind backward, the sum of gradients over blocks."""
        replicas = self.replicas(layer.spec.num_experts, layer.num_ranks)
        block = layer.block(layer.num_ranks // replicas)
        model = block.model(block.padded_PE if self.pads else block.counts_PE)
        if replicas == 1:
            return model
        experts = layer.spec.num_experts / block.num_ranks
        return dataclasses.replace(model, extras=(layer.replica_gradients(block.num_ranks, experts),))

    def gradient_sync(self, model: nn.Module, mesh: Mesh) -> GradientSync:
        """Over an expert's ranks, which the layers' mesh knows."""
        layers = moe_layers(model)
        return super().gradient_sync(model, layers[0].mesh if layers else mesh)


_MESHES: dict[tuple[dist.ProcessGroup, int], Mesh] = {}


def mesh_of_blocks(mesh: Mesh, replicas: int) -> Mesh:
    """The mesh of `replicas` blocks of ranks. Made when first asked for, which is collective; then the same again."""
    ep_size = mesh.world_size // replicas
    if ep_size == mesh.ep_size:
        return mesh
    key = (mesh.ep_group, ep_size)  # a mesh's own, so that another run in this process makes others
    if key not in _MESHES:
        _MESHES[key] = create_mesh(mesh.cluster, mesh.device, ep_size)
    return dataclasses.replace(_MESHES[key], cluster=mesh.cluster)
