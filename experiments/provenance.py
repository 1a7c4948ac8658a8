"""Where a result comes from: code, versions, machine. Nothing in it says whose machine it was."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from experiments.join import ranks_here

REPOSITORY = Path(__file__).resolve().parent.parent
LOCK = REPOSITORY / "requirements" / "lock.txt"
SOURCES = ("moe", "baselines", "methods", "experiments")
PACKAGES = (
    "torch",
    "lightning",
    "hydra-core",
    "omegaconf",
    "pydantic",
    "numpy",
    "pyarrow",
    "tokenizers",
    "datasets",
    "deepspeed",
    "fairscale",
    "tutel",
    "fastmoe",
    "megatron-core",
    "triton",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)


def manifest(
    run_id: str, seed: int, cluster: Mapping[str, Any], started: str, ended: str | None = None
) -> dict[str, Any]:
    """What manifest.json holds.

    Args:
        run_id: of the run.
        seed: of the run.
        cluster: the declared cluster (name, levels, emulation) as plain data.
        started, ended: ISO 8601 times; `ended` is None while the run goes on.
    """
    return {"run_id": run_id, "seed": seed, "cluster": dict(cluster), "started": started, "ended": ended, **facts()}


def facts() -> dict[str, Any]:
    """Commit, versions, lock and machine, as plain data; `num_machines` counts those that hold ranks."""
    here = ranks_here(os.environ)
    return {
        "git": git_state(),
        "python": platform.python_version(),
        "versions": versions(),
        "lock_sha256": lock_sha256(),
        "hardware": hardware(),
        "num_machines": 1 if here is None else here.num_nodes,
    }


def git_state(folder: Path = REPOSITORY) -> dict[str, Any]:
    """`commit` of the checkout and whether it is `dirty` (changed or untracked files); both None outside git."""
    commit = _output("git", "-C", str(folder), "rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "dirty": None}
    changes = _output("git", "-C", str(folder), "status", "--porcelain")
    return {"commit": commit, "dirty": None if changes is None else changes != ""}


def versions() -> dict[str, str]:
    """Versions of those `PACKAGES` that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def lock_sha256(path: Path = LOCK) -> str | None:
    """Hash of the lock file that the environment was installed from, None without one."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def sources_sha256() -> str:
    """Hash of the code that measures, which tells two states of a changed checkout apart; no docs, tests, analysis."""
    files = [path for folder in SOURCES for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def hardware() -> dict[str, Any]:
    """CPU model, usable cores, memory in bytes, GPUs (name, memory and driver as nvidia-smi says), system."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": len(affinity(0)) if affinity is not None else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": _gpus(),
    }


def _cpu_model() -> str:
    described = Path("/proc/cpuinfo")
    for line in described.read_text().splitlines() if described.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def free_gpu_bytes() -> list[int]:
    """Free memory of every GPU of this machine, in bytes."""
    return [int(line.split()[0]) << 20 for line in _nvidia_smi("memory.free")]  # MiB


def _gpus() -> list[str]:
    return _nvidia_smi("name,memory.total,driver_version")


def _nvidia_smi(fields: str) -> list[str]:
    """A line a GPU. Not through torch: asking it would hold a context, and memory, on a GPU."""
    listed = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    return listed.splitlines() if listed else []


def _output(*command: str) -> str | None:
    """What a command prints, None when it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
