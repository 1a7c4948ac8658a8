"""Trying what may fail for one system, on all ranks at once, so that the other systems of a benchmark go on."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from experiments.failures import classify, describe
from experiments.ranks import RankInfo

Value = TypeVar("Value")
FATAL = ("config", "timeout", "lost_peer", "interrupted")
"""Kinds of failure after which the ranks can't go on together, or that concern all systems."""


def attempt(action: Callable[[], Value]) -> tuple[Value | None, tuple[str, str] | None]:
    """Do something on every rank; it counts only when all of them could. Collective.

    A rank that fails while the others wait for it inside `action` can't be helped: they end with a timeout.

    Args:
        action: may raise.

    Returns:
        This rank's value and None; or None and (status, reason) of the first rank that failed, the same on all ranks.
        A status is `failed`, `oom` or `refused`.
    """
    value, failure = None, None
    try:
        value = action()
    except Exception as error:
        kind = classify(error)
        if kind in FATAL:
            raise
        traceback.print_exc()  # into this rank's log
        failure = (kind, describe(error))
    failures: list[tuple[str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    first = next((told for told in failures if told is not None), None)
    return (value, None) if first is None else (None, first)


def stop_agreed(info: RankInfo) -> bool:
    """Whether any rank has seen the user's wish to stop. Collective."""
    seen = [False] * info.world_size
    dist.all_gather_object(seen, info.stop_requested())
    return any(seen)
