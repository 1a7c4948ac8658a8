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

    Args:
        action: may raise; best without communication, so that no rank waits in it for one that failed.

    Returns:
        This rank's value and None; or None and (status, reason) of the first rank that failed, the same on all ranks.
        A status is `failed`, `oom` or `refused`.

    Raises:
        Exception: what this rank failed with, when it can't be settled: the others wait for it inside `action`.
    """
    value = None
    try:
        value = action()
    except Exception as error:
        kind = classify(error)
        if kind in FATAL:
            raise
        traceback.print_exc()  # into this rank's log
        try:
            first = _first((kind, describe(error)))
        except Exception:
            raise error from None  # what the others see is its consequence
    else:
        first = _first(None)
    return (value, None) if first is None else (None, first)


def _first(failure: tuple[str, str] | None) -> tuple[str, str] | None:
    failures: list[tuple[str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    return next((told for told in failures if told is not None), None)


def stop_agreed(info: RankInfo) -> bool:
    """Whether any rank has seen the user's wish to stop. Collective."""
    seen = [False] * info.world_size
    dist.all_gather_object(seen, info.stop_requested())
    return any(seen)
