"""FasterMoE's smart scheduling (He et al., PPoPP 2022, section 4.2): a grouped pairwise exchange that overlaps.

The P ranks are n groups of g. In step j = 0 .. n - 1, with i this rank's group,

    S_j: send own tokens to group t = i - j, receive those of group f = i + j (mod n)
    C_j: the local experts compute the tokens of group f
    R_j: their outputs go back to group f, own outputs come from group t

Communication runs in the order S_0 .. S_{n-1}, weights of shadowed experts, R_0 .. R_{n-1}; computation in the order
C_0 .. C_{n-1}, shadowed experts. The backward is the mirror: gradients of outputs as R_{n-1} .. R_0, shadowed experts,
C_{n-1} .. C_0, gradients of tokens as S_{n-1} .. S_0; what stays exposed are the same two exchanges, S_0 inside the
group and R_{n-1} with the next one. One group of all ranks is plain, synchronous expert parallelism.

Dimensions: T tokens of this rank, K choices, M model, P ranks, E experts, L experts a rank, N shadowed experts, S
copies this rank keeps (those that travel by destination, then those of shadowed experts), R rows of one step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from baselines.fastermoe_exchange import Exchange, WeightShare
from baselines.fastermoe_shadow import Counts
from moe import ops
from moe.collectives import gather_rows
from moe.dispatch import expand, permute, weighted_sum
from moe.experts import GroupedExperts
from moe.gate import Routing
from moe.mesh import Mesh


class StepExperts(nn.Module):
    """This rank's experts on the tokens of one step, C_j. Modules of their own, because the suite times their calls.

    Args:
        experts: which the steps share; kept out of `parameters()`.
    """

    def __init__(self, experts: GroupedExperts) -> None:
        super().__init__()
        self.hidden = (experts,)

    def forward(self, rows_RM: Tensor, expert_rows: list[int], expert_ends: Tensor) -> Tensor:
        """As `GroupedExperts.forward`."""
        return self.hidden[0](rows_RM, expert_rows, expert_ends)


class ShadowExperts(nn.Module):
    """Shadowed experts on this rank's own tokens.

    Args:
        experts: whose network it is; kept out of `parameters()`.
    """

    def __init__(self, experts: GroupedExperts) -> None:
        super().__init__()
        self.hidden = (experts,)

    def forward(self, rows_RM: Tensor, expert_rows: list[int], weights: tuple[Tensor, Tensor] | None) -> Tensor:
        """Rows [R, M] sorted by shadowed expert, and the experts' w_in and w_out [N, ...]; None where N = 0."""
        if weights is None:
            return rows_RM.clone()
        parameters = {"w_in": weights[0], "w_out": weights[1]}
        return functional_call(self.hidden[0], parameters, (rows_RM, expert_rows))


@dataclass(frozen=True)
class Step:
    """What this rank does in step j.

    Attributes:
        to_group: t, whose experts compute this rank's copies.
        send, receive: exchanges S_j and R_j.
        expert_order, expert_inverse: [R] int64, arrival order -> expert-major order and back; None when they agree.
        expert_rows: rows of each of the L experts.
        expert_ends: [L] int32, the row behind each expert's last.
    """

    to_group: int
    send: Exchange
    receive: Exchange
    expert_order: Tensor | None
    expert_inverse: Tensor | None
    expert_rows: list[int]
    expert_ends: Tensor


@dataclass(frozen=True)
class Plan:
    """Where the copies of one layer call travel.

    Attributes:
        order, inverse_TK: [S] and [T, K] int64, as in `moe.dispatch.DispatchPlan`.
        group_rows: copies that go to each group.
        shadowed: global ids of the N shadowed experts.
        shadow_rows: this rank's copies of each.
        steps: in order.
    """

    order: Tensor
    inverse_TK: Tensor
    group_rows: list[int]
    shadowed: list[int]
    shadow_rows: list[int]
    steps: list[Step]


class PairwiseSchedule:
    """Tokens to their experts and back, step by step.

    Args:
        mesh: its expert-parallel group is used.
        num_experts: E.
        group_size: g, dividing the ranks of that group.
        choose_shadows: experts to shadow, from counts [P, E]; must decide alike on every rank.
        dtype: of weights that are broadcast.

    Attributes:
        last_shadowed: the experts that the last call shadowed.
    """

    def __init__(
        self,
        mesh: Mesh,
        num_experts: int,
        group_size: int,
        choose_shadows: Callable[[Counts], list[int]],
        dtype: torch.dtype,
    ) -> None:
        assert mesh.ep_size % group_size == 0, f"{mesh.ep_size} ranks in groups of {group_size}"
        self.group, self.rank, self.num_ranks = mesh.ep_group, mesh.ep_rank, mesh.ep_size
        self.num_experts, self.num_local = num_experts, num_experts // mesh.ep_size
        self.group_size, self.num_groups = group_size, mesh.ep_size // group_size
        self.choose_shadows = choose_shadows
        self.dtype = dtype
        self.last_shadowed: list[int] = []

    def __call__(
        self,
        x_TM: Tensor,
        routing: Routing,
        experts: GroupedExperts,
        step_experts: Sequence[nn.Module],
        shadow_experts: nn.Module,
    ) -> Tensor:
        """Run tokens [T, M] through their experts. Collective; waits for the counts on the host.

        Args:
            x_TM: tokens.
            routing: of these tokens.
            experts: whose weights are shared.
            step_experts: called in C_0 .. C_{n-1}.
            shadow_experts: called once, behind them.

        Returns:
            [T, M].
        """
        plan = self.plan(routing)
        self.last_shadowed = plan.shadowed
        copies_SM = expand(x_TM, plan.order, plan.inverse_TK)
        *by_group, own_SM = copies_SM.split([*plan.group_rows, sum(plan.shadow_rows)])
        sent = [step.send.post(by_group[step.to_group]) for step in plan.steps]
        share = weights = None
        if plan.shadowed:
            share = WeightShare(self.group, plan.shadowed, self.num_local, self.dtype)
            weights = share.post(experts.w_in, experts.w_out)
        returned = []
        for step, compute, buffer_RM in zip(plan.steps, step_experts, sent, strict=True):
            rows_RM = step.send.wait(buffer_RM)
            rows_RM = permute(rows_RM, step.expert_order, step.expert_inverse)
            rows_RM = compute(rows_RM, step.expert_rows, step.expert_ends)
            rows_RM = permute(rows_RM, step.expert_inverse, step.expert_order)
            returned.append(step.receive.post(rows_RM))
        if share is not None and weights is not None:
            weights = share.wait(*weights)
        own_SM = shadow_experts(own_SM, plan.shadow_rows, weights)
        for step, buffer_SM in zip(plan.steps, returned, strict=True):
            by_group[step.to_group] = step.receive.wait(buffer_SM)
        copies_SM = torch.cat([*by_group, own_SM])
        return weighted_sum(copies_SM, routing.weights_TK, plan.order, plan.inverse_TK)

    def plan(self, routing: Routing) -> Plan:
        """Exchange the counts, choose the shadows and lay out the copies. Collective."""
        chosen, counts_E = routing.expert_ids_TK.flatten(), routing.counts_E
        if routing.kept_TK is not None:
            chosen = torch.where(routing.kept_TK.flatten(), chosen, self.num_experts)
            counts_E = ops.count_choices(chosen, self.num_experts + 1)[:-1]
        counts_PE = gather_rows(counts_E, self.group).view(self.num_ranks, self.num_experts)
        known_PE: Counts = counts_PE.cpu().numpy().copy()
        shadowed = self.choose_shadows(known_PE)
        num_kept = int(known_PE[self.rank].sum())
        shadow_rows = [int(known_PE[self.rank, expert]) for expert in shadowed]
        if shadowed:  # copies of shadowed experts sort behind all that travel, dropped ones behind them
            places = torch.arange(self.num_experts + 1)
            places[shadowed] = torch.arange(self.num_experts, self.num_experts + len(shadowed))
            places[-1] += len(shadowed)
            chosen = places.to(chosen.device)[chosen]
            counts_PE[:, shadowed] = 0
            known_PE[:, shadowed] = 0
        order, inverse = ops.sort_by_expert(chosen, self.num_experts + len(shadowed), num_kept)
        return Plan(
            order,
            inverse.view_as(routing.expert_ids_TK),
            known_PE[self.rank].reshape(self.num_groups, -1).sum(1).tolist(),
            shadowed,
            shadow_rows,
            [self._step(index, known_PE, counts_PE) for index in range(self.num_groups)],
        )

    def _step(self, index: int, known_PE: Counts, counts_PE: Tensor) -> Step:
        """Step j, from counts without those of shadowed experts, on the host and on the device."""
        own_group = self.rank // self.group_size
        to_group, from_group = (own_group - index) % self.num_groups, (own_group + index) % self.num_groups
        rows_PPL = known_PE.reshape(self.num_ranks, self.num_ranks, self.num_local)  # source, destination, expert
        targets, sources = self._ranks(to_group), self._ranks(from_group)
        send = [(rank, int(rows_PPL[self.rank, rank].sum())) for rank in targets]
        receive = [(rank, int(rows_PPL[rank, self.rank].sum())) for rank in sources]
        arriving_GL = counts_PE.view(rows_PPL.shape)[sources.start : sources.stop, self.rank]
        expert_order = expert_inverse = None
        if self.num_local > 1 and self.group_size > 1:
            num_rows = sum(rows for _, rows in receive)
            local_expert = torch.arange(self.num_local, device=counts_PE.device).repeat(self.group_size)
            arriving = local_expert.repeat_interleave(arriving_GL.flatten(), output_size=num_rows)
            expert_order, expert_inverse = ops.sort_by_expert(arriving, self.num_local, num_rows)
        return Step(
            to_group,
            Exchange(self.group, send, receive),
            Exchange(self.group, receive, send),
            expert_order,
            expert_inverse,
            np.sum(rows_PPL[sources.start : sources.stop, self.rank], axis=0).tolist(),
            arriving_GL.sum(0).cumsum(0, dtype=torch.int32),
        )

    def _ranks(self, group: int) -> range:
        return range(group * self.group_size, (group + 1) * self.group_size)
