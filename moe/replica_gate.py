"""Routing among replicas: a token's expert is chosen as ever, then one of the expert's replicas takes it, while the
capacity of its slots lasts (SYMI, arXiv 2504.19925, section 3.4).

    slot capacity = c copies / J,    capacity of expert i = r_i slot capacities

with c the capacity factor, J the slots of all ranks, r_i those of expert i. Ours, since the paper does not say: copies
are those of one source rank (`per_source`, as DeepSpeed has it) or of all ranks (`global`); the product is rounded up
once for each expert, so that with even replicas it is the suite's `LayerSpec.capacity`; who comes first is kept; an
expert's copies take its replicas in turn.

Dimensions: T tokens of this rank, K choices, E experts, N ranks, J slots.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from moe import ops
from moe.gate import Routing, TopKGate, queue_positions
from moe.mesh import Mesh
from moe.replica_table import Drop, Table
from moe.system import LayerSpec


def expert_capacities(capacity_factor: float, num_copies: int | Tensor, replicas_E: Tensor, num_slots: int) -> Tensor:
    """Copies that each expert takes, ceil(r_i * c * copies / J).

    Args:
        capacity_factor: c.
        num_copies: T K of one rank, or of all, int or scalar int64.
        replicas_E: [E] int64, r.
        num_slots: J.

    Returns:
        [E] int64.
    """
    exact_E = replicas_E.double() * num_copies * capacity_factor / num_slots
    return exact_E.round(decimals=6).ceil().long()  # as in LayerSpec.capacity: 110.00000000000001 is 110


def global_places(counts_NE: Tensor, capacity_E: Tensor) -> Tensor:
    """How an expert's capacity is shared by the ranks: in proportion to their copies of it (ours), dropping no copy
    more than the sum over ranks makes necessary.

    Args:
        counts_NE: [N, E] int64, copies of each rank.
        capacity_E: [E] int64, of all ranks together.

    Returns:
        [N + 1, E] int64: rank n's kept copies of expert i have the places from [n, i] to [n + 1, i] among all kept.
    """
    before_NE = torch.cat([torch.zeros_like(counts_NE[:1]), counts_NE.cumsum(0)])
    total_E = before_NE[-1]
    return before_NE * torch.minimum(capacity_E, total_E) // total_E.clamp_min(1)


class ReplicaGate(TopKGate):
    """The top-k gate, which also says which replica takes each copy.

    Args:
        spec: of the layer.
        mesh: of the run; replicas are spread over all of its ranks.
        table: of the first iteration.
        drop: rule.

    Attributes:
        slot_ids_TK: [T, K] int64, of the last call; also where the copy is dropped.
    """

    slot_ids_TK: Tensor

    def __init__(self, spec: LayerSpec, mesh: Mesh, table: Table, drop: Drop) -> None:
        super().__init__(spec, mesh.device)
        self.mesh, self.drop = mesh, drop
        self.use(table)

    def use(self, table: Table) -> None:
        """Go by another table from now on."""
        self.num_slots = table.num_slots
        by_expert = sorted(range(table.num_slots), key=table.expert_of_slot.__getitem__)
        firsts = list(accumulate(table.counts, initial=0))[:-1]
        self.first_E, self.replicas_E = self.mesh.tensor([firsts, table.counts])
        in_order = by_expert == list(range(table.num_slots))
        self.slots_J = None if in_order else self.mesh.tensor(by_expert)

    def keep(self, expert_ids_TK: Tensor) -> Tensor | None:
        """As `TopKGate.keep`; collective where the drop rule is global and there is a capacity."""
        position_TK = queue_positions(expert_ids_TK, self.spec.num_experts)
        factor, kept_TK = self.spec.capacity_factor, None
        turn_TK = position_TK + self.mesh.rank  # ranks with few copies do not all begin at the same replica
        if factor is not None and self.drop == "per_source":
            quota_E = expert_capacities(factor, expert_ids_TK.numel(), self.replicas_E, self.num_slots)
            kept_TK = position_TK < quota_E[expert_ids_TK]
        elif factor is not None:
            counts_NE = self._counts_of_all_ranks(expert_ids_TK)
            capacity_E = expert_capacities(factor, counts_NE.sum(), self.replicas_E, self.num_slots)
            first_E, last_E = global_places(counts_NE, capacity_E)[self.mesh.rank : self.mesh.rank + 2]
            kept_TK = position_TK < (last_E - first_E)[expert_ids_TK]
            turn_TK = position_TK + first_E[expert_ids_TK]
        self.slot_ids_TK = self.first_E[expert_ids_TK] + turn_TK % self.replicas_E[expert_ids_TK]
        if self.slots_J is not None:
            self.slot_ids_TK = self.slots_J[self.slot_ids_TK]
        return kept_TK

    def placed(self, routing: Routing) -> Routing:
        """The last call's routing with slots in place of experts, for a dispatcher of J experts."""
        counts_J = ops.count_choices(self.slot_ids_TK, self.num_slots)
        return routing._replace(expert_ids_TK=self.slot_ids_TK, counts_E=counts_J)

    def _counts_of_all_ranks(self, expert_ids_TK: Tensor) -> Tensor:
        counts_E = ops.count_choices(expert_ids_TK, self.spec.num_experts)
        if self.mesh.world_size == 1:
            return counts_E.unsqueeze(0)
        counts_NE = [torch.empty_like(counts_E) for _ in range(self.mesh.world_size)]
        dist.all_gather(counts_NE, counts_E)
        return torch.stack(counts_NE)
