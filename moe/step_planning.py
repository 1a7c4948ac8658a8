"""Degrees of the pipelined layers of a model, and the slices of its dense gradients: from a system's plan to what runs.

A plan is made twice. Before the first forward pass the modules are profiled (`moe.module_profile`) and every layer gets
its degrees. After a few steps, whose dense parts were timed in passing, it is made again with the gradients to be
reduced, where a `moe.sliced_sync.SlicedSync` reduces them. Costs are the slowest rank's, and rank 0's plan is that of
all ranks.

Dimensions: T tokens of a rank, N layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.distributed as dist

from moe.costs import AlphaBeta
from moe.mesh import Mesh
from moe.metering import uncounted
from moe.schedules import LayerPlan, LayerWork, StepPlan
from moe.simulator import Costs

Planner = Callable[[Sequence[LayerWork], Costs, float], StepPlan]
"""From the layers in the order of the forward pass, the costs, and bytes of gradient that are there when backward
begins."""


class Plannable(Protocol):
    """What planning needs of a layer."""

    mesh: Mesh

    def work(self, num_tokens: int) -> LayerWork:
        """Of a forward pass; without dense parts, which are not the layer's."""

    def costs(self, num_tokens: int) -> dict[str, AlphaBeta]:
        """Measured. Collective over all ranks."""


@dataclass(frozen=True)
class Fixed:
    """Degrees that a user gave; None where the plan decides."""

    degree: int | None = None
    backward_degree: int | None = None

    def over(self, plan: LayerPlan) -> LayerPlan:
        """The plan with these degrees."""
        return replace(
            plan,
            degree=self.degree or plan.degree,
            backward_degree=self.backward_degree or plan.backward_degree,
        )


@dataclass(frozen=True)
class Dense:
    """What lies between the mixtures of a model, for each of N layers: the part before it.

    Args:
        seconds: of its backward, by layer.
        gradient_bytes: of its parameters, by layer.
        carried_bytes: of gradient behind the last layer, there when backward begins.
    """

    seconds: tuple[float, ...]
    gradient_bytes: tuple[float, ...]
    carried_bytes: float


class StepPlanning:
    """Plans the step of some layers. What planning sends, and measuring what it goes by, counts in no step's bytes.

    Args:
        layers: of a model, in the order of the forward pass; or one by itself.
        planner: of the system.
        fixed: degrees that were given.

    Attributes:
        plan: of the step; None before the first forward pass.
    """

    def __init__(self, layers: Sequence[Plannable], planner: Planner, fixed: Fixed) -> None:
        self.layers, self.planner, self.fixed = list(layers), planner, fixed
        self.plan: StepPlan | None = None
        self._num_tokens = 0

    def layer_plan(self, index: int, num_tokens: int) -> LayerPlan:
        """Of one layer. Collective over all ranks when first asked.

        Args:
            index: of the layer.
            num_tokens: T; the largest of all ranks in the first forward pass is planned for, and the plan then stands.
        """
        if self.plan is None:
            with uncounted():
                self._num_tokens = self._agreed(float(num_tokens))
                self.plan = self._planned(None)
        return self.plan.layers[index]

    def plan_slices(self, dense: Dense) -> StepPlan:
        """Plan again, now with the dense parts. Collective over all ranks.

        Args:
            dense: as this rank saw it.
        """
        assert self.plan is not None, "no forward pass has been"
        seconds = torch.tensor(dense.seconds, dtype=torch.float64, device=self.layers[0].mesh.device)
        with uncounted():
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
            self.plan = self._planned(replace(dense, seconds=tuple(seconds.tolist())))
        return self.plan

    def _planned(self, dense: Dense | None) -> StepPlan:
        works = [layer.work(self._num_tokens) for layer in self.layers]
        if dense is None and self.fixed.degree and self.fixed.backward_degree:
            return StepPlan(tuple(self.fixed.over(LayerPlan()) for _ in works))
        costs: dict[str, AlphaBeta] = {}
        for layer in self.layers:
            costs = layer.costs(self._num_tokens)  # of layers that are alike, so any one's
        if dense is not None:
            works = [
                replace(work, dense_backward_s=seconds, gradient_bytes=gradient_bytes)
                for work, seconds, gradient_bytes in zip(works, dense.seconds, dense.gradient_bytes, strict=True)
            ]
        plan = self.planner(works, costs, dense.carried_bytes if dense else 0.0)
        box = [replace(plan, layers=tuple(map(self.fixed.over, plan.layers)))]
        dist.broadcast_object_list(box, src=0, device=self.layers[0].mesh.device)  # ranks may compute differently
        return box[0]

    def _agreed(self, num_tokens: float) -> int:
        """The largest of all ranks."""
        largest = torch.tensor(num_tokens, dtype=torch.float64, device=self.layers[0].mesh.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)
