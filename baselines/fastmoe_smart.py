"""FasterMoE (He et al., PPoPP 2022) as FastMoE ships it: its smart schedule (section 4.2), and its dynamic shadowing
(section 4.1) where asked for, behind `fmoe.FMoE` with the suite's gate, expert network and weights.

The schedule exchanges between groups of ranks in turn and computes what one group sent while the next one's rows
travel.

Upstream's policy of shadowing (1.1) is not the paper's, and stays as shipped: where the paper sums the copies of each
expert over ranks, it sums each rank's copies over experts. Where all ranks send equally many, it never shadows; where
drops make them differ, it shadows the expert whose id is the fuller rank's. It counts a model as fp32, sent once.

One function does the schedule, exchange and experts overlapped, so the stage `experts` holds both; `dispatch` and
`combine` hold next to nothing. Byte meters count both exchanges, and shadows' models and gradients as a ring moves
them. Upstream's topology-aware gate (section 4.3) is not here: it sends tokens elsewhere than the suite's gate does.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from baselines import fastmoe_gates
from baselines.fastmoe import FastMoELayer
from baselines.fmoe_package import MISSING, NEEDS_CUDA, PACKAGE, Switches, other_switches
from baselines.replacing import replaced
from moe.errors import Refused
from moe.mesh import Mesh, ranks_are_on_cuda
from moe.system import LayerSpec, MoELayer, MoEOutput, System
from moe.topology import Cluster

ONE_RANK = "FasterMoE's schedule exchanges between ranks, and upstream's crashes on one; use several, or fastmoe."
SHADOWS_DIFFER = (
    "Where copies are dropped and experts shadowed, upstream's outputs are not the oracle's (relative error 1.3 on two "
    "H100); set shadowing=false, or capacity_factor=null."
)


class Options(BaseModel):
    """Options of conf/system/fastermoe_upstream.yaml. Upstream reads the first two once a process.

    Args:
        shadowing: replicate experts for a step where upstream's policy says that it pays (see above when that is).
        group_size: ranks that exchange at once; the ranks must be a multiple of it, or fewer.
        network_bytes_per_s: bandwidth in that model, bytes/s of a rank (upstream documents GB/s and computes in
            bytes/s); its default is 50 Gbit/s.
        gemm_flop_per_s: speed of matrix products in that model, FLOP/s of a rank.
    """

    model_config = ConfigDict(extra="forbid")
    shadowing: bool = True
    group_size: int = Field(default=4, ge=1)
    network_bytes_per_s: float = Field(default=6.25e9, gt=0)
    gemm_flop_per_s: float = Field(default=11.5e12, gt=0)

    @property
    def switches(self) -> Switches:
        """Of upstream's process."""
        return Switches(schedule=True, shadowing=self.shadowing, group_size=self.group_size)

    def policy(self, spec: LayerSpec) -> dict[str, str]:
        """Upstream's variables for its model of shadowing, which it reads at every forward pass.

        Alpha is for upstream the hidden width of a two-layer network over its width M. Here it is an expert's
        parameters / (2 M^2), the same for `gelu`; for `swiglu` (ours) it makes both model size and FLOP come out right.
        """
        numel = sum(rows * columns for rows, columns in spec.expert_shapes.values())
        return {
            "FMOE_FASTER_GLBPLC_NETBW": repr(self.network_bytes_per_s),
            "FMOE_FASTER_GLBPLC_GPUTP": repr(self.gemm_flop_per_s),
            "FMOE_FASTER_GLBPLC_ALPHA": repr(numel / (2 * spec.model_dim**2)),
            "FMOE_FASTER_GLBPLC_DMODEL": str(spec.model_dim),
        }


class Schedule(nn.Module):
    """Upstream's function that exchanges and computes, as a module, so that its time can be seen.

    Args:
        function: `fmoe.layers._fmoe_general_global_forward`.
    """

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x_TM: Tensor, *routing: Any, **experts: Any) -> Tensor:
        """x [T, M] -> the experts' outputs of all copies, [T * K, M]."""
        return self.function(x_TM, *routing, **experts)


class FasterMoELayer(FastMoELayer):
    """Upstream's layer with its switches on.

    Raises:
        Refused: what `FastMoELayer` does; an expert-parallel group of one rank, or one that no groups divide.
    """

    def __init__(self, spec: LayerSpec, mesh: Mesh, options: Options) -> None:
        if reasons := _group_refusals(mesh.ep_size, options.group_size):
            raise Refused(*reasons)
        super().__init__(spec, mesh, fastmoe_gates.Options(), options.switches)
        import fmoe.layers

        self.smart = options
        self.schedule = Schedule(fmoe.layers._fmoe_general_global_forward)

    def forward(self, x_TM: Tensor) -> MoEOutput:
        """Route this rank's tokens [T, M]."""
        import fmoe.layers

        os.environ.update(self.smart.policy(self.spec))  # here, because layers of other widths may have run before
        with replaced(fmoe.layers, "_fmoe_general_global_forward", self._run):
            return super().forward(x_TM)

    def _run(self, x_TM: Tensor, *routing: Any, **experts: Any) -> Tensor:
        # A view, whose gradient is the schedule's alone: the stage clock reads when it is there.
        return self.schedule(x_TM.view_as(x_TM), *routing, **experts)

    @property
    def path(self) -> str:
        """The switches, and where the time of the exchange is."""
        group_size = min(self.smart.group_size, self.mesh.ep_size)
        shadowing = "shadowing" if self.smart.shadowing else "no shadowing"
        return f"groups of {group_size}, {shadowing}; stage experts holds the exchange too"

    def stage_modules(self) -> tuple[nn.Module, ...]:
        """The gate and the schedule."""
        return self.upstream.gate, self.schedule


class FasterMoE(System):
    """FastMoE with FasterMoE's switches on."""

    name = "fastermoe_upstream"
    implementation = "upstream"
    summary = "FasterMoE in FastMoE: exchange and experts overlapped by groups, crowded experts shadowed"
    Options = Options

    def refusals(self, spec: LayerSpec, cluster: Cluster) -> list[str]:
        """Missing package, no CUDA, bf16, one rank, groups that don't divide the ranks, shadows among drops, or a
        process with others on."""
        if find_spec(PACKAGE) is None:
            return [MISSING]
        reasons = [] if ranks_are_on_cuda() else [NEEDS_CUDA]
        if spec.dtype == torch.bfloat16:
            reasons.append("FasterMoE's schedule has no backward in bf16; run it in fp32.")
        if self.options.shadowing and spec.capacity_factor is not None:
            reasons.append(SHADOWS_DIFFER)
        reasons += _group_refusals(cluster.world_size, self.options.group_size)
        return reasons + other_switches(self.options.switches)

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """Upstream's layer."""
        return FasterMoELayer(spec, mesh, self.options)


def _group_refusals(num_ranks: int, group_size: int) -> list[str]:
    if num_ranks == 1:
        return [ONE_RANK]
    if num_ranks % min(group_size, num_ranks):
        return [f"FasterMoE's group_size={group_size} doesn't divide {num_ranks} ranks; set one that does."]
    return []
