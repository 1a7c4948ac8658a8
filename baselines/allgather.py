"""Expert parallelism by all-gather: every rank sees every token and computes its own experts' part; a reduce-scatter
sums the parts. What Megatron-LM's `allgather` token dispatcher does; also the README's example of a new system."""

from __future__ import annotations

import torch
from torch import Tensor

from moe.collectives import gather_rows, sum_and_scatter_rows
from moe.exchange_costs import Exchange, ring_cost
from moe.layer import NativeMoE
from moe.layer_simulation import LayerModel, RoutedLayer
from moe.mesh import Mesh
from moe.system import LayerSpec, MoELayer, MoEOutput, System


class AllGatherLayer(NativeMoE):
    """The native gate and experts; tokens are gathered instead of dispatched. Every rank must have as many tokens."""

    def forward(self, x_TM: Tensor) -> MoEOutput:
        """Route this rank's tokens [T, M]."""
        routing, group = self.gate(x_TM), self.mesh.ep_group
        chosen = routing.expert_ids_TK if routing.kept_TK is None else routing.expert_ids_TK.where(routing.kept_TK, -1)
        tokens, ids = gather_rows(x_TM, group), gather_rows(chosen, group).flatten()
        weights = gather_rows(routing.weights_TK, group).flatten()
        mine = self.mesh.local_experts(self.spec.num_experts)
        copies = torch.argsort(ids, stable=True)
        copies = copies[(ids[copies] >= mine.start) & (ids[copies] < mine.stop)]
        rows_per_expert = torch.bincount(ids[copies] - mine.start, minlength=len(mine)).tolist()
        token_of_copy = copies // self.spec.top_k
        rows = self.experts(tokens[token_of_copy], rows_per_expert) * weights[copies, None].to(x_TM.dtype)
        y_TM = sum_and_scatter_rows(torch.zeros_like(tokens).index_add(0, token_of_copy, rows), group)
        dropped = (chosen < 0).sum()
        return MoEOutput(y_TM, routing.aux_loss, routing.counts_E, dropped, routing.expert_ids_TK)


class AllGather(System):
    """Native expert parallelism by all-gather and reduce-scatter."""

    name = "allgather"
    implementation = "native"
    summary = "all tokens to all ranks, reduce-scatter back"

    def simulated_layer(self, layer: RoutedLayer) -> LayerModel:
        """An all-gather of all ranks' tokens and a reduce-scatter back, in place of the exchanges."""
        whole_bytes = float(layer.num_ranks * layer.num_tokens * layer.row_bytes)
        return layer.model(layer.counts_PE, exchange=Exchange(ring_cost(layer.cluster), whole_bytes))

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """The layer."""
        return AllGatherLayer(spec, mesh)
