"""Over how many levels HierMoE's layers dispatch: as told, or as its performance model says for what was routed.

Dimensions: T tokens of this rank, K choices, M model, E experts, D levels, S counts of `methods.hiermoe_model`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from methods.hiermoe_dispatch import HierarchicalDispatcher, block_sizes
from methods.hiermoe_model import Collectives, best_dim, dispatch_s, group_counts
from moe.dispatch import AllToAllDispatcher, Dispatcher
from moe.gate import Routing
from moe.layer import default_dispatcher
from moe.mesh import Mesh
from moe.system import LayerSpec

ID_AND_WEIGHT_BYTES = 8
"""That travel with a row for each of its choices."""


class LevelsDispatcher(Dispatcher):
    """One of HierMoE's dispatchers over 1 to D levels.

    Over one level a token goes once to every rank (HD1): through the memory that the GPUs of one node share, where they
    do, else by messages; without `dedup` each copy goes by itself, by all-to-all-v.

    Args:
        spec: of the layer.
        mesh: of the run. Making this is collective.
        levels: d; None leaves it to the model, at the first call and whenever `model` is asked again.
        dedup: a token crosses a level once per group.
        collectives: costs; None where nobody knows them and `levels` is given.

    Attributes:
        modelled_s: seconds of a dispatch over 1 to D levels, of what was routed when the model was last asked; empty
            before.
    """

    def __init__(
        self, spec: LayerSpec, mesh: Mesh, levels: int | None, dedup: bool, collectives: Collectives | None
    ) -> None:
        self.spec, self.mesh, self.dedup, self.collectives = spec, mesh, dedup, collectives
        self.modelled_s: list[float] = []
        self.is_free = levels is None
        sizes = block_sizes(mesh.cluster, mesh.ep_size)
        groups = tuple(mesh.ep_size // size for size in sizes)
        assert collectives is None or collectives.groups == groups, (collectives, groups)
        depth = len(sizes)
        wanted = range(1, depth + 1) if levels is None else [levels]
        self._by_levels = {d: self._over(d) for d in wanted}
        self._take(min(wanted))

    def _take(self, levels: int) -> None:
        self.num_levels, self.chosen = levels, self._by_levels[levels]
        self.path = self.chosen.path

    def _over(self, levels: int) -> Dispatcher:
        if levels > 1:
            return HierarchicalDispatcher(self.mesh, self.spec.num_experts, levels, self.dedup)
        if not self.dedup:
            return AllToAllDispatcher(self.mesh, self.spec.num_experts)
        flat = default_dispatcher(self.spec, self.mesh)
        if isinstance(flat, AllToAllDispatcher) and self.mesh.ep_size > 1:
            return HierarchicalDispatcher(self.mesh, self.spec.num_experts, 1)
        return flat

    @property
    def row_bytes(self) -> int:
        """Of a row, and of what is told with it."""
        choices = self.spec.top_k if self.dedup else 1
        return self.spec.model_dim * self.spec.dtype.itemsize + ID_AND_WEIGHT_BYTES * choices

    @property
    def workspace_bytes(self) -> int:
        """Of the chosen one."""
        return self.chosen.workspace_bytes

    def dispatch(self, x_TM: Tensor, routing: Routing) -> tuple[Tensor, Any]:
        """As `Dispatcher.dispatch`; the first call asks the model."""
        if self.collectives is not None and not self.modelled_s:
            self.model(routing.expert_ids_TK, routing.kept_TK)
        return self.chosen.dispatch(x_TM, routing)

    def combine(self, rows_RM: Tensor, plan: Any, weights_TK: Tensor) -> Tensor:
        """As `Dispatcher.combine`."""
        return self.chosen.combine(rows_RM, plan, weights_TK)

    @torch.no_grad()
    def model(self, ids_TK: Tensor, kept_TK: Tensor | None) -> None:
        """Ask the model how long a dispatch would take over each number of levels; take the best where that is free.
        Collective; waits for the device.

        Args:
            ids_TK: [T, K] int64, by slot.
            kept_TK: [T, K] bool, or None.
        """
        collectives, spec = self.collectives, self.spec
        assert collectives is not None, "a model without costs"
        counts_S = group_counts(ids_TK, spec.num_experts, collectives.groups, self.dedup, kept_TK)
        counts_GS = counts_S.new_empty(self.mesh.ep_size, len(counts_S))
        dist.all_gather_into_tensor(counts_GS.view(-1), counts_S, group=self.mesh.ep_group)
        seconds_D = dispatch_s(counts_GS, collectives, self.row_bytes)
        if self.mesh.edp_size > 1:  # replicas of the experts choose alike
            dist.all_reduce(seconds_D, op=dist.ReduceOp.MAX)
        self.modelled_s = seconds_D.tolist()
        if self.is_free:
            self._take(best_dim(seconds_D))
