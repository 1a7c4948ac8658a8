"""A comparison as the suite leaves it; drops, replicas, losses and times can be reckoned by hand: 4 ranks, 4 experts.

Losses fall in a straight line, so that the mean of the last 10 is the line 4.5 steps earlier.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from tests.analysis_results import write_parquet

EMULATION = "plain loopback, declared levels"
LABELS = {"kind": "measured", "cluster": "toy_2x2", "emulation": EMULATION, "schema_version": 1}
IMPLEMENTATIONS = {"deepspeed": "upstream", "flat": "native", "swiftmoe": "native"}
STEPS, LAYERS, RANKS, EXPERTS = 60, 2, 4, 4
COPIES = 100
"""Of each rank in each layer and step."""

SLOPE = {"deepspeed": 0.02, "flat": 0.01, "swiftmoe": 0.03}
"""Nats per token and step, down from 5 (seed 0) or 5.1 (seed 1)."""

STEP_S = {"deepspeed": 0.2, "flat": 0.1, "swiftmoe": 0.1}
DROPPED = {"deepspeed": 200, "flat": 240, "swiftmoe": 80}
"""Of the 800 copies of every step."""

SLOTS = 8

TARGET = 4.358
"""Nats per token, stated in every run's configuration."""

PARTS_MS = {
    "forward/gate": 1,
    "forward/dispatch": 2,
    "forward/experts": 3,
    "forward/combine": 4,
    "backward/combine": 5,
    "backward/experts": 6,
    "backward/dispatch": 7,
    "backward/gate": 8,
    "dense_gradients": 9,
    "expert_gradients": 4,
    "optimizer": 3,
}
"""Medians, of every system."""

SWIFTMOE_MS = {"popularity": 1, "scheduler": 0.5, "metadata": 0.5, "gradient_shards": 2, "weights": 6}
"""The same, of swiftmoe; 0 of the others."""


def popularity() -> np.ndarray:
    """int64 [steps, layers, E] of one rank: expert 2 of layer 1 grows from 10 to 69 of the 100 copies."""
    counts = np.full((STEPS, LAYERS, EXPERTS), COPIES // EXPERTS)
    counts[:, 1, 2] = 10 + np.arange(STEPS)
    counts[:, 1, 1] = counts[:, 1, 3] = (COPIES - counts[:, 1, 2]) // 4
    counts[:, 1, 0] = COPIES - counts[:, 1, 1:].sum(axis=1)
    return counts


def routing(system: str) -> dict[str, np.ndarray]:
    """Arrays of routing.npz; replicas follow popularity one step late, each expert keeping one slot."""
    counts_SLE = popularity()
    by_rank = np.repeat(counts_SLE[:, :, None], RANKS, axis=2).astype(np.int32)
    arrays: dict[str, np.ndarray] = {"steps": np.arange(STEPS), "dispatch_counts": by_rank}
    if system == "swiftmoe":
        replicas = np.full((STEPS, LAYERS, EXPERTS), SLOTS // EXPERTS, dtype=np.int16)
        replicas[1:, 1, 2] = 1 + 4 * counts_SLE[:-1, 1, 2] // COPIES
        replicas[:, 1, 1] = replicas[:, 1, 3] = 1
        replicas[:, 1, 0] = SLOTS - replicas[:, 1, 1:].sum(axis=1)
        arrays["replica_counts"] = replicas
    return arrays


def run_rows(system: str, seed: int, log_every: int = 1) -> list[dict[str, Any]]:
    """metrics.parquet of one run."""
    rows: list[dict[str, Any]] = []
    for step in range(log_every - 1, STEPS, log_every):
        for metric, value, unit in (
            ("loss", 5 + 0.1 * seed - SLOPE[system] * step, "nats/token"),
            ("step_time", STEP_S[system], "s"),
            ("dropped_copies", DROPPED[system], "copies/step"),
        ):
            rows.append({"step": step, "metric": metric, "part": "", "value": float(value), "unit": unit})
    return rows


Change = Callable[[pd.DataFrame], pd.DataFrame]


def write_run(
    outputs: Path,
    system: str,
    seed: int,
    *,
    arrays: dict[str, np.ndarray] | None = None,
    log_every: int = 1,
    change: Change = lambda table: table,
    model: dict[str, Any] | None = None,
    target_loss: float | None = TARGET,
) -> Path:
    """A run folder that is done. `arrays` replaces those of routing.npz, an empty dict leaves the file out; `change` is
    applied to the metrics before they are written; `model` adds to that of config.yaml, which has `target_loss` too."""
    folder = outputs / f"{system}-toy-s{seed}-{len(system):05x}{seed:05x}"
    folder.mkdir(parents=True)
    levels = [{"name": "node", "fanout": 2}, {"name": "network", "fanout": 2}]
    cluster = {"name": "toy_2x2", "levels": levels, "launch": "spawn", "device": "cpu", "emulation": EMULATION}
    sizes = {"name": "toy", "num_experts": 4} | (model or {})
    config = {"system": {"name": system}, "seed": seed, "cluster": cluster, "model": sizes}
    config["trainer"] = {"target_loss": target_loss}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "manifest.json").write_text(json.dumps({"run_id": folder.name, "seed": seed, "cluster": cluster}))
    (folder / "status.json").write_text(json.dumps({"status": "done", "reason": "", "step": STEPS}))
    footer = {"run_id": folder.name, "system": system, "seed": seed, "implementation": IMPLEMENTATIONS[system]}
    table = change(pd.DataFrame(run_rows(system, seed, log_every)))
    write_parquet(folder / "metrics.parquet", table, footer | LABELS)
    arrays = routing(system) if arrays is None else arrays
    if arrays:
        np.savez_compressed(folder / "routing.npz", **arrays)  # type: ignore[arg-type]  # as in experiments.results
    return folder


def write_samples(outputs: Path, systems: Sequence[str]) -> Path:
    """Interleaved rounds in which every system but the baseline is a little slower than when it was trained."""
    rows = []
    for system in systems:
        for seed in (0, 1):
            cell = {"system": system, "implementation": IMPLEMENTATIONS[system], "seed": seed}
            cell |= {"shape": "toy", "workload": "training", "part": ""}
            rows.append(cell | {"round": 0, "metric": "tokens", "value": 400.0, "unit": "tokens/step"})
            own = SWIFTMOE_MS if system == "swiftmoe" else dict.fromkeys(SWIFTMOE_MS, 0)
            seconds = STEP_S[system] * (1 if system == "deepspeed" else 1.2)
            for turn, noise in enumerate((0.9, 1.0, 5.0)):  # the median of these is 1
                sample = {"round": turn, "metric": "step_time", "value": seconds * noise, "unit": "s"}
                rows.append(cell | sample)
                for part, milliseconds in (PARTS_MS | own | {"migration": 0}).items():
                    metric = "stage_time" if "/" in part else "part_time"
                    sample = {"round": turn, "metric": metric, "value": milliseconds * noise / 1e3, "unit": "s"}
                    rows.append(cell | sample | {"part": part})
    write_parquet(outputs / "samples" / "samples.parquet", pd.DataFrame(rows), LABELS)
    return outputs / "samples"


def write_comparison(outputs: Path, systems: Sequence[str] = tuple(IMPLEMENTATIONS), **run: Any) -> Path:
    """A folder with compare.json whose baseline is flat, as `experiments.compare` leaves it; `run` goes to `write_run`.

    Returns:
        The folder.
    """
    runs = [write_run(outputs, system, seed, **run) for system in systems for seed in (0, 1)]
    write_samples(outputs, systems)
    folder = outputs / "compare"
    folder.mkdir()
    baseline = "flat" if "flat" in systems else systems[0]
    index = {"runs": [f"../{path.name}" for path in runs], "samples": "../samples", "baseline": baseline}
    (folder / "compare.json").write_text(json.dumps(index))
    return folder
