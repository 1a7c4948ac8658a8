"""Where tokens went in single runs, as data for the page's viewer: counts by expert and by rank, bytes by level.

Dimensions: S embedded steps, L MoE layers, W ranks, E experts, C classes of traffic.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.errors import ResultsError
from analysis.load import Run
from analysis.pair_costs import level_indices, levels_of
from analysis.report.runs import Entry
from analysis.routing import load_routing, routing_arrays

MOST_NUMBERS = 2_000_000
"""That all runs of a page embed together, some 8 MB: a browser reads it in a second."""

MOST_STEPS = 60
"""Of one run: as many as a slider on a telephone can tell apart."""


def viewer_data(found: Sequence[Entry], first: str = "") -> tuple[str, list[str]]:
    """(JSON for the page, sentences on the runs that it lacks).

    Args:
        found: runs; those that are not done or no training are passed over.
        first: name of the one that is shown first.

    Raises:
        ResultsError: no run of that name, or one that can't be shown.
    """
    trained = [entry for entry in found if entry.what == "training" and entry.run.is_done]
    names = [entry.name for entry in trained]
    if first and first not in names:
        raise ResultsError(
            f"--run {first}: no finished run of that name. Fix: name one of {', '.join(names[:4]) or 'none'}."
        )
    trained.sort(key=lambda entry: entry.name != first)
    shown: list[dict[str, Any]] = []
    missing: list[str] = []
    left = MOST_NUMBERS
    for index, entry in enumerate(trained):
        share = left // (len(trained) - index)
        try:
            one = _run_data(entry, share)
        except ResultsError as error:
            if entry.name == first:
                raise
            missing.append(str(error))
            continue
        if one is None:
            missing.append(f"{entry.name}: too large to embed beside the others. Fix: --run {entry.name}")
            continue
        shown.append(one)
        left -= len(one["counts"]) + len(one["links"] or ())
    text = json.dumps(shown, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c"), missing  # so that no text of a file ends the page's script


def _run_data(entry: Entry, most_numbers: int) -> dict[str, Any] | None:
    """What the viewer shows of one run; None where not even two steps fit."""
    run = entry.run
    _, arrays = routing_arrays(run)
    order = np.argsort(arrays["steps"], kind="stable")
    steps_S, counts_SLWE = arrays["steps"][order], arrays["dispatch_counts"][order]
    links_SLWW, why = _links(run)
    one_step = counts_SLWE[0].size + (links_SLWW[0].size if links_SLWW is not None else 0)
    num_steps = min(MOST_STEPS, len(steps_S), most_numbers // one_step)
    if num_steps < min(2, len(steps_S)):
        return None
    kept = np.unique(np.linspace(0, len(steps_S) - 1, num_steps).round().astype(int))
    levels = levels_of(run)
    num_layers, num_ranks, num_experts = counts_SLWE.shape[1:]
    index_WW = level_indices(levels) if levels else np.empty((0, 0))
    classes, bytes_SC = _bytes(run, steps_S[kept])
    return {
        "name": entry.name,
        "label": f"{run.system} ({run.implementation}), seed {run.seed}",
        "kind": str(run.metadata.get("kind", "measured")),
        "steps": steps_S[kept].tolist(),
        "logged": len(steps_S),
        "layers": num_layers,
        "ranks": num_ranks,
        "experts": num_experts,
        "counts": counts_SLWE[kept].ravel().tolist(),
        "links": None if links_SLWW is None else links_SLWW[kept].astype(np.int64).ravel().tolist(),
        "noLinks": why,
        "levels": ["self", *(level.name for level in levels)],
        "levelOfPair": index_WW.ravel().tolist() if index_WW.shape == (num_ranks, num_ranks) else None,
        "classes": classes,
        "bytes": bytes_SC,
    }


def _links(run: Run) -> tuple[NDArray[np.float64] | None, str]:
    """Copies from rank to rank by logged step, or why nobody can say."""
    try:
        return load_routing(run).copies_SLWW, ""
    except ResultsError as error:
        return None, str(error)


def _bytes(run: Run, steps_S: NDArray[np.int64]) -> tuple[list[str], list[list[float | None]]]:
    """(`<level>/<class>` in order, bytes [S][C] over all ranks); no class where none was recorded.

    A step that was metered has no row for a class that sent nothing; one that was not, or with a number that is none,
    has None.
    """
    table = run.metrics[run.metrics["metric"] == "bytes"].astype({"part": str})
    if not len(table):
        return [], []
    wide = table.pivot(index="step", columns="part", values="value").fillna(0.0)
    wide[wide.index.isin(table.loc[~np.isfinite(table["value"]), "step"])] = np.nan
    values_SC = wide.reindex(steps_S).to_numpy(dtype=np.float64)
    return list(wide.columns), [[None if np.isnan(value) else value for value in row] for row in values_SC.tolist()]
