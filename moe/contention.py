"""How much two operations slow each other that run at the same time: measured in a layer's profile
(`moe.module_profile`), and what the simulator then goes by.

Each takes f times as long while the other one works: of two that begin together the shorter ends after f times its own
time, and the longer has its rest to do alone,

    t_both = f short + (long - short),    f = 1 + (t_both - long) / short

f is 1 where they do not feel each other and 2 where it is as well to run one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping

from moe.costs import AlphaBeta
from moe.schedules import COMPUTE, INTER, INTRA

RESOURCES = {"gemm": COMPUTE, "all_to_all": INTER, "all_gather": INTRA}
"""Of the operations that are measured in pairs; what else runs there is taken to slow others as much."""

PAIRS = (("gemm", "all_to_all"), ("gemm", "all_gather"), ("all_gather", "all_to_all"))


def beside(first: str, second: str) -> str:
    """Operation of a profile: both at once, by the size of the first."""
    return f"{first} beside {second}"


def contention_of(costs: Mapping[str, AlphaBeta], sizes: Mapping[str, float]) -> dict[tuple[str, str], float]:
    """Factors for `moe.simulator.simulate`, of the pairs that were measured.

    Args:
        costs: of the operations, those of a matrix product for one of the experts' two, and of pairs.
        sizes: of each operation in a layer, in the unit of its cost.
    """
    found = {}
    for first, second in PAIRS:
        if (pair := beside(first, second)) not in costs:
            continue
        alone_s = [costs[name].predict(sizes[name]) for name in (first, second)]
        alone_s[0] += costs["gemm"].alpha_s if first == "gemm" else 0.0
        factor = 1 + (costs[pair].predict(sizes[first]) - max(alone_s)) / min(alone_s)
        found[RESOURCES[first], RESOURCES[second]] = max(1.0, factor)
    return found
