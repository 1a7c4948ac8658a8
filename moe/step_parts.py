"""Parts of a training step outside its MoE layers, for the stage clock: whoever does one says where it begins and ends,
and the clocks that run (`moe.stages.StageClock.timed`) take its time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

PARTS = (
    "popularity",  # counts of copies summed over ranks, or brought to who decides
    "expert_gradients",  # of experts' replicas, summed over ranks
    "gradient_shards",  # sums brought to the ranks that hold the optimizer's shards
    "dense_gradients",  # of everything else
    "optimizer",  # its step, of all parameters
    "scheduler",  # who gets which slots next
    "metadata",  # gates and experts told of it
    "weights",  # new ones sent to the slots of sharded optimizers
    "migration",  # experts moved with their weights and optimizer state
)
"""In the order of a step."""

HOST_PARTS = ("scheduler", "metadata")
"""What the host alone does: by the host's clock, also where the layers are on GPUs, whose work may hide it."""


class PartClock(Protocol):
    """What is told of parts."""

    def part(self, name: str) -> AbstractContextManager[None]:
        """One of PARTS is done inside."""


RUNNING: list[PartClock] = []
"""Clocks that run now."""


@contextmanager
def step_part(name: str) -> Iterator[None]:
    """Let the clocks that run count what is done inside to one of PARTS, which may come several times in a step; also a
    decorator."""
    assert name in PARTS, f"{name} is none of {PARTS}"
    with ExitStack() as stack:
        for clock in RUNNING:
            stack.enter_context(clock.part(name))
        yield
