"""Writes result files as the suite leaves them, with known numbers, for the tests of analysis/."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

IMPLEMENTATIONS = {"flat": "native", "deepspeed": "upstream", "fairscale": "upstream", "reference": "native"}
SLOWNESS = {"flat": 1.0, "deepspeed": 1.62, "fairscale": 1.95, "reference": 2.7}
EMULATION = "plain loopback, declared levels"
LABELS = {"kind": "measured", "cluster": "local_2x2", "emulation": EMULATION, "schema_version": 1}
STAGES = ("gate", "dispatch", "experts", "combine")
ERROR_PARTS = ("output", "input_grad", "gate_grad", "expert_grad")
SHARES = {"gate": 0.07, "dispatch": 0.2, "experts": 0.5, "combine": 0.16}
NUM_STEPS = 60

Rows = list[dict[str, Any]]
Change = Callable[[pd.DataFrame], pd.DataFrame]


def unchanged(table: pd.DataFrame) -> pd.DataFrame:
    """The table as it is."""
    return table


def loss_curve(system: str, seed: int, steps: int = NUM_STEPS) -> np.ndarray:
    """Loss of every step, float64 [steps]: the same for all systems up to rounding that grows with the step."""
    step = np.arange(steps)
    shared = 2.6 + 4.9 * np.exp(-step / 17) + 0.11 * np.random.default_rng(seed).standard_normal(steps)
    drift = {"reference": 0.0, "flat": 2e-7, "fairscale": 8e-7, "deepspeed": 6e-3}[system]
    noise = np.random.default_rng([seed, len(system)]).standard_normal(steps)
    return shared + drift * np.linspace(0.2, 3, steps) ** 2 * (noise + (system == "deepspeed"))


def run_rows(system: str, seed: int, steps: int = NUM_STEPS) -> Rows:
    """metrics.parquet of one run, long form."""
    rows: Rows = []

    def add(step: int, metric: str, value: float, unit: str, part: str = "") -> None:
        rows.append({"step": step, "metric": metric, "part": part, "value": float(value), "unit": unit})

    random = np.random.default_rng([seed, 7])
    for step, loss in enumerate(loss_curve(system, seed, steps)):
        add(step, "loss", loss, "nats/token")
        add(step, "grad_norm", 1.0 + random.random(), "1")
        tokens = 2.1e6 * random.uniform(0.9, 1.1) * (0 if system == "reference" else 1)
        padded = 1.25 if system in ("deepspeed", "fairscale") else 1.0
        for level, share in (("self", 1.0), ("node", 1.0), ("network", 2.0)):
            reduced = 0 if level == "self" else 2.9e6 if level == "network" else 2.7e6
            sent = {
                "alltoall": round(tokens * share * padded),
                "reduction": reduced * (1 + 2 * (system == "reference")),
            }
            for kind, num_bytes in sent.items():
                if num_bytes:  # the suite writes no zeros
                    add(step, "bytes", num_bytes, "B/step", f"{level}/{kind}")
        add(step, "dropped_copies", 12 if system == "deepspeed" else 0, "copies/step")
        if (step + 1) % 15 == 0:
            add(step, "val_loss", loss_curve(system, seed, steps)[step] + 0.17, "nats/token")
    return rows


def write_parquet(path: Path, table: pd.DataFrame, footer: dict[str, Any] | None) -> None:
    """A table with the suite's footer; None writes it without one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    metadata = {} if footer is None else {b"moe_suite": json.dumps(footer).encode()}
    pq.write_table(arrow.replace_schema_metadata(metadata), path)


def write_run(
    outputs: Path,
    system: str,
    seed: int,
    status: str = "done",
    reason: str = "",
    change: Change = unchanged,
    labels: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """A run folder; a run that is not done has no metrics. Returns the folder.

    Args:
        change: applied to the metrics before they are written.
        labels: entries of the footer to replace.
        config: entries of config.yaml to replace.
    """
    folder = outputs / f"{system}-tiny-s{seed}-{abs(hash((len(system), seed))) % 16**10:010x}"
    folder.mkdir(parents=True)
    levels = [{"name": "node", "fanout": 2}, {"name": "network", "fanout": 2}]
    cluster = {"name": "local_2x2", "emulation": EMULATION, "levels": levels, "launch": "spawn", "device": "cpu"}
    settings = {"system": {"name": system}, "seed": seed, "cluster": cluster, "model": {"name": "tiny", "top_k": 2}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | (config or {})))
    manifest = {"run_id": folder.name, "seed": seed, "cluster": cluster, "git": {"commit": "4257ce7"}}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"implementation": IMPLEMENTATIONS[system]}))
    (folder / "status.json").write_text(json.dumps({"status": status, "reason": reason, "step": 41}))
    if status == "done":
        footer = {"run_id": folder.name, "system": system, "seed": seed, "implementation": IMPLEMENTATIONS[system]}
        table = change(pd.DataFrame(run_rows(system, seed)))
        write_parquet(folder / "metrics.parquet", table, footer | LABELS | (labels or {}))
    return folder


def sample_rows(systems: list[str], seeds: int = 2, rounds: int = 12, noise: float = 0.05) -> Rows:
    """samples.parquet: interleaved rounds in which a busy machine slows all systems alike."""
    rows: Rows = []
    random = np.random.default_rng(3)
    for seed in range(seeds):
        for round_index in range(rounds):
            busy = random.gamma(9, 1 / 9)
            for system in systems:
                seconds = 0.05 * SLOWNESS[system] * (0.7 + 0.3 * busy) * np.exp(noise * random.standard_normal())
                cell = {
                    "system": system,
                    "implementation": IMPLEMENTATIONS[system],
                    "shape": "M256_H1024_E16_K2",
                    "workload": "uniform",
                    "seed": seed,
                    "round": round_index,
                }

                def add(metric: str, value: float, unit: str, part: str = "", cell: dict[str, Any] = cell) -> None:
                    rows.append(cell | {"metric": metric, "part": part, "value": float(value), "unit": unit})

                add("step_time", seconds, "s")
                if round_index == 0:
                    add("tokens", 4096, "tokens/step")
                    add("peak_memory", 3e8 * SLOWNESS[system] + seed, "B")
                    add("dropped_copies", 0, "copies/step")
                    for part in ERROR_PARTS:
                        add("relative_error", 2e-7 * random.uniform(1, 2) * (system != "reference"), "1", part)
                for direction, share in (("forward", 0.36), ("backward", 0.64)):
                    for stage in STAGES:
                        part = f"{direction}/{stage}"
                        add("stage_time", seconds * share * SHARES[stage] * random.uniform(0.95, 1.1), "s", part)
    return rows


def write_samples(
    outputs: Path, systems: list[str] | None = None, change: Change = unchanged, rounds: int = 12, noise: float = 0.05
) -> Path:
    """A folder of interleaved samples; `change` is applied to the table before it is written. Returns the folder."""
    table = change(pd.DataFrame(sample_rows(systems or list(IMPLEMENTATIONS), rounds=rounds, noise=noise)))
    write_parquet(outputs / "samples" / "samples.parquet", table, LABELS)
    return outputs / "samples"


def status_row(system: str, seed: int, text: str) -> Rows:
    """The row that samples.parquet holds in place of the rounds of a system that could not be timed."""
    labels = {"system": system, "implementation": IMPLEMENTATIONS[system], "seed": seed, "round": 0}
    shape = {"shape": "M256_H1024_E16_K2", "workload": "uniform"}
    return [labels | shape | {"metric": "status", "part": text, "value": float("nan"), "unit": ""}]


def layer_rows(
    system: str,
    shape: str,
    seconds: float = 0.05,
    *,
    implementation: str = "native",
    floor_s: float = 0.03,
    workload: str = "uniform",
    peak_bytes: float = 3e8,
    dropped: int = 0,
    status: str = "",
    rounds: int = 10,
) -> Rows:
    """What a layer benchmark samples of one system under one shape; only its status, where one is given."""
    cell = {"system": system, "implementation": implementation, "shape": shape, "workload": workload, "seed": 0}

    def row(metric: str, value: float, unit: str, turn: int = 0, part: str = "") -> dict[str, Any]:
        return cell | {"round": turn, "metric": metric, "part": part, "value": float(value), "unit": unit}

    if status:
        return [row("status", float("nan"), "", part=status)]
    rows = [row("peak_memory", peak_bytes, "B"), row("dropped_copies", dropped, "copies/step")]
    rows.append(row("tokens", 4096, "tokens/step"))
    random = np.random.default_rng([len(system), len(shape)])
    for turn in range(rounds):
        rows.append(row("step_time", seconds * random.uniform(0.99, 1.01), "s", turn))
        rows.append(row("floor_time", floor_s * random.uniform(0.99, 1.01), "s", turn))
    return rows


def write_manifest(folder: Path) -> None:
    """manifest.json as a run on two GPUs leaves it."""
    cluster = {"name": "auto", "levels": [{"name": "node", "fanout": 2}], "launch": "spawn", "device": "cuda"}
    hardware = {"cpu": "Some CPU", "cores": 32, "gpus": ["NVIDIA H100 80GB HBM3, 81559 MiB, 580.1"] * 2}
    manifest = {"cluster": cluster, "hardware": hardware, "versions": {"torch": "2.11.0"}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
