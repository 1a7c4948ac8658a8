"""FSMoE's degree of pipelining: how many chunks r an MoE layer is cut into, for each layer and direction.

Pan et al., ASPLOS 2025 (arXiv 2501.10714), section 4. A chunk's dispatch or combine takes a, its all-gather g, its
reduce-scatter s and its experts e, each alpha + work / r; G is the slice of gradient that is all-reduced between the
last dispatch and the first combine, on the same link as these (0 in forward). The layer then takes

    case 1: f1 = 2 r a + G              the link between nodes is never idle
    case 2: f2 = 2 a + g + s + r e      the experts are never idle
    case 3: f3 = 2 r a + g + s          all-to-alls alone decide
    case 4: f4 = 2 a + r g + r s        the link in the node is never idle

Which case holds is decided by seven predicates; where g = s that is the largest of the four, and elsewhere nearly so.
`best_degree` therefore enumerates max(f1, ..., f4); `slsqp_degree` is the paper's algorithm 1 on the cases. Left out is
a rule of the released code: r = 1 where an unsplit all-to-all takes less than 1 ms. It would make the layers whose
degrees differ between the directions fewer than they are here, and here they are fewer than the paper's 912 of 1458.

Degrees and G may be arrays (float64, broadcast together). Seconds throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from moe.schedules import LayerTimes, Part

Array = NDArray[np.float64]
DEGREES = (1, 2, 4, 8)
"""What the released code tries."""


class Chunk(NamedTuple):
    """Seconds of one chunk's operations: a, g, s, e."""

    a: Any
    g: Any
    s: Any
    e: Any


class Choice(NamedTuple):
    """A degree, the seconds that the layer then takes, and the case (1 to 4) that says why."""

    degree: int
    seconds: float
    case: int


def chunk_of(times: LayerTimes, degree: Any) -> Chunk:
    """Seconds of a chunk when there are r of them: t_op,r = alpha_op + work_op / r (section 4.1)."""

    def of(part: Part) -> Any:
        return part.alpha_s + part.work_s / degree

    return Chunk(of(times.all_to_all), of(times.all_gather), of(times.reduce_scatter), of(times.experts))


def case_seconds(times: LayerTimes, degree: Any, slice_s: Any = 0.0) -> tuple[Any, Any, Any, Any]:
    """f1, f2, f3, f4.

    Args:
        times: of the layer in one direction.
        degree: r >= 1, not necessarily whole.
        slice_s: G.
    """
    r, (a, g, s, e) = degree, chunk_of(times, degree)
    return 2 * r * a + slice_s, 2 * a + g + s + r * e, 2 * r * a + g + s, 2 * a + r * (g + s)


def layer_s(times: LayerTimes, degree: Any, slice_s: Any = 0.0) -> Any:
    """max(f1, f2, f3, f4), seconds of the layer; arguments as in `case_seconds`."""
    return np.maximum.reduce(np.broadcast_arrays(*case_seconds(times, degree, slice_s)))


def window_s(times: LayerTimes, degree: Any) -> Any:
    """The longest G that does not lengthen the layer: what the link between nodes idles, at least g + s (section 5's
    t_olp,moe: max(f2, f3, f4) - 2 r a says its three lines in one)."""
    return layer_s(times, degree) - case_seconds(times, degree)[0]


def _margins(times: LayerTimes, degree: float, slice_s: float) -> dict[str, float]:
    """By how much each predicate holds: > 0 where it does (table 2's Q1 to Q6; Q7 is Q5)."""
    r, (a, g, s, e) = degree, chunk_of(times, degree)
    return {
        "Q1": a - g,
        "Q2": r * e - 2 * (r - 1) * a,
        "Q3": r * e - (r - 1) * (g + s),
        "Q4": slice_s - (g + s),
        "Q5": slice_s - (r * e - 2 * (r - 1) * a + g + s),
        "Q6": slice_s - (r * g + r * s - 2 * (r - 1) * a),
    }


@dataclass(frozen=True)
class _Branch:
    """Predicates that lead to a case: those that hold and those that don't."""

    case: int
    holding: tuple[str, ...]
    failing: tuple[str, ...]

    def margins(self, times: LayerTimes, degree: float, slice_s: float) -> Array:
        """How far inside its region a degree is, one number a predicate; all >= 0 inside."""
        margins = _margins(times, degree, slice_s)
        return np.array([margins[q] for q in self.holding] + [-margins[q] for q in self.failing])


_BRANCHES = (
    _Branch(1, ("Q1", "Q4"), ("Q2",)),
    _Branch(1, ("Q1", "Q2", "Q5"), ()),
    _Branch(1, ("Q6",), ("Q1", "Q3")),
    _Branch(1, ("Q3", "Q5"), ("Q1",)),
    _Branch(2, ("Q1", "Q2"), ("Q5",)),
    _Branch(2, ("Q3",), ("Q1", "Q5")),
    _Branch(3, ("Q1",), ("Q2", "Q4")),
    _Branch(4, (), ("Q1", "Q3", "Q6")),
)
"""Every layer is in one of them, for any degree."""


def case_of(times: LayerTimes, degree: int, slice_s: float = 0.0) -> int:
    """The case that the paper's predicates say, 1 to 4."""
    margins = _margins(times, degree, slice_s)
    for branch in _BRANCHES:
        if all(margins[q] > 0 for q in branch.holding) and all(margins[q] <= 0 for q in branch.failing):
            return branch.case
    raise AssertionError(f"no case of {times} at r={degree}, G={slice_s}")


def best_degree(times: LayerTimes, slice_s: float = 0.0, degrees: Sequence[int] = DEGREES) -> Choice:
    """The degree of least max(f1, ..., f4), by trying all; of equally good ones the first.

    Args:
        times: of the layer in one direction.
        slice_s: G.
        degrees: r to choose from, each >= 1.
    """
    assert degrees and min(degrees) >= 1, degrees
    seconds = layer_s(times, np.array(degrees, dtype=np.float64), slice_s)
    degree = degrees[int(seconds.argmin())]
    return Choice(degree, float(seconds.min()), case_of(times, degree, slice_s))


def slsqp_degree(
    times: LayerTimes, slice_s: float = 0.0, degrees: Sequence[int] = DEGREES, starts: Sequence[float] = DEGREES
) -> Choice:
    """The paper's algorithm 1: the least f of each case where that case holds, over real r, by SLSQP; then rounded.

    As in the released code each way into a case is a problem of its own, and its r is rounded to the `degrees` on both
    sides, which count only where the case still holds. Ours: a start is tried where the one before it failed, and if no
    degree is left (the region of the optimum lies between two) the first one stands.

    Args:
        times, slice_s, degrees: as in `best_degree`.
        starts: of the solver; the released code's are 1, 2, 4 and 8.
    """
    unit_s = float(layer_s(times, 1.0, slice_s))
    assert unit_s > 0, f"a layer without work has no best degree: {times}"
    found: list[Choice] = []
    for branch in _BRANCHES:
        attempts = (_solved(times, slice_s, branch, start, max(degrees), unit_s) for start in starts)
        solution = next((degree for degree in attempts if degree is not None), None)
        if solution is not None:
            for degree in _rounded(solution, degrees):
                if (branch.margins(times, degree, slice_s) >= -1e-9 * unit_s).all():
                    seconds = float(case_seconds(times, degree, slice_s)[branch.case - 1])
                    found.append(Choice(degree, seconds, branch.case))
    if not found:
        first = degrees[0]
        return Choice(first, float(layer_s(times, first, slice_s)), case_of(times, first, slice_s))
    return min(found, key=lambda choice: (choice.seconds, choice.degree))


def _solved(
    times: LayerTimes, slice_s: float, branch: _Branch, start: float, most: float, unit_s: float
) -> float | None:
    """Real r of least f in the branch's region, None if the solver finds none. In units of `unit_s`, near 1."""
    solved = minimize(
        lambda x: case_seconds(times, float(x[0]), slice_s)[branch.case - 1] / unit_s,
        np.array([start]),
        method="SLSQP",
        options={"maxiter": 30},  # a region without a point would go on to 100
        bounds=[(1.0, float(most))],
        constraints={"type": "ineq", "fun": lambda x: branch.margins(times, float(x[0]), slice_s) / unit_s},
    )
    return float(solved.x[0]) if solved.success and math.isfinite(solved.x[0]) else None


def _rounded(degree: float, degrees: Sequence[int]) -> set[int]:
    """The nearest of `degrees` below and above."""
    below, above = [d for d in degrees if d <= degree + 1e-6], [d for d in degrees if d >= degree - 1e-6]
    return {max(below, default=degrees[0]), min(above, default=degrees[-1])}
