"""Tutel, the upstream package's layer (`tutel.moe.moe_layer`) and gate, with the suite's expert network and weights.

Without a capacity factor nothing drops: upstream then pads every expert to the fullest one of any rank. With one, the
copies drop that the suite's rule drops; upstream makes room in multiples of K, so the adapter asks for the next one and
leaves out the slots above the suite's capacity. The balance loss is the suite's; upstream's agrees for K <= 2.

Of upstream's adaptive parallelism (Hwang et al. 2023, section 3.1) two degrees r remain where every rank holds whole
experts: 1, tokens travel, and 0, experts do. Upstream leaves the choice to its caller, and so does the option.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Literal

import torch.distributed as dist
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from baselines.replacing import replaced
from baselines.tutel_2dh import two_dimensional
from baselines.tutel_2dh_exchange import node_size
from moe import ops
from moe.errors import Refused
from moe.experts import feed_forward
from moe.gate import balance_loss
from moe.layer_simulation import LayerModel, RoutedLayer, fixed_degree
from moe.mesh import Mesh, ranks_are_on_cuda
from moe.slots import BatchedExperts, Slots
from moe.system import ExpertView, LayerSpec, MoELayer, MoEOutput, System
from moe.topology import Cluster

PAGE = "https://github.com/microsoft/Tutel"
LARGEST_INDEX = 2**31 - 1


class Options(BaseModel):
    """Options of conf/system/tutel.yaml; upstream's names.

    Args:
        a2a_ffn_overlap_degree: parts that the slots are cut into, to overlap all-to-all and experts; CUDA only.
        use_2dh: two-dimensional hierarchical all-to-all, between nodes, then inside them; on a cluster of one level,
            all ranks are one node.
        adaptive_r: 1 exchanges tokens; 0 gathers all experts' weights on every rank, and no token leaves it.
        batch_prioritized_routing: where copies drop, the tokens with the surest gate come first, not the first ones.
    """

    model_config = ConfigDict(extra="forbid")
    a2a_ffn_overlap_degree: int = Field(default=1, ge=1, le=32)
    use_2dh: bool = False
    adaptive_r: Literal[0, 1] = 1
    batch_prioritized_routing: bool = False


class GatheredExperts(BatchedExperts):
    """This rank's experts, whose weights it gathers from all others before it computes with them."""

    gathered: tuple[Tensor, Tensor]

    def forward(self, rows_RM: Tensor, *_: list[int] | Tensor | None) -> Tensor:
        """All E experts on their R / E rows [R, M] each; returns the same order and dtype."""
        w_in, w_out = self.gathered
        x_ECM = rows_RM.view(len(w_in), len(rows_RM) // len(w_in), rows_RM.shape[1])
        return feed_forward(x_ECM, w_in, w_out, self.activation, lambda rows, weight: rows @ weight.mT).view_as(rows_RM)


class GatheredSlots(Slots):
    """What upstream calls with adaptive_r=0: with the slots of all experts, filled by this rank's tokens."""

    def forward(self, x_ESM: Tensor, _layer: Any) -> Tensor:
        """Slots [E, slots, M] -> the same shape; those above `capacity` are left out. The gather is upstream's."""
        from tutel.net import zero_gather

        experts = self.hidden[0]
        assert isinstance(experts, GatheredExperts)
        kept = int(min(x_ESM.shape[1], self.capacity))
        weights = (experts.w_in.to(x_ESM.dtype), experts.w_out.to(x_ESM.dtype))
        experts.gathered = zero_gather(weights[0], group=self.group), zero_gather(weights[1], group=self.group)
        y_RM = experts(x_ESM[:, :kept].reshape(-1, x_ESM.shape[2]), [kept] * len(x_ESM))
        del experts.gathered
        return F.pad(y_RM.view(len(x_ESM), kept, -1), (0, 0, 0, x_ESM.shape[1] - kept))


class TutelLayer(MoELayer):
    """Upstream's layer behind the suite's contract."""

    def __init__(self, spec: LayerSpec, mesh: Mesh, options: Options) -> None:
        super().__init__(spec, mesh)
        overlaps = options.a2a_ffn_overlap_degree > 1
        if mesh.edp_size > 1 and (overlaps or options.use_2dh):
            raise Refused("Tutel's 2DH and overlap take all ranks for one expert-parallel group.")
        self.options = options
        _prepare_upstream(mesh, "nccl_all_to_all_scatter_async" if overlaps else "inject_source")
        from tutel.impls.communicate import PrimAllToAll2D, RestoreBackward
        from tutel.moe import moe_layer

        # Upstream reads LOCAL_SIZE once a process, and this one may have run on other nodes.
        PrimAllToAll2D.LOCAL_SIZE = node_size(mesh.cluster, mesh.world_size)

        class RestoreInGroup(RestoreBackward):
            """Gradients go back in the group; upstream's go through the default group, whatever group tokens took."""

            @staticmethod
            def forward(ctx: Any, received: Tensor, sent: Tensor) -> Tensor:
                return RestoreBackward.forward(ctx, received, sent, mesh.ep_group)

        self.restore = RestoreInGroup
        experts, slots_class = (GatheredExperts, GatheredSlots) if options.adaptive_r == 0 else (BatchedExperts, Slots)
        self.experts = experts(spec, mesh.local_experts(spec.num_experts), mesh.device)
        slots = slots_class(self.experts, mesh.ep_group, meter=overlaps and mesh.ep_size > 1)
        self.upstream = moe_layer(
            {"type": "top", "k": spec.top_k, "fp32_gate": True, "capacity_factor": 0.0},
            spec.model_dim,
            {"type": "custom", "module": lambda **_: slots, "num_experts_per_device": len(self.experts.experts)},
            group=mesh.ep_group,
            parallel_type=f"adaptive:{options.adaptive_r}",
            **options.model_dump(exclude={"adaptive_r"}),
        ).to(mesh.device)

    def forward(self, x_TM: Tensor) -> MoEOutput:
        """Route this rank's tokens [T, M]; T equal on all ranks where a capacity factor is set."""
        from tutel.impls import communicate, losses

        spec, capacity, factor = self.spec, math.inf, None
        if spec.capacity_factor is not None:
            capacity = spec.capacity(len(x_TM))
            # Upstream makes room for K * int(factor * ceil(T / E)); the half keeps rounding errors off the edge.
            factor = (math.ceil(capacity / spec.top_k) + 0.5) / math.ceil(len(x_TM) / spec.num_experts)
        self.upstream.experts.capacity, self.upstream.experts.first_slot = capacity, 0
        chosen: list[Tensor] = []

        def loss(probs_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
            if factor is None:
                self._refuse_too_many_slots(expert_ids_TK)
            chosen.append(expert_ids_TK)
            return balance_loss(probs_TE, expert_ids_TK)

        with replaced(losses, "gshard_loss", loss), replaced(communicate, "RestoreBackward", self.restore):
            y_TM = self.upstream(x_TM.contiguous(), capacity_factor=factor)
        counts_E = ops.count_choices(chosen[0], spec.num_experts)
        dropped = (counts_E - capacity).clamp_min(0).sum().long()
        return MoEOutput(y_TM, self.upstream.l_aux, counts_E, dropped, chosen[0])

    def _refuse_too_many_slots(self, expert_ids_TK: Tensor) -> None:
        """Upstream's kernels count elements in 32 bits; beyond, they write elsewhere and end the process. Collective
        where the tokens could need that many."""
        num_experts, model_dim = self.spec.num_experts, self.spec.model_dim
        if num_experts * len(expert_ids_TK) * model_dim <= LARGEST_INDEX:
            return
        fullest = ops.count_choices(expert_ids_TK, num_experts).max()
        if self.mesh.ep_size > 1:
            dist.all_reduce(fullest, op=dist.ReduceOp.MAX, group=self.mesh.ep_group)
        if num_experts * int(fullest) * model_dim > LARGEST_INDEX:
            raise Refused(
                f"Tutel would pad {num_experts} experts to {int(fullest)} slots, more than its kernels count."
            )

    @property
    def gate_weight(self) -> nn.Parameter:
        """[E, M]."""
        return self.upstream.gates[0].wg.weight

    @property
    def path(self) -> str:
        """With `use_2dh`, what upstream takes for nodes; else empty."""
        if not self.options.use_2dh:
            return ""
        world_size, size = self.mesh.world_size, node_size(self.mesh.cluster, self.mesh.world_size)
        if size == world_size:
            return "2DH asked for, linear all-to-all on one level, blocking"
        return (
            f"2DH all-to-all, {world_size // size} node{'s' * (world_size > size)} of {size}, between first, blocking"
        )

    def expert_views(self) -> list[ExpertView]:
        """Views into the batched weights."""
        return self.experts.views()

    def stage_modules(self) -> tuple[nn.Module, ...]:
        """Upstream's gate (its linear map; softmax and top-k count as dispatch) and the experts."""
        return self.upstream.gates[0], self.experts


class Tutel(System):
    """Tutel as its authors ship it."""

    name = "tutel"
    implementation = "upstream"
    summary = "Tutel: sparse encode and decode kernels, experts padded to equal capacity"
    Options = Options

    def refusals(self, spec: LayerSpec, cluster: Cluster) -> list[str]:
        """Missing package, odd widths, and options where upstream has nothing to do for them or does it wrong."""
        if find_spec("tutel") is None:
            return [f"The package tutel is not installed; see {PAGE}."]
        reasons = []
        if spec.model_dim % 2:
            reasons.append("Tutel takes an even model_dim only.")
        overlaps = self.options.a2a_ffn_overlap_degree > 1
        if overlaps and not ranks_are_on_cuda():
            reasons.append("Tutel's a2a_ffn_overlap_degree works on CUDA only; elsewhere it would do nothing.")
        if overlaps and self.options.use_2dh:  # it takes a CUDA device's number for the rank's place in its node
            reasons.append("Tutel's overlapped 2DH mixes up ranks: use one of use_2dh and a2a_ffn_overlap_degree.")
        if self.options.adaptive_r == 0 and (overlaps or self.options.use_2dh):
            reasons.append("Tutel's adaptive_r=0 exchanges no tokens: leave use_2dh and a2a_ffn_overlap_degree out.")
        if self.options.batch_prioritized_routing and spec.capacity_factor is None:  # it reads the last token's place
            reasons.append(
                "Tutel's batch_prioritized_routing miscounts slots where nothing drops: set capacity_factor."
            )
        return reasons

    def simulated_layer(self, layer: RoutedLayer) -> LayerModel:
        """Padded experts by one exchange or two, in as many parts as it is told; adaptive_r=0 is not told apart."""
        counts_PE, options = layer.padded_PE, self.options
        exchange = two_dimensional(layer, counts_PE) if options.use_2dh else None
        return replace(layer.model(counts_PE, exchange=exchange), planner=fixed_degree(options.a2a_ffn_overlap_degree))

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """Upstream's layer."""
        return TutelLayer(spec, mesh, self.options)


def _prepare_upstream(mesh: Mesh, needed: str) -> None:
    """Set what upstream reads from the environment, and make sure that its CUDA parts were built."""
    os.environ.setdefault("NUMA_TYPE", "0")  # or its import binds this process to some cores, for other systems too
    os.environ["LOCAL_SIZE"] = str(node_size(mesh.cluster, mesh.world_size))
    import tutel_custom_kernel

    if mesh.device.type == "cuda" and not hasattr(tutel_custom_kernel, needed):
        raise Refused(f"Tutel was installed without its CUDA or NCCL parts; see {PAGE}.")
