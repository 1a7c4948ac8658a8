"""What systems of pipelined layers share: options, layers, and the reduction of gradients."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from moe.exchange_costs import Counts
from moe.expert_sharding import sharded_model, sharding_refusals
from moe.layer_simulation import LayerModel, RoutedLayer
from moe.mesh import Mesh
from moe.pipelined_layer import PipelinedMoE
from moe.pipelined_parts import Choices, Schedule
from moe.schedules import LayerWork, StepPlan
from moe.simulator import Costs
from moe.sliced_sync import SlicedSync
from moe.step_planning import Fixed
from moe.sync import GradientSync
from moe.system import LayerSpec, MoELayer, System, moe_layers
from moe.topology import Cluster

Degree = Annotated[int, Field(ge=1, le=64)] | Literal["auto"]


class PipelinedOptions(BaseModel):
    """Options of a pipelined layer.

    Args:
        degree, backward_degree: chunks of each direction, any number (parts of a queue differ by one row at most);
            `auto`: as the schedule plans by measured costs.
        profile: file of measured costs, written where it is missing, refused where it is of other hardware; null: they
            are measured in every process.
        trace: folder for a timeline of the last step, `rank<r>.json` in Chrome's format; null: none is recorded.
        expert_sharding: spread experts over nodes and cut each over the ranks of its node (`moe.expert_sharding`).
    """

    model_config = ConfigDict(extra="forbid")
    degree: Degree = "auto"
    backward_degree: Degree = "auto"
    profile: str | None = None
    trace: str | None = None
    expert_sharding: bool = False

    def choices(self) -> Choices:
        """For the layers."""
        return Choices(
            Fixed(_number(self.degree), _number(self.backward_degree)),
            None if self.profile is None else Path(self.profile).expanduser(),
            None if self.trace is None else Path(self.trace).expanduser(),
            expert_sharding=self.expert_sharding,
        )


def _number(degree: int | str) -> int | None:
    return None if isinstance(degree, str) else degree


class PipelinedSystem(System):
    """A system whose idea is a schedule."""

    implementation = "native"

    @property
    @abstractmethod
    def schedule(self) -> Schedule:
        """Of its layers."""

    @property
    def choices(self) -> Choices:
        """What the user said."""
        choices: Choices = self.options.choices()
        return choices

    def refusals(self, spec: LayerSpec, cluster: Cluster) -> list[str]:
        """Experts that can't be cut over this cluster's nodes."""
        return sharding_refusals(spec, cluster) if self.options.expert_sharding else []

    def simulated_layer(self, layer: RoutedLayer) -> LayerModel:
        """The schedule's own plan and order of tasks."""
        counts_PE = self.simulated_counts(layer)
        model = sharded_model(layer, counts_PE) if self.options.expert_sharding else layer.model(counts_PE)
        schedule, fixed = self.schedule, self.choices.fixed

        def planned(works: Sequence[LayerWork], costs: Costs, carried_bytes: float) -> StepPlan:
            plan = schedule.planner(works, costs, carried_bytes)
            return replace(plan, layers=tuple(map(fixed.over, plan.layers)))

        return replace(model, planner=planned, pipeline=schedule.pipeline)

    def simulated_counts(self, layer: RoutedLayer) -> Counts:
        """[P, E], copies that travel."""
        return layer.counts_PE

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """The pipelined layer."""
        return PipelinedMoE(spec, mesh, self.schedule, self.choices)

    def gradient_sync(self, model: nn.Module, mesh: Mesh) -> GradientSync:
        """In slices where the schedule has such, else in the end."""
        layers = [layer for layer in moe_layers(model) if isinstance(layer, PipelinedMoE)]
        if not self.schedule.slices:
            return super().gradient_sync(model, mesh)
        return SlicedSync(model, layers, mesh, self.schedule.planner, self.choices.fixed)
