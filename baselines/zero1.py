"""ZeRO stage 1 (Rajbhandari et al. 2020) of experts over the ranks that hold the same ones, as DeepSpeed's optimizer
shards expert parameters over their expert-data-parallel group, and SYMI's baseline does (arXiv 2504.19925, section 5).

Each of an expert's N ranks trains one N-th of it in float32, here of its hidden dimension (DeepSpeed: of all numbers in
a row; as many either way), and computes with a copy of the whole in the dtype of the arithmetic. Behind backward,
gradients are reduced and scattered to those parts; behind the optimizer's step the copies gather what it made.

Dimensions: N ranks with the same experts, L experts of a rank, M model, H hidden of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from moe.collectives import gather_into, scatter_sums
from moe.expert_sharding import ShardedExperts, Sharding
from moe.experts import CopiedExperts
from moe.mesh import Mesh
from moe.point_to_point import in_turn
from moe.step_parts import step_part
from moe.sync import GradientSync
from moe.system import LayerSpec


class Zero1Experts(CopiedExperts):
    """This rank's L experts to compute with, and its part of them that is trained.

    Args:
        spec: of the layer; its hidden dimension is a multiple of N.
        mesh: of the layer; its `edp_group` holds the same experts.

    Attributes:
        trained: the parts, float32.
        are_current: whether the copies are those of the parts' weights.
    """

    def __init__(self, spec: LayerSpec, mesh: Mesh) -> None:
        experts = mesh.local_experts(spec.num_experts)
        super().__init__(spec, experts, mesh.device)
        self.spec = spec
        self.mesh, self.group, self.num_ranks = mesh, mesh.edp_group, mesh.edp_size
        self.trained = ShardedExperts(spec, Sharding(mesh.ep_group, mesh.edp_group, experts), mesh.device)
        self.are_current = False

    def collect(self) -> Iterator[None]:
        """Make the mean over all ranks' tokens the gradient of the trained parts, and drop that of the copies; in
        parts, for `in_turn`. Collective over the N ranks."""
        parts = list(self.trained.parameters())
        sizes = [part.numel() for part in parts]
        grad_in, grad_out = self.w_in.grad, self.w_out.grad
        with step_part("expert_gradients"):
            if grad_in is None or grad_out is None:  # there was no backward pass through these experts
                whole_NF = self.w_in.new_zeros(self.num_ranks, sum(sizes), dtype=torch.float32)
            else:
                whole_NF = self.w_in.new_empty(self.num_ranks, sum(sizes), dtype=torch.float32)
                self._copy(self._cuts(grad_in, grad_out), whole_NF, sizes, back=False)
            self.drop_gradients()
            mine_F = torch.empty_like(whole_NF[0])
            work = scatter_sums(mine_F, whole_NF.view(-1), self.group, async_op=True)
        yield
        with step_part("expert_gradients"):
            if work is not None:
                work.wait()
            mine_F /= self.mesh.world_size
            for part, numbers in zip(parts, mine_F.split(sizes), strict=True):
                part.grad = numbers.view(part.shape)

    def gather(self) -> Iterator[None]:
        """Let the copies be what the parts have become; in parts, for `in_turn`. Collective over the N ranks."""
        parts = list(self.trained.parameters())
        sizes = [part.numel() for part in parts]
        mine_F = torch.cat([part.detach().to(self.w_in.dtype).view(-1) for part in parts])
        whole_NF = mine_F.new_empty(self.num_ranks, len(mine_F))
        work = gather_into(whole_NF.view(-1), mine_F, self.group, async_op=True)
        yield
        if work is not None:
            work.wait()
        self._copy(self._cuts(self.w_in.data, self.w_out.data), whole_NF, sizes, back=True)
        self.are_current = True

    def _cuts(self, w_in: Tensor, w_out: Tensor) -> tuple[Tensor, Tensor]:
        """Views of what each rank trains, [N, L, 1 or 2, H / N, M] and [N, L, M, H / N]."""
        per_expert = w_in.shape[1] // self.spec.hidden_dim
        cut_in = w_in.unflatten(1, (per_expert, self.num_ranks, -1)).permute(2, 0, 1, 3, 4)
        return cut_in, w_out.unflatten(2, (self.num_ranks, -1)).permute(2, 0, 1, 3)

    @staticmethod
    def _copy(cuts: tuple[Tensor, Tensor], whole_NF: Tensor, sizes: list[int], back: bool) -> None:
        """To what travels, or back from it."""
        for cut, numbers_NF in zip(cuts, whole_NF.split(sizes, 1), strict=True):
            there = numbers_NF.unflatten(1, cut.shape[1:])
            (cut if back else there).copy_(there if back else cut)


def fill(experts: Sequence[Zero1Experts]) -> None:
    """Let the copies of these experts, of a model's layers in order, be what is trained. Collective."""
    with step_part("weights"):
        in_turn(held.gather() for held in experts)


class Zero1Sync(GradientSync):
    """Reduces dense gradients as ever, and brings every rank those of the parts of experts that it trains.

    Args:
        model: all its parameters with a gradient are reduced.
        experts: of its layers, in order.
        mesh: of these.
    """

    def __init__(self, model: nn.Module, experts: Sequence[Zero1Experts], mesh: Mesh) -> None:
        super().__init__(model, (), mesh, owned=[part for held in experts for part in held.trained.parameters()])
        self.experts = experts

    def reduce(self) -> None:
        """Reduce every gradient. Collective."""
        in_turn(held.collect() for held in self.experts)
        super().reduce()
