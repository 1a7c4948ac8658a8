"""What a pipelined layer (`moe.pipelined_layer`) is told: its schedule, what a user chose, a gate, slices of gradient.

Dimensions: T tokens of this rank, M model, S copies this rank sends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor, nn

from moe.chunks import Queues
from moe.schedules import Pipeline
from moe.step_planning import Fixed, Planner

Travel = Callable[[Tensor, Queues], Tensor]
"""Copies [S, M], in the chunks of the forward pass, to the outputs of their experts."""


class Gate(Protocol):
    """What a pipelined layer needs of its gate, a module whose call gives the `Routing` of tokens [T, M]; another thing
    where the layer's class knows how to use it."""

    weight: nn.Parameter

    def __call__(self, x_TM: Tensor) -> Any:
        """Route."""

    def load(self, gate_EM: Tensor) -> None:
        """Take the suite's matrix, [E, M]."""

    def most_copies(self, num_tokens: int) -> int:
        """Copies that a rank sends of so many tokens, at most."""


class Backward(Protocol):
    """What takes part in a layer's backward: slices of gradient are sent in it."""

    def begins(self) -> None:
        """Before the first task."""

    def slice(self, chunk: int) -> dist.Work | None:
        """In the middle, where the layer's plan has a slice."""

    def ended(self) -> None:
        """When the last task is issued."""


@dataclass(frozen=True)
class Schedule:
    """How a system pipelines its layers.

    Args:
        name: in results.
        planner: decides degrees and slices.
        pipeline: writes the tasks of a layer.
        slices: whether dense gradients are reduced in slices during backward.
    """

    name: str
    planner: Planner
    pipeline: Pipeline
    slices: bool = False


@dataclass(frozen=True)
class Choices:
    """What a user may say of a pipelined layer.

    Args:
        fixed: degrees; the plan's where none are given.
        profile: file that keeps measured costs; None keeps them in the process.
        trace: folder for timelines, a file a rank, of the last step; None records none. Recording waits for the GPU.
        dense_order: tokens become copies and copies tokens by matrix products (`moe.dense_order`).
        expert_sharding: experts are spread over nodes and cut over the ranks of each (`moe.expert_sharding`).
    """

    fixed: Fixed = Fixed()
    profile: Path | None = None
    trace: Path | None = None
    dense_order: bool = False
    expert_sharding: bool = False
