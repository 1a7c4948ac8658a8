"""HierMoE (arXiv 2508.09591): tables II and IV, fitted collectives, dispatch by number of levels, speed-ups of
all-to-all and of whole steps, step times with swaps."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from analysis.figures.found import Alike, Found, LayerFolder, Recipe
from analysis.figures.parts import write_ratios, write_throughput
from analysis.files import write_text
from analysis.hiermoe import write_figures
from analysis.hiermoe_levels import MODELLED, write_levels
from analysis.hiermoe_tables import read_tables
from analysis.machine import machine_of
from analysis.plots.steps import steps_figure
from analysis.style import save, suite_style

METHOD = "hiermoe"
BASELINE = "flat"
"""Exchanges as Megatron-LM's alltoall dispatcher does, which the paper compares with."""


def recipes(found: Found) -> Iterator[Recipe]:
    """What can be made."""
    comm = found.files["comm.parquet"][-1:]  # one cluster's collectives beside the paper's
    for path in found.files["tables.csv"]:
        yield Recipe("tables", [path, *comm], partial(_write_tables, path, comm[0].parent if comm else None))
    for layer in found.layers:
        if METHOD in layer.methods.values() and BASELINE in layer.methods:
            yield Recipe(layer.name, [layer.path], partial(_write_layer, layer))
    for one in found.comparisons:
        if METHOD in one.methods:
            baseline = BASELINE if BASELINE in one.methods else one.baseline
            yield Recipe(one.name, [one.path], partial(write_throughput, one, baseline))
    for group in found.alike:
        if any(_method(run.config) == METHOD for run in group.runs):
            yield Recipe(group.name, [run.path for run in group.runs], partial(write_steps, group))


def _method(config: dict) -> str:
    return str(config.get("system", {}).get("name"))


def _write_tables(path: Path, comm: Path | None, out: Path) -> None:
    write_figures(path.parent, comm, out)
    table = read_tables(path)
    for name, own in table.groupby("table", sort=False):
        write_text(out / f"table_{str(name).replace(' ', '_')}.csv", own.to_csv(index=False))


def _write_layer(layer: LayerFolder, out: Path) -> None:
    if (layer.samples.table["metric"] == MODELLED).any():
        write_levels(layer.path, out)
    write_ratios(layer, BASELINE, ("communication_ratio", "step_time_ratio"), out)


def write_steps(group: Alike, out: Path) -> None:
    """Step times of runs that differ in their system alone."""
    kinds = {str(run.metadata.get("kind", "measured")) for run in group.runs}
    machines = dict.fromkeys(machine_of(run.path) for run in group.runs)
    seed = group.runs[0].seed
    with suite_style():
        figure = steps_figure(group.runs, " and ".join(sorted(kinds)), f"Seed {seed}, on {'; '.join(machines)}.")
        save(figure, out / "steps")
