"""The cost model of an all-to-all over levels: its slowest pair of ranks. Everything that comes out is modelled.

    T(bytes) = max over ordered pairs (i, j) of alpha_ij + beta_ij * bytes_ij

alpha: latency in s; beta: inverse bandwidth in s/byte; both those of the smallest level that holds i and j. It knows no
contention: what concurrent traffic costs has to be inside the measured beta. Four exchanges a layer and step are
counted: dispatch and combine, forward and backward.

Dimensions: S steps, L layers, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.errors import ResultsError
from analysis.load import Run

EXCHANGES = 4
"""All-to-alls of an MoE layer in a training step."""

ELEMENT_BYTES = {"fp32": 4, "bf16": 2}
"""Bytes that one number of a token takes on its way, by `trainer.precision`."""


@dataclass(frozen=True)
class Level:
    """One level of a cluster: a name, a fan-out and the cost of a message, None where nothing says it."""

    name: str
    fanout: int
    alpha_s: float | None
    beta_s_per_byte: float | None

    @property
    def has_costs(self) -> bool:
        """Whether both numbers are known."""
        return self.alpha_s is not None and self.beta_s_per_byte is not None


@dataclass(frozen=True, eq=False)
class PairCosts:
    """Costs of every ordered pair of ranks.

    Attributes:
        alpha_s_WW, beta_s_per_byte_WW: float64 [W, W].
        counted_WW: bool [W, W]: the pairs that the model looks at. The copy from a rank to itself counts only where the
            cluster says what it costs.
    """

    alpha_s_WW: NDArray[np.float64]
    beta_s_per_byte_WW: NDArray[np.float64]
    counted_WW: NDArray[np.bool_]

    def exchange_s(self, bytes_WW: NDArray[np.float64]) -> NDArray[np.float64]:
        """Seconds of one all-to-all [...] that moves bytes [..., W, W], row to column; 0 on a single rank."""
        times_WW = self.alpha_s_WW + self.beta_s_per_byte_WW * bytes_WW
        return np.max(times_WW, axis=(-2, -1), where=self.counted_WW, initial=0.0)


def levels_of(*runs: Run) -> list[Level]:
    """Levels above the rank itself, innermost first, as the first run declares them that does; else none."""
    for cluster in (cluster for run in runs for cluster in _clusters(run)):
        levels = cluster.get("levels") or []
        if levels and all(isinstance(level, dict) and isinstance(level.get("fanout"), int) for level in levels):
            return [
                Level(str(level.get("name")), level["fanout"], level.get("alpha_s"), level.get("beta_s_per_byte"))
                for level in levels
                if level.get("name") != "self"
            ]
    return []


def _clusters(run: Run) -> Iterator[dict[str, Any]]:
    for source in (run.manifest, run.config):
        cluster = source.get("cluster")
        if isinstance(cluster, dict):
            yield cluster


def innermost_group(levels: list[Level]) -> tuple[int, list[str]]:
    """(ranks of the innermost group of several, names of the levels inside it, `self` first); (1, [self]) where that is
    the whole cluster or there is none: then what stays near is what stays on its rank."""
    names, size = ["self"], 1
    for index, level in enumerate(levels):
        names.append(level.name)
        size *= level.fanout
        if size > 1 and any(outer.fanout > 1 for outer in levels[index + 1 :]):
            return size, names
    return 1, ["self"]


def level_indices(levels: list[Level]) -> NDArray[np.intp]:
    """[W, W]: of every pair the level of the smallest group that holds both: 0 the rank itself, 1 `levels[0]`, ..."""
    ranks_W = np.arange(prod(level.fanout for level in levels))
    index_WW = np.full((len(ranks_W), len(ranks_W)), len(levels), dtype=np.intp)
    for index in range(len(levels), -1, -1):
        group_W = ranks_W // prod(level.fanout for level in levels[:index])
        index_WW[group_W[:, None] == group_W[None, :]] = index
    return index_WW


def pair_costs(run: Run) -> PairCosts:
    """The costs that a run's cluster declares.

    Raises:
        ResultsError: no levels, or one that ranks talk over has no alpha or beta.
    """
    levels = levels_of(run)
    if not levels:
        raise ResultsError(f"{run.path.name}: neither manifest.json nor config.yaml declares the levels of its cluster")
    bare = [level.name for level in levels if level.fanout > 1 and not level.has_costs]
    if bare:
        raise ResultsError(
            f"cluster {run.declared('cluster')}: level {' and '.join(bare)} has no alpha_s and beta_s_per_byte, so "
            "nothing is modelled. Fix: measure them with `python -m experiments.comm write_to=conf/cluster/NAME.yaml` "
            "and train with cluster=NAME"
        )
    copy: dict[str, Any] = next((cluster["local_copy"] for cluster in _clusters(run) if cluster.get("local_copy")), {})
    costs = [Level("self", 1, copy.get("alpha_s"), copy.get("beta_s_per_byte")), *levels]
    index_WW = level_indices(levels)
    return PairCosts(
        alpha_s_WW=np.array([level.alpha_s or 0.0 for level in costs])[index_WW],
        beta_s_per_byte_WW=np.array([level.beta_s_per_byte or 0.0 for level in costs])[index_WW],
        counted_WW=np.array([level.has_costs for level in costs])[index_WW],
    )


def row_bytes(run: Run) -> int:
    """Bytes of one token copy on its way: model_dim numbers of the run's precision.

    Raises:
        ResultsError: config.yaml does not say both.
    """
    model, trainer = run.config.get("model"), run.config.get("trainer")
    model_dim = model.get("model_dim") if isinstance(model, dict) else None
    precision = trainer.get("precision") if isinstance(trainer, dict) else None
    if not isinstance(model_dim, int) or precision not in ELEMENT_BYTES:
        raise ResultsError(
            f"{run.path.name}/config.yaml: model.model_dim={model_dim}, trainer.precision={precision}: needs a number "
            f"and one of {', '.join(ELEMENT_BYTES)} to know the bytes of a token. Fix: run it again"
        )
    return model_dim * ELEMENT_BYTES[precision]


def communication_s(costs: PairCosts, copies_SLWW: NDArray[np.float64], copy_bytes: int) -> float:
    """Modelled seconds that the MoE layers of one step communicate: four exchanges a layer, mean over the steps.

    Combine runs dispatch's way backwards; as a pair costs the same both ways, the slowest pair takes as long.

    Args:
        costs: of W ranks.
        copies_SLWW: [S, L, W, W], copies from row to column in one exchange.
        copy_bytes: of one of them.

    Raises:
        ResultsError: the counts are of another number of ranks than the costs.
    """
    if copies_SLWW.shape[-1] != len(costs.counted_WW):
        raise ResultsError(
            f"the counts are of {copies_SLWW.shape[-1]} ranks, but the cluster's levels make {len(costs.counted_WW)}"
        )
    return float(EXCHANGES * costs.exchange_s(copies_SLWW * copy_bytes).sum(axis=1).mean())


def traffic_bytes(copies_SLWW: NDArray[np.float64], copy_bytes: int) -> float:
    """Modelled bytes that leave their rank in one step, over all ranks, layers and exchanges; mean over the steps."""
    leaving = copies_SLWW.sum(axis=(-2, -1)) - np.trace(copies_SLWW, axis1=-2, axis2=-1)
    return float(EXCHANGES * copy_bytes * leaving.sum(axis=1).mean())
