"""A GPT with MoE layers: rotary positions, RMSNorm or LayerNorm, grouped-query attention, no biases.

Dimensions: B sequences, S positions, M model, N heads, G key-value heads, D of a head, V vocabulary, T = B * S tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.config import ModelConfig
from moe.experts import ExpertFFN
from moe.mesh import Mesh
from moe.system import LayerSpec, MoELayer, MoEOutput, System, moe_layers
from moe.weights import load_layer, seeded_normal

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Arithmetic of the MoE layers by `trainer.precision`."""


class Losses(NamedTuple):
    """What one forward pass gives.

    Attributes:
        cross_entropy: scalar, nats a token, mean over this rank's tokens.
        aux_loss: scalar, mean of the MoE layers' balance losses, unweighted.
        moe: outputs of the MoE layers, first layer first.
    """

    cross_entropy: Tensor
    aux_loss: Tensor
    moe: list[MoEOutput]


class Attention(nn.Module):
    """Causal self-attention with rotary positions (Su et al. 2021) and grouped queries (Ainslie et al. 2023)."""

    def __init__(self, model: ModelConfig, device: torch.device) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = model.num_heads, model.num_kv_heads or model.num_heads
        self.head_dim = model.head_dim or model.model_dim // model.num_heads
        query_dim, kv_dim = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.query = nn.Linear(model.model_dim, query_dim, bias=False, device=device)
        self.key = nn.Linear(model.model_dim, kv_dim, bias=False, device=device)
        self.value = nn.Linear(model.model_dim, kv_dim, bias=False, device=device)
        self.out = nn.Linear(query_dim, model.model_dim, bias=False, device=device)

    def forward(self, x_BSM: Tensor, rotation_SD: tuple[Tensor, Tensor]) -> Tensor:
        """[B, S, M] -> [B, S, M]; `rotation_SD` is cos and sin, each [S, D], in the dtype of queries and keys."""
        query, key, value = (
            projected.unflatten(-1, (-1, self.head_dim))
            for projected in (self.query(x_BSM), self.key(x_BSM), self.value(x_BSM))
        )
        rotated = rotate(torch.cat([query, key], dim=2), rotation_SD)  # together, for half of the launches
        query, key = rotated.split([self.num_heads, self.num_kv_heads], dim=2)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        grouped = self.num_kv_heads != self.num_heads
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        return self.out(mixed.transpose(1, 2).flatten(2))


def rotation(length: int, head_dim: int, device: torch.device, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, each [S, D] float32."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation_SD: tuple[Tensor, Tensor]) -> Tensor:
    """Apply the rotary angles to [B, S, N, D]."""
    cos, sin = (part.unsqueeze(1) for part in rotation_SD)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Block(nn.Module):
    """Pre-norm attention, then a dense network or an MoE layer."""

    def __init__(self, model: ModelConfig, moe: MoELayer | None, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.attention_norm = _norm(model, device)
        self.attention = Attention(model, device)
        self.ffn_norm = _norm(model, device)
        self.moe = moe
        self.dtype = dtype
        if moe is None:
            self.ffn = ExpertFFN(
                LayerSpec(model.model_dim, model.dense_hidden_dim, 1, 1, activation=model.activation), device
            )

    def forward(self, x_BSM: Tensor, rotation_SD: tuple[Tensor, Tensor]) -> tuple[Tensor, MoEOutput | None]:
        """[B, S, M] -> [B, S, M] and, from an MoE block, what the layer returned."""
        x_BSM = x_BSM + self.attention(self.attention_norm(x_BSM), rotation_SD)
        normed = self.ffn_norm(x_BSM)
        if self.moe is None:
            return x_BSM + self.ffn(normed), None
        # Autocast would run the gate in bf16. The layer's dtype is said in its spec instead.
        with torch.autocast(x_BSM.device.type, enabled=False):
            output: MoEOutput = self.moe(normed.reshape(-1, normed.shape[-1]).to(self.dtype))
        return x_BSM + output.y_TM.view_as(x_BSM).to(x_BSM.dtype), output


class GPT(nn.Module):
    """The language model.

    Args:
        model: shapes.
        build_layer: makes the MoE layer of block i from i.
        dtype: of the MoE layers' arithmetic.
        device: of all weights.
    """

    def __init__(
        self, model: ModelConfig, build_layer: Callable[[int], MoELayer], dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(model.vocab_size, model.model_dim, device=device)
        self.blocks = nn.ModuleList(
            Block(model, build_layer(i) if (i + 1) % model.moe_every == 0 else None, dtype, device)
            for i in range(model.num_layers)
        )
        self.norm = _norm(model, device)
        self.head = nn.Linear(model.model_dim, model.vocab_size, bias=False, device=device)
        if model.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.head_dim = model.head_dim or model.model_dim // model.num_heads

    @property
    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers, first block first."""
        return moe_layers(self)

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor) -> Losses:
        """tokens and targets [B, S] int64 -> losses over this rank's tokens."""
        x_BSM = self.embedding(tokens_BS)
        cos, sin = rotation(tokens_BS.shape[1], self.head_dim, x_BSM.device)
        kind = x_BSM.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_BSM.dtype
        angles = cos.to(dtype), sin.to(dtype)  # once, not in every block
        outputs = []
        for block in self.blocks:
            x_BSM, output = block(x_BSM, angles)
            if output is not None:
                outputs.append(output)
        logits = self.head(self.norm(x_BSM))
        cross_entropy = F.cross_entropy(logits.flatten(0, 1).float(), targets_BS.flatten())
        return Losses(cross_entropy, torch.stack([output.aux_loss for output in outputs]).mean(), outputs)


def _norm(model: ModelConfig, device: torch.device) -> nn.Module:
    if model.norm == "rms":
        return nn.RMSNorm(model.model_dim, eps=1e-6, device=device)
    return nn.LayerNorm(model.model_dim, bias=False, device=device)


def layer_spec(model: ModelConfig, layer_index: int, seed: int, dtype: torch.dtype) -> LayerSpec:
    """The spec of the MoE layer in block `layer_index`."""
    return LayerSpec(
        model_dim=model.model_dim,
        hidden_dim=model.hidden_dim,
        num_experts=model.num_experts,
        top_k=model.top_k,
        activation=model.activation,
        capacity_factor=model.capacity_factor,
        dtype=dtype,
        seed=seed,
        layer_index=layer_index,
    )


@torch.no_grad()
def build_gpt(model: ModelConfig, system: System, mesh: Mesh, seed: int, dtype: torch.dtype) -> GPT:
    """A GPT of `system`, with the suite's initial weights: the same for every system and world size.

    Args:
        model: shapes.
        system: builds the MoE layers.
        mesh: of the run. Collective where the system's layers make groups.
        seed: of the weights.
        dtype: of the MoE layers' arithmetic; parameters are float32.
    """

    def build_layer(index: int) -> MoELayer:
        layer = system.build_layer(layer_spec(model, index, seed, dtype), mesh)
        load_layer(layer)
        return layer

    gpt = GPT(model, build_layer, dtype, mesh.device)
    in_moe = {id(parameter) for layer in gpt.moe_layers for parameter in layer.parameters()}
    for name, parameter in gpt.named_parameters():
        if id(parameter) not in in_moe and parameter.dim() > 1:
            std = 0.02 if parameter is gpt.embedding.weight else parameter.shape[1] ** -0.5
            parameter.copy_(seeded_normal((seed, name), tuple(parameter.shape), std, mesh.device))
    return gpt
