"""Pipelined layers on streams: exact in chunks, communication beside computation, gradients in slices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from experiments.launch import run_ranks
from tests.gpu.test_gpu import SHAPE, only, run

VARIANTS = {
    "fsmoe 3 and 2": "{name: fsmoe, label: fsmoe 3 and 2, degree: 3, backward_degree: 2}",
    "fsmoe 8 and 8": "{name: fsmoe, label: fsmoe 8 and 8, degree: 8, backward_degree: 8}",
    "schemoe": "{name: pipelined, label: schemoe, schedule: schemoe, degree: 2, backward_degree: 4}",
    "sequential": "{name: pipelined, label: sequential, schedule: sequential}",
    "auto": "{name: fsmoe, label: auto}",
    "cut": "{name: fsmoe, label: cut, expert_sharding: true, degree: 4, backward_degree: 3}",
    "cut, one link": "{name: fsmoe, label: 'cut, one link', expert_sharding: true, schedule: fsmoe_no_iio}",
    "dense order": "{name: fsmoe, label: dense order, order: dense, degree: 2}",
}


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
@pytest.mark.parametrize("workload", ["uniform", "zipf"])
def test_chunks_equal_the_oracle(tmp_path: Path, dtype: str, tolerance: float, workload: str) -> None:
    systems = f"systems=[{','.join(VARIANTS.values())}]"
    overrides = ["cluster=auto", f"dtype={dtype}", f"workload={workload}", systems, SHAPE, "rounds=3"]
    run("experiments.layer", *overrides, f"output_dir={tmp_path}")
    samples = pd.read_parquet(only(tmp_path, "layer-*") / "samples.parquet")
    errors = samples[samples["metric"] == "relative_error"]
    assert set(errors["system"]) == set(VARIANTS)
    assert (errors["value"] <= tolerance).all(), errors


def test_dispatches_run_beside_experts(tmp_path: Path) -> None:
    """By what the streams did: a later chunk's dispatch begins before an earlier chunk's experts end."""
    shape = SHAPE.replace("512, model_dim: 256, hidden_dim: 512", "8192, model_dim: 1024, hidden_dim: 4096")
    system = f"systems=[{{name: fsmoe, degree: 4, backward_degree: 4, trace: {tmp_path}/trace}}]"
    run("experiments.layer", "cluster=auto", system, shape, "rounds=3", f"output_dir={tmp_path}")
    for path in sorted((tmp_path / "trace").iterdir()):
        tasks = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
        for direction in ("forward", "backward"):
            at = {event["name"]: event for event in tasks if event["args"]["direction"] == direction}
            assert len(at) == 12
            assert at["dispatch 3"]["ts"] < at["experts 0"]["ts"] + at["experts 0"]["dur"]
            assert all(
                at[f"dispatch {i}"]["ts"] + at[f"dispatch {i}"]["dur"] <= at[f"experts {i}"]["ts"] + 5 for i in range(4)
            )


def test_gates_are_their_formulas(tmp_path: Path) -> None:
    num_ranks = torch.cuda.device_count()
    facts: dict[str, list[dict[str, Any]]] = run_ranks(
        "tests.rank_fsmoe_gates:measure",
        {},
        num_ranks=num_ranks,
        ranks_per_node=num_ranks,
        device="cuda",
        log_dir=tmp_path,
        timeout_s=120,
    )
    for name, ranks in facts.items():
        for found in ranks:
            assert max(found["errors"].values()) < 1e-5, (name, found["errors"])
            assert found["counts"] == found["expected_counts"], name


def test_sliced_gradients_are_those_of_one_reduction(tmp_path: Path) -> None:
    num_ranks = torch.cuda.device_count()
    facts: list[dict[str, Any]] = run_ranks(
        "tests.rank_fsmoe:measure_on_gpus",
        {},
        num_ranks=num_ranks,
        ranks_per_node=num_ranks,
        device="cuda",
        log_dir=tmp_path,
        timeout_s=120,
    )
    for found in facts:
        for name, case in found.items():
            assert max(case["errors"].values()) < 1e-5, (name, case["errors"])
            assert any(case["planned"]) or name.endswith(("fsmoe", "beside dense parts")), name
