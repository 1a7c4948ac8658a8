"""SwiftMoE (arXiv 2504.19925, NSDI 2026 as SYMI): the number of an expert's replicas follows its popularity from one
iteration to the next, at no cost on top of what an iteration sends anyway.

    forward    tokens are routed and counted; an expert's tokens go to its replicas
    backward   counts are summed over ranks, gradients over replicas inside ranks and between them
    step       every rank takes its shard of every expert's gradient, steps, and sends the new weights to the slots of
               the next placement, which the counts of this iteration decide

The scheduler stands in methods/swiftmoe_scheduler.py, the slots in methods/swiftmoe_slots.py, the decoupled optimizer
in methods/swiftmoe_optimizer.py; capacities and drop rules, which FlexMoE shares, in moe/replica_gate.py.

Dimensions: T tokens of a rank, K choices, M model, E experts, N ranks, J slots of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from methods.swiftmoe_optimizer import ExpertShards
from methods.swiftmoe_popularity import Popularity
from methods.swiftmoe_rank_table import RankTable, packed_on_device
from methods.swiftmoe_scheduler import SlotTable, even_table, table_of
from methods.swiftmoe_slots import SlotExperts
from moe.exchange_costs import ring_cost
from moe.experts import GroupedExperts
from moe.flat_experts import FlatExperts
from moe.gate import Routing
from moe.layer_simulation import Extra, LayerModel, RoutedLayer
from moe.mesh import Mesh, ranks_are_on_cuda
from moe.point_to_point import Exchange, in_turn
from moe.replica_layer import ReplicatedMoE
from moe.replica_table import SlotOptions
from moe.step_parts import step_part
from moe.sync import GradientSync
from moe.system import ExpertView, LayerSpec, MoELayer, MoEOutput, System, moe_layers
from moe.topology import Cluster


class Options(SlotOptions):
    """Options of conf/system/swiftmoe.yaml, beside those of `SlotOptions`.

    Args:
        reduce_dtype: of the experts' gradients on their way between ranks: `fp32` as in the other systems, or `bf16`,
            half of the bytes, as in the paper's accounting.
        scatter: new weights of an expert go to each `rank` that holds it once (ours), or once for each `slot` of it, as
            in the paper's accounting.
        offload: the optimizer's shards and their step in the host's memory, as in the paper.
    """

    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    scatter: Literal["rank", "slot"] = "rank"
    offload: bool = False


REDUCE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class SwiftMoELayer(ReplicatedMoE):
    """Experts in slots over all ranks of the run, whatever its expert-parallel groups are.

    Until the first forward pass, and inside `whole_experts`, `expert_views` are of whole float32 experts, each on one
    rank: initial weights and checkpoints come and go there. Otherwise they are of this rank's slots.

    Args:
        spec: what to compute.
        mesh: where.
        options: of the system; no fewer slots than experts.

    Attributes:
        table: which expert is in which slot.
        here: what this rank makes of it.
        counts_E: [E] int64, this rank's copies in the last forward pass with gradients, one of which is meant to be in
            each training step; None once they are summed.
        popularity: tells their sums over ranks, [E]; None before and after.
        whole: this rank's whole experts, while there are any.
    """

    table: SlotTable
    here: RankTable
    experts: SlotExperts
    counts_E: Tensor | None
    popularity: Callable[[], list[int]] | None
    whole: GroupedExperts | None

    def __init__(self, spec: LayerSpec, mesh: Mesh, options: Options) -> None:
        table = even_table(spec.num_experts, mesh.world_size, options.slots(spec.num_experts, mesh.world_size))
        flat = FlatExperts(spec, mesh.world_size)
        here = RankTable(table, mesh.rank, options.scatter == "slot")
        super().__init__(spec, mesh, table, SlotExperts(spec, mesh, here, flat), options.drop)
        self.per_slot = options.scatter == "slot"
        _use([self], [here])
        self.shards = ExpertShards(spec, mesh, flat, REDUCE_DTYPES[options.reduce_dtype], options.offload)
        self.counts_E = self.popularity = None
        self._set_whole(self.shards.new_whole(spec))

    def _set_whole(self, whole: GroupedExperts | None) -> None:
        # Not by nn.Module's own way: what is trained are the shards, these would be parameters beside them.
        object.__setattr__(self, "whole", whole)

    def forward(self, x_TM: Tensor) -> MoEOutput:
        """Route this rank's tokens [T, M]. A pass with gradients tells the next placement how popular experts are."""
        self.start()
        return super().forward(x_TM)

    def learn(self, routing: Routing) -> None:
        """How popular experts are, from a pass with gradients."""
        if torch.is_grad_enabled():
            self.counts_E = routing.counts_E

    def start(self, optimizer: Optimizer | None = None) -> None:
        """Take whole experts over into shards and slots, if there are any, and their state in `optimizer`, if given.
        Collective."""
        if self.whole is None:
            return
        with torch.no_grad():
            self.shards.take(self.whole, optimizer)
            self._set_whole(None)
            in_turn([self.shards.refill(self.experts, self.here)])

    @contextmanager
    def whole_experts(self, optimizer: Optimizer, loading: bool) -> Iterator[None]:
        """For a checkpoint: inside, `expert_views` are of whole experts, each on one rank, and `optimizer` has the
        state of those parameters. Collective.

        Args:
            optimizer: Adam's kind, of the model that this layer is in.
            loading: weights and state will be written there, and are taken over at the end.
        """
        made_here = None
        if self.whole is None:
            made_here = self.shards.new_whole(self.spec)
            if not loading:
                self.shards.give(made_here, optimizer)
            self._set_whole(made_here)
        try:
            yield
            if loading:
                self.start(optimizer)
        finally:
            if made_here is not None:
                self._set_whole(None)
                for parameter in made_here.parameters():
                    optimizer.state.pop(parameter, None)

    def use(self, table: SlotTable) -> None:
        """Go by another table; its slots must be filled next (`ExpertShards.refill`)."""
        _use([self], [self.seen_here(table)])

    def seen_here(self, table: SlotTable) -> RankTable:
        """What this rank makes of a table."""
        return RankTable(table, self.mesh.rank, self.per_slot)

    @property
    def path(self) -> str:
        """Slots, how tokens travel, how experts multiply, and where the optimizer is."""
        where = "place" if self.shards.host is None else "the host's memory"
        return f"{super().path}; optimizer in {where}"

    def expert_views(self) -> list[ExpertView]:
        """Of whole experts while there are any, else of each expert's first slot on this rank."""
        return self.experts.views() if self.whole is None else self.whole.views()

    def sharded_parameters(self) -> list[nn.Parameter]:
        """The shards of all experts."""
        return [self.shards.master_EF]

    def drop_gradients(self) -> None:
        """Of all parameters and of the slots, which are none of the module's."""
        super().drop_gradients()
        self.experts.drop_gradients()

    def restore_placement(self, expert_of_slot: list[int] | None) -> None:
        """Take a checkpoint's table where it fits, else an even one; weights are to be loaded next."""
        even = even_table(self.spec.num_experts, self.mesh.world_size, self.table.slots_per_rank)
        self.use(table_of(expert_of_slot, even) or even)


class ShardSync(GradientSync):
    """Reduces dense gradients as ever, and brings every rank its shards of the experts'.

    Args:
        model: all its parameters with a gradient are reduced.
        layers: its SwiftMoE layers.
        mesh: of the run.
    """

    def __init__(self, model: nn.Module, layers: Sequence[SwiftMoELayer], mesh: Mesh) -> None:
        shards = [parameter for layer in layers for parameter in layer.sharded_parameters()]
        super().__init__(model, (), mesh, owned=shards)
        self.layers = layers

    def reduce(self) -> None:
        """Reduce every gradient, and sum how popular experts are. Collective."""
        underway: list[Exchange] = []
        in_turn(layer.shards.collect(layer.experts, underway) for layer in self.layers)
        with step_part("popularity"):  # here, so that a GPU has work to do while the host decides by it
            self._sum_popularity()
        super().reduce()
        with step_part("gradient_shards"):
            for layer in self.layers:
                layer.shards.finish()

    def _sum_popularity(self) -> None:
        counts = [layer.counts_E for layer in self.layers if layer.counts_E is not None]
        if not counts:
            return
        assert len(counts) == len(self.layers), "layers that had no tokens"
        popularity = Popularity(torch.stack(counts), self.mesh)
        for index, layer in enumerate(self.layers):
            layer.counts_E, layer.popularity = None, partial(popularity.counts, index)


class SwiftMoE(System):
    """SwiftMoE's replicas over a decoupled optimizer."""

    name = "swiftmoe"
    implementation = "native"
    summary = "replicas follow each iteration's popularity, over an optimizer that never moves"
    Options = Options

    def refusals(self, spec: LayerSpec, cluster: Cluster) -> list[str]:
        """Fewer slots than experts."""
        refusals: list[str] = self.options.refusals("SwiftMoE", spec, cluster)
        return refusals

    def expert_copies(self, num_experts: int, num_ranks: int) -> float:
        """The shards of all ranks together are one; offloaded they take no memory of GPUs."""
        return 0.0 if self.options.offload and ranks_are_on_cuda() else 1.0

    def slot_copies(self, num_experts: int, num_ranks: int) -> float:
        """Slots over experts."""
        return float(self.options.slots(num_experts, num_ranks) * num_ranks / num_experts)

    def simulated_layer(self, layer: RoutedLayer) -> LayerModel:
        """Replicas as the scheduler makes them of this very routing, as if it were the iteration before. Behind
        backward: sums of gradients over a rank's replicas elsewhere, shards of every expert's gradient, and weights for
        its slots; their optimizer's time is left out."""
        num_ranks, num_experts = layer.num_ranks, layer.spec.num_experts
        slots = self.options.slots(num_experts, num_ranks)
        table = even_table(num_experts, num_ranks, slots).after(layer.counts_PE.sum(0).tolist())
        slots_EP = np.zeros((num_experts, num_ranks), dtype=np.int64)
        np.add.at(slots_EP, (table.expert_of_slot, np.arange(table.num_slots) // slots), 1)
        gradient_bytes = (4.0 if self.options.reduce_dtype == "fp32" else 2.0) * layer.expert_weights
        shared = max((slots_EP[table.shared] > 0).sum(0).tolist(), default=0)
        fills = slots if self.options.scatter == "slot" else int((slots_EP > 0).sum(0).max())
        ring, even = ring_cost(layer.cluster), layer.exchange(np.ones((num_ranks, num_ranks), dtype=np.int64)).cost
        extras = (
            Extra("replica_gradients", ring, 2 * shared * gradient_bytes),
            Extra("gradient_shards", even, num_experts * gradient_bytes / num_ranks),
            Extra("slot_weights", even, fills * layer.spec.dtype.itemsize * layer.expert_weights),
        )
        model = layer.model(layer.counts_PE, layer.spread(slots_EP))
        return replace(model, extras=extras if num_ranks > 1 else ())

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """The layer. Collective: it makes groups of ranks."""
        return SwiftMoELayer(spec, mesh, self.options)

    def gradient_sync(self, model: nn.Module, mesh: Mesh) -> GradientSync:
        """Of shards."""
        return ShardSync(model, _swift_layers(model), mesh)

    def after_step(self, model: nn.Module, optimizer: Optimizer, steps_done: int) -> None:
        """Decide the next iteration's replicas and fill their slots with the weights that the step made."""
        layers = _swift_layers(model)
        told = [layer.popularity and layer.popularity() for layer in layers]  # the host waits here, once a step
        with step_part("scheduler"):
            tables = [
                layer.table.after(popularity) if popularity else layer.table
                for layer, popularity in zip(layers, told, strict=True)
            ]
        place(layers, tables)


def place(layers: Sequence[SwiftMoELayer], tables: Sequence[SlotTable]) -> None:
    """Go over to new tables, and to the weights that the optimizer's shards now have. Collective.

    Args:
        layers: of a model, in order.
        tables: of each; of the layers' sizes, and the same on all ranks.
    """
    with step_part("metadata"):
        moved = [
            (layer, layer.seen_here(table))
            for layer, table in zip(layers, tables, strict=True)
            if table is not layer.table
        ]
        if moved:
            _use(*zip(*moved, strict=True))
        for layer in layers:
            layer.popularity = None
    with step_part("weights"):
        in_turn(layer.shards.refill(layer.experts, layer.here) for layer in layers)


def _use(layers: Sequence[SwiftMoELayer], heres: Sequence[RankTable]) -> None:
    """Let gates and shards go by other tables, all of which the device is told at once."""
    numbers = [[layer.gate.numbers(here.table), *here.numbers()] for layer, here in zip(layers, heres, strict=True)]
    tensors = iter(packed_on_device(list(chain(*numbers)), layers[0].mesh))
    for layer, here, lists in zip(layers, heres, numbers, strict=True):
        of_gate, *rest = islice(tensors, len(lists))
        layer.table, layer.here = here.table, here
        layer.gate.use(here.table, of_gate)
        here.take(rest)


def _swift_layers(model: nn.Module) -> list[SwiftMoELayer]:
    return [layer for layer in moe_layers(model) if isinstance(layer, SwiftMoELayer)]
