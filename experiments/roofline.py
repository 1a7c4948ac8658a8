"""FasterMoE's DDL-Roofline of a comparison: `python -m experiments.roofline outputs/compare --flops-per-s 2e10`.

Writes roofline.csv, .png and .pdf into the comparison's folder: for every system a point from the predictor (hollow:
modelled, from the counts of copies that its runs recorded and the costs of the cluster's levels) and one from the timed
stages of its MoE layers (filled: measured), under the bounds of `baselines.fastermoe_predictor`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.compare import read_index
from analysis.comparison import Comparison, compare
from analysis.errors import ResultsError, exit_code
from analysis.files import write_text
from analysis.load import Run
from analysis.pair_costs import row_bytes
from analysis.plots.rows import where
from analysis.roofline import write_roofline
from analysis.routing import Routing
from analysis.topology import load_routings
from analysis.topology_table import COMMUNICATION, COMPUTATION, stage_sums
from baselines.fastermoe_predictor import (
    Point,
    all_to_all_traffic,
    communication_latency_s,
    compute_latency_s,
    compute_over_communication,
    end_to_end_latency_s,
    roofline_rows,
    throughput_flops_per_s,
)
from experiments.config import ClusterConfig, cluster_from


def points_of(run: Run, routing: Routing, comparison: Comparison, flops_per_s: float) -> list[Point]:
    """One system's points, of one of its runs: an average MoE layer of the last tenth of its steps.

    Args:
        run: its config says cluster and sizes.
        routing: its counts.
        comparison: holds the timed stages, if any.
        flops_per_s: P, of one rank.

    Raises:
        ResultsError: the cluster has no costs.
    """
    copies_WW = routing.last_copies_SLWW.mean(axis=(0, 1))
    model = run.config["model"]
    expert_parameters = (3 if model["activation"] == "swiglu" else 2) * model["model_dim"] * model["hidden_dim"]
    cluster = cluster_from(ClusterConfig.model_validate(run.config["cluster"]))
    rows_W = copies_WW.sum(0).tolist()
    try:
        traffic = all_to_all_traffic(cluster, copies_WW * row_bytes(run))
        communication_s = communication_latency_s(cluster, traffic)
    except ValueError as error:
        raise ResultsError(f"{run.path.name}: {error}.") from error
    compute_s = compute_latency_s(rows_W, expert_parameters, flops_per_s)
    ratio = compute_over_communication(compute_s, communication_s)
    if not 0 < ratio < np.inf:
        raise ResultsError(f"{run.path.name}: nothing is sent between ranks, so it has no place on a roofline.")

    def point(layer_s: float, kind: str) -> Point:
        return Point(run.system, ratio, throughput_flops_per_s(rows_W, expert_parameters, layer_s), kind)

    points = [point(end_to_end_latency_s(compute_s, communication_s), "modelled")]
    timed = stage_sums(comparison, run.system, (*COMMUNICATION, *COMPUTATION))
    timed = timed[timed["seed"] == run.seed]
    if len(timed):
        points.append(point(float(timed["value"].median()) / routing.copies_SLWW.shape[1], "measured"))
    return points


def write(folder: Path, flops_per_s: float) -> list[str]:
    """Write table and figure; sentences on what has no point.

    Args:
        folder: holds compare.json.
        flops_per_s: P, of one rank.

    Raises:
        ResultsError: no comparison there, or no system with a point.
    """
    run_dirs, samples_dir, baseline = read_index(folder)
    comparison = compare(run_dirs, samples_dir, baseline)
    routings, notes = load_routings(comparison)
    points: list[Point] = []
    drawn: set[str] = set()
    for run in comparison.runs:
        routing = routings.get((run.system, run.seed))
        if run.system in drawn or routing is None:
            continue
        drawn.add(run.system)
        try:
            points += points_of(run, routing, comparison, flops_per_s)
        except ResultsError as error:
            notes.append(str(error))
    if not points:
        raise ResultsError(" ".join(["No system has a point.", *notes]))
    table = pd.DataFrame(roofline_rows(points, flops_per_s))
    write_text(folder / "roofline.csv", table.to_csv(index=False))
    told = f"{where(comparison)} First seed; peak {flops_per_s:.3g} FLOP/s a rank."
    write_roofline(folder / "roofline.csv", told, labels={name: comparison.label(name) for name in comparison.systems})
    return notes


@exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line, with its exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.roofline", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with compare.json, such as outputs/compare")
    parser.add_argument(
        "--flops-per-s", type=float, required=True, help="of one rank; the paper takes 90 %% of the peak"
    )
    given = parser.parse_args(arguments)
    if not (np.isfinite(given.flops_per_s) and given.flops_per_s > 0):
        parser.error(f"--flops-per-s={given.flops_per_s}: must be a positive number, such as 2e10")
    notes = write(given.folder, given.flops_per_s)
    for note in notes:
        print(note)
    print(f"written: {given.folder}/roofline.csv, .png and .pdf")


if __name__ == "__main__":
    sys.exit(main())
