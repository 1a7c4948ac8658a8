"""How much two operations slow each other that run at the same time: measured in a layer's profile
(`moe.module_profile`), and what the simulator then goes by.

Each takes f times as long while the other one works: of two that begin together the shorter ends after f times its own
time, and the longer has its rest to do alone,

    t_both = f short + (long - short),    f = 1 + (t_both - long) / short

f is 1 where they do not feel each other and 2 where they might as well run one after the other. Outside of that is
noise of times that were measured apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from moe.schedules import COMPUTE, INTER, INTRA

RESOURCES = {"gemm": COMPUTE, "all_to_all": INTER, "all_gather": INTRA}
"""Of the operations that are measured in pairs; what else runs there is taken to slow others as much."""

PAIRS = (("gemm", "all_to_all"), ("gemm", "all_gather"), ("all_gather", "all_to_all"))


class Point(NamedTuple):
    """One measured size: bytes of a collective, multiply-adds of the experts; median seconds of the slowest rank."""

    size: float
    seconds: float


Points = dict[str, list[Point]]
"""By operation, sizes rising."""


def beside(first: str, second: str) -> str:
    """Operation of a profile: both at once, by the size of the first."""
    return f"{first} beside {second}"


def contention_of(profiles: Iterable[Mapping[str, Sequence[Point]]]) -> dict[tuple[str, str], float]:
    """Factors for `moe.simulator.simulate`: the median over profiles and sizes, within 1 and 2.

    Args:
        profiles: of layers; one that lacks a pair tells nothing of it.
    """
    found = {}
    for first, second in PAIRS:
        factors = [
            1 + (both.seconds - max(one.seconds, other.seconds)) / min(one.seconds, other.seconds)
            for points in profiles
            if beside(first, second) in points
            for one, other, both in zip(points[first], points[second], points[beside(first, second)], strict=False)
        ]
        if factors:
            found[RESOURCES[first], RESOURCES[second]] = min(2.0, max(1.0, median(factors)))
    return found
