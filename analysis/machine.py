"""On what a folder was measured, from its manifest.json, in words for captions and tables."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from analysis.load import UNKNOWN, Run, load_run


def machine_of(folder: Path) -> str:
    """Hardware, cluster and torch of one folder.

    Args:
        folder: of a run, of a benchmark, or a published one; what its manifest does not say is left out.

    Returns:
        Such as `2 x NVIDIA H200, cluster auto (2 NCCL ranks on one machine), torch 2.11.0`, or `1 of 2 x NVIDIA H200`
        where one stood idle.

    Raises:
        ResultsError: the folder's files name different runs.
    """
    run = load_run(folder, metrics=[])
    torch = run.manifest.get("versions", {}).get("torch")
    return ", ".join([_hardware(run), _cluster(run), *([f"torch {torch}"] if torch else [])])


def _hardware(run: Run) -> str:
    hardware = run.manifest.get("hardware", {})
    gpus = Counter(str(gpu).partition(",")[0] for gpu in hardware.get("gpus") or [])
    if gpus:
        alone = len(gpus) == 1 and run.manifest.get("num_machines", 1) == 1 and run.declared("device") == "cuda"
        told = f"{run.num_ranks} of " if alone and 0 < run.num_ranks < sum(gpus.values()) else ""  # a rank has one
        return told + " and ".join(f"{count} x {name}" for name, count in gpus.items())
    if not hardware:
        return f"{UNKNOWN} hardware"
    return f"{hardware.get('cores', UNKNOWN)} cores of {hardware.get('cpu', f'an {UNKNOWN} processor')}"


def _cluster(run: Run) -> str:
    ranks, emulation = run.ranks, run.declared("emulation")
    told = "; ".join(text for text in (ranks, emulation) if text)
    return f"cluster {run.declared('cluster') or UNKNOWN}" + (f" ({told})" if told else "")
