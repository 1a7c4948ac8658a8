"""FSMoE's adaptive gradient partitioning: how much of the dense gradient is all-reduced where in backward.

Pan et al., ASPLOS 2025 (arXiv 2501.10714), section 5. In backward a layer's mixture of experts comes first, then its
dense part (attention), whose gradients exist when that ends and are all-reduced later: in the middle of a mixture
(`moe` slice), beside a dense part (`dense` slice), or when backward has ended (`tail`).

1. Greedy: every window in which the link between nodes idles takes what it can hide of what exists and is unsent.
2. Where something is left before the last layer, differential evolution puts more into the mixtures, if these then take
   less longer than the tail gets shorter.

Layers are in the order of backward throughout. Ours: the paper adds up a layer's two windows, here each slice pays the
latency of its own all-reduce, as it does when it runs; and the search is over shares of what may still be sent, so that
every point of it is feasible (the released code searches bytes under a constraint).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import differential_evolution

from methods.fsmoe_solver import DEGREES, best_degree, case_seconds, layer_s, window_s
from moe.costs import AlphaBeta
from moe.schedules import LayerTimes

Array = NDArray[np.float64]
MARGIN = 0.2
"""By which the search goes beyond shares of 0 and 1, which it then takes for these: nothing and all are often the best,
and a search of [0, 1] alone never draws its ends."""


@dataclass(frozen=True)
class BackwardLayer:
    """What the partition needs to know of a layer.

    Args:
        times: of its mixture of experts, in backward.
        dense_s: seconds that the link between nodes idles beside its dense part.
        gradient_bytes: what exists when its dense part has ended.
    """

    times: LayerTimes
    dense_s: float
    gradient_bytes: float


@dataclass(frozen=True)
class Partition:
    """Slices by layer, in the order of backward.

    Args:
        moe_bytes, dense_bytes: in the middle of the mixtures, and beside the dense parts.
        tail_bytes: after all.
        degrees: of the mixtures' backward, the best for their slices.
    """

    moe_bytes: tuple[float, ...]
    dense_bytes: tuple[float, ...]
    tail_bytes: float
    degrees: tuple[int, ...]


def all_reduce_s(size_bytes: float, all_reduce: AlphaBeta) -> float:
    """Seconds of a slice; none for an empty one."""
    return all_reduce.predict(size_bytes) if size_bytes > 0 else 0.0


def hidden_bytes(window: float, all_reduce: AlphaBeta) -> float:
    """The slice whose all-reduce takes that many seconds; 0 where its latency alone takes longer (g_inv)."""
    return max(0.0, window - all_reduce.alpha_s) / all_reduce.beta_s_per_byte


def backward_s(layers: Sequence[BackwardLayer], made: Partition, all_reduce: AlphaBeta) -> float:
    """Modelled seconds of backward, all-reduces included."""
    total = all_reduce_s(made.tail_bytes, all_reduce)
    for layer, moe, dense, degree in zip(layers, made.moe_bytes, made.dense_bytes, made.degrees, strict=True):
        total += float(layer_s(layer.times, degree, all_reduce_s(moe, all_reduce)))
        total += max(layer.dense_s, all_reduce_s(dense, all_reduce))
    return total


def greedy(
    layers: Sequence[BackwardLayer],
    all_reduce: AlphaBeta,
    carried_bytes: float = 0.0,
    degrees: Sequence[int] = DEGREES,
) -> Partition:
    """Step 1. What does not fit in a layer's windows is carried to the next.

    Args:
        layers: at least one.
        all_reduce: its cost.
        carried_bytes: of gradient that is there when backward begins.
        degrees: to choose from.
    """
    unsent, moe, dense, chosen = carried_bytes, [], [], []
    for layer in layers:
        degree = best_degree(layer.times, 0.0, degrees).degree
        moe.append(min(unsent, hidden_bytes(float(window_s(layer.times, degree)), all_reduce)))
        unsent -= moe[-1]
        dense.append(min(unsent, hidden_bytes(layer.dense_s, all_reduce)))
        unsent += layer.gradient_bytes - dense[-1]
        chosen.append(degree)
    return Partition(tuple(moe), tuple(dense), unsent, tuple(chosen))


def movable_bytes(layers: Sequence[BackwardLayer], made: Partition, carried_bytes: float = 0.0) -> Array:
    """[N], the most that each mixture's slice can grow if no other does: what exists before it and is in the tail."""
    existing = list(accumulate((layer.gradient_bytes for layer in layers[:-1]), initial=carried_bytes))
    sent = accumulate(m + d for m, d in zip(made.moe_bytes, made.dense_bytes, strict=True))
    slack = np.array(existing) - np.array(list(sent))
    # More in one layer leaves less for all later ones, whose slices stay.
    return np.minimum.accumulate(slack[::-1])[::-1].clip(min=0)


def partition(
    layers: Sequence[BackwardLayer],
    all_reduce: AlphaBeta,
    carried_bytes: float = 0.0,
    degrees: Sequence[int] = DEGREES,
    seed: int = 0,
    generations: int = 100,
) -> Partition:
    """Both steps; the second's result only where it is better.

    Args:
        layers, all_reduce, carried_bytes, degrees: as in `greedy`.
        seed: of the search.
        generations: of the search, at most.
    """
    first = greedy(layers, all_reduce, carried_bytes, degrees)
    movable_N = movable_bytes(layers, first, carried_bytes)
    if not (movable_N > 0).any():
        return _with_best_degrees(layers, first, all_reduce, degrees)
    search = _Search(layers, first, all_reduce, movable_N, degrees)
    found = differential_evolution(
        search.backward_s,
        bounds=[(-MARGIN, 1 + MARGIN)] * len(layers),
        x0=np.zeros(len(layers)),
        seed=seed,
        maxiter=generations,
        popsize=max(3, 60 // len(layers)),  # scipy multiplies by the number of layers
        polish=False,
        vectorized=True,
        updating="deferred",
    )
    extra = search.extra_bytes(found.x[:, None])[:, 0]
    moe = tuple(float(m + x) for m, x in zip(first.moe_bytes, extra, strict=True))
    second = replace(first, moe_bytes=moe, tail_bytes=max(0.0, first.tail_bytes - float(extra.sum())))
    candidates = [_with_best_degrees(layers, made, all_reduce, degrees) for made in (first, second)]
    return min(candidates, key=lambda made: backward_s(layers, made, all_reduce))


def _with_best_degrees(
    layers: Sequence[BackwardLayer], made: Partition, all_reduce: AlphaBeta, degrees: Sequence[int]
) -> Partition:
    """Degrees chosen anew, for the slices that the mixtures have in the end."""
    slices = zip(layers, made.moe_bytes, strict=True)
    chosen = (best_degree(layer.times, all_reduce_s(moe, all_reduce), degrees).degree for layer, moe in slices)
    return replace(made, degrees=tuple(chosen))


class _Search:
    """What step 2 minimises. A point u [N, S], S points at once, says which share of what each mixture may still send
    it does send; no share, no extra."""

    def __init__(
        self,
        layers: Sequence[BackwardLayer],
        first: Partition,
        all_reduce: AlphaBeta,
        movable_N: Array,
        degrees: Sequence[int],
    ) -> None:
        degrees_R = np.array(degrees, dtype=np.float64)
        self.at_least_NR = np.stack([layer_s(layer.times, degrees_R) for layer in layers])
        self.exchanges_NR = np.stack([case_seconds(layer.times, degrees_R)[0] for layer in layers])
        self.first_moe_N = np.array(first.moe_bytes)
        self.tail_bytes = first.tail_bytes
        self.movable_N = movable_N
        self.all_reduce = all_reduce

    def extra_bytes(self, shares_NS: Array) -> Array:
        """[N, S] bytes on top of step 1's slices."""
        extra_NS = np.empty_like(shares_NS)
        sent_S = np.zeros(shares_NS.shape[1])
        for layer, movable in enumerate(self.movable_N):
            extra_NS[layer] = shares_NS[layer].clip(0, 1) * (movable - sent_S).clip(min=0)
            sent_S += extra_NS[layer]
        return extra_NS

    def backward_s(self, shares_NS: Array) -> Array:
        """[S] seconds of all mixtures and the tail."""
        extra_NS = self.extra_bytes(shares_NS)
        slices_NS = self._all_reduce_s(self.first_moe_N[:, None] + extra_NS)
        each_NSR = np.maximum(self.at_least_NR[:, None], self.exchanges_NR[:, None] + slices_NS[..., None])
        tail_S = self._all_reduce_s((self.tail_bytes - extra_NS.sum(0)).clip(min=0))
        return each_NSR.min(-1).sum(0) + tail_S

    def _all_reduce_s(self, sizes: Array) -> Array:
        return np.where(sizes > 0, self.all_reduce.alpha_s + self.all_reduce.beta_s_per_byte * sizes, 0.0)


def in_whole_pairs(made: Partition, element_bytes: int = 4) -> Partition:
    """The same with an even number of elements in every slice but the tail, which takes what is left.

    The released code rounds slices up; here the places where the gradient is cut are rounded down (ours), so that all
    slices together hold what they held and none reaches for what does not exist yet.

    Args:
        made: slices in bytes, not necessarily whole.
        element_bytes: of one gradient.
    """
    pair = 2 * element_bytes
    sizes = [size for both in zip(made.moe_bytes, made.dense_bytes, strict=True) for size in both]
    total = sum(sizes) + made.tail_bytes
    ends = [float(pair * np.floor(end / pair)) for end in accumulate(sizes)]
    whole = [end - start for start, end in zip([0.0, *ends], ends, strict=False)]
    return replace(made, moe_bytes=tuple(whole[::2]), dense_bytes=tuple(whole[1::2]), tail_bytes=total - ends[-1])
