"""fairscale's GShard layer (`fairscale.nn.MOELayer`), upstream, with the suite's expert network and weights.

Upstream's layer takes its gate as an argument. Upstream's own `Top2Gate` fixes the capacity at 2T / E and samples the
second choice, so it can't be compared with the others token by token: the default is the suite's gate, which hands the
upstream layer the masks it wants. `gate: upstream` runs theirs.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from moe import ops
from moe.errors import Refused
from moe.experts import ExpertFFN
from moe.gate import TopKGate, queue_positions
from moe.layer_simulation import LayerModel, RoutedLayer
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

    @property
    def weight(self) -> nn.Parameter:
        """[E, M]."""
        return self.gate.weight

    def forward(self, x_TM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the balance loss, combine weights [T, E, C] and dispatch mask [T, E, C]; C is equal on all ranks."""
        routing = self.gate(x_TM)
        capacity = self._capacity(len(x_TM), routing.counts_E)
        slot_TK = queue_positions(routing.expert_ids_TK, self.spec.num_experts)
        kept_TK = slot_TK < capacity
        self.expert_ids_TK, self.num_dropped = routing.expert_ids_TK, (~kept_TK).sum()
        combine_TEC = x_TM.new_zeros(len(x_TM), self.spec.num_experts, capacity)
        token_TK = torch.arange(len(x_TM), device=x_TM.device).unsqueeze(1).expand_as(slot_TK)
        index = (token_TK[kept_TK], routing.expert_ids_TK[kept_TK], slot_TK[kept_TK])
        true = torch.ones((), dtype=torch.bool, device=x_TM.device)
        mask_TEC = torch.zeros_like(combine_TEC, dtype=torch.bool).index_put(index, true)
        return routing.aux_loss, combine_TEC.index_put(index, routing.weights_TK[kept_TK].to(x_TM.dtype)), mask_TEC

    def _capacity(self, num_tokens: int, counts_E: Tensor) -> int:
        if self.spec.capacity_factor is not None:
            return self.spec.capacity(num_tokens)
        fullest = counts_E.max()
        dist.all_reduce(fullest, op=dist.ReduceOp.MAX, group=self.group)
        return int(fullest)


class UpstreamGate(nn.Module):
    """Upstream's Top2Gate, and what it chose: upstream samples the second choice and does not tell it."""

    def __init__(self, spec: LayerSpec, mesh: Mesh) -> None:
        super().__init__()
        from fairscale.nn.moe import Top2Gate

        self.gate = Top2Gate(spec.model_dim, spec.num_experts).to(mesh.device)

    @property
    def weight(self) -> nn.Parameter:
        """[E, M]."""
        return self.gate.wg.weight

    def forward(self, x_TM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What Top2Gate returns, its loss scaled like the suite's. T must be a multiple of E, as upstream asserts."""
        self._foresee(x_TM)
        aux_loss, combine_TEC, mask_TEC = self.gate(x_TM)
        return aux_loss * mask_TEC.shape[1] ** 2, combine_TEC, mask_TEC

    @torch.no_grad()
    def _foresee(self, x_TM: Tensor) -> None:
        from fairscale.nn.moe.top2gate import gumbel_rsample

        logits_TE = self.gate.wg(x_TM)
        with torch.random.fork_rng([x_TM.device] if x_TM.is_cuda else []):  # upstream will draw the same noise again
            noisy_TE = logits_TE + gumbel_rsample(logits_TE.shape, x_TM.device)
        first_T1 = logits_TE.softmax(1).argmax(1, keepdim=True)
        second_T1 = noisy_TE.scatter(1, first_T1, -torch.inf).argmax(1, keepdim=True)
        self.expert_ids_TK = torch.cat([first_T1, second_T1], dim=1)
        num_experts = logits_TE.shape[1]
        slot_TK = queue_positions(self.expert_ids_TK, num_experts)
        self.num_dropped = (slot_TK >= 2 * len(x_TM) // num_experts).sum()


class FairscaleLayer(MoELayer):
    """Upstream's layer behind the suite's contract."""

    def __init__(self, spec: LayerSpec, mesh: Mesh, options: Options) -> None:
        super().__init__(spec, mesh)
        from fairscale.nn.moe import MOELayer

        gate = MaskGate(spec, mesh) if options.gate == "suite" else UpstreamGate(spec, mesh)
        experts = [ExpertFFN(spec, mesh.device) for _ in mesh.local_experts(spec.num_experts)]
        self.upstream = MOELayer(gate, nn.ModuleList(experts), mesh.ep_group)

    def forward(self, x_TM: Tensor) -> MoEOutput:
        """Route this rank's tokens [T, M]; T a multiple of this rank's experts, as upstream asserts."""
        num_local = len(self.upstream.experts)
        if len(x_TM) % num_local:
            raise Refused(f"fairscale needs tokens in multiples of a rank's {num_local} experts, not {len(x_TM)}.")
        y_TM = self.upstream(x_TM.view(num_local, -1, x_TM.shape[1])).view_as(x_TM)
        gate = self.upstream.gate
        ids_TK = gate.expert_ids_TK
        counts_E = ops.count_choices(ids_TK, self.spec.num_experts)
        return MoEOutput(y_TM, self.upstream.l_aux, counts_E, gate.num_dropped, ids_TK)

    @property
    def gate_weight(self) -> nn.Parameter:
        """[E, M]."""
        return self.upstream.gate.weight

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

    def simulated_layer(self, layer: RoutedLayer) -> LayerModel:
        """Padded experts, and the einsums with one-hot masks of every token and slot there and back."""
        model = layer.model(layer.padded_PE)
        slots = int(layer.padded_PE[0].sum())
        einsum_s = 2 * layer.num_tokens * slots * layer.spec.model_dim * layer.costs["gemm"].beta_s_per_byte
        dense_s, backward_s = model.work.dense_s + einsum_s, model.work.dense_backward_s + 2 * einsum_s
        return replace(model, work=replace(model.work, dense_s=dense_s, dense_backward_s=backward_s))

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """Upstream's layer."""
        return FairscaleLayer(spec, mesh, self.options)
