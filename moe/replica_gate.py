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


def take_turns(
    expert_ids_TK: Tensor, table_RE: Tensor, num_slots: int, slot_order_J: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Which slot takes each copy: an expert's copies, in the order of their queue, take its slots in turn.

    Args:
        expert_ids_TK: [T, K] int64.
        table_RE: [3 or 4, E] int64: an expert's first slot, how many it has, whose turn it is first, and how many
            copies it keeps; without the last row all.
        num_slots: J.
        slot_order_J: [J] int64, the slots in the order of their experts, which the first row counts in; None for the
            order that they have.

    Returns:
        slots [T, K] int64; whether copies are kept [T, K] bool, None without a last row; counts [J] int64 of the slots.
    """
    if ops.is_fast(expert_ids_TK) and expert_ids_TK.numel() and table_RE.shape[1] <= ops.MOST_EXPERTS:
        return ops.kernels().take_turns(expert_ids_TK, table_RE, num_slots, slot_order_J)
    position_TK = queue_positions(expert_ids_TK, table_RE.shape[1])
    first_TK, replicas_TK, turn_TK, *quota = table_RE[:, expert_ids_TK].unbind()
    slot_ids_TK = first_TK + (position_TK + turn_TK) % replicas_TK
    if slot_order_J is not None:
        slot_ids_TK = slot_order_J[slot_ids_TK]
    kept_TK = position_TK < quota[0] if quota else None
    return slot_ids_TK, kept_TK, ops.count_choices(slot_ids_TK, num_slots)


class ReplicaGate(TopKGate):
    """The top-k gate, which also says which replica takes each copy.

    Args:
        spec: of the layer.
        mesh: of the run; replicas are spread over all of its ranks.
        table: of the first iteration.
        drop: rule.

    Attributes:
        slot_ids_TK: [T, K] int64, of the last call; also where the copy is dropped.
        counts_J: [J] int64, how often each slot stands there.
    """

    slot_ids_TK: Tensor
    counts_J: Tensor

    def __init__(self, spec: LayerSpec, mesh: Mesh, table: Table, drop: Drop) -> None:
        super().__init__(spec, mesh.device)
        self.mesh, self.drop = mesh, drop
        self._num_copies, self._capacities = 0, [0]  # of the last call: copies, and those that so many slots keep
        self.use(table)

    def use(self, table: Table, numbers: Tensor | None = None) -> None:
        """Go by another table from now on.

        Args:
            table: which expert is in which slot.
            numbers: `self.numbers(table)` where they are on the device already: those of several layers can go there
                together.
        """
        self.table = table
        slots = table.expert_of_slot
        by_expert = None if slots == sorted(slots) else sorted(range(len(slots)), key=slots.__getitem__)
        self.slot_order_J = None if by_expert is None else self.mesh.tensor(by_expert)
        if numbers is None:
            numbers = self.mesh.tensor(self.numbers(table))
        self._table_RE = numbers.view(-1, self.spec.num_experts)

    def numbers(self, table: Table) -> list[int]:
        """What the device must know of a table, `table_RE` of `take_turns` row by row; with capacities of a source
        rank as soon as it is known how many copies it has, of which the last call tells."""
        firsts = list(accumulate(table.counts, initial=0))[:-1]
        first_turn = self.mesh.rank  # ranks with few copies do not all begin at the same replica
        kept = [self._capacities[count] for count in table.counts] if self._num_copies else []
        return [*firsts, *table.counts, *[first_turn] * len(firsts), *kept]

    def keep(self, expert_ids_TK: Tensor) -> Tensor | None:
        """As `TopKGate.keep`; collective where the drop rule is global and there is a capacity."""
        if self.spec.capacity_factor is None:
            table_RE = self._table_RE
        elif self.drop == "per_source":
            table_RE = self._with_capacities(expert_ids_TK.numel(), self.spec.capacity_factor)
        else:
            table_RE = self._with_shares(expert_ids_TK, self.spec.capacity_factor)
        self.slot_ids_TK, kept_TK, self.counts_J = take_turns(
            expert_ids_TK, table_RE, self.table.num_slots, self.slot_order_J
        )
        return kept_TK

    def placed(self, routing: Routing) -> Routing:
        """The last call's routing with slots in place of experts, for a dispatcher of J experts."""
        return routing._replace(expert_ids_TK=self.slot_ids_TK, counts_E=self.counts_J)

    def _with_capacities(self, num_copies: int, factor: float) -> Tensor:
        """[4, E], for so many copies of this rank. The host knows them all: the GPU is told of them with the table."""
        if num_copies != self._num_copies:
            num_slots = self.table.num_slots
            capacities = expert_capacities(factor, num_copies, torch.arange(num_slots + 1), num_slots)
            self._num_copies, self._capacities = num_copies, capacities.tolist()
            self._table_RE = self.mesh.tensor(self.numbers(self.table)).view(-1, self.spec.num_experts)
        return self._table_RE

    def _with_shares(self, expert_ids_TK: Tensor, factor: float) -> Tensor:
        """[4, E], with this rank's shares of the experts' capacities, and the turns that those of ranks before it end
        at."""
        counts_NE = self._counts_of_all_ranks(expert_ids_TK)
        replicas_E = self._table_RE[1]
        capacity_E = expert_capacities(factor, counts_NE.sum(), replicas_E, self.table.num_slots)
        first_E, last_E = global_places(counts_NE, capacity_E)[self.mesh.rank : self.mesh.rank + 2]
        return torch.stack([self._table_RE[0], replicas_E, first_E, last_E - first_E])

    def _counts_of_all_ranks(self, expert_ids_TK: Tensor) -> Tensor:
        counts_E = ops.count_choices(expert_ids_TK, self.spec.num_experts)
        if self.mesh.world_size == 1:
            return counts_E.unsqueeze(0)
        counts_NE = [torch.empty_like(counts_E) for _ in range(self.mesh.world_size)]
        dist.all_gather(counts_NE, counts_E)
        return torch.stack(counts_NE)
