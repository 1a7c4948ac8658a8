"""The slots of padded expert parallelism, cut into parts whose exchanges overlap the experts (Tutel, section 3.3).

Every rank has equally many slots for each expert, C: what the capacity factor allows, else as many as the fullest
expert of any rank needs. So the exchanges need no counts, and send what is empty, too. D parts are cut out of the
slots, not of the tokens: the gate decides for all tokens at once who drops.

    send part 0 .. D-1;  part by part: await it, experts, send it back;  await what came back

With D = 1 nothing overlaps. The backward is the mirror.

Dimensions: T tokens of this rank, K choices, M model, P ranks, E experts, L experts of a rank, S copies kept, C slots
of an expert, R rows of the experts in one part, P * C / D for each of the L.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from baselines.tutel_2dh_exchange import Exchange2D, nodes_of
from moe import ops
from moe.dispatch import expand, weighted_sum
from moe.gate import Routing
from moe.mesh import Mesh
from moe.static_dispatch import collect, spread
from moe.system import LayerSpec


@dataclass(frozen=True)
class SlotPlan:
    """Where the copies of one layer call travel.

    Attributes:
        order: [S] int64, kept copy, sorted by expert -> flat copy t * K + k.
        inverse_TK: [T, K] int64, its inverse; S where the copy is dropped.
        slots_S: [S] int64, the slot of each kept copy, of [D, E, C / D].
        part_slots: C / D.
    """

    order: Tensor
    inverse_TK: Tensor
    slots_S: Tensor
    part_slots: int


class SlotSchedule:
    """Tokens to their experts and back, part by part.

    Args:
        spec: of the layer.
        mesh: its expert-parallel group is used. Collective over all ranks of the run.
        inside_first: as in `Exchange2D`.
        num_parts: D.

    Raises:
        Refused: nodes do not fit, see `nodes_of`.
    """

    def __init__(self, spec: LayerSpec, mesh: Mesh, inside_first: bool, num_parts: int) -> None:
        self.spec, self.mesh = spec, mesh
        self.nodes, self.inside_first, self.num_parts = nodes_of(mesh), inside_first, num_parts
        self.num_local = spec.num_experts // mesh.ep_size

    def __call__(self, x_TM: Tensor, routing: Routing, part_experts: Sequence[nn.Module]) -> Tensor:
        """Run tokens [T, M] through their experts. Collective; waits for the number of slots on the host.

        Args:
            x_TM: tokens; T equal on all ranks where a capacity factor is set.
            routing: of these tokens.
            part_experts: one for each part, called in order, as `moe.experts.GroupedExperts` is.

        Returns:
            [T, M].
        """
        plan, model_dim, num_ranks = self.plan(routing), x_TM.shape[1], self.mesh.ep_size
        copies_SM = expand(x_TM, plan.order, plan.inverse_TK)
        part_rows = self.spec.num_experts * plan.part_slots
        slots = spread(copies_SM, plan.slots_S, self.num_parts * part_rows)
        chunks = (self.nodes.num_nodes, self.nodes.node_size, self.num_local * plan.part_slots, model_dim)
        expert_rows = [num_ranks * plan.part_slots] * self.num_local
        expert_ends = torch.arange(1, self.num_local + 1, dtype=torch.int32, device=x_TM.device) * expert_rows[0]
        parts = slots.split(part_rows) if self.num_parts > 1 else [slots]
        there, back = self._exchanges(), self._exchanges()
        sent = [exchange.post(part.view(chunks)) for exchange, part in zip(there, parts, strict=True)]
        returning = []
        for go, come, buffer, compute in zip(there, back, sent, part_experts, strict=True):
            rows_RM = _swap(go.wait(buffer), num_ranks, self.num_local)
            rows_RM = compute(rows_RM, expert_rows, expert_ends)
            returning.append(come.post(_swap(rows_RM, self.num_local, num_ranks).view(chunks)))
        parts = [come.wait(buffer).view(part_rows, -1) for come, buffer in zip(back, returning, strict=True)]
        slots = torch.cat(parts) if self.num_parts > 1 else parts[0]
        return weighted_sum(collect(slots, plan.slots_S), routing.weights_TK, plan.order, plan.inverse_TK)

    def plan(self, routing: Routing) -> SlotPlan:
        """Lay out the copies. Collective where no capacity factor says how many slots there are."""
        ids_TK, num_experts = routing.expert_ids_TK, self.spec.num_experts
        chosen, counts_E, num_kept = ids_TK.flatten(), routing.counts_E, ids_TK.numel()
        if routing.kept_TK is not None:
            kept = routing.kept_TK.flatten()
            chosen = torch.where(kept, chosen, num_experts)  # dropped copies sort behind the last expert
            counts_E, num_kept = ops.count_choices(chosen, num_experts + 1)[:-1], int(kept.sum())
        order, inverse = ops.sort_by_expert(chosen, num_experts, num_kept)
        part_slots = -(-self._num_slots(len(ids_TK), counts_E) // self.num_parts)
        expert_S = chosen[order]
        place_S = torch.arange(num_kept, device=chosen.device) - (counts_E.cumsum(0) - counts_E)[expert_S]
        part_S, place_S = place_S // part_slots, place_S % part_slots
        slots_S = (part_S * num_experts + expert_S) * part_slots + place_S
        return SlotPlan(order, inverse.view_as(ids_TK), slots_S, part_slots)

    def _num_slots(self, num_tokens: int, counts_E: Tensor) -> int:
        """C before it is rounded up to whole parts, the same on all ranks; at least 1."""
        if self.spec.capacity_factor is not None:
            return max(1, self.spec.capacity(num_tokens))
        fullest = counts_E.max()
        dist.all_reduce(fullest, op=dist.ReduceOp.MAX, group=self.mesh.ep_group)
        return max(1, int(fullest))

    def _exchanges(self) -> list[Exchange2D]:
        return [Exchange2D(self.nodes, self.inside_first) for _ in range(self.num_parts)]


def _swap(rows: Tensor, outer: int, inner: int) -> Tensor:
    """Rows [outer * inner * slots, M] of any leading shape, to [inner * outer * slots, M]: from rank-major to
    expert-major, or back."""
    model_dim = rows.shape[-1]
    return rows.reshape(outer, inner, -1, model_dim).transpose(0, 1).reshape(-1, model_dim)
