"""SwiftMoE's expert slots (SYMI, arXiv 2504.19925): weights that live for one iteration, in the dtype of the
arithmetic, and the sums of their gradients over an expert's replicas (section 4.1).

Dimensions: N ranks, L slots of this rank, G experts with a slot here, F numbers of one of an expert's N equal shards,
R shards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from methods.swiftmoe_rank_table import RankTable
from moe import ops
from moe.experts import CopiedExperts
from moe.flat_experts import FlatExperts
from moe.mesh import Mesh
from moe.system import ExpertView, LayerSpec


class SlotExperts(CopiedExperts):
    """This rank's L slots, copies of the optimizer's shards (`methods.swiftmoe_optimizer`).

    Args:
        spec: of the layer; the weights have its dtype.
        mesh: of the run.
        here: of the first iteration.
        flat: layout of an expert's vector.

    Attributes:
        here: what this rank makes of the table that the slots are filled by.
    """

    here: RankTable

    def __init__(self, spec: LayerSpec, mesh: Mesh, here: RankTable, flat: FlatExperts) -> None:
        super().__init__(spec, range(here.table.slots_per_rank), mesh.device)
        self.mesh, self.flat = mesh, flat
        self._sums_RF: Tensor | None = None
        self.use(here)

    def use(self, here: RankTable) -> None:
        """Go by another table from now on."""
        self.here = here
        self.experts = [run.expert for run in here.runs for _ in range(run.num_slots)]

    def views(self) -> list[ExpertView]:
        """Of each expert's first slot here, whose gradient is that of all replicas once they are reduced."""
        self._show_gradients()
        views = super().views()
        each = len(views) // len(self.experts)
        return [view for run in self.here.runs for view in views[run.first * each : (run.first + 1) * each]]

    def summed_gradients(self, dtype: torch.dtype) -> Tensor:
        """The sums over this rank's slots of each expert, as shards [R, F] in `RankTable.order` and in a dtype, zero
        where there was no backward pass; summed in float32 and rounded once. The slots' own gradients are gone then;
        `views` show what the caller makes of these in place, until the next backward pass or `drop_gradients`."""
        here, num_ranks, size = self.here, self.mesh.world_size, self.flat.shard_size
        grad_in, grad_out = self.w_in.grad, self.w_out.grad
        self.drop_gradients()
        if grad_in is None or grad_out is None:
            sums_RF = self.w_in.new_zeros(len(here.order), size, dtype=dtype)
        elif ops.is_fast(grad_in):
            sums_RF = ops.kernels().sum_replicas(
                grad_in.contiguous(), grad_out.contiguous(), here.order_R, here.runs_G2, num_ranks, size, dtype
            )
        else:
            flat = self._summed(grad_in, grad_out, dtype)
            sums_RF = flat.view(-1, size).index_select(0, here.order_R)
        self._sums_RF = sums_RF
        return sums_RF

    def _summed(self, grad_in: Tensor, grad_out: Tensor, dtype: torch.dtype) -> Tensor:
        """Gradients [L, ...] to sums [G, N F]."""
        flat = self.flat.empty(len(self.here.runs), grad_in, dtype)
        for part, grads in zip(self.flat.parts(flat), (grad_in, grad_out), strict=True):
            for row, run in zip(part, self.here.runs, strict=True):
                replicas = grads[run.first : run.first + run.num_slots].flatten(1)
                if dtype == torch.float32:
                    torch.sum(replicas, 0, dtype=dtype, out=row)
                else:
                    row.copy_(replicas[0] if run.num_slots == 1 else replicas.sum(0, dtype=torch.float32))
        return flat

    @torch.no_grad()
    def _show_gradients(self) -> None:
        """Write the mean over ranks of the last sums to each expert's first slot. The paper does so in every step and
        to all slots; here nothing of a step reads it, so it is done when someone looks."""
        if self._sums_RF is None or self.w_in.grad is not None:
            return
        rows = self.mesh.tensor(self.here.rows_of_experts())
        flat = self._sums_RF.index_select(0, rows).view(len(self.here.runs), -1)
        for part, weight in zip(self.flat.parts(flat), (self.w_in, self.w_out), strict=True):
            weight.grad = torch.zeros_like(weight)
            for row, run in zip(part, self.here.runs, strict=True):
                torch.div(row.view(weight.shape[1:]), self.mesh.world_size, out=weight.grad[run.first])

    def drop_gradients(self) -> None:
        """Forget the slots' gradients and their sums."""
        super().drop_gradients()
        self._sums_RF = None

    def fill(self, shards_NBF: Tensor) -> None:
        """Take the weights of all slots, in shards [N, B, F] of what `RankTable.fills` says; the gradients of what was
        there are gone."""
        w_in, w_out = self.w_in.data, self.w_out.data
        if ops.is_fast(shards_NBF):
            ops.kernels().fill_replicas(shards_NBF, self.here.fills_B2, w_in, w_out)
        else:
            if len(self.here.fills) < len(w_in):
                shards_NBF = shards_NBF.repeat_interleave(self.here.fills_B2[:, 1], dim=1, output_size=len(w_in))
            self.flat.unpack_shards(shards_NBF, w_in, w_out)
        self.drop_gradients()
