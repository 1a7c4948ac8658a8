"""The experts' feed-forward networks: one module for upstream packages, one grouped module for the native layer.

Dimensions: R rows, M model, H hidden, L experts of this rank. No biases (Mixtral, Qwen3, DeepSeek have none).
"""

from __future__ import annotations

from operator import itemgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.system import Activation, ExpertView, LayerSpec


def activate(gate: Tensor, up: Tensor | None, activation: Activation) -> Tensor:
    """gelu(gate), or silu(gate) * up for `swiglu`; the first matrix gives `gate`, the third `up`."""
    if activation == "gelu":
        return F.gelu(gate)
    assert up is not None
    return F.silu(gate) * up


class ExpertFFN(nn.Module):
    """One expert, as upstream packages take it: maps [..., M] to [..., M] in the dtype of its input.

    Args:
        spec: of the layer.
        device: of the weights, float32 [H, M] or [M, H] as in `nn.Linear`.
    """

    def __init__(self, spec: LayerSpec, device: torch.device) -> None:
        super().__init__()
        self.activation = spec.activation
        for name, (rows, columns) in spec.expert_shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(columns, rows, device=device)))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., M] -> [..., M]."""
        parameters = dict(self.named_parameters())
        gate = F.linear(x, parameters["w1"].to(x.dtype))
        up = F.linear(x, parameters["w3"].to(x.dtype)) if "w3" in parameters else None
        return F.linear(activate(gate, up, self.activation), parameters["w2"].to(x.dtype))

    def views(self, expert: int) -> list[ExpertView]:
        """Canonical views of this module's matrices, as global expert `expert`."""
        return [ExpertView(expert, name, parameter, Tensor.t) for name, parameter in self.named_parameters()]


class GroupedExperts(nn.Module):
    """All experts of a rank, as one grouped matrix product a layer.

    Args:
        spec: of the layer.
        experts: global ids of this rank's experts.
        device: of the weights: w1 (w3) [L, M, H] and w2 [L, H, M], float32.
    """

    def __init__(self, spec: LayerSpec, experts: range, device: torch.device) -> None:
        super().__init__()
        self.activation = spec.activation
        self.experts = experts
        for name, shape in spec.expert_shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(len(experts), *shape, device=device)))

    def forward(self, rows_RM: Tensor, expert_rows: list[int]) -> Tensor:
        """Run each expert on its rows.

        Args:
            rows_RM: [R, M], sorted by local expert.
            expert_rows: rows of each expert; zeros allowed; they sum to R.

        Returns:
            [R, M], same order and dtype.
        """
        parameters = dict(self.named_parameters())
        gate = grouped_matmul(rows_RM, parameters["w1"], expert_rows)
        up = grouped_matmul(rows_RM, parameters["w3"], expert_rows) if "w3" in parameters else None
        return grouped_matmul(activate(gate, up, self.activation), parameters["w2"], expert_rows)

    def views(self) -> list[ExpertView]:
        """Canonical views, one per expert and matrix."""
        return [
            ExpertView(expert, name, parameter, itemgetter(slot))
            for slot, expert in enumerate(self.experts)
            for name, parameter in self.named_parameters()
        ]


def grouped_matmul(rows: Tensor, weights: Tensor, group_rows: list[int]) -> Tensor:
    """Rows of group g times weights[g], for every group.

    Args:
        rows: [R, A], sorted by group.
        weights: [L, A, B]; cast to the dtype of the rows.
        group_rows: L row counts that sum to R.

    Returns:
        [R, B]. One `grouped_mm` kernel on CUDA in bf16, else a product a group.
    """
    weights = weights.to(rows.dtype)
    if rows.is_cuda and rows.dtype == torch.bfloat16 and len(rows):
        ends = torch.tensor(group_rows, device=rows.device).cumsum(0).to(torch.int32)
        return F.grouped_mm(rows, weights, offs=ends)
    parts = zip(rows.split(group_rows), weights.unbind(0), strict=True)
    return torch.cat([part @ weight for part, weight in parts])
