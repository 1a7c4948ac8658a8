"""Experts as vectors, whole or cut into equal shards.

Dimensions: G experts, N shards, F numbers of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from moe.system import LayerSpec


class FlatExperts:
    """An expert as one vector: w_in, then w_out, then zeros up to a multiple of N, cut into N shards of F numbers.

    Args:
        spec: of the layer.
        num_shards: N.
    """

    def __init__(self, spec: LayerSpec, num_shards: int) -> None:
        self.num_in = spec.hidden_dim * spec.model_dim * (2 if spec.activation == "swiglu" else 1)
        self.num_weights = sum(map(prod, spec.expert_shapes.values()))
        self.num_shards, self.shard_size = num_shards, -(-self.num_weights // num_shards)

    def empty(self, num_experts: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[num_experts, N F] vectors in `dtype`, else that of `like`: zero in the padding, elsewhere nothing yet."""
        flat = like.new_empty(num_experts, self.num_shards * self.shard_size, dtype=dtype)
        flat[:, self.num_weights :] = 0
        return flat

    def parts(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Views of w_in and w_out in vectors [..., N F], each flat."""
        return flat[..., : self.num_in], flat[..., self.num_in : self.num_weights]

    def pack(self, w_in: Tensor, w_out: Tensor) -> Tensor:
        """[G, ...] and [G, ...] to vectors [G, N F]."""
        flat = self.empty(len(w_in), w_in)
        for part, matrix in zip(self.parts(flat), (w_in, w_out), strict=True):
            part.copy_(matrix.flatten(1))
        return flat

    def unpack(self, flat: Tensor, w_in: Tensor, w_out: Tensor) -> None:
        """Write vectors [G, N F] into matrices [G, ...] and [G, ...]."""
        for part, matrix in zip(self.parts(flat), (w_in, w_out), strict=True):
            matrix.copy_(part.view_as(matrix))

    def unpack_shards(self, shards_NGF: Tensor, w_in: Tensor, w_out: Tensor) -> None:
        """As `unpack`, of vectors that lie as [N, G, F], their first shards first: straight to their places."""
        size, start = self.shard_size, 0
        for matrix in (w_in, w_out):
            rows = matrix.view(len(matrix), -1)
            stop = start + rows.shape[1]
            for first, last in _pieces(start, stop, size):
                shards = shards_NGF[first // size : -(-last // size)]
                inside = shards[:, :, first % size : first % size + last - first].transpose(0, 1)
                rows[:, first - start : last - start].view(inside.shape).copy_(inside)
            start = stop


def _pieces(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Numbers from `start` to `stop` cut into those of one shard or of several whole ones, as few pieces as can be."""
    edges = {start, stop, *(edge for edge in (-(-start // size) * size, stop // size * size) if start < edge < stop)}
    return pairwise(sorted(edges))
