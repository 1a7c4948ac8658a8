"""Where tokens went: the counts of routing.npz as copies from rank to rank, and the dispatch that a run aimed at.

Dimensions: S logged steps, L MoE layers, W ranks, E experts over all ranks (placed contiguously, E / W a rank).
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.errors import ResultsError
from analysis.load import Run, one_line

LAST_PART = 0.1
"""Share of the logged steps, the last ones, that stands for the routing that a run has learned."""

_PLACES = ("expert_of_slot", "replica_counts")
_ROW_SUM_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Routing:
    """What the gates of one run chose.

    Attributes:
        steps_S: int64 [S], ascending.
        copies_SLWW: float64 [S, L, W, W], copies of tokens of rank i (third axis) for experts of rank j (last axis),
            before any drop.
        target_WW: float64 [W, W], rows summing to 1: the shares that a topology-aware run aimed at; None without.
        flaw: a sentence on a target that is there but can't be used; "" when nothing is wrong.
    """

    steps_S: NDArray[np.int64]
    copies_SLWW: NDArray[np.float64]
    target_WW: NDArray[np.float64] | None
    flaw: str = ""

    @property
    def num_ranks(self) -> int:
        """W."""
        return int(self.copies_SLWW.shape[-1])

    @property
    def last_copies_SLWW(self) -> NDArray[np.float64]:
        """The copies of the last tenth of the logged steps, at least of one."""
        return self.copies_SLWW[-ceil(LAST_PART * len(self.steps_S)) :]

    @property
    def last_steps(self) -> tuple[int, int]:
        """First and last step of `last_copies_SLWW`."""
        return int(self.steps_S[-len(self.last_copies_SLWW)]), int(self.steps_S[-1])

    @property
    def shares_WW(self) -> NDArray[np.float64]:
        """[W, W]: each rank's copies by destination over the last tenth of the steps and all layers; rows sum to 1.

        A rank without copies has a row of NaN.
        """
        copies_WW = self.last_copies_SLWW.sum(axis=(0, 1))
        totals_W1 = copies_WW.sum(axis=1, keepdims=True)
        return np.divide(copies_WW, totals_W1, out=np.full_like(copies_WW, np.nan), where=totals_W1 > 0)


def by_rank(per_expert: NDArray[np.floating] | NDArray[np.integer], num_ranks: int) -> NDArray[np.float64]:
    """[..., E] to [..., W], summed over the E / W slots of one rank; E must be a multiple of W."""
    *front, num_experts = per_expert.shape
    return per_expert.reshape(*front, num_ranks, num_experts // num_ranks).sum(axis=-1, dtype=np.float64)


def routing_arrays(run: Run, *more: str) -> tuple[str, dict[str, NDArray[Any]]]:
    """What a run's routing.npz holds.

    Args:
        run: a run folder.
        more: arrays that are read where they are there.

    Returns:
        The file's name for messages; `steps` [S], `dispatch_counts` [S, L, W, E], and those.

    Raises:
        ResultsError: no routing.npz, one that can't be read, or no counts of every step.
    """
    name = f"{run.path.name}/routing.npz"
    try:
        with np.load(run.path / "routing.npz", allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("steps", "dispatch_counts", *more) if key in file.files}
    except FileNotFoundError:
        raise ResultsError(f"{name}: there is no such file. Fix: run it again.") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ResultsError(f"{name}: can't be read ({one_line(error)[:80]}). Fix: run it again.") from error
    absent = [key for key in ("steps", "dispatch_counts") if key not in arrays]
    if absent:
        raise ResultsError(f"{name}: lacks {' and '.join(absent)} (an older run). Fix: run it again.")
    steps_S, counts_SLWE = arrays["steps"], arrays["dispatch_counts"]
    if counts_SLWE.ndim != 4 or len(counts_SLWE) != len(steps_S) or not counts_SLWE.size:
        raise ResultsError(
            f"{name}: dispatch_counts must be [steps, layers, ranks, experts] with one entry a step, not "
            f"{list(counts_SLWE.shape)} beside {len(steps_S)} steps. Fix: run it again."
        )
    return name, arrays


def load_routing(run: Run) -> Routing:
    """The routing of one run folder.

    Raises:
        ResultsError: no routing.npz, one that can't be read, or counts that are not of every rank and expert.
    """
    name, arrays = routing_arrays(run, "target_shares", *_PLACES)
    steps_S, counts_SLWE = arrays["steps"], arrays["dispatch_counts"]
    num_ranks, num_experts = counts_SLWE.shape[2:]
    if num_experts % num_ranks:
        raise ResultsError(
            f"{name}: {num_experts} experts on {num_ranks} ranks don't lie evenly, and counts are by expert only. "
            "Fix: train with a multiple of the ranks."
        )
    if "replica_counts" in arrays:
        raise ResultsError(f"{name}: experts have replicas, and counts are by expert only. Fix: leave this system out.")
    if "expert_of_slot" in arrays:
        places_SLE = arrays["expert_of_slot"].astype(np.int64)
        if places_SLE.shape != (*counts_SLWE.shape[:2], num_experts):
            raise ResultsError(f"{name}: expert_of_slot is {list(places_SLE.shape)}. Fix: run it again.")
        counts_SLWE = np.take_along_axis(counts_SLWE, places_SLE[:, :, None, :], axis=3)
    order = np.argsort(steps_S, kind="stable")
    target_WW, flaw = None, ""
    if "target_shares" in arrays:
        target_WE = arrays["target_shares"]
        if target_WE.shape != (num_ranks, num_experts):
            flaw = f"{name}: target_shares is {list(target_WE.shape)}, not {[num_ranks, num_experts]}, and left out."
        elif (target_WE < 0).any() or not np.allclose(target_WE.sum(axis=1), 1, atol=_ROW_SUM_TOLERANCE):
            flaw = f"{name}: target_shares has rows that are no shares summing to 1, and is left out."
        else:
            target_WW = by_rank(target_WE, num_ranks)
    return Routing(steps_S[order], by_rank(counts_SLWE, num_ranks)[order], target_WW, flaw)
