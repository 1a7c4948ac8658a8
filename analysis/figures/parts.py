"""What several papers' figures are made with: throughput of a comparison, bars of a layer benchmark, verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.comparison import compare
from analysis.errors import ResultsError
from analysis.figures.found import ComparisonFolder, LayerFolder
from analysis.files import write_text
from analysis.layer import ratio_rows, write_layer
from analysis.ledger.verdicts import Verdict
from analysis.load import UNKNOWN, Samples
from analysis.machine import machine_of
from analysis.plots.claims import claims_figure
from analysis.plots.speedups import MOST_GROUPS, speedups_figure
from analysis.plots.throughput import throughput_figure
from analysis.style import save, suite_style
from analysis.summary import summarise

RATIOS = {
    "step_time_ratio": ("Layer", "speed, ratio to", "one forward and backward of a layer"),
    "communication_ratio": (
        "Communication",
        "communication speed, ratio to",
        "gate, dispatch and combine of one forward and backward: all of a layer but its experts",
    ),
}
"""Of a layer's summary: title of the panel, label, and what is timed."""


def sizes_of(samples: Samples) -> str:
    """The sizes of a layer benchmark's shapes, as a sentence; "" when nothing says them."""
    shapes = samples.metadata.get("shapes")
    if not isinstance(shapes, dict):
        return ""
    shown = [name for name in dict.fromkeys(samples.table["shape"]) if name in shapes]
    tokens = ", ".join(dict.fromkeys(str(shapes[name].get("tokens_per_rank", UNKNOWN)) for name in shown))
    if len(shown) > MOST_GROUPS:
        return f"{tokens} tokens per rank; all sizes are in config.yaml."
    keys = ("num_experts", "top_k", "model_dim", "hidden_dim")
    sizes = [f"{name} {'/'.join(str(shapes[name].get(key, UNKNOWN)) for key in keys)}" for name in shown]
    return f"{tokens} tokens per rank; experts/top-k/model/hidden size: {', '.join(sizes)}." if shown else ""


def write_throughput(one: ComparisonFolder, baseline: str, out: Path) -> None:
    """summary.csv and throughput of a comparison."""
    comparison = compare(one.run_dirs, one.samples_dir, baseline)
    summary = summarise(comparison)
    write_text(out / "summary.csv", summary.to_csv(index=False))
    with suite_style():
        save(throughput_figure(comparison, summary), out / "throughput")


def write_ratios(layer: LayerFolder, baseline: str, metrics: Sequence[str], out: Path) -> None:
    """summary and stages of a layer benchmark, and for each of some ratios its bars by shape."""
    summary = write_layer(layer.path, baseline, out)
    kind = str(layer.samples.metadata.get("kind", "measured"))
    for metric in metrics:
        title, quantity, timed = RATIOS[metric]
        table = ratio_rows(summary, metric)
        label = _label(summary, baseline)
        told = f"Ratios of medians over interleaved rounds with 95 % paired bootstrap intervals, of {timed}."
        with suite_style():
            others = table[table["system"] != baseline]
            figure = speedups_figure(
                others,
                label,
                kind,
                f"{sizes_of(layer.samples)} On {machine_of(layer.path)}.",
                title=title,
                quantity=quantity,
                told=told,
            )
            save(figure, out / metric.removesuffix("_ratio"))


def _label(summary: pd.DataFrame, system: str) -> str:
    own = summary[summary["system"] == system]
    if not len(own):
        raise ResultsError(f"{system} is no part of this benchmark, so there is nothing to compare with.")
    return f"{system} ({own['implementation'].iloc[0]})"


def write_claims(verdicts: Sequence[Verdict], out: Path) -> None:
    """claims.csv and, where a claim has a number, its figure."""
    rows = [row.as_json() for row in verdicts]
    write_text(out / "claims.csv", pd.DataFrame(rows).to_csv(index=False))
    if any(row.interval is not None for row in verdicts):
        with suite_style():
            save(claims_figure(verdicts), out / "claims")
