"""FSMoE (arXiv 2501.10714): its tables 2 and 5 and figures 5 to 8 as simulated, layers of its schedule as measured, and
the simulator beside measurements.

Not made: its timelines (figures 3 and 4), which are drawings, and table 6 as it stands: gates are compared with each
other, not with DeepSpeed-MoE's implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.found import Found, LayerFolder, Recipe
from analysis.figures.parts import write_ratios, write_throughput
from analysis.files import write_text
from analysis.fsmoe_tables import SCHEDULES, read_simulated
from analysis.plots.fsmoe import (
    contention_figure,
    figure_5_figure,
    speedup_panels,
    table_2_figure,
    table_5_figure,
)
from analysis.plots.validation import validation_figure
from analysis.style import save, suite_style
from analysis.validation import mean_absolute_error, read_validation

METHOD = "fsmoe"
BASELINES = ("tutel", "tutel_overlap", "sequential", "flat")
"""The first of these that a benchmark has is what its bars are ratios to, else its own first system."""


def recipes(found: Found) -> Iterator[Recipe]:
    """What can be made."""
    for file, (draw, pattern) in TABLES.items():
        for path in found.files[file]:
            yield Recipe("simulated", [path], partial(_write_table, path, pattern, draw))
    for path in found.files["validation.csv"]:
        yield Recipe("validation", [path], partial(_write_validation, path))
    for layer in found.layers:
        if METHOD in layer.methods.values():
            yield Recipe(layer.name, [layer.path], partial(_write_layer, layer))
    for one in found.comparisons:
        if METHOD in one.methods:
            yield Recipe(one.name, [one.path], partial(write_throughput, one, one.baseline))


def _write_table(path: Path, pattern: str, draw: Callable[[pd.DataFrame], Figure], out: Path) -> None:
    rows = read_simulated(path, pattern)
    write_text(out / path.name, pd.read_csv(path).to_csv(index=False))
    with suite_style():
        save(draw(rows), out / path.stem)


def _write_validation(path: Path, out: Path) -> None:
    rows = read_validation(path.parent)
    write_text(out / path.name, rows.to_csv(index=False))
    with suite_style():
        save(validation_figure(rows, mean_absolute_error(rows)), out / path.stem)


def _write_layer(layer: LayerFolder, out: Path) -> None:
    baseline = next(name for name in (*BASELINES, *layer.methods) if name in layer.methods)
    write_ratios(layer, baseline, ("step_time_ratio",), out)


def _contention(rows: pd.DataFrame) -> Figure:
    return contention_figure(rows.assign(contention=rows["costs"].str.extract(r"contention (\S+)", expand=False)))


def _figure_6(rows: pd.DataFrame) -> Figure:
    bars = rows[rows["schedule"].isin(SCHEDULES) & (rows["schedule"] != "sequential")]
    bars = bars[bars["model"] != "all models"]
    groups = [name for name in SCHEDULES.values() if name != SCHEDULES["sequential"]]
    ends = rows[(rows["schedule"] == METHOD) & (rows["model"] == "all models") & rows["extreme"].notna()]["paper"]
    return speedup_panels(
        bars.assign(group=bars["schedule"].map(SCHEDULES)),
        groups,
        "model",
        "FSMoE's figure 6: speed-up of each schedule over DeepSpeed-MoE's.",
        "speed-up over DS-MoE, x",
        (float(ends.min()), float(ends.max())) if ends.notna().any() else None,
    )


def _figure_7(rows: pd.DataFrame) -> Figure:
    named = rows.assign(group=rows["case"].str.replace(" GPUs", "\nGPUs"), over="over " + rows["over"].map(SCHEDULES))
    return speedup_panels(
        named,
        list(dict.fromkeys(named["group"])),
        "over",
        "FSMoE's figure 7: speed-up of FSMoE by length of the sequence on 48 GPUs, and by number of GPUs at L = 1024.",
        "speed-up of FSMoE, x",
    )


def _figure_8(rows: pd.DataFrame) -> Figure:
    named = rows.assign(group="over\n" + rows["over"].map(SCHEDULES), case="")
    return speedup_panels(
        named,
        list(dict.fromkeys(named["group"])),
        "case",
        "FSMoE's figure 8: mean speed-up of FSMoE over the others with two pipeline stages, mean over the models.",
        "mean speed-up of FSMoE, x",
    )


_SPEEDUP = r"speed-up of (?P<schedule>\S+) over"
TABLES: dict[str, tuple[Callable[[pd.DataFrame], Figure], str]] = {
    "table5.csv": (table_5_figure, rf"mean {_SPEEDUP} tutel_overlap, \d+ layers"),
    "contention.csv": (_contention, rf"mean {_SPEEDUP} tutel_overlap, \d+ layers"),
    "table2.csv": (table_2_figure, r"(?P<operation>\S+), (?P<model>\S+), (?P<direction>forward|backward)"),
    "fig5.csv": (figure_5_figure, r"(?P<operation>\S+), (?P<size>\d+) (?P<what>\S+)"),
    "fig6.csv": (_figure_6, rf"(?P<extreme>least|largest)? ?{_SPEEDUP} sequential, (?P<model>.+)"),
    "fig7.csv": (_figure_7, rf"{_SPEEDUP} (?P<over>\S+), (?P<case>.+)"),
    "fig8.csv": (_figure_8, rf"mean {_SPEEDUP} (?P<over>\S+), all models"),
}
"""By file: what draws it, and how its quantities read."""
