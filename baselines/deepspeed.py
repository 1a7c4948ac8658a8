"""DeepSpeed-MoE, the upstream package's layer (`deepspeed.moe.layer.MoE`), with the suite's expert network and weights.

Its gate runs without sampling (no second-expert noise, no random token selection), so that it is the same function as
the others'. Without a capacity factor nothing drops: upstream then pads every expert to the fullest one of any rank.
With one, it drops as many copies as the others, not always the same ones: for K = 2 the last in the queue (the suite's
rule), for K > 2 the least probable, for K = 1 whichever `torch.topk` finds last among equals.

With `replicas` = r it runs upstream's expert-data parallelism, `ep_size` = ranks / r (baselines/replica_blocks.py). The
layer alone is upstream's, not its engine: gradients are reduced by the suite, to all replicas, and without ZeRO-1 each
keeps its expert's whole optimizer state.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
from importlib.util import find_spec
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from baselines.replica_blocks import ReplicaBlocks, mesh_of_blocks, replicas_of
from moe.experts import ExpertFFN
from moe.mesh import Mesh
from moe.system import ExpertView, LayerSpec, MoELayer, MoEOutput
from moe.topology import Cluster


class Options(BaseModel):
    """Options of conf/system/deepspeed.yaml; upstream's names.

    Args:
        replicas: r, of every expert, on different ranks; null: as many as the mesh has, which is one.
        min_capacity: fewest slots of an expert when a capacity factor is set.
        use_rts: where K = 1 drops, drop at random.
        use_tutel: upstream's Tutel kernels; needs the package.
    """

    model_config = ConfigDict(extra="forbid")
    replicas: int | None = Field(default=None, ge=1, examples=[4])
    min_capacity: int = Field(default=4, ge=0)
    use_rts: bool = False
    use_tutel: bool = False


class DeepSpeedLayer(MoELayer):
    """Upstream's layer behind the suite's contract."""

    def __init__(self, spec: LayerSpec, mesh: Mesh, options: Options) -> None:
        super().__init__(spec, mesh)
        self.min_capacity = options.min_capacity
        upstream = _import_upstream(mesh.device)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a line for every group it makes
            self.upstream = upstream.MoE(
                spec.model_dim,
                ExpertFFN(spec, mesh.device),
                num_experts=spec.num_experts,
                ep_size=mesh.ep_size,
                k=spec.top_k,
                capacity_factor=spec.capacity_factor or 1.0,
                eval_capacity_factor=spec.capacity_factor or 1.0,
                min_capacity=options.min_capacity,
                drop_tokens=spec.capacity_factor is not None,
                use_rts=options.use_rts,
                use_tutel=options.use_tutel,
                top2_2nd_expert_sampling=False,
            ).to(mesh.device)
            self.upstream.set_deepspeed_parallelism()

    def forward(self, x_TM: Tensor) -> MoEOutput:
        """Route this rank's tokens [T, M]."""
        y_TM, aux_loss, counts_E = self.upstream(x_TM)
        return MoEOutput(y_TM, aux_loss, counts_E, self._dropped(counts_E, len(x_TM)), None)

    def _dropped(self, counts_E: Tensor, num_tokens: int) -> Tensor:
        spec = self.spec
        if spec.capacity_factor is None:
            return torch.zeros_like(counts_E[0])
        # Upstream's `_capacity`, in float32 as there.
        capacity = math.ceil(num_tokens / spec.num_experts * torch.tensor(spec.capacity_factor * spec.top_k))
        return (counts_E - max(capacity, self.min_capacity)).clamp_min(0).sum()

    @property
    def gate_weight(self) -> nn.Parameter:
        """[E, M]."""
        return self.upstream.deepspeed_moe.gate.wg.weight

    @property
    def replicas_E(self) -> list[int] | None:
        """As many of each expert."""
        return replicas_of(self)

    def expert_views(self) -> list[ExpertView]:
        """Upstream's list of local experts, in global order."""
        experts = self.upstream.deepspeed_moe.experts.deepspeed_experts
        ids = self.mesh.local_experts(self.spec.num_experts)
        return [view for expert, module in zip(ids, experts, strict=True) for view in module.views(expert)]

    def stage_modules(self) -> tuple[nn.Module, ...]:
        """Upstream's gate and experts."""
        return self.upstream.deepspeed_moe.gate, self.upstream.deepspeed_moe.experts


class DeepSpeed(ReplicaBlocks):
    """DeepSpeed-MoE as its authors ship it."""

    name = "deepspeed"
    implementation = "upstream"
    summary = "DeepSpeed-MoE: GShard gating, experts padded to equal capacity"
    Options = Options
    pads = True

    def replicas(self, num_experts: int, num_ranks: int) -> int:
        """r; one unless asked for."""
        return int(self.options.replicas or 1)

    def refusals(self, spec: LayerSpec, cluster: Cluster) -> list[str]:
        """Missing packages, and replicas that the ranks can't be cut into."""
        reasons = [] if self.options.replicas is None else super().refusals(spec, cluster)
        if find_spec("deepspeed") is None:
            reasons.append(
                "The package deepspeed is not installed; see https://www.deepspeed.ai/tutorials/advanced-install/."
            )
        if self.options.use_tutel and find_spec("tutel") is None:
            reasons.append("use_tutel needs the package tutel; see https://github.com/microsoft/Tutel.")
        return reasons

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """Upstream's layer. Collective: it makes process groups."""
        if self.options.replicas is not None:
            mesh = mesh_of_blocks(mesh, self.options.replicas)
        return DeepSpeedLayer(spec, mesh, self.options)


def _import_upstream(device: torch.device) -> Any:
    """Import the package and let it adopt the process group that is there."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.moe.layer
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not deepspeed.comm.is_initialized():
        # Its shared-memory all-reduce would be compiled at first use (a minute, a compiler); no MoE layer calls it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        with contextlib.redirect_stdout(io.StringIO()):
            deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    return deepspeed.moe.layer
