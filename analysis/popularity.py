"""How popular each expert was and how many slots it had, step by step: the counts of routing.npz by expert.

Dimensions: S logged steps, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.comparison import Comparison
from analysis.errors import ResultsError
from analysis.load import Run
from analysis.routing import routing_arrays


class Expert(NamedTuple):
    """One expert of one MoE layer, both counted from 0."""

    layer: int
    expert: int


@dataclass(frozen=True, eq=False)
class Popularity:
    """What one run's tokens chose, and what it was ready for.

    Attributes:
        steps_S: int64 [S], ascending.
        copies_SLE: int64 [S, L, E], copies of all ranks' tokens that chose the expert, before any drop.
        replicas_SLE: int64 [S, L, E], slots that the expert had in that step; None where each has one.
    """

    steps_S: NDArray[np.int64]
    copies_SLE: NDArray[np.int64]
    replicas_SLE: NDArray[np.int64] | None

    @property
    def routed_copies(self) -> int:
        """Copies of one step, all layers together: the same in each, as every token has as many choices."""
        return int(self.copies_SLE[0].sum())

    def copy_shares_S(self, of: Expert) -> NDArray[np.float64]:
        """[S], an expert's share of its layer's copies; NaN in a step without any."""
        totals_S = self.copies_SLE[:, of.layer].sum(axis=-1)
        own_S = self.copies_SLE[:, of.layer, of.expert].astype(np.float64)
        return np.divide(own_S, totals_S, out=np.full_like(own_S, np.nan), where=totals_S > 0)

    def slot_shares_S(self, of: Expert) -> NDArray[np.float64]:
        """[S], an expert's share of its layer's slots; capacity is in proportion to it."""
        if self.replicas_SLE is None:
            return np.full(len(self.steps_S), 1 / self.copies_SLE.shape[-1])
        layer_SE = self.replicas_SLE[:, of.layer].astype(np.float64)
        shares_S: NDArray[np.float64] = layer_SE[:, of.expert] / layer_SE.sum(axis=-1)
        return shares_S

    def characters(self) -> dict[str, Expert]:
        """Experts that show what popularity can do: the one whose share of its layer's copies grew most from the first
        third of the steps to the last, the one whose share shrank most, and of the rest the one that changed most from
        step to step. Fewer where there are fewer experts."""
        shares_SLE = self.copies_SLE / self.copies_SLE.sum(axis=-1, keepdims=True).clip(1)
        third = -(-len(shares_SLE) // 3)
        growth_LE = shares_SLE[-third:].mean(axis=0) - shares_SLE[:third].mean(axis=0)
        jumps_LE = np.abs(np.diff(shares_SLE, axis=0)).sum(axis=0)
        chosen: dict[str, Expert] = {}
        for name, measure_LE in (("growing", growth_LE), ("shrinking", -growth_LE), ("spiky", jumps_LE)):
            free_LE = measure_LE.copy()
            for taken in chosen.values():
                free_LE[taken] = -np.inf
            if np.isfinite(free_LE).any():
                layer, expert = np.unravel_index(free_LE.argmax(), free_LE.shape)
                chosen[name] = Expert(int(layer), int(expert))
        return chosen


Popularities = Mapping[tuple[str, int | None], Popularity]
"""Of every usable run that has counts, by system and seed."""


def load_popularity(run: Run) -> Popularity:
    """The counts of one run folder.

    Raises:
        ResultsError: no routing.npz, one that can't be read, or counts that are not of every step, layer and expert.
    """
    name, arrays = routing_arrays(run, "replica_counts")
    steps_S, counts_SLWE = arrays["steps"], arrays["dispatch_counts"]
    copies_SLE = counts_SLWE.sum(axis=2, dtype=np.int64)
    replicas_SLE = arrays.get("replica_counts")
    if replicas_SLE is not None and (replicas_SLE.shape != copies_SLE.shape or (replicas_SLE < 1).any()):
        raise ResultsError(
            f"{name}: replica_counts must be {list(copies_SLE.shape)} slots, one or more an expert, and is "
            f"{list(replicas_SLE.shape)} with at least {replicas_SLE.min(initial=1)}. Fix: run it again."
        )
    order = np.argsort(steps_S, kind="stable")
    told_SLE = None if replicas_SLE is None else replicas_SLE[order].astype(np.int64)
    return Popularity(steps_S[order], copies_SLE[order], told_SLE)


def load_popularities(comparison: Comparison) -> tuple[Popularities, list[str]]:
    """(counts of every usable run that has some, sentences on those that have none)."""
    found: dict[tuple[str, int | None], Popularity] = {}
    notes = []
    for run in comparison.runs:
        try:
            found[run.system, run.seed] = load_popularity(run)
        except ResultsError as error:
            notes.append(str(error))
    return found, notes
