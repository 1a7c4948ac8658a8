"""Experts cut over the ranks of a node: expert-sharding parallelism (ESP), as FSMoE lays layers out (arXiv 2501.10714,
section 2.2, figure 2).

Experts are spread over nodes, and each one's hidden dimension over the n ranks of its node. A copy travels between
nodes to the rank at the sender's place in the expert's node, is gathered with those of the other ranks there, meets the
part of the expert that each of them has, and the parts' outputs are summed as they scatter back.

Of the paper's layout (DP + MP + EP + ESP with as many ranks in MP and ESP as in a node) this is what a mixture of
experts sees: models here have no tensor parallelism (MP), whose sequence shards each rank's own tokens stand for, so
that the reduce-scatter before a mixture and the all-gather behind it have nothing to do.

Dimensions: M model, H hidden of an expert, n ranks of a node, L experts of a node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from moe.exchange_costs import Counts, first_ranks, ring_cost
from moe.experts import GroupedExperts
from moe.layer_simulation import LayerModel, RoutedLayer
from moe.mesh import Mesh, block_group
from moe.system import ExpertView, LayerSpec
from moe.topology import Cluster

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of Adam's kind, for every parameter."""


def node_size(cluster: Cluster) -> int:
    """n, ranks of the innermost level above a rank."""
    return cluster.group_size(1) if len(cluster.levels) > 1 else 1


def sharding_refusals(spec: LayerSpec, cluster: Cluster) -> list[str]:
    """Why the experts can't be cut over this cluster's nodes; empty when they can."""
    size, reasons = node_size(cluster), []
    if size == 1:
        return [
            f"expert_sharding=true cuts experts over the ranks of a node, and a node of cluster {cluster.name} has one "
            "rank: set expert_sharding=false."
        ]
    num_nodes = cluster.world_size // size
    if spec.num_experts % num_nodes:
        reasons.append(
            f"expert_sharding=true spreads experts over nodes, and num_experts={spec.num_experts} is no multiple of "
            f"the {num_nodes} nodes of cluster {cluster.name}: use a multiple of {num_nodes}."
        )
    if spec.hidden_dim % size:
        reasons.append(
            f"expert_sharding=true cuts experts into {size} equal parts on cluster {cluster.name}, and "
            f"hidden_dim={spec.hidden_dim} is no multiple of {size}: use one."
        )
    return reasons


def sharded_model(layer: RoutedLayer, counts_PE: Counts) -> LayerModel:
    """What such a layer does in a simulation: copies go to the rank at their own one's place in the expert's node.

    Args:
        layer: of a cluster that has nodes.
        counts_PE: [P, E], copies of each rank for each expert.
    """
    num_ranks, size = layer.num_ranks, node_size(layer.cluster)
    rows_PN = counts_PE.reshape(num_ranks, num_ranks // size, -1).sum(2)
    rows_PP = np.zeros((num_ranks, num_ranks), dtype=np.int64)
    for rank, rows_N in enumerate(rows_PN):
        rows_PP[rank, rank % size :: size] = rows_N
    arriving_Nn = rows_PP.sum(0).reshape(-1, size)
    model = layer.model(counts_PE, rows_PP)
    shard_bytes = float(size * int(arriving_Nn.max()) * layer.row_bytes)
    expert_work = float(int(arriving_Nn.sum(1).max()) * layer.expert_weights) / size
    in_node = ring_cost(first_ranks(layer.cluster, size))
    costs = {"all_gather": in_node, "reduce_scatter": in_node, **model.costs}
    return replace(model, work=replace(model.work, shard_bytes=shard_bytes, expert_work=expert_work), costs=costs)


@dataclass(frozen=True)
class Sharding:
    """Where a rank stands among those that share its experts.

    Args:
        between: ranks at its place in their nodes, over which copies travel.
        node: the n ranks that share experts.
        experts: global ids of these.
    """

    between: dist.ProcessGroup
    node: dist.ProcessGroup
    experts: range

    @property
    def num_shards(self) -> int:
        """n."""
        return self.node.size()

    @property
    def place(self) -> int:
        """Of this rank in its node."""
        return self.node.rank()


def sharding_of(mesh: Mesh, num_experts: int) -> Sharding:
    """Of a rank. Makes groups, which is collective over all ranks of the run.

    Args:
        mesh: of the run.
        num_experts: E, over the nodes of an expert-parallel group.
    """
    size = node_size(mesh.cluster)
    assert mesh.ep_size % size == 0, f"expert-parallel groups of {mesh.ep_size} ranks, nodes of {size}"
    per_node = num_experts * size // mesh.ep_size
    first = mesh.ep_rank // size * per_node
    between, node = block_group(mesh, mesh.ep_size, size), block_group(mesh, size, 1)
    return Sharding(between, node, range(first, first + per_node))


class ShardedExperts(GroupedExperts):
    """This rank's part of every expert of its node: grouped experts of hidden dimension H / n.

    Args:
        spec: of the layer.
        sharding: of this rank.
        device: of the weights.
    """

    def __init__(self, spec: LayerSpec, sharding: Sharding, device: torch.device) -> None:
        super().__init__(replace(spec, hidden_dim=spec.hidden_dim // sharding.num_shards), sharding.experts, device)
        self.spec, self.sharding = spec, sharding

    def views(self) -> list[ExpertView]:
        """Canonical views of the parts."""
        return [replace(view, part=partial(self._part, view.name)) for view in super().views()]

    def _part(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a canonical matrix."""
        return self._cut_up(name, whole)[self.sharding.place]

    @contextmanager
    def whole(self, optimizer: Optimizer, loading: bool) -> Iterator[list[ExpertView]]:
        """Views of whole experts for a checkpoint, with their state in `optimizer`: each expert is on one rank of its
        node, in turn. Collective over the node.

        Args:
            optimizer: Adam's kind, of the model that these experts are in.
            loading: weights and state will be written there, and are taken over at the end.
        """
        kept = range(self.sharding.place, len(self.experts), self.sharding.num_shards)
        wholes = GroupedExperts(self.spec, [self.experts[slot] for slot in kept], self.w_in.device)
        try:
            if not loading:
                self._give(wholes, optimizer)
            yield wholes.views()
            if loading:
                self._take(wholes, optimizer)
        finally:
            for whole in wholes.parameters():
                optimizer.state.pop(whole, None)

    def _give(self, wholes: GroupedExperts, optimizer: Optimizer) -> None:
        """Put parts, and what `optimizer` has of their state, together."""
        self._join(wholes, lambda parameter: parameter.data)
        if self.w_in not in optimizer.state:
            return
        for part, whole in zip(self.parameters(), wholes.parameters(), strict=True):
            optimizer.state[whole] = {name: torch.empty_like(whole) for name in MOMENTS}
            optimizer.state[whole]["step"] = optimizer.state[part]["step"].clone()
        for name in MOMENTS:
            self._join(wholes, partial(_moment, optimizer, name))

    def _take(self, wholes: GroupedExperts, optimizer: Optimizer) -> None:
        """Cut whole experts and their state."""
        for part, whole in zip(self.parameters(), wholes.parameters(), strict=True):
            there, here = optimizer.state[whole], optimizer.state[part]
            for name in MOMENTS:
                there.setdefault(name, torch.zeros_like(whole))  # a rank may keep no whole expert, and was told nothing
                here.setdefault(name, torch.zeros_like(part))
            step = torch.as_tensor(there.get("step", 0.0), dtype=torch.float32, device=part.device).clone()
            dist.all_reduce(step, op=dist.ReduceOp.MAX, group=self.sharding.node)
            here["step"] = step
        self._cut(wholes, lambda parameter: parameter.data)
        for name in MOMENTS:
            self._cut(wholes, partial(_moment, optimizer, name))

    def _join(self, wholes: GroupedExperts, of: Callable[[nn.Parameter], Tensor]) -> None:
        """Of each expert, all ranks' parts to the one that keeps it whole."""
        for view, whole in self._matched(wholes):
            mine = view.view(of(view.parameter)).contiguous()
            parts = [torch.empty_like(mine) for _ in range(self.sharding.num_shards)]
            dist.all_gather(parts, mine, group=self.sharding.node)
            if whole is not None:
                for there, part in zip(self._parts(whole, of), parts, strict=True):
                    there.copy_(part)

    def _cut(self, wholes: GroupedExperts, of: Callable[[nn.Parameter], Tensor]) -> None:
        """The way back."""
        for view, whole in self._matched(wholes):
            parts = None if whole is None else [part.contiguous() for part in self._parts(whole, of)]
            here = view.view(of(view.parameter))
            received = torch.empty_like(here, memory_format=torch.contiguous_format)
            keeper = self.experts.index(view.expert) % self.sharding.num_shards
            source = dist.get_global_rank(self.sharding.node, keeper)
            dist.scatter(received, parts, src=source, group=self.sharding.node)
            here.copy_(received)

    def _matched(self, wholes: GroupedExperts) -> Iterator[tuple[ExpertView, ExpertView | None]]:
        """Every matrix of which this rank has a part, and the whole one where this rank keeps it."""
        kept = {(view.expert, view.name): view for view in wholes.views()}
        return ((view, kept.get((view.expert, view.name))) for view in self.views())

    def _parts(self, whole: ExpertView, of: Callable[[nn.Parameter], Tensor]) -> list[Tensor]:
        """Views of every rank's part of a whole matrix."""
        return self._cut_up(whole.name, whole.view(of(whole.parameter)))

    def _cut_up(self, name: str, whole: Tensor) -> list[Tensor]:
        """A canonical matrix along the hidden dimension: columns of w1 and w3, rows of w2."""
        return list(whole.chunk(self.sharding.num_shards, dim=0 if name == "w2" else 1))


def _moment(optimizer: Optimizer, name: str, parameter: nn.Parameter) -> Tensor:
    moment: Tensor = optimizer.state[parameter][name]
    return moment
