"""What an all-to-all of uneven rows, and a ring, cost on a cluster, by alpha and beta of its levels.

An exchange takes as long as its slowest level (ours): of each level the busiest rank's bytes, sent or received, all
levels side by side, since a level's cost is measured while all its ranks send.

Dimensions: P ranks that exchange, D levels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.costs import AlphaBeta
from moe.topology import Cluster, Level

Counts = NDArray[np.int64]

FREE = AlphaBeta(0.0, 1e-15)


class Exchange(NamedTuple):
    """An all-to-all: bytes of what limits it, and what they cost."""

    cost: AlphaBeta
    size_bytes: float

    @property
    def seconds(self) -> float:
        """Unsplit."""
        return self.cost.predict(self.size_bytes)


NOTHING = Exchange(FREE, 0.0)


def chained(*exchanges: Exchange) -> Exchange:
    """One after the other, as one; its size is what the largest one's is."""
    size_bytes = max(exchange.size_bytes for exchange in exchanges) or 1.0
    beta_s = sum(exchange.cost.beta_s_per_byte * exchange.size_bytes for exchange in exchanges) / size_bytes
    return Exchange(AlphaBeta(sum(exchange.cost.alpha_s for exchange in exchanges), max(beta_s, 1e-15)), size_bytes)


def busiest_by_level(rows_PP: Counts, cluster: Cluster) -> list[int]:
    """[D], by level, of the rank that sends or receives most there: how many rows; index 0 are those that stay.

    Args:
        rows_PP: [P, P], from each rank to each.
        cluster: of these ranks.
    """
    num_ranks = cluster.world_size
    assert rows_PP.shape == (num_ranks, num_ranks), (rows_PP.shape, num_ranks)
    below = np.zeros((2, num_ranks), dtype=np.int64)
    busiest = []
    for level in range(len(cluster.levels)):
        size = cluster.group_size(level)
        blocks = rows_PP.reshape(num_ranks // size, size, num_ranks // size, size)
        index = np.arange(num_ranks // size)
        inside = blocks[index, :, index, :]  # [groups, from, to]
        both = np.stack([inside.sum(2).ravel(), inside.sum(1).ravel()])
        busiest.append(int((both - below).max()))
        below = both
    return busiest


def ring_cost(cluster: Cluster) -> AlphaBeta:
    """Of an all-gather among all ranks by bytes of the whole, level by level with all ranks at once (ours): a level of
    fan-out f whose groups below have g ranks adds beta (f - 1) / f / g, and its alpha once. A reduce-scatter costs the
    same, an all-reduce both."""
    crossed = [(index, level) for index, level in enumerate(cluster.levels) if index and level.fanout > 1]
    betas = [
        cost_of(level).beta_s_per_byte * (1 - 1 / level.fanout) / cluster.group_size(index - 1)
        for index, level in crossed
    ]
    return AlphaBeta(sum(cost_of(level).alpha_s for _, level in crossed), max(sum(betas), 1e-15))


def first_ranks(cluster: Cluster, num_ranks: int) -> Cluster:
    """The cluster cut down to its first ranks, whole groups of its levels.

    Args:
        cluster: whole.
        num_ranks: a divisor of its size that fills whole groups.
    """
    levels, left = list(cluster.levels[:1]), num_ranks
    for level in cluster.levels[1:]:
        fanout = min(level.fanout, left)
        assert level.fanout % fanout == 0 and left % fanout == 0, f"{num_ranks} ranks of {cluster.name}"
        levels.append(replace(level, fanout=fanout))
        left //= fanout
    assert left == 1, f"{num_ranks} ranks of {cluster.name}, which has {cluster.world_size}"
    whole = num_ranks == cluster.world_size
    return replace(cluster, levels=tuple(levels), collectives=cluster.collectives if whole else None)


def outside_of(cluster: Cluster, num_ranks: int) -> Cluster:
    """The ranks at one place of all blocks of so many, as a cluster of their own.

    Args:
        cluster: whole.
        num_ranks: of a block, as of `first_ranks`.
    """
    inner = first_ranks(cluster, num_ranks)
    pairs = zip(cluster.levels, inner.levels, strict=True)
    levels = tuple(replace(level, fanout=level.fanout // part.fanout) for level, part in pairs)
    return replace(cluster, levels=levels, collectives=None)


def cost_of(level: Level) -> AlphaBeta:
    """Of a level, which must have one."""
    assert level.alpha_s is not None and level.beta_s_per_byte, f"the level {level.name} has no cost"
    return AlphaBeta(level.alpha_s, level.beta_s_per_byte)
