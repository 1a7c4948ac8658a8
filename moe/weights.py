"""Weights that are the same for every system, rank and world size: a function of (seed, layer, global expert, name)."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from moe.system import LayerSpec, MoELayer


def seeded_generator(key: tuple[object, ...], device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose numbers depend on `key` alone (and on the kind of device).

    Args:
        key: what the numbers are for; hashed, so any printable parts do.
        device: where they are drawn.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)


def seeded_normal(key: tuple[object, ...], shape: tuple[int, ...], std: float, device: torch.device | str) -> Tensor:
    """Normal numbers that depend on `key` alone (and on the kind of device).

    Args:
        key: what the numbers belong to, e.g. (seed, "layer", 3, "expert", 7, "w1").
        shape: of the result.
        std: standard deviation.
        device: where they are drawn.

    Returns:
        float32 tensor of `shape` on `device`.
    """
    return torch.empty(shape, device=device).normal_(0.0, std, generator=seeded_generator(key, device))


def gate_matrix(spec: LayerSpec, device: torch.device | str) -> Tensor:
    """The gate's initial matrix, [E, M] float32, std 1 / sqrt(M)."""
    key = (spec.seed, "layer", spec.layer_index, "gate")
    return seeded_normal(key, (spec.num_experts, spec.model_dim), spec.model_dim**-0.5, device)


def expert_matrix(spec: LayerSpec, expert: int, name: str, device: torch.device | str) -> Tensor:
    """One initial matrix of a global expert, shape `spec.expert_shapes[name]`, float32, std 1 / sqrt(rows)."""
    shape = spec.expert_shapes[name]
    key = (spec.seed, "layer", spec.layer_index, "expert", expert, name)
    return seeded_normal(key, shape, shape[0] ** -0.5, device)


@torch.no_grad()
def load_layer(layer: MoELayer) -> None:
    """Fill a layer of any system with the suite's initial weights for its spec."""
    device = layer.mesh.device
    layer.set_gate(gate_matrix(layer.spec, device))
    for view in layer.expert_views():
        matrix = expert_matrix(layer.spec, view.expert, view.name, device)
        view.view(view.parameter.data).copy_(view.part(matrix))
