"""How far two tensors are apart."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected| in the Euclidean norm, in float64.

    Where nothing but zeros is expected (a gradient of an expert that no token chose), it is 0 for zeros and inf for
    anything else. Numbers that are not finite are infinitely far apart, whatever is expected.
    """
    assert got.shape == expected.shape, f"{tuple(got.shape)} against {tuple(expected.shape)}"
    distance = (got.detach().double() - expected.detach().double()).norm()
    if not torch.isfinite(distance):
        return float("inf")
    return 0.0 if distance == 0 else float(distance / expected.detach().double().norm())
