"""Schedules that FSMoE is compared with (arXiv 2501.10714, sections 6.3 and 6.4), as plans for `moe.schedules`.

| schedule | all-to-all beside experts | dense gradients | chunks |
|---|---|---|---|
| `sequential` (DeepSpeed-MoE) | no | in the end | 1 |
| `tutel_overlap` | yes | in the end | 1, 2, 4 or 8 by PipeMoE's model, one number for both directions |
| `tutel_improved` | yes | beside dense parts | the same |
| `pipemoe` | yes | in the end | any number up to 8 by PipeMoE's model, one for both directions |
| `pipemoe_lina` | yes | pieces of 30 MB in any gap of the link | PipeMoE's |

In all of them collectives in a node, the sequence's too, wait for those between nodes. That Tutel's gradients wait for
the end is inferred from what FSMoE calls improved.

Ours: PipeMoE's model knows no collectives in the node, of which half of both is added to its all-to-all; the one degree
is that of least time of forward and backward together; Tutel tries its degrees on the job, here PipeMoE's model chooses
among them. Of Lina is left out that it cuts each tensor separately (here a layer's gradient is one) and sends nothing
while the combine computes.
"""

from __future__ import annotations

from collections.abc import Sequence

from moe.schedules import Builder, LayerPlan, LayerTimes, LayerWork, StepPlan, layer_times, planned
from moe.simulator import Costs

TUTEL_DEGREES = (1, 2, 4, 8)
PIPEMOE_DEGREES = tuple(range(1, 9))
LINA_PIECE_BYTES = 30 * 2**20
"""Of a gradient: its micro-operations (Lina, ATC 2023)."""


def pipemoe_s(times: LayerTimes, degree: int) -> float:
    """PipeMoE's model (INFOCOM 2023): t(r) = max(2 r t_d, 2 t_d + r t_e), which its four cases come down to.

    Args:
        times: of a layer in one direction; t_d is of an all-to-all, to which collectives in the node add (half of both,
            as they wait for each other; ours).
        degree: r >= 1.

    Returns:
        Seconds.
    """
    one_link = times.on_one_link()
    exchange_s = one_link.all_to_all.alpha_s + one_link.all_to_all.work_s / degree
    experts_s = one_link.experts.alpha_s + one_link.experts.work_s / degree
    return max(2 * degree * exchange_s, 2 * exchange_s + degree * experts_s)


def pipemoe_degree(work: LayerWork, costs: Costs, degrees: Sequence[int] = PIPEMOE_DEGREES) -> int:
    """One degree for forward and backward, of least time of both together (ours); of equally good ones the first.

    Args:
        work: of the layer.
        costs: of its operations.
        degrees: to choose from.
    """
    forward, backward = layer_times(work, costs), layer_times(work, costs, backward=True)
    return min(degrees, key=lambda degree: pipemoe_s(forward, degree) + pipemoe_s(backward, degree))


def _in_the_end(layers: Sequence[LayerWork], degrees: Sequence[int], carried_bytes: float) -> StepPlan:
    """All gradients in one all-reduce after backward."""
    existing = carried_bytes + sum(work.gradient_bytes for work in (layers[1:] if carried_bytes else layers))
    return StepPlan(tuple(LayerPlan(r, r) for r in degrees), tail_bytes=existing, one_link=True)


def plan_sequential(layers: Sequence[LayerWork], costs: Costs, carried_bytes: float = 0.0) -> StepPlan:
    """Nothing beside anything."""
    return _in_the_end(layers, [1] * len(layers), carried_bytes)


def plan_tutel_overlap(layers: Sequence[LayerWork], costs: Costs, carried_bytes: float = 0.0) -> StepPlan:
    """Tutel with an adaptive degree, chosen by PipeMoE's model (ours)."""
    return _in_the_end(layers, [pipemoe_degree(work, costs, TUTEL_DEGREES) for work in layers], carried_bytes)


def plan_pipemoe(layers: Sequence[LayerWork], costs: Costs, carried_bytes: float = 0.0) -> StepPlan:
    """PipeMoE."""
    return _in_the_end(layers, [pipemoe_degree(work, costs) for work in layers], carried_bytes)


def plan_tutel_improved(
    layers: Sequence[LayerWork], costs: Costs, carried_bytes: float = 0.0, whole_step: bool = False
) -> StepPlan:
    """Tutel, with a layer's gradients all-reduced beside the dense part that follows in backward.

    Args:
        layers, costs, carried_bytes: as of a `moe.schedules.Planner`.
        whole_step: what is carried belongs to this step; else the step is one period of many, and the first layer's
            gradient is the next one's.
    """
    degrees = [pipemoe_degree(work, costs, TUTEL_DEGREES) for work in layers]
    before = [*(work.gradient_bytes for work in layers[1:]), carried_bytes]  # of layer i: what layer i + 1 left
    plans = tuple(LayerPlan(r, r, dense_bytes=left) for r, left in zip(degrees, before, strict=True))
    tail_bytes = layers[0].gradient_bytes if whole_step or not carried_bytes else 0.0
    return StepPlan(plans, tail_bytes=tail_bytes, one_link=True)


def plan_pipemoe_lina(layers: Sequence[LayerWork], costs: Costs, carried_bytes: float = 0.0) -> StepPlan:
    """PipeMoE, with gradients in pieces that Lina sends when no all-to-all is waiting."""
    degrees = [pipemoe_degree(work, costs) for work in layers]
    return StepPlan(tuple(LayerPlan(r, r) for r in degrees), filler_bytes=LINA_PIECE_BYTES, one_link=True)


SCHEDULES: dict[str, Builder] = {
    "sequential": planned(plan_sequential),
    "tutel_overlap": planned(plan_tutel_overlap),
    "tutel_improved": planned(plan_tutel_improved),
    "pipemoe": planned(plan_pipemoe),
    "pipemoe_lina": planned(plan_pipemoe_lina),
}
