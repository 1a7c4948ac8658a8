"""FasterMoE's performance predictor and DDL-Roofline (He et al., PPoPP 2022, section 3), equations (1) to (6).

Latency of a message is neglected (the paper: messages are larger than 4 KB). Traffic runs over directed links: every
group of a cluster's level has one link up to the level above and one down, so a duplex cable is two links.

Dimensions: W ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe.topology import Cluster


class Link(NamedTuple):
    """A directed link between a group and the level above it.

    Attributes:
        level: of the group; 0 is a rank.
        group: index of the group in its level.
        up: towards the level above.
    """

    level: int
    group: int
    up: bool


Traffic = dict[Link, float]
"""Bytes on every link that carries any."""


def path(cluster: Cluster, source: int, destination: int) -> list[Link]:
    """Links from one rank to another: up to the smallest group that holds both, then down; none to itself."""
    levels = range(cluster.level_of(source, destination))
    ups = [Link(level, cluster.group_of(source, level), True) for level in levels]
    return ups + [Link(level, cluster.group_of(destination, level), False) for level in reversed(levels)]


def link_bytes_per_s(cluster: Cluster, link: Link) -> float:
    """Bandwidth of a link.

    The suite's beta is what one rank sees while all ranks send, so a link that a group shares carries its number of
    ranks times 1 / beta of the level above (ours; the paper takes specifications and point-to-point benchmarks).

    Raises:
        ValueError: that level has no cost, or a cost of 0.
    """
    # A level of one group below has no link of its own: what leaves it is the next one's.
    above = next(level for level in cluster.levels[link.level + 1 :] if level.fanout > 1)
    if not above.beta_s_per_byte:
        raise ValueError(f"level {above.name} of cluster {cluster.name} has no beta_s_per_byte; measure or declare it")
    return cluster.group_size(link.level) / above.beta_s_per_byte


def all_to_all_traffic(cluster: Cluster, bytes_WW: NDArray[np.float64]) -> Traffic:
    """Every pair's bytes on all links of its path, all at once.

    Args:
        cluster: of W ranks.
        bytes_WW: [W, W], from row to column.
    """
    return _traffic(
        cluster,
        (
            (source, destination, float(bytes_WW[source, destination]))
            for source in range(cluster.world_size)
            for destination in range(cluster.world_size)
        ),
    )


def all_reduce_traffic(cluster: Cluster, num_bytes: float) -> Traffic:
    """A ring over all n ranks: 2 (n - 1) / n * bytes from each to its neighbour."""
    size = cluster.world_size
    return _ring(cluster, 2 * (size - 1) / size * num_bytes)


def broadcast_traffic(cluster: Cluster, num_bytes: float) -> Traffic:
    """A pipelined ring, forward or (a reduce) backward: all bytes to each neighbour."""
    return _ring(cluster, num_bytes)


def _ring(cluster: Cluster, num_bytes: float) -> Traffic:
    size = cluster.world_size
    return _traffic(cluster, ((rank, (rank + 1) % size, num_bytes) for rank in range(size)))


def _traffic(cluster: Cluster, messages: Iterable[tuple[int, int, float]]) -> Traffic:
    traffic: defaultdict[Link, float] = defaultdict(float)
    for source, destination, num_bytes in messages:
        for link in path(cluster, source, destination) if num_bytes else ():
            traffic[link] += num_bytes
    return dict(traffic)


def compute_latency_s(rows_W: Sequence[float], expert_parameters: int, flops_per_s: float) -> float:
    """Equation (1): max_w 4 B_w alpha H^2 / P_w, one forward of the experts on the busiest rank.

    Args:
        rows_W: B_w, tokens that each rank's experts compute.
        expert_parameters: 2 alpha H^2 (3 M H with SwiGLU).
        flops_per_s: P_w, of one rank; the paper takes 90 % of the peak.
    """
    return max(2 * expert_parameters * rows / flops_per_s for rows in rows_W)


def communication_latency_s(cluster: Cluster, traffic: Mapping[Link, float]) -> float:
    """Equation (2): max_l T_l / W_l over the directed links; 0 without traffic."""
    return max((num_bytes / link_bytes_per_s(cluster, link) for link, num_bytes in traffic.items()), default=0.0)


def end_to_end_latency_s(compute_s: float, communication_s: float) -> float:
    """Of a step of synchronous expert parallelism: three rounds of computation, four exchanges."""
    return 3 * compute_s + 4 * communication_s


def compute_over_communication(compute_s: float, communication_s: float) -> float:
    """Equation (3): R_CC, the x axis of the roofline; inf without communication."""
    return compute_s / communication_s if communication_s else float("inf")


def throughput_flops_per_s(rows_W: Sequence[float], expert_parameters: int, end_to_end_s: float) -> float:
    """Equation (4): 12 alpha H^2 sum_w B_w / (N Lat_e2e), the y axis: FLOP/s of a rank, forward and backward."""
    return 3 * 2 * expert_parameters * sum(rows_W) / (len(rows_W) * end_to_end_s)


class Curve(NamedTuple):
    """One bound of the roofline.

    Attributes:
        name: of the curve.
        compute, communication: rounds of each in a step.
        overlapped: True where the two run at the same time.
    """

    name: str
    compute: int
    communication: int
    overlapped: bool

    def flops_per_s(self, ratio: NDArray[np.float64], peak_flops_per_s: float) -> NDArray[np.float64]:
        """The bound at R_CC = `ratio` > 0 for ranks of that peak."""
        computed, sent = self.compute * ratio, float(self.communication)
        return peak_flops_per_s * (computed / (np.maximum(computed, sent) if self.overlapped else computed + sent))


CURVES = (
    Curve("ideal (5)", 1, 1, True),
    Curve("semi-ideal (6)", 1, 1, False),
    Curve("ideal, 3 : 4", 3, 4, True),
    Curve("semi-ideal, 3 : 4", 3, 4, False),
)
"""P min(1, R_CC) and P R_CC / (R_CC + 1) as published, and the same for a step's 3 computations and 4 exchanges: the
published ones leave that ratio out (ours)."""


class Point(NamedTuple):
    """A system on the roofline.

    Attributes:
        name: of the system or configuration.
        ratio: R_CC.
        flops_per_s: of one rank, achieved or predicted.
        kind: `measured` or `modelled`.
    """

    name: str
    ratio: float
    flops_per_s: float
    kind: str


def roofline_rows(
    points: Sequence[Point], peak_flops_per_s: float, num_samples: int = 65
) -> list[dict[str, str | float]]:
    """Rows of the table that the roofline figure reads: the points, and every curve over their range.

    Args:
        points: at least one, with finite ratios > 0.
        peak_flops_per_s: P, of one rank.
        num_samples: of each curve, from a fourth of the smallest ratio (at most 1/4) to four times the largest.

    Returns:
        Rows of `what` (`curve` or `point`), `name`, `kind`, `ratio` and `flops_per_s`.
    """
    assert points and all(0 < point.ratio < float("inf") for point in points), points
    low, high = min(1.0, *(point.ratio for point in points)), max(1.0, *(point.ratio for point in points))
    ratios = np.geomspace(low / 4, high * 4, num_samples)
    rows: list[dict[str, str | float]] = [{"what": "point", **point._asdict()} for point in points]
    for curve in CURVES:
        bound = curve.flops_per_s(ratios, peak_flops_per_s)
        rows += [
            {"what": "curve", "name": curve.name, "ratio": float(x), "flops_per_s": float(y), "kind": "modelled"}
            for x, y in zip(ratios, bound, strict=True)
        ]
    return rows
