"""The process groups that SwiftMoE reduces gradients in: an expert's ranks are consecutive."""

from __future__ import annotations

from itertools import combinations

import torch.distributed as dist

_GROUPS: dict[dist.ProcessGroup, dict[tuple[int, int], dist.ProcessGroup]] = {}


def consecutive_groups(num_ranks: int) -> dict[tuple[int, int], dist.ProcessGroup]:
    """The process groups of all runs of at least two consecutive ranks, by (first, last): N (N - 1) / 2 of them, one
    being that of all ranks (SYMI, section 4.1). Made when first asked for, which is collective; then the same again."""
    if num_ranks == 1:
        return {}
    world = dist.group.WORLD
    assert world is not None
    if world not in _GROUPS:
        _GROUPS[world] = {
            (first, last): world if last - first + 1 == num_ranks else dist.new_group(list(range(first, last + 1)))
            for first, last in combinations(range(num_ranks), 2)
        }
    return _GROUPS[world]
