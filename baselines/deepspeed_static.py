"""DeepSpeed-MoE's replicas from the suite's own parts, SwiftMoE's baseline (SYMI, arXiv 2504.19925, section 5): r of
every expert, for the whole run, by expert-data parallelism.

Blocks of N / r consecutive ranks share a set of all experts, and a block's tokens stay in it; the gradients of an
expert are summed over the r ranks that hold it. So replicas of an expert are on different ranks, and its capacity never
changes: each source rank keeps ceil(c K T / E) copies of it, as DeepSpeed does with its gate's sampling off. Unlike
upstream's (see the system `deepspeed`), rows are not padded to the capacity.

Unlike SYMI's baseline it does without ZeRO-1: each replica keeps its expert's whole optimizer state and steps it, r
times what SYMI's DeepSpeed does.

Dimensions: N ranks, r replicas, E experts, T tokens of a rank, K choices.
"""

from __future__ import annotations

import dataclasses

import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from moe.layer import NativeMoE
from moe.mesh import Mesh, create_mesh
from moe.replica_table import SLOTS_PER_EXPERT
from moe.sync import GradientSync
from moe.system import LayerSpec, MoELayer, System, moe_layers
from moe.topology import Cluster


class Options(BaseModel):
    """Options of conf/system/deepspeed_static.yaml.

    Args:
        replicas: r, of every expert; null: four, as in SYMI's testbed, or where that does not divide the ranks, or
            leaves a block more ranks than E goes into, the next smaller number that fits.
    """

    model_config = ConfigDict(extra="forbid")
    replicas: int | None = Field(default=None, ge=1, examples=[4])


def fits(replicas: int, num_experts: int, num_ranks: int) -> bool:
    """Whether the ranks can be cut into that many blocks of which each holds all experts, as many a rank."""
    return num_ranks % replicas == 0 and num_experts % (num_ranks // replicas) == 0


class StaticReplicas(NativeMoE):
    """The native layer in blocks of ranks."""

    @property
    def replicas_E(self) -> list[int] | None:
        """As many of each expert."""
        return [self.mesh.edp_size] * self.spec.num_experts if self.mesh.edp_size > 1 else None


class DeepSpeedStatic(System):
    """Expert-data parallelism with static capacities."""

    name = "deepspeed_static"
    implementation = "native"
    summary = "as many replicas of every expert for the whole run, by expert-data parallelism"
    Options = Options

    def replicas(self, num_experts: int, num_ranks: int) -> int:
        """r; the number that was asked for, or that fits best."""
        if self.options.replicas is not None:
            return int(self.options.replicas)
        fitting = [r for r in range(1, SLOTS_PER_EXPERT + 1) if fits(r, num_experts, num_ranks)]
        return max(fitting, default=1)

    def refusals(self, spec: LayerSpec, cluster: Cluster) -> list[str]:
        """Replicas that the ranks can't be cut into."""
        num_ranks, num_experts = cluster.world_size, spec.num_experts
        replicas = self.replicas(num_experts, num_ranks)
        if fits(replicas, num_experts, num_ranks):
            return []
        fitting = [r for r in range(1, num_ranks + 1) if fits(r, num_experts, num_ranks)]
        return [
            f"deepspeed_static can't have replicas={replicas} of {num_experts} experts on {num_ranks} ranks: replicas "
            f"must divide the ranks, and the ranks of a block the experts; set it to one of {fitting}, or to null."
        ]

    def expert_copies(self, num_experts: int, num_ranks: int) -> float:
        """r."""
        return float(self.replicas(num_experts, num_ranks))

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """The native layer with its default parts. Collective: it makes groups of ranks."""
        return StaticReplicas(spec, _mesh_of_blocks(mesh, self.replicas(spec.num_experts, mesh.world_size)))

    def gradient_sync(self, model: nn.Module, mesh: Mesh) -> GradientSync:
        """Over an expert's ranks, which the layers' mesh knows."""
        layers = moe_layers(model)
        return super().gradient_sync(model, layers[0].mesh if layers else mesh)


_MESHES: dict[tuple[dist.ProcessGroup, int], Mesh] = {}


def _mesh_of_blocks(mesh: Mesh, replicas: int) -> Mesh:
    """The mesh of `replicas` blocks of ranks. Made when first asked for, which is collective; then the same again."""
    ep_size = mesh.world_size // replicas
    if ep_size == mesh.ep_size:
        return mesh
    key = (mesh.ep_group, ep_size)  # a mesh's own, so that another run in this process makes others
    if key not in _MESHES:
        _MESHES[key] = create_mesh(mesh.cluster, mesh.device, ep_size)
    return dataclasses.replace(_MESHES[key], cluster=mesh.cluster)
