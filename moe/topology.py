"""A cluster as levels of ranks.

Level 0 is a rank itself, level 1 the ranks that share its innermost group (a node), and so on outwards; the level of a
pair of ranks is the smallest group that holds both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it costs pairs of ranks by their level, and imports this file
    from moe.costs import AlphaBeta


@dataclass(frozen=True)
class Level:
    """One level of a cluster.

    Args:
        name: what results and figures call it, e.g. `node`.
        fanout: how many groups of the level below make up one group of this level (1 for the rank itself).
        alpha_s: latency of one message in seconds, None when nobody declared or measured it.
        beta_s_per_byte: inverse bandwidth in seconds per byte, None likewise.
    """

    name: str
    fanout: int
    alpha_s: float | None = None
    beta_s_per_byte: float | None = None


@dataclass(frozen=True)
class CollectiveCosts:
    """What the even all-to-alls of a hierarchical dispatch cost, by bytes that a rank sends in all.

    Over D levels of more than one group, the outermost being the first (HierMoE, arXiv 2508.09591, figure 9).

    Args:
        standard: of all ranks.
        inter: D - 1 costs; Inter-i joins the ranks at equal places of a level-i group's parts, in all groups at once.
        intra: D - 1 costs; Intra-i joins the ranks of one such part, in all of them at once.
    """

    standard: AlphaBeta
    inter: tuple[AlphaBeta, ...] = ()
    intra: tuple[AlphaBeta, ...] = ()


@dataclass(frozen=True)
class Cluster:
    """Levels of ranks, innermost first; `levels[0]` is the rank itself (copies that leave no device).

    Args:
        name: name of the conf/cluster file.
        levels: at least the level `self`; fan-outs multiply to the world size.
        emulation: empty for a real cluster, else one phrase that says what stands in for it
            ("plain loopback, declared levels"); it goes into every result.
        collectives: measured one by one; None where nobody did.
    """

    name: str
    levels: tuple[Level, ...]
    emulation: str = ""
    collectives: CollectiveCosts | None = None

    @property
    def world_size(self) -> int:
        """Number of ranks: the product of the fan-outs."""
        return prod(level.fanout for level in self.levels)

    @property
    def level_names(self) -> list[str]:
        """Names of the levels, innermost first."""
        return [level.name for level in self.levels]

    @property
    def crossed_levels(self) -> list[int]:
        """Indices of the levels that tell ranks apart, those of more than one group of the level below, innermost
        first."""
        return [index for index, level in enumerate(self.levels) if index and level.fanout > 1]

    def group_size(self, level: int) -> int:
        """Ranks in one group of `level`: 1 at level 0, the world size at the outermost."""
        return prod(item.fanout for item in self.levels[: level + 1])

    def group_of(self, rank: int, level: int) -> int:
        """Index of the group of `level` that holds `rank`."""
        return rank // self.group_size(level)

    def level_of(self, rank_a: int, rank_b: int) -> int:
        """Smallest level whose group holds both ranks; 0 iff they are the same rank."""
        for level in range(len(self.levels)):
            if self.group_of(rank_a, level) == self.group_of(rank_b, level):
                return level
        raise ValueError(f"ranks {rank_a} and {rank_b} are not both in a cluster of {self.world_size} ranks")

    def pair_levels(self, ranks: Sequence[int]) -> list[list[int]]:
        """[P, P], `level_of` every pair of P ranks."""
        return [[self.level_of(a, b) for b in ranks] for a in ranks]

    def groups(self, level: int) -> list[list[int]]:
        """Ranks of every group of `level`, in order."""
        size = self.group_size(level)
        return [list(range(start, start + size)) for start in range(0, self.world_size, size)]


def cluster_of(
    fanouts: Sequence[int], names: Sequence[str] = ("node", "network", "rack", "site"), name: str = "ad_hoc"
) -> Cluster:
    """A cluster from fan-outs, innermost first: `cluster_of([2, 2])` is two nodes of two ranks.

    Args:
        fanouts: one number >= 1 per level above the rank itself.
        names: names of these levels; at least as many.
        name: name of the cluster.
    """
    assert len(names) >= len(fanouts), f"{len(fanouts)} levels, {len(names)} names"
    levels = [Level("self", 1)] + [Level(label, fanout) for label, fanout in zip(names, fanouts, strict=False)]
    return Cluster(name, tuple(levels))
