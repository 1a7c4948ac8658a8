"""The suite itself: comparisons of no paper's own, layers beside the upstream packages, growth with size."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.comparison import compare
from analysis.errors import ResultsError
from analysis.figures import fsmoe, hiermoe, swiftmoe, ta_moe
from analysis.figures.found import ComparisonFolder, Found, LayerFolder, Recipe
from analysis.figures.parts import sizes_of, write_ratios
from analysis.files import write_text
from analysis.growth import series_of, write_growth
from analysis.layer import refuse_bad_times
from analysis.machine import machine_of
from analysis.plots.bytes import bytes_figure
from analysis.plots.loss import loss_figure
from analysis.plots.profile import profile_figure
from analysis.plots.stages import stages_figure
from analysis.plots.throughput import throughput_figure
from analysis.statistics import interquartile_mean, median
from analysis.style import save, suite_style
from analysis.summary import summarise
from analysis.tables import format_table

PAPERS = {ta_moe.METHOD, hiermoe.METHOD, swiftmoe.METHOD, fsmoe.METHOD}
BASELINE = "flat"


def recipes(found: Found) -> Iterator[Recipe]:
    """What can be made."""
    for one in found.comparisons:
        if not one.methods & PAPERS:
            yield Recipe(one.name, [one.path], partial(_write_comparison, one))
    for layer in found.layers:
        if set(layer.methods.values()) & PAPERS or BASELINE not in layer.methods:
            continue
        yield Recipe(layer.name, [layer.path], partial(_write_layer, layer))


def _write_comparison(one: ComparisonFolder, out: Path) -> None:
    comparison = compare(one.run_dirs, one.samples_dir, one.baseline)
    summary = summarise(comparison)
    write_text(out / "summary.csv", summary.to_csv(index=False))
    write_text(out / "summary.txt", format_table(summary))
    with suite_style():
        if comparison.runs:  # published without its runs, a comparison has no curves
            save(loss_figure(comparison), out / "loss")
        save(throughput_figure(comparison, summary), out / "throughput")
        save(bytes_figure(comparison, summary), out / "bytes")
        save(stages_figure(comparison, summary), out / "stages")


def _write_layer(layer: LayerFolder, out: Path) -> None:
    sizes = layer.samples.metadata.get("shapes")
    if isinstance(sizes, dict) and series_of(sizes):
        write_growth(layer.path, out)
        return
    write_ratios(layer, BASELINE, ("step_time_ratio",), out)
    if layer.samples.table["shape"].nunique() > 1 and layer.samples.table["system"].nunique() > 1:
        write_profile(layer, out)


def write_profile(layer: LayerFolder, out: Path) -> None:
    """The performance profile of a layer benchmark's systems over its shapes, and times.csv.

    Raises:
        ResultsError: a time that is no number.
    """
    refuse_bad_times(layer.samples)
    samples = layer.samples
    both = pd.concat([samples.table, samples.problems])[["system", "implementation"]].drop_duplicates()
    labels = {system: f"{system} ({implementation})" for system, implementation in both.itertuples(index=False)}
    times = samples.table[samples.table["metric"] == "step_time"]
    medians = times.pivot_table(index="system", columns=["shape", "workload"], values="value", aggfunc="median")
    if medians.isna().all(axis=0).any():
        raise ResultsError(f"{layer.path}: a shape has no time of any system. Fix: measure it again.")
    workloads = " and ".join(dict.fromkeys(times["workload"]))
    shapes = sizes_of(samples) or f"Shapes {', '.join(dict.fromkeys(times['shape']))}."
    where = f"{shapes} {workloads.capitalize()} routing, on {machine_of(layer.path)}."
    kind = str(samples.metadata.get("kind", "measured"))
    rows = [
        {
            **dict(zip(("shape", "workload", "system", "implementation"), key, strict=True)),
            "median_ms": 1e3 * median(own),
            "interquartile_mean_ms": 1e3 * interquartile_mean(own),
            "rounds": len(own),
        }
        for key, own in times.groupby(["shape", "workload", "system", "implementation"], sort=False)["value"]
    ]
    write_text(out / "times.csv", pd.DataFrame(rows).to_csv(index=False))
    ordered = medians.reindex(list(labels)).to_numpy(dtype=np.float64)
    with suite_style():
        save(profile_figure(ordered, labels, medians.shape[1], kind, where), out / "profile")
