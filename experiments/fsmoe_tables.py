"""FSMoE's tables 2 and 5 and figure 5 by simulation: every schedule on the paper's layers and testbeds.

No system's code runs: durations come from the paper's own numbers, in several variants (`methods.fsmoe_calibration`).
Every row says where its costs are from, what in them is ours, and how our number came to be (`Kind`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Literal, TypedDict

from baselines import overlap_schedules, schemoe_schedule
from methods import fsmoe_schedule
from methods.fsmoe_calibration import CALIBRATED, CONTENTION, TABLE_5_VARIANTS, contended
from methods.fsmoe_paper import (
    COMMUNICATION_SIZES,
    ELEMENT_BYTES,
    FIGURE_5_R2,
    GEMM_SIZES,
    MODELS,
    OTHER_DEGREE_CASES,
    TABLE_2,
    TABLE_2_BATCH,
    TABLE_2_LENGTH,
    TABLE_2_OPERATIONS,
    TABLE_5,
    TESTBEDS,
    Testbed,
    configured_layers,
    layer_work,
)
from methods.fsmoe_partition import all_reduce_s
from moe.schedules import INTER, INTRA, Builder, LayerWork, layer_times
from moe.simulator import Span, makespan_s, simulate

SCHEDULES: dict[str, Builder] = {
    **overlap_schedules.SCHEDULES,
    **schemoe_schedule.SCHEDULES,
    **fsmoe_schedule.SCHEDULES,
}
"""All schedules by name."""


Kind = Literal["simulated", "modelled", "fitted"]
"""How our number came to be: as the end of a timeline, by formulas without one, or by a fit to the paper's number that
stands beside it (so that the two say nothing about each other)."""


class Row(TypedDict):
    """A number beside the paper's.

    Attributes:
        quantity: what of.
        testbed: of the paper; both where it gives one number for both.
        costs: where the durations of operations are from.
        paper: the paper's own number, measured; None where it states none.
        ours: our number.
        unit: of both.
        kind: how ours came to be.
        source: where the paper's stands, what is not verified, what is ours, what is not reproduced.
    """

    quantity: str
    testbed: str
    costs: str
    paper: float | None
    ours: float
    unit: str
    kind: Kind
    source: str


def row_of(
    quantity: str, testbed: Testbed, paper: float | None, ours: float, unit: str, kind: Kind, source: str
) -> Row:
    """A row; arguments as of `Row`, and the testbed says its costs and what in them is ours."""
    return Row(
        quantity=quantity,
        testbed=testbed.name,
        costs=testbed.costs_from,
        paper=paper,
        ours=ours,
        unit=unit,
        kind=kind,
        source="; ".join([source, *testbed.remarks]),
    )


def simulated(schedule: str, layers: Sequence[LayerWork], testbed: Testbed, carried_bytes: float = 0.0) -> list[Span]:
    """Timeline of a step.

    Args:
        schedule: name in `SCHEDULES`.
        layers: in the order of the forward pass.
        testbed: says costs and contention.
        carried_bytes: of gradient that is there when backward begins (`moe.schedules.step_tasks`).
    """
    tasks = SCHEDULES[schedule](layers, testbed.costs, carried_bytes)
    return simulate(tasks, testbed.costs, {(INTER, INTRA): testbed.contention})


TABLE_5_SOURCE = (
    "Table 5, mean of ratios over the configured layers; k = 2, f = * as f = 1, units of the fits, and that "
    "gradients of the layer before, equally large, are hidden in a layer not verified"
)
ORDER_ONLY = "without compression and with nothing sent in the node ScheMoE is PipeMoE"
DEGREES_SOURCE = f"section 4; {TABLE_5_SOURCE}; the released code's r = 1 for all-to-alls below 1 ms left out"
NOT_REPRODUCED = "not reproduced"


def table_5_rows(every: int = 1) -> list[Row]:
    """Mean speed-up over Tutel on the 1458 layers of each testbed, with all variants of costs, and of how many layers
    the best degrees differ.

    A layer stands in an endless row of its like: the gradients of one are reduced in the next.

    Args:
        every: one layer in so many only (for a quick look).
    """
    return [
        row for variants in TABLE_5_VARIANTS.values() for testbed in variants for row in _table_5_rows(testbed, every)
    ]


def _table_5_rows(testbed: Testbed, every: int) -> list[Row]:
    works = _works(testbed, every)
    rows = []
    for schedule, speedup in _speedups(SCHEDULES, testbed, works).items():
        source = f"{TABLE_5_SOURCE}; {ORDER_ONLY}" if schedule == "schemoe_order_only" else TABLE_5_SOURCE
        rows.append(_table_5_row(schedule, testbed, speedup, len(works), source))
    plans = {
        work: fsmoe_schedule.plan_fsmoe([work], testbed.costs, work.gradient_bytes).layers[0] for work in set(works)
    }
    different = sum(plans[work].degree != plans[work].backward_degree for work in works)
    paper = OTHER_DEGREE_CASES.get(testbed.name) if every == 1 else None
    quantity = "layers of unlike best degrees forward and backward"
    source = f"{DEGREES_SOURCE}; {NOT_REPRODUCED}" if paper else DEGREES_SOURCE
    return [*rows, row_of(quantity, testbed, paper, different, "layers", "modelled", source)]


def _works(testbed: Testbed, every: int) -> list[LayerWork]:
    """One in so many of the 1458 layers."""
    return [layer_work(layer, testbed) for layer in configured_layers(testbed)][::every]


def _speedups(schedules: Iterable[str], testbed: Testbed, works: Sequence[LayerWork]) -> dict[str, float]:
    """Mean speed-up of each schedule over Tutel."""

    def seconds(schedule: str) -> dict[LayerWork, float]:
        # Of unlike layers only: the number of heads changes no cost.
        return {work: makespan_s(simulated(schedule, [work], testbed, work.gradient_bytes)) for work in set(works)}

    base = seconds("tutel_overlap")
    speedups = {}
    for schedule in schedules:
        own = seconds(schedule)
        speedups[schedule] = fmean(base[work] / own[work] for work in works)
    return speedups


def _table_5_row(schedule: str, testbed: Testbed, speedup: float, num_layers: int, source: str) -> Row:
    """FSMoE on testbed A is what contention was fitted to."""
    is_target = (schedule, testbed.name, testbed.contention) == ("fsmoe", "A", CONTENTION)
    quantity = f"mean speed-up of {schedule} over tutel_overlap, {num_layers} layers"
    paper = TABLE_5[testbed.name].get(schedule)
    return row_of(quantity, testbed, paper, speedup, "x", "fitted" if is_target else "simulated", source)


CONTENTIONS = (1.0, 1.2, 1.4, 1.6, 2.0)


def contention_rows(every: int = 1) -> list[Row]:
    """FSMoE's mean speed-up over Tutel in table 5, with table 2's costs, by how much the links slow each other. In all
    other schedules of that table one waits for the other, so that contention changes nothing.

    Args:
        every: one layer in so many only (for a quick look).
    """
    rows = []
    for calibrated in CALIBRATED.values():
        works = _works(calibrated, every)
        for contention in CONTENTIONS:
            testbed = contended(calibrated, contention)
            speedup = _speedups(["fsmoe"], testbed, works)["fsmoe"]
            rows.append(_table_5_row("fsmoe", testbed, speedup, len(works), TABLE_5_SOURCE))
    return rows


TABLE_2_SOURCE = (
    "Table 2; all-to-all is dispatch and combine, the collectives in a node are the experts' and the sequence's; "
    "k = 2, f = 1.2, sizes of the models and units of the fits not verified"
)


def table_2_rows() -> list[Row]:
    """Milliseconds of each operation in a layer by figure 5's fits, and by those to table 2 itself. Routing and order
    have no fit, hence no row."""
    models = {model.name: model for model in MODELS}
    rows: list[Row] = []
    kinds: tuple[tuple[Kind, dict[str, Testbed]], ...] = (("modelled", TESTBEDS), ("fitted", CALIBRATED))
    for kind, testbeds in kinds:
        for (testbed_name, model_name), stated in TABLE_2.items():
            testbed = testbeds[testbed_name]
            work = layer_work(models[model_name].layer(TABLE_2_BATCH, TABLE_2_LENGTH), testbed)
            for direction, milliseconds in stated.items():
                ours = operation_s(work, testbed, backward=direction == "backward")
                for operation, paper in zip(TABLE_2_OPERATIONS, milliseconds, strict=True):
                    if operation in ours and paper:  # nothing is reduced in forward
                        quantity = f"{operation}, {model_name}, {direction}"
                        took_ms = 1e3 * ours[operation]
                        rows.append(row_of(quantity, testbed, paper, took_ms, "ms", kind, TABLE_2_SOURCE))
    return rows


def operation_s(work: LayerWork, testbed: Testbed, backward: bool) -> dict[str, float]:
    """Seconds of each operation of a layer, unsplit.

    Args:
        work: of the layer.
        testbed: its costs.
        backward: direction.
    """
    times = layer_times(work, testbed.costs, backward)
    sequence_s = {name: testbed.costs[name].predict(work.sequence_bytes) for name in ("all_gather", "reduce_scatter")}
    return {
        "all_to_all": 2 * sum(times.all_to_all),
        "all_reduce": all_reduce_s(work.gradient_bytes, testbed.costs["all_reduce"]) if backward else 0.0,
        "all_gather": sum(times.all_gather) + sequence_s["all_gather"],
        "reduce_scatter": sum(times.reduce_scatter) + sequence_s["reduce_scatter"],
        "experts": sum(times.experts),
        "attention": (work.dense_backward_s if backward else work.dense_s) - testbed.gate_s,
    }


def figure_5_rows() -> list[Row]:
    """The fitted lines at the sizes that the paper profiled, its measured points being in an image only."""
    rows: list[Row] = []
    for testbed in TESTBEDS.values():
        for operation, r2 in FIGURE_5_R2.items():
            gemm = operation == "gemm"
            for size in GEMM_SIZES if gemm else COMMUNICATION_SIZES:
                milliseconds = 1e3 * testbed.costs[operation].predict(size if gemm else ELEMENT_BYTES * size)
                quantity = f"{operation}, {size} {'multiply-adds' if gemm else 'elements'}"
                source = f"Figure 5, the line; r2 {r2}; units not verified"
                rows.append(row_of(quantity, testbed, None, milliseconds, "ms", "modelled", source))
    return rows


def compared(rows: Iterable[Row]) -> list[Row]:
    """Those that have the paper's number beside them."""
    return [row for row in rows if row["paper"] is not None]
