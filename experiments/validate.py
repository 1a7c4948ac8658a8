"""The simulator against measurements: `python -m experiments.validate outputs/layer-...`.

Reads benchmarks of layers (`experiments.layer experiment=simulator_validation`), in which a layer that plans by
measured costs has noted what its modules take. Of every system and shape the step is then simulated, with costs fitted
to the modules of the other shapes only, on the routing that was measured and by the cluster's measured costs. Writes
validation.csv, and a table and figures beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from pydantic import ValidationError

from analysis.errors import ResultsError, exit_code
from analysis.files import write_text
from analysis.load import Samples, load_samples
from analysis.machine import machine_of
from analysis.validation import COLUMNS, format_validation, write_validation
from experiments import registry
from experiments.config import LayerRunConfig, LayerShape, cluster_from
from experiments.model import DTYPES
from moe.contention import Point, Points, contention_of
from moe.costs import AlphaBeta
from moe.errors import SuiteError
from moe.layer_simulation import RoutedLayer
from moe.module_profile import costs_of
from moe.simulator import makespan_s
from moe.system import LayerSpec
from moe.topology import Cluster
from moe.workload import Workload, expert_ids

NEEDED = ("all_to_all", "gemm", "gemm_backward", "outside", "outside_backward")
"""Operations that a layer must have measured."""


def validation_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """A row for every system and shape of a layer benchmark, see `analysis.validation.COLUMNS`.

    Args:
        folder: of the run.

    Raises:
        ResultsError: no samples, no config, a single shape, or shapes without measured modules.
    """
    samples, config = load_samples(folder), _config(folder)
    if samples.status != "done":
        raise ResultsError(f"{folder}: {samples.reason}. Fix: run `python -m experiments.layer` first.")
    points = {shape.name: _points(samples, shape.name) for shape in config.shapes}
    if len(config.shapes) < 2:
        raise ResultsError(f"{folder}: one shape, and costs are fitted to the others. Fix: measure several shapes.")
    for name, by_system in points.items():
        measured = next(iter(by_system.values()), {})
        if missing := [operation for operation in NEEDED if operation not in measured]:
            raise ResultsError(
                f"{folder}: shape {name} has no module_time of {', '.join(missing)}. Fix: measure a system that plans "
                "by measured costs beside the others, such as fsmoe with degree=auto."
            )
    cluster, machine = cluster_from(config.cluster), machine_of(folder)
    for shape in config.shapes:
        others = [by_system for name, by_system in points.items() if name != shape.name]
        for system in config.systems:
            # Experts that are cut have other messages and products than whole ones, which all others have.
            own = [by_system.get(system.label) or next(iter(by_system.values())) for by_system in others]
            layer = replace(routed_layer(config, shape, cluster, fitted(own)), contention=contention_of(own))
            times = _times(samples, system.label, shape.name)
            created = registry.create(system.name, system.options)
            try:
                model = created.simulated_layer(layer)
            except (AssertionError, SuiteError) as error:
                print(f"{folder}: {system.label}, {shape.name} can't be simulated: {error}", flush=True)
                continue
            if not len(times):
                continue
            yield {
                "run": folder.name,
                "machine": machine,
                "cluster": cluster.name,
                "system": system.label,
                "implementation": created.implementation,
                "shape": shape.name,
                "measured_s": float(np.median(times)),
                "measured_low_s": float(np.quantile(times, 0.25)),
                "measured_high_s": float(np.quantile(times, 0.75)),
                "simulated_s": makespan_s(replace(model, extras=()).simulated([model.work])),  # those are training's
            }


def routed_layer(
    config: LayerRunConfig, shape: LayerShape, cluster: Cluster, costs: dict[str, AlphaBeta]
) -> RoutedLayer:
    """What was measured of a shape, as the simulator takes it.

    Args:
        config: of the run.
        shape: one of its.
        cluster: with its costs.
        costs: of the modules.
    """
    spec = LayerSpec(
        shape.model_dim,
        shape.hidden_dim,
        shape.num_experts,
        shape.top_k,
        shape.activation,
        config.capacity_factor,
        DTYPES[config.dtype],
    )
    drawn = Workload(config.workload.kind, config.workload.exponent, config.workload.path)
    sizes = (shape.tokens_per_rank, shape.num_experts, shape.top_k, config.seed)
    ids = [expert_ids(drawn, *sizes, rank).numpy() for rank in range(cluster.world_size)]
    return RoutedLayer(spec, cluster, np.stack(ids), costs)


def fitted(points: Sequence[Points]) -> dict[str, AlphaBeta]:
    """Costs by lines through the points of several shapes together."""
    together: Points = {}
    for measured in points:
        for operation, own in measured.items():
            together.setdefault(operation, []).extend(own)
    return costs_of(together)


def _config(folder: Path) -> LayerRunConfig:
    try:
        return LayerRunConfig.model_validate(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ResultsError(f"{folder}: config.yaml is of no layer benchmark ({reason}). Fix: name another.") from error


def _points(samples: Samples, shape: str) -> dict[str, Points]:
    """What layers that measured their modules noted for a shape, by system."""
    rows = samples.table[(samples.table["metric"] == "module_time") & (samples.table["shape"] == shape)]
    points: dict[str, Points] = {}
    for system, part, seconds in zip(rows["system"], rows["part"], rows["value"], strict=True):
        operation, size = str(part).rsplit(" ", 1)
        points.setdefault(system, {}).setdefault(operation, []).append(Point(float(size), float(seconds)))
    return points


def _times(samples: Samples, system: str, shape: str) -> np.ndarray:
    table = samples.table
    own = table[(table["metric"] == "step_time") & (table["system"] == system) & (table["shape"] == shape)]
    return own["value"].to_numpy()


@exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line, with its exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.validate", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="of layer benchmarks")
    parser.add_argument("--out", type=Path, default=Path("outputs/validation"), help="where the results go")
    given = parser.parse_args(arguments)
    rows = [row for folder in given.folders for row in validation_rows(folder)]
    write_text(given.out / "validation.csv", pd.DataFrame(rows, columns=COLUMNS).to_csv(index=False))
    print(f"{format_validation(write_validation(given.out))}written: {given.out}")


if __name__ == "__main__":
    sys.exit(main())
