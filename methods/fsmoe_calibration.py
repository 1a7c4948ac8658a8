"""Costs for FSMoE's testbeds from the times of table 2, beside figure 5's fits (arXiv 2501.10714).

The paper's two sources disagree: by figure 5 the operations of a layer take other times than table 2 measures of them
(experts a third on both testbeds; all-gather on testbed A four times as much). Here latencies stay figure 5's, and each
operation's beta is fitted to table 2's four times (two models, two directions) by relative errors (ours).

Neither says what collectives in a node cost those between nodes that run beside them, where GPUs reach both over the
same PCIe. `CONTENTION` does, a single number (ours).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from methods.fsmoe_paper import (
    ATTENTION_CALLS,
    MILLISECONDS,
    MODELS,
    TABLE_2,
    TABLE_2_BATCH,
    TABLE_2_LENGTH,
    TABLE_2_OPERATIONS,
    TESTBEDS,
    Testbed,
    layer_work,
)
from moe.costs import AlphaBeta
from moe.schedules import BACKWARD_WORK

CONTENTION = 1.4
"""How many times as long a collective takes while one on the other link runs. Fitted (one decimal) to a single number
of the paper, FSMoE's 1.18 in table 5 on testbed A with table 2's costs; what it gives elsewhere is a prediction."""


def table_2_calls(testbed: Testbed) -> Iterator[tuple[str, float, float, float]]:
    """Every time of table 2: operation (as in `Testbed.costs`), latencies that it pays, its work, and seconds.

    All-to-all is dispatch and combine; the collectives in a node are the experts' and the sequence's, which explains
    testbed B's times to a few per cent (inferred).

    Args:
        testbed: of the paper.
    """
    models = {model.name: model for model in MODELS}
    for (testbed_name, model_name), by_direction in TABLE_2.items():
        if testbed_name != testbed.name:
            continue
        layer = models[model_name].layer(TABLE_2_BATCH, TABLE_2_LENGTH)
        work = layer_work(layer, testbed)
        for direction, milliseconds in by_direction.items():
            times = BACKWARD_WORK if direction == "backward" else 1
            in_node = 2, work.shard_bytes + work.sequence_bytes
            calls: dict[str, tuple[str, float, float]] = {
                "all_to_all": ("all_to_all", 2, 2 * work.all_to_all_bytes),
                "all_gather": ("all_gather", *in_node),
                "reduce_scatter": ("reduce_scatter", *in_node),
                "experts": ("gemm", times * work.expert_calls, times * work.expert_work),
                "all_reduce": ("all_reduce", 1, work.gradient_bytes),
                "attention": (
                    "attention",
                    times * ATTENTION_CALLS,
                    times * layer.attention_work() / testbed.node_size,
                ),
            }
            for operation, value in zip(TABLE_2_OPERATIONS, milliseconds, strict=True):
                if operation in calls and value:
                    yield (*calls[operation], value * MILLISECONDS)


def calibrated(testbed: Testbed) -> Testbed:
    """The testbed with table 2's betas, gate and order, without contention.

    Args:
        testbed: with figure 5's costs.
    """
    rows = list(table_2_calls(testbed))
    costs = {}
    for operation, cost in testbed.costs.items():
        own = np.array([row[1:] for row in rows if row[0] == operation])
        calls_N, work_N, seconds_N = own.T
        # Least squares of ((calls alpha + work beta) / seconds - 1) over beta.
        wanted_N, slope_N = 1 - calls_N * cost.alpha_s / seconds_N, work_N / seconds_N
        costs[operation] = AlphaBeta(cost.alpha_s, float(slope_N @ wanted_N / (slope_N @ slope_N)))
    gate_ms = [
        milliseconds[TABLE_2_OPERATIONS.index("routing")] + milliseconds[TABLE_2_OPERATIONS.index("order")]
        for (name, _), by_direction in TABLE_2.items()
        if name == testbed.name
        for milliseconds in by_direction.values()
    ]
    return replace(testbed, costs=costs, costs_from="table 2", gate_s=float(np.mean(gate_ms)) * MILLISECONDS)


def contended(testbed: Testbed, contention: float = CONTENTION) -> Testbed:
    """The testbed with links that slow each other."""
    return replace(testbed, contention=contention, costs_from=f"{testbed.costs_from}, contention {contention:g}")


CALIBRATED = {name: calibrated(testbed) for name, testbed in TESTBEDS.items()}
VARIANTS = {name: (testbed, CALIBRATED[name], contended(CALIBRATED[name])) for name, testbed in TESTBEDS.items()}
"""By testbed: figure 5's costs, table 2's, and the latter with contention."""
