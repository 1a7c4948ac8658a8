"""Token dispatch inside a node without messages: each rank reads the tokens that chose its experts out of the other
ranks' memory, straight into its experts' rows, and writes their sums back.

A token crosses to a rank once, however many of that rank's experts it chose, and comes back as one row. There is no
send order and no permutation on arrival, and no counts are exchanged: all ranks see all choices. Weights are applied by
the experts, so that nothing of the way back is kept for the backward pass.

Dimensions: T tokens of this rank, K choices, P ranks of the expert-parallel group, M model, L experts a rank, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe import metering, ops
from moe.dispatch import Dispatcher
from moe.experts import products_are_grouped
from moe.gate import Routing
from moe.mesh import Mesh
from moe.peers import Workspace, shared_workspace
from moe.system import LayerSpec

MOST_SPARE = 0.25
"""Rows that may be laid out beyond an even share of all copies, so that the host need not know how many are taken; what
rounding up each expert's capacity for each rank adds is allowed on top."""


@dataclass(frozen=True)
class PeerPlan:
    """Where the copies of one layer call travel.

    Attributes:
        chosen_TK: [T, K] int64, E where the copy is dropped.
        places_PTK: [P, T, K] int32, the row of every rank's copies on this rank, or -1.
        num_rows: R, at least as many as copies come here; those behind the last expert's hold nothing.
        expert_rows: copies for each of this rank's L experts; None where the host does not know.
        expert_ends: [L] int32, the row behind each expert's last.
        crossings_3P: [3, P] int64, where bytes are counted: tokens of this rank that each rank reads, and the sums and
            copies that this rank has for each.
        row_weights: [R] float32, what the experts' rows are to be multiplied by.
    """

    chosen_TK: Tensor
    places_PTK: Tensor
    num_rows: int
    expert_rows: list[int] | None
    expert_ends: Tensor
    crossings_3P: Tensor | None = None
    row_weights: Tensor | None = None


class _Pull(torch.autograd.Function):
    """Tokens [T, M] and weights [T, K] to rows [R, M] and their weights [R]; backward they come home as sums."""

    @staticmethod
    def forward(
        ctx: Any, x_TM: Tensor, weights_TK: Tensor, exchange: PeerDispatcher, plan: PeerPlan
    ) -> tuple[Tensor, Tensor]:
        ctx.exchange, ctx.plan = exchange, plan
        return exchange.pull(x_TM, plan, weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        return *ctx.exchange.push(grads[0].contiguous(), ctx.plan, grads[1].contiguous()), None, None


class _Push(torch.autograd.Function):
    """Rows [R, M] to their sums over each token's copies [T, M]; backward every row gets its token's gradient."""

    @staticmethod
    def forward(ctx: Any, rows_RM: Tensor, exchange: PeerDispatcher, plan: PeerPlan) -> Tensor:
        ctx.exchange, ctx.plan = exchange, plan
        return exchange.push(rows_RM, plan)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad_TM = _aligned(grads[0])
        ctx.exchange.stage(grad_TM)
        return ctx.exchange.pull(grad_TM, ctx.plan)[0], None, None


class PeerDispatcher(Dispatcher):
    """Dispatch and combine over memory that the ranks of a group share.

    Args:
        mesh: its expert-parallel group is used; see `moe.peers.peers_reach_each_other`.
        spec: of the layer, whose experts are spread over the group. With a capacity factor the gate must keep no more
            than `LayerSpec.capacity` copies of an expert, of each rank or of all in the mean: more end the run.
        workspace: to use instead of the process' own (tests bring memory of a CPU).
    """

    path = "shared memory"

    def __init__(self, mesh: Mesh, spec: LayerSpec, workspace: Workspace | None = None) -> None:
        self.mesh, self.me, self.num_ranks = mesh, mesh.ep_rank, mesh.ep_size
        self.spec, self.num_experts, self.num_local = spec, spec.num_experts, spec.num_experts // mesh.ep_size
        self.experts = range(self.me * self.num_local, (self.me + 1) * self.num_local)
        self.workspace = workspace
        self._no_peers = torch.zeros(1, dtype=torch.int64, device=mesh.device)
        self._ends_on_host = torch.empty(self.num_local, dtype=torch.int32, pin_memory=mesh.device.type == "cuda")

    @property
    def workspace_bytes(self) -> int:
        """Of the memory that ranks share, also with other layers of this shape."""
        return 0 if self.workspace is None else self.workspace.num_bytes

    def dispatch(self, x_TM: Tensor, routing: Routing) -> tuple[Tensor, PeerPlan]:
        """As `Dispatcher.dispatch`. The largest T of all ranks bounds later calls, unless all exceed it together."""
        x_TM = _aligned(x_TM)
        chosen_TK, weights_TK = routing.expert_ids_TK, _aligned(routing.weights_TK)
        if routing.kept_TK is not None:
            chosen_TK = torch.where(routing.kept_TK, chosen_TK, self.num_experts)
        chosen_TK = _aligned(chosen_TK)
        if self.num_ranks > 1:
            if self.workspace is None or len(x_TM) > self.workspace.max_tokens:
                self.workspace = shared_workspace(self.mesh, x_TM, chosen_TK.shape[1])
            space = self.workspace
            space.before_staging()
            ops.kernels().stage_tokens(
                x_TM, chosen_TK, weights_TK, space.tokens_TM, space.ids_TK, space.weights_TK, self.num_experts
            )
            space.barrier()
        plan = self._plan(chosen_TK, products_are_grouped(x_TM))
        rows_RM, row_weights = _Pull.apply(x_TM, weights_TK, self, plan)
        return rows_RM, replace(plan, row_weights=row_weights)  # not the plan that the graph of the weights holds

    def combine(self, rows_RM: Tensor, plan: PeerPlan, weights_TK: Tensor) -> Tensor:
        """As `Dispatcher.combine`; the rows come weighted."""
        return _Push.apply(rows_RM, self, plan)

    def stage(self, rows_TM: Tensor) -> None:
        """Lay rows [T, M] out for the other ranks to read; they may once their queue has passed the barrier here."""
        if self.num_ranks > 1:
            assert self.workspace is not None
            self.workspace.before_staging()
            self.workspace.tokens_TM[: len(rows_TM)].copy_(rows_TM)
            self.workspace.barrier()

    def _plan(self, chosen_TK: Tensor, on_device: bool) -> PeerPlan:
        """Lay out the rows of all ranks' copies. The host waits for their number while the GPU lays them out, unless
        the experts find their rows `on_device` and room for the most that there can be is no waste."""
        space = self.workspace
        if space is None:
            rows = ops.kernels().LocalRows(self._no_peers, 0, chosen_TK, self.me, self.experts)
        else:
            rows = ops.kernels().LocalRows(space.memory.pointers, space.ids_at, space.ids_TK, self.me, self.experts)
        num_rows = self._most_rows(*chosen_TK.shape) if on_device else None
        if num_rows is not None:
            expert_rows, places_PTK = None, rows.places(num_rows)
        else:
            self._ends_on_host.copy_(rows.ends, non_blocking=True)
            known = torch.cuda.Event() if chosen_TK.is_cuda else None
            if known is not None:
                known.record()
            places_PTK = rows.places(self.num_ranks * rows.num_copies)
            if known is not None:
                known.synchronize()
            ends = self._ends_on_host.tolist()
            expert_rows = [end - start for start, end in zip([0, *ends], ends, strict=False)]
            num_rows = sum(expert_rows)
        crossings = None
        if space is not None and metering.INSTALLED:
            crossings = ops.kernels().count_crossings(space.ids_TK, places_PTK, self.num_local)
        return PeerPlan(chosen_TK, places_PTK, num_rows, expert_rows, rows.ends, crossings)

    def _most_rows(self, num_tokens: int, top_k: int) -> int | None:
        """Rows that this rank's experts can get at most, None where an even share of all copies is far less."""
        if self.workspace is not None:
            num_tokens = self.workspace.max_tokens
        share = num_tokens * top_k
        most, queues = self.num_ranks * share, self.num_ranks * self.num_local
        if self.spec.capacity_factor is not None:  # which replicas' gates may round up once more
            most = min(most, queues * (self.spec.capacity(num_tokens) + 1))
        return most if 0 < most <= (1 + MOST_SPARE) * share + 2 * queues else None

    def pull(self, own_TM: Tensor, plan: PeerPlan, weights_TK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rows [R, M] of this rank's experts from what ranks have staged, and their weights [R] where asked for."""
        space = self.workspace
        if space is not None:
            space.tokens_in_use = True
            self._tell_read(own_TM, plan, weights_TK is not None)
        pointers = self._no_peers if space is None else space.memory.pointers
        tokens_at, weights_at = (0, 0) if space is None else (space.tokens_at, space.weights_at)
        return ops.kernels().pull_rows(
            pointers, self.me, own_TM, tokens_at, plan.places_PTK, plan.num_rows, weights_TK, weights_at
        )

    def push(self, rows_RM: Tensor, plan: PeerPlan, row_grads_R: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Sums of rows [T, M] on the tokens' own ranks; with gradients [R] of the row weights, these as [T, K] too."""
        fast, (num_tokens, top_k) = ops.kernels(), plan.chosen_TK.shape
        space = self.workspace
        if space is None:
            sums_TM = rows_RM.new_empty(num_tokens, rows_RM.shape[1])
            grads_TK = None if row_grads_R is None else row_grads_R.new_zeros(num_tokens, top_k)
            fast.push_sums(self._no_peers, 0, rows_RM, plan.places_PTK, sums_TM.unsqueeze(1), 0, row_grads_R, grads_TK)
            return sums_TM, grads_TK
        space.before_pushing()
        self._tell_written(rows_RM, plan, row_grads_R is not None)
        fast.push_sums(
            space.memory.pointers,
            self.me,
            rows_RM,
            plan.places_PTK,
            space.slots_TJM,
            space.slots_at,
            row_grads_R,
            None if row_grads_R is None else space.weight_grads_TK,
            space.weight_grads_at,
        )
        space.barrier()
        space.slots_in_use = True
        grads_TK = None if row_grads_R is None else space.weight_grads_TK[:num_tokens]
        return fast.sum_partials(
            space.slots_TJM[:num_tokens], plan.chosen_TK, self.num_experts, self.num_local, grads_TK
        )

    # Byte meters see messages only; what is read and written in place is told, when one listens.

    def _tell_read(self, own_TM: Tensor, plan: PeerPlan, in_dispatch: bool) -> None:
        """What each rank reads of this one's: a token that chose it once; in dispatch its weights, too, and all ids, by
        the kernel that counts and by the one that places."""
        if plan.crossings_3P is None:
            return
        assert self.workspace is not None
        top_k = plan.chosen_TK.shape[1]
        for meter in metering.INSTALLED:
            meter.count_rows(plan.crossings_3P[0], _row_bytes(own_TM) + 4 * top_k * in_dispatch, self.mesh.ep_group)
            if in_dispatch:
                ids = 2 * 8 * self.workspace.ids_TK.numel()
                meter.count_all_to_all([ids] * self.num_ranks, self.mesh.ep_group)

    def _tell_written(self, rows_RM: Tensor, plan: PeerPlan, with_grads: bool) -> None:
        """What this rank writes to each: a token's sum, and for each of its copies the gradient of the weight."""
        if plan.crossings_3P is None:
            return
        for meter in metering.INSTALLED:
            meter.count_rows(plan.crossings_3P[1], _row_bytes(rows_RM), self.mesh.ep_group)
            if with_grads:
                meter.count_rows(plan.crossings_3P[2], 4, self.mesh.ep_group)


def _row_bytes(rows_RM: Tensor) -> int:
    return rows_RM.shape[1] * rows_RM.element_size()


def _aligned(tensor: Tensor) -> Tensor:
    """The same values, contiguous from a 16-byte boundary on, as kernels take them."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
