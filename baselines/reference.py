"""The dense oracle: every rank holds every expert and sends nothing. Slow, simple, and what the others must equal."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from moe.exchange_costs import NOTHING
from moe.experts import ExpertFFN
from moe.gate import TopKGate
from moe.layer_simulation import LayerModel, RoutedLayer
from moe.mesh import Mesh
from moe.system import ExpertView, LayerSpec, MoELayer, MoEOutput, System


class DenseExperts(nn.Module):
    """Every expert on every token; y_T = sum_e weight_Te * expert_e(x_T).

    Args:
        spec: of the layer.
        device: of the weights.
    """

    def __init__(self, spec: LayerSpec, device: torch.device) -> None:
        super().__init__()
        self.experts = nn.ModuleList(ExpertFFN(spec, device) for _ in range(spec.num_experts))

    def forward(self, x_TM: Tensor, weights_TE: Tensor) -> Tensor:
        """x [T, M], weights [T, E] (zero where the expert is not chosen) -> [T, M]."""
        y_TM = torch.zeros_like(x_TM)
        for weight_T, expert in zip(weights_TE.unbind(1), self.experts, strict=True):
            y_TM = y_TM + weight_T.unsqueeze(1).to(x_TM.dtype) * expert(x_TM)
        return y_TM

    def views(self) -> list[ExpertView]:
        """Canonical views of every expert's matrices."""
        return [view for expert, module in enumerate(self.experts) for view in cast(ExpertFFN, module).views(expert)]


class ReferenceLayer(MoELayer):
    """Gate, then all experts on all tokens of this rank."""

    def __init__(self, spec: LayerSpec, mesh: Mesh) -> None:
        super().__init__(spec, mesh)
        self.gate = TopKGate(spec, mesh.device)
        self.dense = DenseExperts(spec, mesh.device)

    def forward(self, x_TM: Tensor) -> MoEOutput:
        """Compute this rank's tokens [T, M] with no communication."""
        routing = self.gate(x_TM)
        weights_TE = torch.zeros_like(routing.probs_TE).scatter(1, routing.expert_ids_TK, routing.weights_TK)
        y_TM = self.dense(x_TM, weights_TE)
        dropped = torch.zeros_like(routing.counts_E[0]) if routing.kept_TK is None else (~routing.kept_TK).sum()
        return MoEOutput(y_TM, routing.aux_loss, routing.counts_E, dropped, routing.expert_ids_TK)

    @property
    def gate_weight(self) -> nn.Parameter:
        """[E, M]."""
        return self.gate.weight

    def expert_views(self) -> list[ExpertView]:
        """Every expert, on every rank."""
        return self.dense.views()

    def stage_modules(self) -> tuple[nn.Module, ...]:
        """Gate and the dense experts."""
        return self.gate, self.dense

    @property
    def experts_are_sharded(self) -> bool:
        """False: the experts train like dense parameters."""
        return False


class Reference(System):
    """The oracle."""

    name = "reference"
    implementation = "native"
    summary = "dense oracle: all experts on all tokens, no communication"
    shards_experts = False

    def simulated_layer(self, layer: RoutedLayer) -> LayerModel:
        """Nothing travels, and every token meets every expert; behind backward, the sum of all experts' gradients."""
        num_experts = layer.spec.num_experts
        model = layer.model(layer.counts_PE, exchange=NOTHING, most_rows=num_experts * layer.num_tokens)
        return replace(model, extras=(layer.replica_gradients(1, num_experts),))

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """The dense layer."""
        return ReferenceLayer(spec, mesh)
