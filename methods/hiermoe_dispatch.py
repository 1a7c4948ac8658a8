"""HierMoE's dispatch over the levels of a cluster (arXiv 2508.09591): a token crosses each level once per block that
holds one of its experts, and its outputs come back summed.

From the paper: the order of the exchanges (Inter-1, ..., Inter-(d-1), then Intra-(d-1)), who takes part in them, and
one copy a block (its HDd; Hd without). It does not describe the way back nor what is told with a token; here these are
ours: expert ids and gate weights are packed with every row, weights are applied at the experts, and partial sums are
added up on every level on the way back.

Dimensions: T tokens of this rank, K choices, M model, P ranks of the expert-parallel group, L experts a rank, E = P L,
R rows that a rank holds, C choices told with a row (K, or 1 where every copy travels by itself), J blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from methods.hiermoe_exchange import Crossing, sum_copies
from moe import ops
from moe.dispatch import Dispatcher, expand
from moe.errors import Refused
from moe.gate import Routing
from moe.mesh import Mesh, block_group
from moe.topology import Cluster


def block_sizes(cluster: Cluster, num_ranks: int) -> list[int]:
    """Ranks of a block of every level that divides the first `num_ranks` ranks, outermost first, and 1 at last.

    Two nodes of four ranks are [4, 1]: first to a node, then to a rank; their length is the largest d. In the paper's
    terms U[i] = num_ranks / block_sizes[i - 1].

    Raises:
        Refused: a level's groups and those of `num_ranks` ranks do not fit into each other.
    """
    sizes = {1}
    for level in range(1, len(cluster.levels)):
        size = cluster.group_size(level)
        if max(size, num_ranks) % min(size, num_ranks):
            raise Refused(
                f"HierMoE needs whole groups of a level: {size} ranks of level {cluster.levels[level].name} and "
                f"{num_ranks} ranks that share experts do not divide each other."
            )
        if size < num_ranks:
            sizes.add(size)
    return sorted(sizes, reverse=True)


@dataclass(frozen=True)
class Level:
    """Who exchanges with whom on one level, and which experts lie behind each peer.

    Attributes:
        group: this rank's peers, one in each of J blocks: they stand in their blocks where it does in its own.
        num_blocks: J.
        block_size: ranks of a block; 1 on the last level.
        first_rank: of the first block, as a position in the expert-parallel group.
    """

    group: dist.ProcessGroup
    num_blocks: int
    block_size: int
    first_rank: int


class Traffic(NamedTuple):
    """Numbers of rows of one layer call, known to the host.

    Attributes:
        levels: rows (sent, received) of each peer, by level.
        expert_rows: copies for each of this rank's L experts.
        expert_ends: [L] int32, the row behind each expert's last.
    """

    levels: list[tuple[list[int], list[int]]]
    expert_rows: list[int]
    expert_ends: Tensor


@dataclass(frozen=True)
class HierarchicalPlan:
    """Where the copies of one layer call travel.

    Attributes:
        crossings: of the levels, outermost first.
        order: [copies] int64, expert row -> flat choice r * C + c of the rows that arrived.
        inverse_RC: [R, C] int64, its inverse; the number of copies where an expert is of another rank.
        expert_rows: copies for each of this rank's L experts.
        expert_ends: [L] int32, the row behind each expert's last.
        row_weights: [copies] float32, what the experts' rows are to be multiplied by.
    """

    crossings: list[Crossing]
    order: Tensor
    inverse_RC: Tensor
    expert_rows: list[int]
    expert_ends: Tensor
    row_weights: Tensor


class HierarchicalDispatcher(Dispatcher):
    """Dispatch and combine level by level. Making it is collective over all ranks of the run.

    Args:
        mesh: its expert-parallel group is used, and its cluster's levels.
        num_experts: E, over the group.
        num_levels: d, exchanges each way: the d - 1 outermost levels by themselves, those inside by one exchange; None
            for one a level; 1 is one exchange of all ranks.
        dedup: a token crosses once per block (HDd); False: once for every choice (Hd).

    Raises:
        Refused: more levels than the group's ranks have, or levels that do not fit into the group.
    """

    def __init__(self, mesh: Mesh, num_experts: int, num_levels: int | None = None, dedup: bool = True) -> None:
        self.num_experts, self.num_ranks, self.dedup = num_experts, mesh.ep_size, dedup
        self.num_local = num_experts // mesh.ep_size
        self.experts = mesh.local_experts(num_experts)
        sizes = block_sizes(mesh.cluster, mesh.ep_size)
        self.num_levels = num_levels or len(sizes)
        copies = "a token once per group" if dedup else "every copy by itself"
        self.path = f"all-to-all-v on {self.num_levels} level{'s' * (self.num_levels > 1)}, {copies}"
        if self.num_levels > len(sizes):
            raise Refused(
                f"HierMoE can't take levels={num_levels}: the {mesh.ep_size} ranks that share experts are divided by "
                f"{len(sizes)} level{'s' * (len(sizes) > 1)} of cluster {mesh.cluster.name}."
            )
        inner = [*sizes[: self.num_levels - 1], 1]
        outer = [mesh.ep_size, *inner[:-1]]
        self.levels = [
            Level(block_group(mesh, whole, block), whole // block, block, mesh.ep_rank // whole * whole)
            for whole, block in zip(outer, inner, strict=True)
        ]

    def dispatch(self, x_TM: Tensor, routing: Routing) -> tuple[Tensor, HierarchicalPlan]:
        """As `Dispatcher.dispatch`. Waits for the numbers of rows on the host, once."""
        ids_RC, weights_RC = routing.expert_ids_TK, routing.weights_TK
        if routing.kept_TK is not None:  # a dropped copy is for an expert that nobody has
            ids_RC = torch.where(routing.kept_TK, ids_RC, self.num_experts)
        rows_a_token = 1
        if not self.dedup:  # as K tokens of one choice each
            rows_a_token = ids_RC.shape[1]
            ids_RC, weights_RC = ids_RC.reshape(-1, 1), weights_RC.reshape(-1, 1)
        ids_RC = ids_RC.to(torch.int32).contiguous()
        traffic = self._count(ids_RC)
        rows_RM, crossings = x_TM, []
        for level, (send_rows, receive_rows) in zip(self.levels, traffic.levels, strict=True):
            wanted_RJ = self._blocks(ids_RC, level.first_rank, level.block_size, level.num_blocks)
            block = torch.arange(level.num_blocks, device=ids_RC.device)
            chosen = torch.where(wanted_RJ, block, level.num_blocks).flatten()
            order, inverse = ops.sort_by_expert(chosen, level.num_blocks, sum(send_rows))
            inverse_RJ = inverse.view(-1, rows_a_token * level.num_blocks)
            crossings.append(Crossing(level.group, send_rows, receive_rows, order, inverse_RJ))
            rows_RM, weights_RC, ids_RC = crossings[-1].there(rows_RM, weights_RC, ids_RC)
            rows_a_token = 1
        local_RC = ids_RC.long() - self.experts.start
        here_RC = (local_RC >= 0) & (local_RC < self.num_local)
        chosen = torch.where(here_RC, local_RC, self.num_local).flatten()
        order, inverse = ops.sort_by_expert(chosen, self.num_local, sum(traffic.expert_rows))
        inverse_RC = inverse.view_as(ids_RC)
        row_weights = weights_RC.flatten().index_select(0, order)
        plan = HierarchicalPlan(crossings, order, inverse_RC, traffic.expert_rows, traffic.expert_ends, row_weights)
        return expand(rows_RM, order, inverse_RC), plan

    def combine(self, rows_RM: Tensor, plan: HierarchicalPlan, weights_TK: Tensor) -> Tensor:
        """As `Dispatcher.combine`; the rows come weighted."""
        partial_RM = sum_copies(rows_RM, plan.order, plan.inverse_RC)
        for crossing in reversed(plan.crossings):
            partial_RM = crossing.back(partial_RM)
        return partial_RM

    def _blocks(self, ids_RC: Tensor, first_rank: int, block_size: int, num_blocks: int) -> Tensor:
        """[R, J] bool: whether a row has an expert in each of the blocks from `first_rank` on."""
        block_RC = (ids_RC.long() - first_rank * self.num_local) // (block_size * self.num_local)
        block_RC = torch.where((block_RC >= 0) & (block_RC < num_blocks), block_RC, num_blocks)
        wanted = torch.zeros(len(ids_RC), num_blocks + 1, dtype=torch.bool, device=ids_RC.device)
        return wanted.scatter_(1, block_RC, True)[:, :num_blocks]

    def _count(self, ids_RC: Tensor) -> Traffic:
        """Numbers of rows on all levels, from this rank's own choices. Collective.

        A rank knows how many of its rows each block of every level wants. On each level it tells its peers what of this
        lies behind them; the sums of what peers tell are what a rank then sends on.
        """
        counts = [
            self._blocks(ids_RC, 0, level.block_size, self.num_ranks // level.block_size).sum(0)
            for level in self.levels
        ]
        counts.append(ops.count_choices(ids_RC.long(), self.num_experts + 1)[: self.num_experts])
        known = []
        for level in self.levels:
            telling = torch.cat([count.view(level.num_blocks, -1) for count in counts], dim=1)
            told = torch.empty_like(telling)
            dist.all_to_all_single(told, telling, group=level.group)
            known += [telling[:, 0], told[:, 0]]
            _, *counts = told.sum(0).split([count.numel() // level.num_blocks for count in counts])
        (experts_L,) = counts
        numbers = iter(torch.cat([*known, experts_L]).tolist())

        def take(length: int) -> list[int]:
            return list(islice(numbers, length))

        levels = [(take(level.num_blocks), take(level.num_blocks)) for level in self.levels]
        return Traffic(levels, list(numbers), experts_L.cumsum(0, dtype=torch.int32))
