"""DeepSpeed-MoE's replicas from the suite's own parts, SwiftMoE's baseline (SYMI, arXiv 2504.19925, section 5): r of
every expert, for the whole run, by expert-data parallelism (baselines/replica_blocks.py).

Replicas of an expert are on different ranks, and its capacity never changes: each source rank keeps ceil(c K T / E)
copies of it, as DeepSpeed does with its gate's sampling off. Unlike upstream's (the system `deepspeed`, which takes
`replicas`, too), rows are not padded to the capacity.

As in SYMI's baseline, ZeRO stage 1 cuts an expert's optimizer state over its r replicas (baselines/zero1.py); without
it each of them keeps the whole state and steps it, r times as much. Unlike SYMI's, that state is on the GPU (SYMI
offloads both systems', here only `swiftmoe` can), and no system here cuts that of dense parameters.

Dimensions: N ranks, r replicas, E experts, T tokens of a rank, K choices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.optim import Optimizer

from baselines.replica_blocks import ReplicaBlocks, fits, mesh_of_blocks, replicas_of
from baselines.zero1 import Zero1Experts, Zero1Sync, fill
from moe.costs import AlphaBeta
from moe.layer import NativeMoE
from moe.layer_simulation import Extra, LayerModel, RoutedLayer
from moe.mesh import Mesh
from moe.replica_table import SLOTS_PER_EXPERT
from moe.sync import GradientSync
from moe.system import ExpertView, LayerSpec, MoELayer, MoEOutput, moe_layers
from moe.topology import Cluster


class Options(BaseModel):
    """Options of conf/system/deepspeed_static.yaml.

    Args:
        replicas: r, of every expert; null: four, as in SYMI's testbed, or where that does not divide the ranks, or
            leaves a block more ranks than E goes into, the next smaller number that fits.
        zero_stage: 1, each replica trains one r-th of its expert and gathers the rest; 0, all of it.
    """

    model_config = ConfigDict(extra="forbid")
    replicas: int | None = Field(default=None, ge=1, examples=[4])
    zero_stage: Literal[0, 1] = 1


class StaticReplicas(NativeMoE):
    """The native layer in blocks of ranks."""

    @property
    def replicas_E(self) -> list[int] | None:
        """As many of each expert."""
        return replicas_of(self)


class Zero1Replicas(StaticReplicas):
    """The same with `Zero1Experts`.

    Args:
        spec, mesh: as of `NativeMoE`.
    """

    experts: Zero1Experts

    def __init__(self, spec: LayerSpec, mesh: Mesh) -> None:
        super().__init__(spec, mesh, experts=Zero1Experts(spec, mesh))
        self._whole: list[ExpertView] | None = None

    def forward(self, x_TM: Tensor) -> MoEOutput:
        """Route this rank's tokens [T, M]. Collective over an expert's replicas where weights were written."""
        if not self.experts.are_current:
            fill([self.experts])
        return super().forward(x_TM)

    def expert_views(self) -> list[ExpertView]:
        """Of the parts that this rank trains; of whole experts for a checkpoint. All ranks must ask, since what is
        written there has to reach the copies."""
        if self._whole is not None:
            return self._whole
        self.experts.are_current = False
        return self.experts.trained.views()

    def sharded_parameters(self) -> list[nn.Parameter]:
        """The parts."""
        return list(self.experts.trained.parameters())

    def drop_gradients(self) -> None:
        """Of all parameters and of the copies, which are none of the module's."""
        super().drop_gradients()
        self.experts.drop_gradients()

    @contextmanager
    def whole_experts(self, optimizer: Optimizer, loading: bool) -> Iterator[None]:
        """As `MoELayer.whole_experts`. Collective."""
        try:
            with self.experts.trained.whole(optimizer, loading) as self._whole:
                yield
        finally:
            self._whole = None
            self.experts.are_current &= not loading

    @property
    def path(self) -> str:
        """Over how many replicas optimizer state is cut, how tokens travel and how experts multiply."""
        return f"ZeRO-1 over {self.mesh.edp_size} replicas; {super().path}"


class DeepSpeedStatic(ReplicaBlocks):
    """Expert-data parallelism with static capacities."""

    name = "deepspeed_static"
    implementation = "native"
    summary = "as many replicas of every expert for the whole run, by expert-data parallelism"
    Options = Options

    def refusals(self, spec: LayerSpec, cluster: Cluster) -> list[str]:
        """As `ReplicaBlocks.refusals`, and a hidden dimension that replicas can't be cut along."""
        reasons = super().refusals(spec, cluster)
        replicas = self.replicas(spec.num_experts, cluster.world_size)
        if not reasons and self.options.zero_stage and spec.hidden_dim % replicas:
            reasons.append(
                f"zero_stage=1 cuts experts into {replicas} equal parts, one a replica, and hidden_dim="
                f"{spec.hidden_dim} is no multiple of {replicas}: use one, or zero_stage=0."
            )
        return reasons

    def cuts(self, num_experts: int, num_ranks: int) -> bool:
        """Whether an expert's replicas train a part of it each."""
        return self.options.zero_stage == 1 and self.replicas(num_experts, num_ranks) > 1

    def replicas(self, num_experts: int, num_ranks: int) -> int:
        """r; the number that was asked for, or that fits best."""
        if self.options.replicas is not None:
            return int(self.options.replicas)
        fitting = [r for r in range(1, SLOTS_PER_EXPERT + 1) if fits(r, num_experts, num_ranks)]
        return max(fitting, default=1)

    def expert_copies(self, num_experts: int, num_ranks: int) -> float:
        """All parts together are one; whole, r."""
        return 1.0 if self.cuts(num_experts, num_ranks) else super().expert_copies(num_experts, num_ranks)

    def slot_copies(self, num_experts: int, num_ranks: int) -> float:
        """r, where what is trained are parts."""
        return float(self.replicas(num_experts, num_ranks)) if self.cuts(num_experts, num_ranks) else 0.0

    def simulated_layer(self, layer: RoutedLayer) -> LayerModel:
        """As `ReplicaBlocks.simulated_layer`; with parts, gradients are scattered and weights gathered, each half of
        that ring. Their optimizer's time is left out."""
        model = super().simulated_layer(layer)
        if not self.cuts(layer.spec.num_experts, layer.num_ranks):
            return model
        ((_, ring, gradient_bytes),) = model.extras
        half = AlphaBeta(ring.alpha_s / 2, ring.beta_s_per_byte / 2)
        weight_bytes = gradient_bytes / 4 * layer.spec.dtype.itemsize
        extras = (Extra("gradient_shards", half, gradient_bytes), Extra("slot_weights", half, weight_bytes))
        return dataclasses.replace(model, extras=extras)

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """The native layer with its default parts. Collective: it makes groups of ranks."""
        blocks = mesh_of_blocks(mesh, self.replicas(spec.num_experts, mesh.world_size))
        kind = Zero1Replicas if self.cuts(spec.num_experts, mesh.world_size) else StaticReplicas
        return kind(spec, blocks)

    def gradient_sync(self, model: nn.Module, mesh: Mesh) -> GradientSync:
        """To an expert's replicas, or to the parts of it that they train."""
        experts = _cut_experts(model)
        return Zero1Sync(model, experts, experts[0].mesh) if experts else super().gradient_sync(model, mesh)

    def after_step(self, model: nn.Module, optimizer: Optimizer, steps_done: int) -> None:
        """Gather what an expert's replicas have made of their parts."""
        fill(_cut_experts(model))


def _cut_experts(model: nn.Module) -> list[Zero1Experts]:
    return [layer.experts for layer in moe_layers(model) if isinstance(layer, Zero1Replicas)]
