"""Gradients of FlexMoE's replicas, summed over all of an expert's slots, wherever they are.

An expert's ranks change with every plan, so there are no process groups of them: each of an expert's R ranks sums one
R-th of its gradient and sends the sum to the others, all in two batches of point-to-point messages, 2 (R - 1) / R of
the gradient from each rank as in a ring. Sums go over ranks in order, so that replicas get the same bits (ours; SYMI
says that FlexMoE's replicas take part in collectives, which have one place a rank).

Dimensions: E experts, N ranks, G experts with a slot on this rank, P numbers of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from moe.experts import GroupedExperts
from moe.flat_experts import FlatExperts
from moe.mesh import Mesh
from moe.point_to_point import Exchange, in_turn
from moe.replica_layer import ReplicatedMoE
from moe.replica_table import ReplicaTable
from moe.step_parts import step_part
from moe.sync import GradientSync


def part(holders: Sequence[int], rank: int, num_weights: int) -> slice:
    """The numbers of an expert that one of its ranks sums."""
    place, count = holders.index(rank), len(holders)
    return slice(num_weights * place // count, num_weights * (place + 1) // count)


class ReplicaSums:
    """The gradients of one layer's experts.

    Args:
        layer: whose slots are trained in place, with a `ReplicaTable`.
        divisor: of the sums.
    """

    def __init__(self, layer: ReplicatedMoE, divisor: int) -> None:
        assert isinstance(layer.table, ReplicaTable)
        self.experts, self.table, self.mesh, self.divisor = layer.experts, layer.table, layer.mesh, divisor
        self.flat = FlatExperts(layer.spec, num_shards=1)

    def reduce(self) -> Iterator[None]:
        """Sum, divide, and write the result to every slot; in parts, for `in_turn`. Collective over all ranks."""
        table, rank = self.table, self.mesh.rank
        slots_of = table.local_slots(rank)
        flat_GP = self._local_sums(list(slots_of.values()))
        shared = [
            (row_P, table.holders[expert])
            for row_P, expert in zip(flat_GP, slots_of, strict=True)
            if len(table.holders[expert]) > 1
        ]
        parts = self._exchange(shared, mine=False)
        yield
        self._take(shared, parts.received(), add=True)
        parts = self._exchange(shared, mine=True)
        yield
        self._take(shared, parts.received(), add=False)
        self._write(flat_GP.div_(self.divisor), list(slots_of.values()))

    def _local_sums(self, slots_G: list[list[int]]) -> Tensor:
        flat_GP = self.flat.empty(len(slots_G), self.experts.w_in)
        for numbers, weight in zip(self.flat.parts(flat_GP), _weights(self.experts), strict=True):
            for row, slots in zip(numbers, slots_G, strict=True):
                if weight.grad is None:  # there was no backward pass through these experts
                    row.zero_()
                else:
                    # Slot by slot: a list of them as an index would let the host wait for a GPU.
                    grads = weight.grad[slots[0]]
                    if len(slots) > 1:
                        grads = torch.stack([weight.grad[slot] for slot in slots]).sum(0)
                    row.copy_(grads.flatten())
        return flat_GP

    def _exchange(self, shared: list[tuple[Tensor, list[int]]], mine: bool) -> Exchange:
        """Send every other rank its part of the experts that it has, too; with `mine`, this rank's part of them."""
        rank, num_ranks = self.mesh.rank, self.mesh.world_size
        sends: list[list[Tensor]] = [[] for _ in range(num_ranks)]
        receives = [0] * num_ranks
        for row_P, holders in shared:
            for peer in holders:
                if peer != rank:
                    theirs, ours = (row_P[part(holders, who, len(row_P))] for who in (peer, rank))
                    sends[peer].append(ours if mine else theirs)
                    receives[peer] += len(theirs if mine else ours)
        numbers = [numbers for of_peer in sends for numbers in of_peer]
        message = torch.cat(numbers) if numbers else self.experts.w_in.new_empty(0)
        return Exchange(message, [sum(map(len, of_peer)) for of_peer in sends], receives, rank)

    def _take(self, shared: list[tuple[Tensor, list[int]]], received: Tensor, add: bool) -> None:
        """With `add`, make this rank's parts the sums over ranks; else put the other ranks' sums in their places."""
        rank, num_ranks = self.mesh.rank, self.mesh.world_size
        sizes = [
            [
                len(row_P[part(holders, rank if add else peer, len(row_P))]) if peer in holders and peer != rank else 0
                for row_P, holders in shared
            ]
            for peer in range(num_ranks)
        ]
        pieces = received.split([size for of_peer in sizes for size in of_peer])
        for index, (row_P, holders) in enumerate(shared):
            arrived = {peer: pieces[peer * len(shared) + index] for peer in holders if peer != rank}
            if add:
                ours = row_P[part(holders, rank, len(row_P))]
                terms = [arrived.get(peer, ours) for peer in holders]
                ours.copy_(sum(terms[1:], start=terms[0]))
            else:
                for peer, numbers in arrived.items():
                    row_P[part(holders, peer, len(row_P))] = numbers

    def _write(self, flat_GP: Tensor, slots_G: list[list[int]]) -> None:
        for numbers, weight in zip(self.flat.parts(flat_GP), _weights(self.experts), strict=True):
            if weight.grad is None:
                weight.grad = torch.empty_like(weight)
            for row, slots in zip(numbers, slots_G, strict=True):
                for slot in slots:
                    weight.grad[slot].copy_(row.view(weight.shape[1:]))


class ReplicaSync(GradientSync):
    """Reduces dense gradients as ever, and those of replicas over all of an expert's slots.

    Args:
        model: all its parameters with a gradient are reduced.
        layers: those with replicas.
        mesh: of the run.
    """

    def __init__(self, model: nn.Module, layers: Sequence[ReplicatedMoE], mesh: Mesh) -> None:
        replicas = [parameter for layer in layers for parameter in layer.sharded_parameters()]
        super().__init__(model, (), mesh, owned=replicas)
        self.layers = layers

    def reduce(self) -> None:
        """Reduce every gradient. Collective."""
        with step_part("expert_gradients"):
            in_turn(ReplicaSums(layer, self.mesh.world_size).reduce() for layer in self.layers)
        super().reduce()

    def squares_not_dense(self) -> Tensor:
        """As `GradientSync.squares_not_dense`; each expert counts once, however many slots it has."""
        squares = torch.zeros((), device=self.mesh.device)
        for layer in self.layers:
            counts = [layer.table.counts[expert] for expert in layer.experts.experts]
            counts_L = self.mesh.tensor(counts, torch.float32)
            for weight in _weights(layer.experts):
                if weight.grad is not None:
                    squares += (weight.grad.flatten(1).norm(dim=1).square() / counts_L).sum()
        return squares


def _weights(experts: GroupedExperts) -> tuple[nn.Parameter, nn.Parameter]:
    return experts.w_in, experts.w_out
