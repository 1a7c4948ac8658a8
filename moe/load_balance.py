"""Experts placed by their loads: the rule of SmartMoE's published artifact (Zhai et al., USENIX ATC 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from moe.migration import migrate, movable_layers


def balance_loads(model: nn.Module, optimizer: Optimizer, steps_done: int, every: int) -> None:
    """Every so many steps, move experts where that lowers the largest load of a rank. Collective.

    The loads are copies chosen, over all ranks, in the mean of the last two steps.

    Args:
        model: whose layers' experts can move.
        optimizer: of their parameters.
        steps_done: since the run began.
        every: steps between two decisions.
    """
    if steps_done % every:
        return
    layers = movable_layers(model)
    loads_NE = torch.stack([torch.stack(placement.loads).double().mean(0) for _, placement in layers])
    dist.all_reduce(loads_NE)
    moves = []
    for (layer, placement), loads_E in zip(layers, loads_NE.tolist(), strict=True):
        placed = greedy_placement(loads_E, placement.expert_of_slot, layer.mesh.ep_size)
        if placed != placement.expert_of_slot:
            moves.append((layer, placed))
    migrate(moves, optimizer)


def greedy_placement(counts_E: Sequence[float], expert_of_slot: Sequence[int], num_ranks: int) -> list[int]:
    """Experts by falling load, each to the rank with a free slot that has least so far (longest processing time first);
    of equals the expert's own rank, then the first. The rule of SmartMoE's published artifact.

    Args:
        counts_E: load of each expert.
        expert_of_slot: the present placement.
        num_ranks: P, dividing E.

    Returns:
        expert_of_slot; an expert that stays on its rank stays in its slot. The present placement where the largest sum
        of a rank would not get less.
    """
    per_rank = len(expert_of_slot) // num_ranks
    rank_of = {expert: slot // per_rank for slot, expert in enumerate(expert_of_slot)}
    load, on_rank = [0.0] * num_ranks, [list[int]() for _ in range(num_ranks)]
    for expert in sorted(rank_of, key=lambda expert: (-counts_E[expert], expert)):
        free = [rank for rank in range(num_ranks) if len(on_rank[rank]) < per_rank]
        rank = min(free, key=lambda rank: (load[rank], rank != rank_of[expert], rank))
        on_rank[rank].append(expert)
        load[rank] += counts_E[expert]
    before = max(
        sum(counts_E[expert] for expert in expert_of_slot[first : first + per_rank])
        for first in range(0, len(expert_of_slot), per_rank)
    )
    if max(load) >= before:
        return list(expert_of_slot)
    placed: list[int] = []
    for rank, experts in enumerate(on_rank):
        present = expert_of_slot[rank * per_rank : (rank + 1) * per_rank]
        coming = iter([expert for expert in experts if expert not in present])
        placed += [expert if expert in experts else next(coming) for expert in present]
    return placed
