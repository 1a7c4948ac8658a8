"""FlexMoE's shifts as SYMI restates them (arXiv 2504.19925, section 5), for slots that have a capacity: one replica at
a time from the least to the most popular expert, whether or not that evens out the ranks.

The cost model of flexmoe_policy.py sees time only; where every rank has a slot of every expert it sees nothing to gain,
however many copies are dropped. SYMI does not say where its FlexMoE stops; ours are the two rules below.

Dimensions: E experts, N ranks, L slots of a rank.
"""

from __future__ import annotations

import numpy as np

from baselines.flexmoe_policy import BALANCED, MOST_SHIFTS, Copies, Expand, Move, Plan, Shrink, Slots, after


def plan_by_popularity(
    slots_EN: Slots, copies_NE: Copies, balanced: float = BALANCED, most_shifts: int = MOST_SHIFTS
) -> Plan:
    """Shift replicas until the most popular slot has no more than `balanced` times the mean of all slots, or until a
    shift would not make the larger of the two experts' copies per slot less.

    Args:
        slots_EN: at present, all slots being taken.
        copies_NE: of the steps before.
        balanced: largest over mean copies of a slot up to which nothing is done.
        most_shifts: of the plan.
    """
    copies_E = copies_NE.sum(axis=0)
    moves: list[Move] = []
    for _ in range(most_shifts if copies_E.any() else 0):
        count_E = slots_EN.sum(axis=1)
        popular_E = copies_E / count_E
        hot = int(popular_E.argmax())
        if popular_E[hot] * count_E.sum() <= balanced * copies_E.sum():
            break
        without_E = np.where(count_E > 1, copies_E / np.maximum(count_E - 1, 1), np.inf)
        without_E[hot] = np.inf
        cold = int(without_E.argmin())
        if not max(without_E[cold], copies_E[hot] / (count_E[hot] + 1)) < popular_E[hot]:
            break
        shift = _shift(slots_EN, hot, cold)
        slots_EN = after(slots_EN, shift)
        moves += shift
    return Plan(slots_EN, tuple(moves))


def _shift(slots_EN: Slots, hot: int, cold: int) -> list[Move]:
    """On a rank that has both, where nothing has to be sent, if there is one; of equals where the unpopular expert has
    most slots, then the first."""
    ranks = [int(rank) for rank in np.flatnonzero(slots_EN[cold])]
    rank = min(ranks, key=lambda rank: (slots_EN[hot, rank] == 0, -slots_EN[cold, rank], rank))
    return [Shrink(cold, rank), Expand(hot, rank)]
