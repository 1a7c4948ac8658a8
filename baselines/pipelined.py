"""Schedules that FSMoE is compared with, on the layer and streams that it runs on: what differs is the schedule alone.

How each decides stands in baselines/overlap_schedules.py and baselines/schemoe_schedule.py. Of ScheMoE that is the
order of tasks only: nothing is compressed, and all-to-alls are the backend's own.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal, Self

from pydantic import model_validator

from baselines.overlap_schedules import (
    plan_pipemoe,
    plan_pipemoe_lina,
    plan_sequential,
    plan_tutel_improved,
    plan_tutel_overlap,
)
from baselines.schemoe_schedule import ScheMoE
from moe.pipelined_parts import Choices, Schedule
from moe.pipelined_system import PipelinedOptions, PipelinedSystem
from moe.schedules import INTER, Pipeline, fsmoe_pipeline
from moe.step_planning import Fixed, Planner

PLANNERS: dict[str, Planner] = {
    "sequential": plan_sequential,
    "tutel_overlap": plan_tutel_overlap,
    "tutel_improved": partial(plan_tutel_improved, whole_step=True),
    "pipemoe": plan_pipemoe,
    "pipemoe_lina": plan_pipemoe_lina,
    "schemoe": plan_pipemoe,
}
SLICED = ("tutel_improved", "pipemoe_lina")
"""Schedules that reduce gradients during backward."""


class Options(PipelinedOptions):
    """Options of conf/system/pipelined.yaml, beside those of `PipelinedOptions`.

    Args:
        schedule: `sequential` (DeepSpeed-MoE's), `tutel_overlap`, `tutel_improved`, `pipemoe`, `pipemoe_lina` or
            `schemoe`, see `baselines.overlap_schedules`.
    """

    schedule: Literal["sequential", "tutel_overlap", "tutel_improved", "pipemoe", "pipemoe_lina", "schemoe"] = (
        "tutel_overlap"
    )

    @model_validator(mode="after")
    def _one_chunk_in_sequence(self) -> Self:
        if self.schedule == "sequential" and {self.degree, self.backward_degree} - {"auto", 1}:
            raise ValueError("schedule=sequential runs in one chunk; leave degree and backward_degree at auto")
        return self


class Pipelined(PipelinedSystem):
    """Other systems' schedules, restated."""

    name = "pipelined"
    summary = "exchange and experts in chunks by the schedule of DeepSpeed-MoE, Tutel, PipeMoE, Lina or ScheMoE"
    Options = Options

    @property
    def schedule(self) -> Schedule:
        """The one that was asked for."""
        name = self.options.schedule
        pipeline: Pipeline = ScheMoE().pipeline if name == "schemoe" else partial(fsmoe_pipeline, in_node=INTER)
        return Schedule(name, PLANNERS[name], pipeline, name in SLICED)

    @property
    def choices(self) -> Choices:
        """What the user said; nothing need be measured for a sequence."""
        choices = super().choices
        return replace(choices, fixed=Fixed(1, 1)) if self.options.schedule == "sequential" else choices
