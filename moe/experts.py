"""The experts' feed-forward networks: one module for upstream packages, one grouped module for the native layer.

Dimensions: R rows, M model, H hidden, L experts of this rank. No biases (Mixtral, Qwen3, DeepSeek have none).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.system import Activation, ExpertView, LayerSpec


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
        weights = {name: weight.to(x.dtype) for name, weight in self.named_parameters()}
        return feed_forward(x, weights, self.activation, F.linear)

    def views(self, expert: int) -> list[ExpertView]:
        """Canonical views of this module's matrices, as global expert `expert`."""
        return [ExpertView(expert, name, parameter, Tensor.t) for name, parameter in self.named_parameters()]


class GroupedExperts(nn.Module):
    """All experts of a rank: grouped matrix products on a GPU in bf16, else one expert after the other.

    Args:
        spec: of the layer.
        experts: global ids of this rank's experts.
        device: of the weights: w1 (w3) [L, H, M] and w2 [L, M, H], float32.
    """

    def __init__(self, spec: LayerSpec, experts: range, device: torch.device) -> None:
        super().__init__()
        self.activation = spec.activation
        self.experts = experts
        for name, (rows, columns) in spec.expert_shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(len(experts), columns, rows, device=device)))

    def forward(self, rows_RM: Tensor, expert_rows: list[int]) -> Tensor:
        """Run each expert on its rows.

        Args:
            rows_RM: [R, M], sorted by local expert.
            expert_rows: rows of each expert; zeros allowed; they sum to R.

        Returns:
            [R, M], same order and dtype.
        """
        weights = {name: weight.to(rows_RM.dtype) for name, weight in self.named_parameters()}
        if rows_RM.is_cuda and rows_RM.dtype == torch.bfloat16 and len(rows_RM):
            ends = torch.tensor(expert_rows, device=rows_RM.device).cumsum(0).to(torch.int32)

            def grouped(rows: Tensor, weight: Tensor) -> Tensor:
                return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)

            return feed_forward(rows_RM, weights, self.activation, grouped)
        return torch.cat(
            [
                feed_forward(rows, {name: weight[slot] for name, weight in weights.items()}, self.activation, F.linear)
                for slot, rows in enumerate(rows_RM.split(expert_rows))
            ]
        )

    def views(self) -> list[ExpertView]:
        """Canonical views, one per expert and matrix."""
        return [
            ExpertView(expert, name, parameter, partial(_canonical, slot))
            for slot, expert in enumerate(self.experts)
            for name, parameter in self.named_parameters()
        ]


def _canonical(slot: int, tensor: Tensor) -> Tensor:
    return tensor[slot].t()


def feed_forward(
    rows: Tensor, weights: dict[str, Tensor], activation: Activation, multiply: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """w2(gelu(w1 rows)), or w2(silu(w1 rows) * (w3 rows)) for `swiglu`.

    Args:
        rows: [..., M].
        weights: by name, in the layout that `multiply` takes.
        activation: which.
        multiply: rows [..., A] and a weight to [..., B].

    Returns:
        [..., M].
    """
    if activation == "gelu":
        return multiply(F.gelu(multiply(rows, weights["w1"])), weights["w2"])
    return multiply(F.silu(multiply(rows, weights["w1"])) * multiply(rows, weights["w3"]), weights["w2"])
