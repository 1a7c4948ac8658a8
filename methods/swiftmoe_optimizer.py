"""SwiftMoE's decoupled optimizer (SYMI, arXiv 2504.19925, sections 3.3 and 4): every expert's state is cut into N equal
shards, shard n stays on rank n for the whole run, and what an expert's slots hold is sent anew after each step.

The shards of the weights, float32, are the parameters that the run's optimizer sees; so its moments are sharded as they
are, and learning rate, decay and clipping are those of every other system. Adam goes number by number: its steps are
the same on shards as on whole experts.

Dimensions: E experts, N ranks, L slots of a rank, J = N L slots, G experts with a slot here, F numbers of a shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from methods.swiftmoe_groups import consecutive_groups
from methods.swiftmoe_popularity import copy_stream
from methods.swiftmoe_scheduler import SlotTable
from methods.swiftmoe_slots import SlotExperts
from moe.experts import GroupedExperts
from moe.flat_experts import FlatExperts
from moe.mesh import Mesh
from moe.point_to_point import Exchange
from moe.system import LayerSpec

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Tensors that Adam keeps for every parameter, beside its scalar `step`."""


class ExpertShards(nn.Module):
    """This rank's shard of every expert of a layer.

    Args:
        spec: of the layer.
        mesh: of the run.
        flat: layout of an expert's vector.
        offload: keep the shards, and with them the optimizer's state and step, in the host's memory.

    Attributes:
        master_EF: [E, F] float32; its values come by `take`.
    """

    def __init__(self, spec: LayerSpec, mesh: Mesh, flat: FlatExperts, offload: bool) -> None:
        super().__init__()
        self.mesh, self.flat = mesh, flat
        self.offloaded = offload and mesh.device.type == "cuda"  # a CPU's memory is the host's
        shape = (spec.num_experts, flat.shard_size)
        place: dict[str, Any] = {"pin_memory": True} if self.offloaded else {"device": mesh.device}
        self.master_EF = nn.Parameter(torch.empty(shape, **place))
        self._staged_EF = torch.empty(shape, dtype=spec.dtype, pin_memory=True) if self.offloaded else None
        self._groups = consecutive_groups(mesh.world_size)
        edges = [spec.num_experts * rank // mesh.world_size for rank in range(mesh.world_size + 1)]
        self._whole = [range(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]

    # One step of training

    def collect(self, slots: SlotExperts, table: SlotTable) -> Iterator[None]:
        """Reduce the gradients of all slots and bring this rank's shards of them here; in parts, for `in_turn`.

        Sums over an expert's slots of a rank, then an all-reduce over its ranks if they are several (section 4.1). Of
        every expert one rank sends this one its shard (section 4.3, algorithm 2). `finish` makes it the gradient.
        """
        rank, num_ranks = self.mesh.rank, self.mesh.world_size
        flat = slots.summed_gradients()
        works = []
        for row, run in zip(flat, slots.runs, strict=True):
            ranks = table.holders[run.expert]
            if len(ranks) > 1:
                group = self._groups[ranks[0], ranks[-1]]
                works.append(dist.all_reduce(row, group=group, async_op=True))
        yield
        for work in works:
            work.wait()
        slots.show_gradients(flat)
        sends = [
            [place for place, run in enumerate(slots.runs) if table.source(run.expert, peer) == rank]
            for peer in range(num_ranks)
        ]
        sources = [table.source(expert, rank) for expert in range(len(self.master_EF))]
        arrived = sorted(range(len(sources)), key=sources.__getitem__)  # in the order of who sends them
        # Shard n of the expert at place g of those here is row g N + n.
        order = [place * num_ranks + peer for peer, places in enumerate(sends) for place in places]
        rows_RF = flat.view(-1, self.flat.shard_size).index_select(0, self._index(order))
        exchange = Exchange(rows_RF, list(map(len, sends)), [sources.count(peer) for peer in range(num_ranks)], rank)
        del flat, rows_RF
        yield
        inverse = sorted(range(len(arrived)), key=arrived.__getitem__)
        self._take_gradient(exchange.received().index_select(0, self._index(inverse)))

    def finish(self) -> None:
        """Make the mean over ranks of what `collect` brought the gradient of the shards; after `collect` of all layers
        and, where state is offloaded, after the copies have arrived (`wait_for_copies`)."""
        if self._staged_EF is not None:
            self.master_EF.grad = self._staged_EF.to(torch.float32, copy=True)  # the buffer takes weights next
        assert self.master_EF.grad is not None
        self.master_EF.grad /= self.mesh.world_size

    def refill(self, slots: SlotExperts, table: SlotTable) -> Iterator[None]:
        """Send every slot of `table` its expert's weights; in parts, for `in_turn`.

        Each rank sends its shard of the slot's expert, whatever was in the slot before: rebalancing costs nothing on
        top (section 4.4). Slots of one rank with the same expert get it once each, as the paper counts.
        """
        slots_per_rank, num_ranks = table.slots_per_rank, self.mesh.world_size
        rows_JF = self._weights(slots.w_in.dtype).index_select(0, self._index(table.expert_of_slot))
        exchange = Exchange(rows_JF, [slots_per_rank] * num_ranks, [slots_per_rank] * num_ranks, self.mesh.rank)
        del rows_JF
        yield
        shards_NLF = exchange.received().view(num_ranks, slots_per_rank, -1)
        slots.use(table)
        slots.fill(shards_NLF.transpose(0, 1).flatten(1))

    def _take_gradient(self, grad_EF: Tensor) -> None:
        if self._staged_EF is None:
            self.master_EF.grad = grad_EF.to(self.master_EF.dtype, copy=True)
            return
        stream = copy_stream(self.mesh.device)
        stream.wait_stream(torch.cuda.current_stream(self.mesh.device))
        with torch.cuda.stream(stream):
            self._staged_EF.copy_(grad_EF, non_blocking=True)
        grad_EF.record_stream(stream)

    def _weights(self, dtype: torch.dtype) -> Tensor:
        """[E, F] on the device that computes; from the host the copy goes beside what the device does."""
        if self._staged_EF is None:
            return self.master_EF.detach().to(dtype)
        self._staged_EF.copy_(self.master_EF.detach())
        stream, here = copy_stream(self.mesh.device), torch.cuda.current_stream(self.mesh.device)
        with torch.cuda.stream(stream):
            weights_EF = self._staged_EF.to(self.mesh.device, non_blocking=True)
        here.wait_stream(stream)
        weights_EF.record_stream(here)
        return weights_EF

    def _index(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self.mesh.device)

    # Whole experts, for initial weights and checkpoints

    def new_whole(self, spec: LayerSpec) -> GroupedExperts:
        """This rank's part of the experts, whole and in float32, with nothing in it yet: each is on one rank."""
        return GroupedExperts(spec, self._whole[self.mesh.rank], self.mesh.device)

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
            optimizer.state[parameter]["step"] = mine["step"].clone()
        for name in MOMENTS:
            self._join(mine[name], optimizer.state[whole.w_in][name], optimizer.state[whole.w_out][name])

    def _cut(self, w_in: Tensor, w_out: Tensor, shard_EF: Tensor) -> None:
        num_whole = list(map(len, self._whole))
        mine, num_ranks = num_whole[self.mesh.rank], self.mesh.world_size
        rows_RF = self.flat.pack(w_in, w_out).view(mine, num_ranks, self.flat.shard_size).transpose(0, 1).flatten(0, 1)
        exchange = Exchange(rows_RF.contiguous(), [mine] * num_ranks, num_whole, self.mesh.rank)
        shard_EF.copy_(exchange.received())

    def _join(self, shard_EF: Tensor, w_in: Tensor, w_out: Tensor) -> None:
        num_whole = list(map(len, self._whole))
        mine, num_ranks = num_whole[self.mesh.rank], self.mesh.world_size
        rows_RF = Exchange(shard_EF.to(self.mesh.device), num_whole, [mine] * num_ranks, self.mesh.rank).received()
        whole = rows_RF.view(num_ranks, mine, self.flat.shard_size).transpose(0, 1).flatten(1)
        self.flat.unpack(whole, w_in, w_out)


def wait_for_copies(mesh: Mesh) -> None:
    """Let the host wait until gradients have come to its memory."""
    if mesh.device.type == "cuda":
        copy_stream(mesh.device).synchronize()
