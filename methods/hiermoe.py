"""HierMoE (arXiv 2508.09591): tokens travel through the levels of the cluster, once to each group that has an expert
of theirs (methods/hiermoe_dispatch.py); a performance model says over how many levels (methods/hiermoe_model.py), and
which experts should trade places (methods/hiermoe_swap.py).

In the paper's names, HD2 is `levels: 2, placement: fixed`; HD-MoE `levels: auto, placement: fixed`; HierMoE all of it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.optim import Optimizer

from methods.hiermoe_dispatch import block_sizes
from methods.hiermoe_levels import ID_AND_WEIGHT_BYTES, LevelsDispatcher
from methods.hiermoe_model import Collectives, best_dim, collectives_of, dispatch_s
from methods.hiermoe_simulation import sent_s, sorted_counts
from methods.hiermoe_swap import Peak, SwapStatistics, gaining, ranked_swaps, swap_costs, swap_statistics
from moe.costs import AlphaBeta
from moe.errors import ConfigError
from moe.exchange_costs import Exchange
from moe.layer import NativeMoE
from moe.layer_simulation import LayerModel, RoutedLayer
from moe.load_balance import balance_loads
from moe.mesh import Mesh
from moe.migration import migrate, movable_layers
from moe.placement import Placement
from moe.system import LayerSpec, MoELayer, System, moe_layers
from moe.topology import Cluster


class Options(BaseModel):
    """Options of conf/system/hiermoe.yaml.

    Args:
        levels: d, exchanges each way: the d - 1 outermost levels of the cluster by themselves, what lies inside by one;
            `all`: every level of more than one group; `auto`: what the performance model finds best for what a layer's
            gate chose.
        choose_every: steps between two such choices; the first is made of the first tokens.
        dedup: a token crosses a level once per group (HDd); false: once for each of its experts (Hd).
        placement: `swap`: experts trade places as the performance model says; `smartmoe`: as `baselines.smartmoe`;
            `fixed`: they stay.
        move_every: steps between two moves; null: 1 for `swap`, 10 for `smartmoe`.
        swap_pairs: pairs of experts at most that a layer swaps at a time; the paper's is 1, more are ours.
        least_gain: share of the score that a swap must save; ours, the paper's is 0. It stands in for what moving
            experts costs, which nothing here weighs against the gain. With `max` that score is a modelled time.
        peak, gamma: how the fullest group is taken in scoring swaps, see `methods.hiermoe_swap.peak`.
    """

    model_config = ConfigDict(extra="forbid")
    levels: Annotated[int, Field(ge=1)] | Literal["auto", "all"] = "auto"
    choose_every: int = Field(default=100, ge=1)
    dedup: bool = True
    placement: Literal["swap", "smartmoe", "fixed"] = "swap"
    move_every: int | None = Field(default=None, ge=1)
    swap_pairs: int = Field(default=1, ge=1)
    least_gain: float = Field(default=1e-3, ge=0, lt=1)
    peak: Peak = "smooth"
    gamma: float = Field(default=10.0, gt=0, allow_inf_nan=False)


SCORED_TOGETHER = 8
"""Layers whose swaps are scored at a time: [layers, E, E, ranks] float64 numbers, a few times."""

MOVE_EVERY = {"swap": 1, "smartmoe": 10}
"""Steps between two moves, as the systems that they are of."""


class HierarchicalMoE(NativeMoE):
    """The native layer with HierMoE's dispatcher."""

    dispatcher: LevelsDispatcher

    @property
    def modelled_dispatch_s(self) -> dict[str, float]:
        """By number of levels."""
        return {str(d): seconds for d, seconds in enumerate(self.dispatcher.modelled_s, 1)}


class HierMoE(System):
    """HierMoE, and its parts by themselves."""

    name = "hiermoe"
    implementation = "native"
    summary = "level by level, a token once to every group that has one of its experts; experts trade places"
    Options = Options

    def refusals(self, spec: LayerSpec, cluster: Cluster) -> list[str]:
        """More levels than the cluster has, costs that nobody measured, more pairs than there are."""
        options, reasons = self.options, []
        there = len(block_sizes(cluster, cluster.world_size))
        if isinstance(options.levels, int) and options.levels > there:
            reasons.append(
                f"HierMoE can't take levels={options.levels}: cluster {cluster.name} has {there} "
                f"level{'s' * (there > 1)} of more than one group; set levels to at most {there}, or to all."
            )
        if self._needs_costs(there):
            try:
                collectives_of(cluster)
            except ConfigError as error:
                reasons.append(
                    f"{error.problems[0].rule}: measure them with `python -m experiments.comm cluster=<this one> "
                    "write_to=conf/cluster/mine.yaml`, or set levels=all and placement=fixed."
                )
        if options.placement == "swap" and options.swap_pairs > spec.num_experts // 2:
            reasons.append(
                f"HierMoE can't swap swap_pairs={options.swap_pairs} pairs of {spec.num_experts} experts; set it to at "
                f"most {spec.num_experts // 2}."
            )
        return reasons

    def simulated_layer(self, layer: RoutedLayer) -> LayerModel:
        """Over as many levels as the performance model would choose, each exchange of the rows there are; experts stay
        in place."""
        collectives = collectives_of(layer.cluster)
        counts_GS = np.stack(
            [
                sorted_counts(ids_TK, layer.spec.num_experts, collectives.groups, self.options.dedup)
                for ids_TK in layer.ids_PTK
            ]
        )
        choices = layer.spec.top_k if self.options.dedup else 1
        row_bytes = layer.row_bytes + ID_AND_WEIGHT_BYTES * choices
        seconds = dispatch_s(torch.from_numpy(counts_GS), collectives, row_bytes)
        wanted = self.options.levels
        levels = best_dim(seconds) if wanted == "auto" else collectives.depth if wanted == "all" else int(wanted)
        exchange = Exchange(AlphaBeta(sent_s(counts_GS, collectives, row_bytes, levels), 1e-15), 1.0)
        return layer.model(layer.counts_PE, exchange=exchange)

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """The native layer with HierMoE's dispatcher.

        Raises:
            Refused: the ranks that share experts have fewer levels, or do not fit into the cluster's.
        """
        options = self.options
        depth = len(block_sizes(mesh.cluster, mesh.ep_size))
        levels = {"auto": None, "all": depth}.get(options.levels, options.levels)
        dispatcher = LevelsDispatcher(spec, mesh, levels, options.dedup, self._collectives(mesh, depth))
        return HierarchicalMoE(spec, mesh, dispatcher=dispatcher, moves_experts=options.placement != "fixed")

    def after_step(self, model: nn.Module, optimizer: Optimizer, steps_done: int) -> None:
        """Move experts, then choose the number of levels anew."""
        options = self.options
        every = options.move_every or MOVE_EVERY.get(options.placement, 1)
        if options.placement == "smartmoe":
            balance_loads(model, optimizer, steps_done, every)
        if options.placement == "swap" and steps_done % every == 0:
            self._swap(model, optimizer)
        if options.levels == "auto" and steps_done % options.choose_every == 0:
            for layer in moe_layers(model):
                assert isinstance(layer, HierarchicalMoE)
                layer.dispatcher.modelled_s = []  # the next call asks the model

    def _needs_costs(self, depth: int) -> bool:
        return depth > 1 and (self.options.levels == "auto" or self.options.placement == "swap")

    def _collectives(self, mesh: Mesh, depth: int) -> Collectives | None:
        try:
            return collectives_of(mesh.cluster, mesh.ep_size)
        except ConfigError:
            if self._needs_costs(depth):
                raise
            return None

    def _swap(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Let the best pairs of every layer trade places, by what all ranks routed in the last step. One reduction and
        one message of choices for all layers that are alike."""
        alike: dict[Any, list[tuple[NativeMoE, Placement]]] = {}
        for layer, placement in movable_layers(model):
            if placement.slots_TK is not None:
                assert isinstance(layer, HierarchicalMoE)
                key = (layer.spec.num_experts, layer.dispatcher.num_levels, placement.slots_TK.shape)
                alike.setdefault(key, []).append((layer, placement))
        moves = []
        for few in [few for layers in alike.values() for few in _cut(layers)]:
            for (layer, placement), ranked_N3 in zip(few, self._ranked(few).tolist(), strict=True):
                places = list(placement.expert_of_slot)
                for a, b in gaining(ranked_N3, self.options.least_gain):
                    places[a], places[b] = places[b], places[a]
                if places != placement.expert_of_slot:
                    moves.append((layer, places))
        migrate(moves, optimizer)

    def _ranked(self, layers: list[tuple[NativeMoE, Placement]]) -> Tensor:
        """The best pairs of layers that are alike, [layers, pairs, 3]; see `ranked_swaps`."""
        options, layer = self.options, layers[0][0]
        spec, mesh, dispatcher = layer.spec, layer.mesh, layer.dispatcher
        assert isinstance(dispatcher, LevelsDispatcher)
        collectives = dispatcher.collectives or _one_level(mesh.ep_size)
        slots = torch.stack([placement.slots_TK for _, placement in layers if placement.slots_TK is not None])
        kept = [placement.kept_TK for _, placement in layers if placement.kept_TK is not None]
        statistics = swap_statistics(
            slots, spec.num_experts, collectives.groups, options.dedup, torch.stack(kept) if kept else None
        )
        sizes = [statistics.counts_S.numel(), statistics.gain_DEE.numel()]
        summed = torch.cat([statistics.counts_S.flatten(), statistics.gain_DEE.flatten()])
        dist.all_reduce(summed)
        counts, gain = summed.split(sizes)
        statistics = SwapStatistics(counts.view_as(statistics.counts_S), gain.view_as(statistics.gain_DEE))
        cost_EE, now_s = swap_costs(
            statistics, collectives, dispatcher.row_bytes, dispatcher.num_levels, options.peak, options.gamma
        )
        ranked = ranked_swaps(cost_EE, now_s, options.swap_pairs, spec.num_experts // mesh.ep_size)
        dist.broadcast(ranked, 0)  # where ranks compute differently, one decides
        return ranked


def _cut(layers: list[Any]) -> list[list[Any]]:
    """So many layers at a time that what scores their swaps stays small."""
    return [layers[first : first + SCORED_TOGETHER] for first in range(0, len(layers), SCORED_TOGETHER)]


def _one_level(num_ranks: int) -> Collectives:
    """Stands for costs that nobody measured where there is one level: its swaps rank alike whatever a byte costs."""
    return Collectives((num_ranks,), AlphaBeta(0.0, 1.0))
