"""SwiftMoE's decoupled optimizer (SYMI, arXiv 2504.19925, sections 3.3 and 4): every expert's state is cut into N equal
shards, shard n stays on rank n for the whole run, and what an expert's slots hold is sent anew after each step.

The shards of the weights, float32, are the parameters that the run's optimizer sees; so its moments are sharded as they
are, and learning rate, decay and clipping are those of every other system. Adam goes number by number: its steps are
the same on shards as on whole experts.

Dimensions: E experts, N ranks, S experts with slots on several, R shards, F numbers of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from methods.swiftmoe_groups import consecutive_groups
from methods.swiftmoe_host import HostBuffers
from methods.swiftmoe_rank_table import RankTable
from methods.swiftmoe_slots import SlotExperts
from moe import ops
from moe.experts import GroupedExperts
from moe.flat_experts import FlatExperts
from moe.mesh import Mesh
from moe.point_to_point import Exchange
from moe.step_parts import step_part
from moe.system import LayerSpec

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Tensors that Adam keeps for every parameter, beside its scalar `step`."""


class ExpertShards(nn.Module):
    """This rank's shard of every expert of a layer.

    Args:
        spec: of the layer.
        mesh: of the run.
        flat: layout of an expert's vector.
        reduce_dtype: that gradients are summed over replicas and collected in.
        offload: keep the shards, and with them the optimizer's state and step, in the host's memory.

    Attributes:
        master_EF: [E, F] float32; its values come by `take`.
    """

    def __init__(
        self, spec: LayerSpec, mesh: Mesh, flat: FlatExperts, reduce_dtype: torch.dtype, offload: bool
    ) -> None:
        super().__init__()
        self.mesh, self.flat, self.reduce_dtype = mesh, flat, reduce_dtype
        self.host = HostBuffers((spec.num_experts, flat.shard_size), spec.dtype, mesh.device) if offload else None
        place: dict[str, Any] = {"device": mesh.device} if self.host is None else self.host.place
        self.master_EF = nn.Parameter(torch.empty(spec.num_experts, flat.shard_size, **place))
        self._groups = consecutive_groups(mesh.world_size)
        edges = [spec.num_experts * rank // mesh.world_size for rank in range(mesh.world_size + 1)]
        self._whole = [range(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]

    # One step of training

    def collect(self, slots: SlotExperts, underway: list[Exchange]) -> Iterator[None]:
        """Reduce the gradients of all slots and make their mean over ranks the gradient of this rank's shards; in
        parts, for `in_turn`, and where the shards are on the host followed by `finish`.

        Sums over an expert's slots of a rank, then an all-reduce over its ranks if they are several (section 4.1). Of
        every expert one rank sends this one its shard (section 4.3, algorithm 2).

        Args:
            slots: with the gradients.
            underway: exchanges of other layers that have not come to their end; this one's is among them meanwhile.
        """
        here = slots.here
        with step_part("expert_gradients"):
            sums_RF = slots.summed_gradients(self.reduce_dtype)
            works = self._sum_over_ranks(sums_RF[here.num_sent :], here, underway)
        yield
        with step_part("expert_gradients"):
            for work in works:
                work.wait()
            if here.has_late_rows:
                to, source = here.late_2
                sums_RF.index_copy_(0, to, sums_RF.index_select(0, source))
        with step_part("gradient_shards"):
            exchange = Exchange(sums_RF[: here.num_sent], here.send_rows, here.receive_rows, self.mesh.rank)
            underway.append(exchange)
            del sums_RF
        yield
        with step_part("gradient_shards"):
            grad_EF = exchange.received().to(torch.float32).div_(self.mesh.world_size)
            underway.remove(exchange)
            if self.host is None:
                self.master_EF.grad = grad_EF.to(self.master_EF.dtype)
            else:
                self.host.take_gradient(grad_EF)

    def _sum_over_ranks(self, sums_RF: Tensor, here: RankTable, underway: list[Exchange]) -> list[dist.Work]:
        """Sum the experts that several ranks hold, in place, each N rows of [S N, F]; what there is to wait for.

        Each run of ranks has a communicator of its own, and two communicators of NCCL that are busy at once can lock
        each other up: one GPU may begin with the one, another GPU with the other. So all ranks start all of them in one
        order, and on a GPU each waits for the one before it, and the first for the messages under way, which are of yet
        another communicator. It is the queue that waits there, not the host.
        """
        if sums_RF.is_cuda:
            for exchange in underway:
                exchange.wait()
        works: list[dist.Work] = []
        for ranks, expert_NF in zip(here.groups, sums_RF.split(self.mesh.world_size), strict=False):
            work = dist.all_reduce(expert_NF, group=self._groups[ranks], async_op=True)
            assert work is not None
            if sums_RF.is_cuda:
                work.wait()
            works.append(work)
        return works

    def finish(self) -> None:
        """Where shards are on the host, wait for what `collect` of all layers brings there."""
        if self.host is not None:
            self.master_EF.grad = self.host.gradient().to(self.master_EF.dtype)

    def refill(self, slots: SlotExperts, here: RankTable) -> Iterator[None]:
        """Send every slot of a table its expert's weights; in parts, for `in_turn`.

        Each rank sends its shard of the slot's expert, whatever was in the slot before: rebalancing costs nothing on
        top (section 4.4). Slots of one rank with the same expert share what comes (ours), or get it once each, as the
        paper counts: by the table.

        Args:
            slots: to be filled.
            here: what this rank makes of the table.
        """
        num_ranks, num_fills = self.mesh.world_size, len(here.fills)
        master_EF, dtype = self.master_EF.detach(), slots.w_in.dtype
        weights_EF = master_EF if self.host is None else self.host.weights(master_EF)
        rows_RF = _for_ranks(weights_EF, here, dtype)
        exchange = Exchange(rows_RF, here.weight_rows, [num_fills] * num_ranks, self.mesh.rank)
        del weights_EF, rows_RF
        yield
        slots.use(here)
        slots.fill(exchange.received().view(num_ranks, num_fills, -1))

    # Whole experts, for initial weights and checkpoints

    def new_whole(self, spec: LayerSpec) -> GroupedExperts:
        """This rank's part of the experts, whole and in float32, with nothing in it yet: each is on one rank. In the
        host's memory: a GPU need not have room for them, nor for their optimizer state, beside its slots."""
        return GroupedExperts(spec, self._whole[self.mesh.rank], torch.device("cpu"))

    def take(self, whole: GroupedExperts, optimizer: Optimizer | None = None) -> None:
        """Cut whole experts into shards, and with `optimizer` what it has of their state. Collective."""
        self._cut(whole.w_in.data, whole.w_out.data, self.master_EF.data)
        if optimizer is None:
            return
        states = [optimizer.state.pop(parameter, {}) for parameter in (whole.w_in, whole.w_out)]
        mine = optimizer.state[self.master_EF]
        for name in MOMENTS:
            mine.setdefault(name, torch.zeros_like(self.master_EF))
            w_in, w_out = (
                state.get(name, torch.zeros_like(parameter))
                for state, parameter in zip(states, (whole.w_in, whole.w_out), strict=True)
            )
            self._cut(w_in, w_out, mine[name])
        steps = torch.tensor([float(states[0].get("step", 0.0))], device=self.mesh.device)
        if self.mesh.world_size > 1:
            dist.all_reduce(steps, op=dist.ReduceOp.MAX)  # a rank may have no whole expert, and was told nothing
        mine["step"] = steps[0].to(self.master_EF.device, torch.float32, copy=True)

    def give(self, whole: GroupedExperts, optimizer: Optimizer) -> None:
        """Put shards, and what `optimizer` has of their state, together to whole experts and theirs. Collective."""
        self._join(self.master_EF.data, whole.w_in.data, whole.w_out.data)
        mine = optimizer.state.get(self.master_EF, {})
        if not mine:
            return
        for parameter in (whole.w_in, whole.w_out):
            optimizer.state[parameter] = {name: torch.empty_like(parameter) for name in MOMENTS}
            optimizer.state[parameter]["step"] = mine["step"].to(parameter.device, copy=True)
        for name in MOMENTS:
            self._join(mine[name], optimizer.state[whole.w_in][name], optimizer.state[whole.w_out][name])

    def _cut(self, w_in: Tensor, w_out: Tensor, shard_EF: Tensor) -> None:
        num_ranks, shard_size = self.mesh.world_size, self.flat.shard_size
        for here, experts in self._one_a_rank():
            flat = self.flat.pack(w_in[here], w_out[here])
            rows_RF = flat.view(len(flat) * num_ranks, shard_size).to(self.mesh.device)
            exchange = Exchange(rows_RF, [len(flat)] * num_ranks, [len(held) for held in experts], self.mesh.rank)
            for row_F, expert in zip(exchange.received(), chain(*experts), strict=True):
                shard_EF[expert].copy_(row_F)

    def _join(self, shard_EF: Tensor, w_in: Tensor, w_out: Tensor) -> None:
        num_ranks = self.mesh.world_size
        for here, experts in self._one_a_rank():
            rows_RF = torch.stack([shard_EF[expert] for expert in chain(*experts)]).to(self.mesh.device)
            mine = len(experts[self.mesh.rank])
            exchange = Exchange(rows_RF, [len(held) for held in experts], [mine] * num_ranks, self.mesh.rank)
            self.flat.unpack(exchange.received().view(mine, num_ranks * self.flat.shard_size), w_in[here], w_out[here])

    def _one_a_rank(self) -> Iterator[tuple[slice, list[range]]]:
        """Rounds of at most one whole expert a rank, so that no more of them are on a GPU at once: its place among
        those here, and each rank's."""
        for place in range(max(map(len, self._whole))):
            yield slice(place, place + 1), [held[place : place + 1] for held in self._whole]


def _for_ranks(weights_EF: Tensor, here: RankTable, dtype: torch.dtype) -> Tensor:
    """Shards of experts [E, F] to those that go to all ranks, `RankTable.weight_rows` of them, in a dtype."""
    num_rows = sum(here.weight_rows)
    if ops.is_fast(weights_EF):
        return ops.kernels().repeat_rows(weights_EF, here.rows_E2, num_rows, dtype)
    return weights_EF.to(dtype).repeat_interleave(here.rows_E2[:, 1], dim=0, output_size=num_rows)
