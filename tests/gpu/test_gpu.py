"""The entry points on CUDA: NCCL, bf16, one rank a GPU, over all GPUs of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from experiments.cli import compose
from experiments.config import load_run, run_id
from experiments.registry import discover

SYSTEMS = sorted(set(discover()) - {"fastermoe_upstream"})
"""All that can share a process: FastMoE and its FasterMoE can't."""

PACKAGES = {
    "deepspeed": "deepspeed",
    "fairscale": "fairscale",
    "tutel": "tutel",
    "fastmoe": "fmoe",
    "megatron": "megatron",
}
SHAPE = (
    "shapes=[{name: small, tokens_per_rank: 512, model_dim: 256, hidden_dim: 512, num_experts: 16, top_k: 2,"
    " activation: swiglu}]"
)
FEW_STEPS = ["trainer.max_steps=12", "trainer.warmup_steps=2", "trainer.val_every=6", "trainer.checkpoint_every=6"]


def run(*arguments: str, launcher: tuple[str, ...] = ()) -> str:
    """Run a module of the suite; its stdout, or a failure that shows all it said."""
    command = [*launcher, "-m", *arguments] if launcher else [sys.executable, "-m", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def only(folder: Path, pattern: str) -> Path:
    """The one path of that pattern."""
    (found,) = folder.glob(pattern)
    return found


def metrics(folder: Path, system: str) -> pd.DataFrame:
    """Metrics of a system's one run."""
    return pd.read_parquet(only(folder, f"{system}-tiny-*") / "metrics.parquet")


def losses(table: pd.DataFrame) -> list[float]:
    """Training loss by step."""
    return list(table[table["metric"] == "loss"].sort_values("step")["value"])


@pytest.fixture(scope="module", autouse=True)
def _gpus() -> None:
    assert torch.cuda.is_available(), "make test-gpu needs a machine with GPUs"


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_layers_equal_the_oracle(tmp_path: Path, dtype: str, tolerance: float) -> None:
    systems = f"systems=[{','.join(SYSTEMS)}]"
    run("experiments.layer", "cluster=auto", f"dtype={dtype}", systems, SHAPE, "rounds=3", f"output_dir={tmp_path}")
    samples = pd.read_parquet(only(tmp_path, "layer-*") / "samples.parquet")
    errors = samples[samples["metric"] == "relative_error"]
    missing = {name for name in SYSTEMS if name in PACKAGES and find_spec(PACKAGES[name]) is None}
    refusing = missing | ({"fairscale"} if dtype == "bf16" else set())
    expected = set(SYSTEMS) - refusing
    assert set(errors["system"]) == expected
    assert (errors["value"] <= tolerance).all(), errors
    refused = samples[samples["metric"] == "status"]
    assert set(refused["system"]) == refusing
    timed = samples[samples["system"].isin(expected)]
    for metric in ("step_time", "peak_memory"):
        assert (timed[timed["metric"] == metric]["value"] > 0).all()
    forward = timed[(timed["metric"] == "stage_time") & (timed["part"] == "forward/experts")]
    assert (forward["value"] > 0).all()
    assert set(forward["system"]) == expected


FASTERMOE = {
    "schedule": "shadowing: false",
    "schedule and shadowing": "shadowing: true",
    "shadows": "network_bytes_per_s: 1.0e+15, gemm_flop_per_s: 1000.0",
    "groups of one": "group_size: 1",
}


@pytest.mark.parametrize("case", FASTERMOE)
def test_fastermoe_equals_the_oracle_in_a_run_of_its_own(tmp_path: Path, case: str) -> None:
    """Upstream's policy shadows only where ranks send unequally many copies, so there some are dropped: refused."""
    systems = f"systems=[{{name: fastermoe_upstream, {FASTERMOE[case]}}},fastmoe]"
    drops = "capacity_factor=1.0" if case == "shadows" else "capacity_factor=null"
    overrides = ["cluster=auto", "dtype=fp32", "workload=zipf", drops, systems, SHAPE, f"output_dir={tmp_path}"]
    run("experiments.layer", *overrides)
    samples = pd.read_parquet(only(tmp_path, "layer-*") / "samples.parquet")
    status = samples[samples["metric"] == "status"]
    refused = dict(zip(status["system"], status["part"], strict=True))
    errors = samples[samples["metric"] == "relative_error"]
    if find_spec("fmoe") is None:
        assert all("not installed" in reason for reason in refused.values())
        assert set(refused) == {"fastermoe_upstream", "fastmoe"}
    elif torch.cuda.device_count() == 1:
        assert set(refused) == {"fastermoe_upstream"}
    elif case == "shadows":
        assert "not the oracle's" in refused["fastermoe_upstream"]
    else:
        assert set(errors["system"]) == {"fastermoe_upstream"}
        assert (errors["value"] <= 1e-5).all(), errors
        assert "give each a run of its own" in refused["fastmoe"]


def test_fastmoe_s_own_gates_route(tmp_path: Path) -> None:
    """Outputs are the oracle's where a gate neither samples nor drops; its loss, and so its gradients, are its own."""
    gates = ["naive", "gshard", "dc", "noisy"]
    systems = ",".join(f"{{name: fastmoe, label: {gate}, gate: {gate}}}" for gate in gates)
    run("experiments.layer", "cluster=auto", "dtype=fp32", f"systems=[{systems}]", SHAPE, f"output_dir={tmp_path}")
    samples = pd.read_parquet(only(tmp_path, "layer-*") / "samples.parquet")
    if find_spec("fmoe") is None:
        assert set(samples[samples["metric"] == "status"]["system"]) == set(gates)
        return
    assert set(samples[samples["metric"] == "step_time"]["system"]) == set(gates)
    of_outputs = samples[(samples["metric"] == "relative_error") & samples["part"].isin(["output", "expert_grad"])]
    assert (of_outputs[of_outputs["system"] != "noisy"]["value"] <= 1e-5).all(), of_outputs


def test_kernels_are_listed(tmp_path: Path) -> None:
    systems = "systems=[flat,deepspeed,reference]"
    run("experiments.layer", "cluster=auto", "profile=true", systems, SHAPE, "rounds=3", f"output_dir={tmp_path}")
    table = pd.read_csv(only(tmp_path, "layer-*") / "kernels.csv")
    assert set(table["device"]) == {"cuda"}
    for _, own in table.groupby("system"):
        time_us = own.set_index("kernel")["us_per_step"]
        assert time_us["(device time)"] > 0
        assert time_us["(wall time)"] - time_us["(idle)"] <= time_us["(device time)"] * (1 + 1e-6)  # busy, not summed
        assert own["kernel"].str.len().max() <= 60


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of three systems."""
    folder = tmp_path_factory.mktemp("trained")
    run(
        "experiments.train", "-m", "system=flat,deepspeed,reference", "cluster=auto", *FEW_STEPS, f"output_dir={folder}"
    )
    return folder


def test_training_takes_nccl_and_bf16(trained: Path) -> None:
    reference = losses(metrics(trained, "reference"))
    for system in ("flat", "deepspeed"):
        folder = only(trained, f"{system}-tiny-*")
        config: dict[str, Any] = load_run(compose("train", [f"system={system}", "cluster=auto"])).model_dump()
        assert config["trainer"]["precision"] == "bf16"
        assert config["cluster"]["device"] == "cuda"
        assert json.loads((folder / "status.json").read_text())["status"] == "done"
        values = losses(metrics(trained, system))
        assert values[-1] < values[0]
        assert values == pytest.approx(reference, rel=5e-3)


def test_resumes_on_another_world_size(trained: Path, tmp_path: Path) -> None:
    source = only(trained, "flat-tiny-*")
    more = [*FEW_STEPS[1:], "trainer.max_steps=14", f"trainer.resume_from={source}", f"output_dir={tmp_path}"]
    run("experiments.train", "cluster=local_1", *more)
    table = metrics(tmp_path, "flat")
    steps = table[table["metric"] == "loss"]["step"]
    assert sorted(steps) == [12, 13]
    assert losses(table)[0] == pytest.approx(losses(metrics(trained, "flat"))[-1], rel=0.05)


def test_torchrun_joins(tmp_path: Path) -> None:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(torch.cuda.device_count()))
    overrides = ["system=flat", "cluster=auto", *FEW_STEPS, f"output_dir={tmp_path}"]
    run("experiments.train", *overrides, launcher=launcher)
    assert len(losses(metrics(tmp_path, "flat"))) == 12


def test_run_ids_tell_the_device() -> None:
    on_cuda = run_id(load_run(compose("train", ["cluster=auto"])))
    on_cpu = run_id(load_run(compose("train", ["cluster=auto", "cluster.device=cpu"])))
    assert on_cuda != on_cpu


def test_comm_measures_every_level(tmp_path: Path) -> None:
    run("experiments.comm", "cluster=auto", f"output_dir={tmp_path}")
    assert only(tmp_path, "comm-*/cluster.yaml").read_text().count("beta_s_per_byte") >= 1
