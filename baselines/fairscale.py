"""fairscale's GShard layer (`fairscale.nn.MOELayer`), upstream, with the suite's expert network and weights.

Upstream's layer takes its gate as an argument. Upstream's own `Top2Gate` fixes the capacity at 2T / E and samples the
second choice, so it can't be compared with the others token by token: the default is the suite's gate, which hands the
upstream layer the masks it wants. `gate: upstream` runs theirs.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from moe.experts import ExpertFFN
from moe.gate import TopKGate, within_capacity
from moe.mesh import Mesh
from moe.system import ExpertView, LayerSpec, MoELayer, MoEOutput, System
from moe.topology import Cluster


class Options(BaseModel):
    """Options of conf/system/fairscale.yaml.

    Args:
        gate: `suite` (any K, any capacity, deterministic) or `upstream` (Top2Gate: K = 2, capacity 2T / E, sampled).
    """

    model_config = ConfigDict(extra="forbid")
    gate: Literal["suite", "upstream"] = "suite"


class MaskGate(nn.Module):
    """The suite's routing in the form that the upstream layer takes: one-hot masks over (token, expert, slot)."""

    def __init__(self, spec: LayerSpec, mesh: Mesh) -> None:
        super().__init__()
        self.spec = spec
        self.group = mesh.ep_group
        self.gate = TopKGate(spec, mesh.device)

    def forward(self, x_TM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the balance loss, combine weights [T, E, C] and dispatch mask [T, E, C]; C is equal on all ranks."""
        spec = self.spec
        self.routing = routing = self.gate(x_TM)
        capacity = self._capacity(len(x_TM))
        slot_TK = _slots(routing.expert_ids_TK, spec.num_experts)
        kept_TK = slot_TK < capacity
        combine_TEC = x_TM.new_zeros(len(x_TM), spec.num_experts, capacity)
        token_TK = torch.arange(len(x_TM), device=x_TM.device).unsqueeze(1).expand_as(slot_TK)
        index = (token_TK[kept_TK], routing.expert_ids_TK[kept_TK], slot_TK[kept_TK])
        mask_TEC = torch.zeros_like(combine_TEC, dtype=torch.bool).index_put(index, torch.tensor(True, device=x_TM.device))
        return routing.aux_loss, combine_TEC.index_put(index, routing.weights_TK[kept_TK].to(x_TM.dtype)), mask_TEC

    def _capacity(self, num_tokens: int) -> int:
        spec = self.spec
        if spec.capacity_factor is not None:
            return math.ceil(spec.capacity_factor * spec.top_k * num_tokens / spec.num_experts)
        fullest = self.routing.counts_E.max()
        dist.all_reduce(fullest, op=dist.ReduceOp.MAX, group=self.group)
        return int(fullest)


def _slots(expert_ids_TK: Tensor, num_experts: int) -> Tensor:
    """Position of every copy in its expert's queue, first choices first; [T, K] int64."""
    by_choice = nn.functional.one_hot(expert_ids_TK.t().flatten(), num_experts)
    position = (by_choice.cumsum(0) * by_choice).sum(1) - 1
    return position.view(expert_ids_TK.shape[1], -1).t()


class FairscaleLayer(MoELayer):
    """Upstream's layer behind the suite's contract."""

    def __init__(self, spec: LayerSpec, mesh: Mesh, options: Options) -> None:
        super().__init__(spec, mesh)
        from fairscale.nn.moe import MOELayer, Top2Gate

        self.own_gate = options.gate == "suite"
        gate = MaskGate(spec, mesh) if self.own_gate else Top2Gate(spec.model_dim, spec.num_experts).to(mesh.device)
        experts = [ExpertFFN(spec, mesh.device) for _ in mesh.local_experts(spec.num_experts)]
        self.upstream = MOELayer(gate, nn.ModuleList(experts), mesh.ep_group)

    def forward(self, x_TM: Tensor) -> MoEOutput:
        """Route this rank's tokens [T, M]; T a multiple of this rank's experts, as upstream asserts."""
        num_local = len(self.upstream.experts)
        y_TM = self.upstream(x_TM.view(num_local, -1, x_TM.shape[1])).view_as(x_TM)
        if self.own_gate:
            routing = self.upstream.gate.routing
            dropped = torch.zeros_like(routing.counts_E[0]) if routing.kept_TK is None else (~routing.kept_TK).sum()
            return MoEOutput(y_TM, self.upstream.l_aux, routing.counts_E, dropped, routing.expert_ids_TK)
        return MoEOutput(y_TM, self.upstream.l_aux * self.spec.num_experts**2, *self._upstream_counts(x_TM), None)

    @torch.no_grad()
    def _upstream_counts(self, x_TM: Tensor) -> tuple[Tensor, Tensor]:
        # Upstream does not tell its choices. Without the sampling of the second one they are the two best.
        ids_TK = (x_TM.float() @ self.gate_weight.t()).topk(2, dim=1).indices
        kept_TK = within_capacity(ids_TK, self.spec.num_experts, 2 * len(x_TM) // self.spec.num_experts)
        return torch.bincount(ids_TK.flatten(), minlength=self.spec.num_experts), (~kept_TK).sum()

    @property
    def gate_weight(self) -> nn.Parameter:
        """[E, M]."""
        return self.upstream.gate.gate.weight if self.own_gate else self.upstream.gate.wg.weight

    def expert_views(self) -> list[ExpertView]:
        """Upstream's list of local experts, in global order."""
        ids = self.mesh.local_experts(self.spec.num_experts)
        return [
            view for expert, module in zip(ids, self.upstream.experts, strict=True) for view in module.views(expert)
        ]

    def stage_modules(self) -> tuple[nn.Module, ...]:
        """The gate and each expert."""
        return self.upstream.gate, *self.upstream.experts


class Fairscale(System):
    """GShard's algorithm 2 as fairscale ships it: dense one-hot einsums and equal capacities."""

    name = "fairscale"
    implementation = "upstream"
    summary = "fairscale MOELayer: GShard's dense one-hot dispatch"
    Options = Options

    def refusals(self, spec: LayerSpec, cluster: Cluster) -> list[str]:
        """Missing package, precision, and what upstream's own gate can't do."""
        reasons = []
        if find_spec("fairscale") is None:
            reasons.append(
                "The package fairscale is not installed; see https://fairscale.readthedocs.io/en/latest/installation_instructions.html."
            )
        if spec.dtype != torch.float32:
            reasons.append("fairscale's layer multiplies a float32 mask with the tokens, so it runs in float32 only.")
        if self.options.gate == "upstream" and (spec.top_k != 2 or spec.capacity_factor != 1.0):
            reasons.append("fairscale's Top2Gate knows only top_k=2 and capacity_factor=1.0 (2T / E slots an expert).")
        return reasons

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """Upstream's layer."""
        return FairscaleLayer(spec, mesh, self.options)
