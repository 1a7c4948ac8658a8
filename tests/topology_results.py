"""A comparison as the suite leaves it, with routing whose costs can be reckoned by hand: 2 nodes of 2 ranks, 8 experts.

Every rank has 100 copies in each of 2 layers and 20 steps; a copy is 10 numbers of 4 bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from tests.analysis_results import write_parquet

EMULATION = "plain loopback, declared levels"
LABELS = {"kind": "measured", "cluster": "toy_2x2", "emulation": EMULATION, "schema_version": 1}
LEVELS: list[dict[str, Any]] = [
    {"name": "node", "fanout": 2, "alpha_s": 1e-3, "beta_s_per_byte": 1e-6},
    {"name": "network", "fanout": 2, "alpha_s": 2e-3, "beta_s_per_byte": 4e-6},
]
NO_COSTS = [level | {"alpha_s": None, "beta_s_per_byte": None} for level in LEVELS]
IMPLEMENTATIONS = {"flat": "native", "ta_moe": "native", "deepspeed": "upstream"}
STEPS, LAYERS, COPIES = 20, 2, 100
NEAR = {"flat": (25, 25, 50), "deepspeed": (25, 25, 50), "ta_moe": (40, 30, 30)}
"""Of a rank's 100 copies: its own, its node's, the network's, in the last tenth of the steps; even before."""

VAL_LOSS = {("flat", 0): 2.0, ("flat", 1): 4.0, ("ta_moe", 0): 2.02, ("ta_moe", 1): 4.08}
STEP_S = {"flat": 0.1, "ta_moe": 0.09, "deepspeed": 0.2}
STAGE_S = {"gate": 0.002, "dispatch": 0.010, "experts": 0.005, "combine": 0.015}
SENT = {"flat": 96000.0, "deepspeed": 192000.0, "ta_moe": 76800.0}
"""Bytes off their rank in a timed step: 4 ranks x copies x 40 bytes x 4 exchanges x 2 layers; deepspeed pads."""


def near_at(system: str, step: int) -> tuple[int, int, int]:
    """Copies of one rank in one layer by distance."""
    return NEAR[system] if step >= STEPS // 2 else NEAR["flat"]


def dispatch_counts(system: str) -> np.ndarray:
    """int32 [steps, layers, 4, 8], symmetric over the ranks."""
    counts = np.zeros((STEPS, LAYERS, 4, 8), dtype=np.int32)
    for step in range(STEPS):
        own, node, network = near_at(system, step)
        for source in range(4):
            for target in range(4):
                copies = own if source == target else node if source // 2 == target // 2 else network // 2
                counts[step, :, source, 2 * target : 2 * target + 2] = (copies - copies // 2, copies // 2)
    return counts


def target_shares(own: float = 0.4, node: float = 0.3, network: float = 0.3) -> np.ndarray:
    """float64 [4, 8], rows summing to 1."""
    shares = np.full((4, 8), network / 4)
    for source in range(4):
        for expert in range(8):
            if expert // 2 == source:
                shares[source, expert] = own / 2
            elif expert // 4 == source // 2:
                shares[source, expert] = node / 2
    return shares


def write_run(
    outputs: Path,
    system: str,
    seed: int,
    *,
    levels: Sequence[dict[str, Any]] = LEVELS,
    local_copy: dict[str, float] | None = None,
    arrays: dict[str, np.ndarray] | None = None,
    model: dict[str, Any] | None = None,
    log_every: int = 1,
) -> Path:
    """A run folder that is done. `arrays` replaces those of routing.npz, an empty dict leaves the file out."""
    folder = outputs / f"{system}-toy-s{seed}-{abs(hash((system, seed))) % 16**10:010x}"
    folder.mkdir(parents=True)
    cluster: dict[str, Any] = {
        "name": "toy_2x2",
        "levels": list(levels),
        "launch": "spawn",
        "device": "cpu",
        "emulation": EMULATION,
    }
    cluster["local_copy"] = local_copy
    sizes = {"name": "toy", "model_dim": 10, "num_experts": 8, "top_k": 2} | (model or {})
    config = {"system": {"name": system}, "seed": seed, "model": sizes, "cluster": cluster}
    config["trainer"] = {"precision": "fp32", "global_batch_size": 8}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "manifest.json").write_text(json.dumps({"run_id": folder.name, "seed": seed, "cluster": cluster}))
    (folder / "status.json").write_text(json.dumps({"status": "done", "reason": "", "step": STEPS}))
    footer = {"run_id": folder.name, "system": system, "seed": seed, "implementation": IMPLEMENTATIONS[system]}
    rows = pd.DataFrame(run_rows(system, seed, log_every))
    write_parquet(folder / "metrics.parquet", rows, footer | LABELS)
    if arrays is None:
        arrays = {"steps": np.arange(STEPS), "dispatch_counts": dispatch_counts(system)}
        arrays |= {"target_shares": target_shares()} if system == "ta_moe" else {}
    if arrays:
        np.savez_compressed(folder / "routing.npz", **arrays)  # type: ignore[arg-type]  # as in experiments.results
    return folder


def run_rows(system: str, seed: int, log_every: int = 1) -> list[dict[str, Any]]:
    """metrics.parquet of one run."""
    rows: list[dict[str, Any]] = []

    def add(step: int, metric: str, value: float, unit: str, part: str = "") -> None:
        rows.append({"step": step, "metric": metric, "part": part, "value": float(value), "unit": unit})

    for step in range(log_every - 1, STEPS, log_every):
        add(step, "loss", 5 - 0.1 * step, "nats/token")
        add(step, "step_time", STEP_S[system], "s")
        for part, copies in zip(("self", "node", "network"), near_at(system, step), strict=True):
            add(step, "routed_share", copies / COPIES, "1", part)
    for done in (0, STEPS // 2, STEPS):
        last = VAL_LOSS.get((system, seed), 3.0)
        add(done, "val_loss", last + 0.1 * (STEPS - done), "nats/token")
    return rows


def write_samples(outputs: Path, systems: Sequence[str] = ("flat", "ta_moe"), rounds: int = 4) -> Path:
    """Interleaved rounds without noise, for seeds 0 and 1."""
    rows = []
    for system in systems:
        for seed in (0, 1):
            cell = {"system": system, "implementation": IMPLEMENTATIONS[system], "seed": seed}
            cell |= {"shape": "toy", "workload": "training"}

            def add(metric: str, value: float, unit: str, part: str = "", turn: int = 0, cell: Any = cell) -> None:
                own = {"round": turn, "metric": metric, "part": part, "value": value, "unit": unit}
                rows.append(cell | own)

            add("tokens", 4096.0, "tokens/step")
            add("bytes", 999.0, "B/step", "self/alltoall")
            add("bytes", SENT[system] / 3, "B/step", "node/alltoall")
            add("bytes", SENT[system] * 2 / 3, "B/step", "network/alltoall")
            add("bytes", 5e6, "B/step", "network/reduction")
            for turn in range(rounds):
                add("step_time", STEP_S[system], "s", turn=turn)
                for stage, seconds in STAGE_S.items():
                    add("stage_time", seconds, "s", f"forward/{stage}", turn)
                    add("stage_time", seconds, "s", f"backward/{stage}", turn)
    write_parquet(outputs / "samples" / "samples.parquet", pd.DataFrame(rows), LABELS)
    return outputs / "samples"


def write_comparison(outputs: Path, systems: Sequence[str] = ("flat", "ta_moe"), **run: Any) -> Path:
    """A folder with compare.json, as `experiments.compare` leaves it; `run` goes to `write_run`. Returns the folder."""
    runs = [write_run(outputs, system, seed, **run) for system in systems for seed in (0, 1)]
    write_samples(outputs, systems)
    folder = outputs / "compare"
    folder.mkdir()
    index = {"runs": [f"../{path.name}" for path in runs], "samples": "../samples", "baseline": systems[0]}
    (folder / "compare.json").write_text(json.dumps(index))
    return folder
