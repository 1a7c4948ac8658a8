"""Many finished runs, written quickly, and what reading them takes: `python -m tests.many_runs 1000` prints it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.load import load_run

ROOT = Path(__file__).resolve().parent.parent
METRICS = [
    *((name, "") for name in ("loss", "aux_loss", "grad_norm", "learning_rate", "dropped_copies")),
    *((name, "") for name in ("step_time", "harness_time", "tokens_per_s")),
    *(("routed_share", level) for level in ("self", "node", "network")),
    *(("bytes", f"{level}/{kind}") for level in ("self", "node", "network") for kind in ("alltoall", "reduction")),
]
"""Metric and part of every row of a step: as many as a training run on four ranks writes."""

LABELS = {"schema_version": 1, "system": "flat", "implementation": "native", "kind": "measured", "cluster": "local_2x2"}


def write_runs(folder: Path, num_runs: int, num_steps: int) -> None:
    """Runs of one system that differ in their seed: every step has a row of every metric, values are random."""
    values = np.random.default_rng(0).random(num_steps * len(METRICS))
    names, parts = (np.tile(np.array(column, dtype=object), num_steps) for column in zip(*METRICS, strict=True))
    units = np.tile(np.array(["nats/token", *["1"] * (len(METRICS) - 1)], dtype=object), num_steps)
    steps = np.repeat(np.arange(num_steps), len(METRICS))
    published = next((ROOT / "results" / "netns_2x2_ta_moe").glob("flat-tiny-s0-*"))
    config, manifest = (published / "config.yaml").read_text(), json.loads((published / "manifest.json").read_text())
    table = pa.table({"step": steps, "metric": names, "part": parts, "value": values, "unit": units})
    for seed in range(num_runs):
        run = folder / f"flat-tiny-s{seed}-{seed:010x}"
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(config.replace("\nseed: 0\n", f"\nseed: {seed}\n"))
        (run / "manifest.json").write_text(json.dumps(manifest | {"run_id": run.name, "seed": seed}, indent=1))
        footer = json.dumps({**LABELS, "run_id": run.name, "seed": seed}).encode()
        pq.write_table(
            table.replace_schema_metadata({b"moe_suite": footer}), run / "metrics.parquet", compression="zstd"
        )
        (run / "status.json").write_text(json.dumps({"status": "done", "step": num_steps}))


def read_runs(folder: Path) -> dict[str, float]:
    """What it takes to read all of them and keep their tables: runs, rows, seconds (on the clock and of this process,
    which differ on a busy machine), MiB before and at the most."""
    before_mib = _peak_mib()
    started, started_cpu = time.perf_counter(), time.process_time()
    runs = [load_run(path) for path in sorted(folder.iterdir())]
    took = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - started_cpu}
    rows = sum(len(run.metrics) for run in runs if run.is_done)
    return took | {"runs": len(runs), "rows": rows, "before_mib": before_mib, "peak_mib": _peak_mib()}


def read_elsewhere(folder: Path) -> dict[str, float]:
    """`read_runs` in a process of its own, whose memory is that of the reading alone."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.many_runs", "--read", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    told: dict[str, float] = json.loads(done.stdout)
    return told


def _peak_mib() -> float:
    """The most memory that this program held, in MiB. (What getrusage tells is also that of whoever started it.)"""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.many_runs", description=__doc__)
    parser.add_argument("runs", nargs="?", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--read", type=Path, help="read the runs of this folder, print what it took as JSON")
    given = parser.parse_args()
    if given.read is not None:
        print(json.dumps(read_runs(given.read)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_runs(Path(folder), given.runs, given.steps)
        told = read_elsewhere(Path(folder))
    times = f"{told['seconds']:.1f} s, {told['cpu_seconds']:.1f} s of them computing"
    print(f"{told['runs']} runs, {told['rows']} rows: {times}, {told['peak_mib']:.0f} MiB at the most")


if __name__ == "__main__":
    main()
