"""SwiftMoE's expert slots (SYMI, arXiv 2504.19925): weights that live for one iteration, in the dtype of the
arithmetic, and the sums of their gradients over an expert's replicas (section 4.1).

Dimensions: N ranks, L slots of this rank, G experts with a slot here, F numbers of one of an expert's N equal shards.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from methods.swiftmoe_scheduler import SlotTable
from moe.experts import GroupedExperts
from moe.flat_experts import FlatExperts
from moe.mesh import Mesh
from moe.system import ExpertView, LayerSpec


class SlotExperts(GroupedExperts):
    """This rank's L slots. Their weights are no parameters of the module: what is trained is the optimizer's shards
    (`methods.swiftmoe_optimizer`), which the slots are filled from.

    Args:
        spec: of the layer; the weights have its dtype.
        mesh: of the run.
        table: of the first iteration.
        flat: layout of an expert's vector.
    """

    def __init__(self, spec: LayerSpec, mesh: Mesh, table: SlotTable, flat: FlatExperts) -> None:
        super().__init__(spec, range(table.slots_per_rank), torch.device("meta"))
        for name, shape in [("w_in", self.w_in.shape), ("w_out", self.w_out.shape)]:
            delattr(self, name)
            weight = nn.Parameter(torch.empty(shape, dtype=spec.dtype, device=mesh.device))
            object.__setattr__(self, name, weight)  # nn.Module's own would make it a parameter of the module
        self.rank, self.num_ranks, self.flat = mesh.rank, mesh.world_size, flat
        self.use(table)

    def use(self, table: SlotTable) -> None:
        """Go by another table from now on."""
        start = self.rank * table.slots_per_rank
        self.experts = table.expert_of_slot[start : start + table.slots_per_rank]
        self.runs = table.runs(self.rank)

    def views(self) -> list[ExpertView]:
        """Of each expert's first slot here, whose gradient is that of all replicas once they are reduced."""
        views = super().views()
        each = len(views) // len(self.experts)
        return [view for run in self.runs for view in views[run.first * each : (run.first + 1) * each]]

    def summed_gradients(self, dtype: torch.dtype) -> Tensor:
        """The sum over this rank's slots of each expert, [G, N F] in a dtype, zero where there was no backward pass;
        summed in float32 and rounded once."""
        flat = self.flat.empty(len(self.runs), self.w_in, dtype)
        for part, weight in zip(self.flat.parts(flat), (self.w_in, self.w_out), strict=True):
            for row, run in zip(part, self.runs, strict=True):
                if weight.grad is None:
                    row.zero_()
                else:
                    grads = weight.grad[run.first : run.first + run.num_slots]
                    summed = grads[0] if run.num_slots == 1 else grads.sum(0, dtype=torch.float32)
                    row.view(grads.shape[1:]).copy_(summed)
        return flat

    def show_gradients(self, flat: Tensor) -> None:
        """Write the mean over ranks of sums [G, N F] to each expert's first slot, where `views` see it. The paper also
        copies it to the others, where nothing would read it."""
        for part, weight in zip(self.flat.parts(flat), (self.w_in, self.w_out), strict=True):
            if weight.grad is not None:
                for row, run in zip(part, self.runs, strict=True):
                    torch.div(row.view(weight.shape[1:]), self.num_ranks, out=weight.grad[run.first])

    def fill(self, flat: Tensor) -> None:
        """Take the weights [L, N F] of every slot; the gradients of what was there are gone."""
        self.flat.unpack(flat, self.w_in.data, self.w_out.data)
        self.w_in.grad = self.w_out.grad = None
