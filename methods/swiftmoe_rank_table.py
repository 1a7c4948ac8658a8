"""A slot table as one rank sees it: which sums of gradients it makes, which of their shards it sends and receives
(SYMI, arXiv 2504.19925, section 4.3, algorithm 2), and which new weights. All of it depends on the table alone, so it
is worked out once a table, and what a GPU has to know of it goes there with that of other layers.

Dimensions: E experts, N ranks, G experts with a slot on this rank, S of them on other ranks too, B fills of its slots,
F numbers of a shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from methods.swiftmoe_scheduler import SlotTable
from moe.mesh import Mesh


class RankTable:
    """What a rank makes of a table. Experts with a slot here are counted by their place g, in order; shard n of the one
    at place g is called g N + n.

    Args:
        table: which expert is in which slot.
        rank: this one.
        per_slot: new weights come once for each slot, as SYMI counts, instead of once a rank (ours).

    Attributes:
        runs: the experts of this rank's slots, in order, each once.
        num_sent: of the shards in `order`.
        order: of the shards to be summed here: first those to send, for rank 0 first, by rising expert; behind them all
            N of each expert of `groups`, whose own sums over ranks come in between.
        send_rows, receive_rows: [N] shards to and from each rank, this one included. What is received is in the order
            of experts, since no expert comes from a rank before that of the expert before it.
        groups: first and last rank of each of the S experts, in the order of `SlotTable.shared`.
        fills: first slot and number of slots of what is received as new weights, in order.
        weight_rows: [N] shards of new weights to each rank, for rank 0 first, by rising expert.
        order_R, runs_G2, fills_B2: on the device (`take`), `order`, and [first slot, slots] of `runs` and `fills`.
        rows_E2: of every expert, its first among all shards of new weights that are sent, and how many it has there.
        late_2: [2, rows], the rows among those to send that have to wait for sums over ranks, and where these lie.
    """

    order_R: Tensor
    runs_G2: Tensor
    fills_B2: Tensor
    rows_E2: Tensor
    late_2: Tensor

    def __init__(self, table: SlotTable, rank: int, per_slot: bool = False) -> None:
        self.table, self.rank, self.runs = table, rank, table.runs(rank)
        num_ranks = table.num_slots // table.slots_per_rank
        shared = [expert for expert in table.shared if rank in table.holders[expert]]
        self.groups = [(table.holders[expert].start, table.holders[expert].stop - 1) for expert in shared]
        taken: list[list[int]] = [[] for _ in range(num_ranks)]
        for place, run in enumerate(self.runs):
            for peer in table.takers(run.expert, rank):
                taken[peer].append(place * num_ranks + peer)
        to_send = [shard for shards in taken for shard in shards]
        self.send_rows = [len(shards) for shards in taken]
        self.receive_rows = [0] * num_ranks
        for expert in range(len(table.counts)):
            self.receive_rows[table.source(expert, rank)] += 1
        self.fills, self.weight_rows, self._rows_of_experts = self._weights_for(per_slot)
        first = self.runs[0].expert
        behind = [(expert - first) * num_ranks + peer for expert in shared for peer in range(num_ranks)]
        self.order, self.num_sent = to_send + behind, len(to_send)
        sum_of = {shard: self.num_sent + index for index, shard in enumerate(behind)}
        self._late = [(row, sum_of[shard]) for row, shard in enumerate(to_send) if shard in sum_of]

    def _weights_for(self, per_slot: bool) -> tuple[list[tuple[int, int]], list[int], list[int]]:
        """`fills`, `weight_rows`, and how many of the latter are of each expert."""
        table, num_ranks = self.table, len(self.send_rows)
        if per_slot:
            fills = [(slot, 1) for slot in range(table.slots_per_rank)]
            return fills, [table.slots_per_rank] * num_ranks, list(table.counts)
        experts_on = [table.num_experts_on(peer) for peer in range(num_ranks)]
        return [(run.first, run.num_slots) for run in self.runs], experts_on, [len(ranks) for ranks in table.holders]

    def numbers(self) -> list[list[int]]:
        """What `take` wants to have on the device."""
        firsts = [
            end - rows for end, rows in zip(accumulate(self._rows_of_experts), self._rows_of_experts, strict=True)
        ]
        return [
            self.order,
            [number for run in self.runs for number in (run.first, run.num_slots)],
            [number for fill in self.fills for number in fill],
            [number for pair in zip(firsts, self._rows_of_experts, strict=True) for number in pair],
            [row for rows in zip(*self._late, strict=True) for row in rows],
        ]

    def take(self, tensors: Sequence[Tensor]) -> None:
        """Use these tensors of `numbers`."""
        self.order_R, runs, fills, rows, late = tensors
        self.runs_G2, self.fills_B2, self.rows_E2 = runs.view(-1, 2), fills.view(-1, 2), rows.view(-1, 2)
        self.late_2 = late.view(2, len(self._late))

    @property
    def has_late_rows(self) -> bool:
        """Whether `late_2` has any."""
        return bool(self._late)

    def rows_of_experts(self) -> list[int]:
        """[G N], where the sum of each shard lies in `order`, sums over ranks where there are some."""
        row_of = {shard: row for row, shard in enumerate(self.order)}
        return [row_of[shard] for shard in range(len(row_of))]


def packed_on_device(lists: Sequence[Sequence[int]], mesh: Mesh) -> list[Tensor]:
    """Numbers of the host on the device, all in one transfer that the host does not wait for; int64, each list from a
    16-byte boundary on, so that for kernels they are always alike (`moe.kernels.launch`)."""
    sizes = [size for numbers in lists for size in (len(numbers), len(numbers) % 2)]
    packed = [number for numbers in lists for number in (*numbers, *[0] * (len(numbers) % 2))]
    return list(mesh.tensor(packed).split(sizes)[::2])
