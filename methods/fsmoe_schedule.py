"""FSMoE's schedule as a plan: a degree for each layer and direction, and the gradient in slices (arXiv 2501.10714).

`fsmoe` runs collectives in a node beside those between nodes; `fsmoe_no_iio` (no intra-inter overlap, the paper's
ablation) lets them wait for each other, the sequence's too, and is the same otherwise. The plan knows no contention of
the two links: with it some small layers are faster without the overlap, and where it is strong (2, see
`experiments.simulate contention`) little is gained over Tutel.
"""

from __future__ import annotations

from collections.abc import Sequence

from methods.fsmoe_partition import BackwardLayer, in_whole_pairs, partition
from methods.fsmoe_solver import best_degree
from moe.schedules import Builder, LayerPlan, LayerTimes, LayerWork, StepPlan, layer_times, planned
from moe.simulator import Costs


def dense_window_s(work: LayerWork, costs: Costs, one_link: bool = False) -> float:
    """Seconds that the link between nodes idles beside a layer's dense part in backward: the dense part's own and,
    unless they wait for that link, those of the tensor-parallel collectives around it, which are in the node.

    Args:
        work: of the layer.
        costs: of `all_gather` and `reduce_scatter`.
        one_link: collectives in the node wait for those between nodes.
    """
    if one_link or not work.sequence_bytes:
        return work.dense_backward_s
    around = (costs[operation].predict(work.sequence_bytes) for operation in ("all_gather", "reduce_scatter"))
    return work.dense_backward_s + sum(around)


def plan_fsmoe(
    layers: Sequence[LayerWork],
    costs: Costs,
    carried_bytes: float = 0.0,
    one_link: bool = False,
    whole_step: bool = False,
) -> StepPlan:
    """The paper's plan of a step.

    Args:
        layers: in the order of the forward pass.
        costs: of their operations.
        carried_bytes: of gradient that is there when backward begins.
        one_link: collectives in the node wait for those between nodes.
        whole_step: what is carried belongs to this step, as a language model's head does; else the step is one period
            of many, and the first layer's gradient is the next one's.
    """

    def times(work: LayerWork, backward: bool) -> LayerTimes:
        both = layer_times(work, costs, backward)
        return both.on_one_link() if one_link else both

    backward = [
        BackwardLayer(times(work, backward=True), dense_window_s(work, costs, one_link), work.gradient_bytes)
        for work in reversed(layers)
    ]
    if carried_bytes and not whole_step:
        backward[-1] = BackwardLayer(backward[-1].times, backward[-1].dense_s, 0.0)
    made = in_whole_pairs(partition(backward, costs["all_reduce"], carried_bytes))
    slices = zip(made.degrees, made.moe_bytes, made.dense_bytes, strict=True)
    plans = [
        LayerPlan(best_degree(times(work, backward=False)).degree, degree, moe_bytes, dense_bytes)
        for work, (degree, moe_bytes, dense_bytes) in zip(reversed(layers), slices, strict=True)
    ]
    return StepPlan(tuple(plans[::-1]), tail_bytes=made.tail_bytes, one_link=one_link)


def plan_fsmoe_no_iio(layers: Sequence[LayerWork], costs: Costs, carried_bytes: float = 0.0) -> StepPlan:
    """The same without overlap of links."""
    return plan_fsmoe(layers, costs, carried_bytes, one_link=True)


SCHEDULES: dict[str, Builder] = {
    "fsmoe_no_iio": planned(plan_fsmoe_no_iio),
    "fsmoe": planned(plan_fsmoe),
}
