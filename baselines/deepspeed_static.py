"""DeepSpeed-MoE's replicas from the suite's own parts, SwiftMoE's baseline (SYMI, arXiv 2504.19925, section 5): r of
every expert, for the whole run, by expert-data parallelism (baselines/replica_blocks.py).

Replicas of an expert are on different ranks, and its capacity never changes: each source rank keeps ceil(c K T / E)
copies of it, as DeepSpeed does with its gate's sampling off. Unlike upstream's (the system `deepspeed`, which takes
`replicas`, too), rows are not padded to the capacity.

Unlike SYMI's baseline it does without ZeRO-1: each replica keeps its expert's whole optimizer state and steps it, r
times what SYMI's DeepSpeed keeps and does. Bytes between ranks are the same: ZeRO-1 reduces and scatters gradients and
gathers weights where this reduces gradients to all, two halves of the same ring.

Dimensions: N ranks, r replicas, E experts, T tokens of a rank, K choices.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from baselines.replica_blocks import ReplicaBlocks, fits, mesh_of_blocks, replicas_of
from moe.layer import NativeMoE
from moe.mesh import Mesh
from moe.replica_table import SLOTS_PER_EXPERT
from moe.system import LayerSpec, MoELayer


class Options(BaseModel):
    """Options of conf/system/deepspeed_static.yaml.

    Args:
        replicas: r, of every expert; null: four, as in SYMI's testbed, or where that does not divide the ranks, or
            leaves a block more ranks than E goes into, the next smaller number that fits.
    """

    model_config = ConfigDict(extra="forbid")
    replicas: int | None = Field(default=None, ge=1, examples=[4])


class StaticReplicas(NativeMoE):
    """The native layer in blocks of ranks."""

    @property
    def replicas_E(self) -> list[int] | None:
        """As many of each expert."""
        return replicas_of(self)


class DeepSpeedStatic(ReplicaBlocks):
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

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """The native layer with its default parts. Collective: it makes groups of ranks."""
        return StaticReplicas(spec, mesh_of_blocks(mesh, self.replicas(spec.num_experts, mesh.world_size)))
