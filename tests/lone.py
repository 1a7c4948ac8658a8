"""A mesh without process groups, for what can be tested in one process: nothing on it may communicate."""

from __future__ import annotations

from typing import Any, cast

import torch

from moe.mesh import Mesh
from moe.topology import cluster_of


def lone_mesh(num_ranks: int = 1, rank: int = 0, ep_size: int | None = None) -> Mesh:
    """Where rank `rank` of `num_ranks` would stand; its groups are None."""
    no_group = cast(Any, None)
    return Mesh(cluster_of([num_ranks]), torch.device("cpu"), rank, ep_size or num_ranks, no_group, no_group)
