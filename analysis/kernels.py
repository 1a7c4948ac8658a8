"""The kernels of a step by system, from samples that `experiments.layer profile=true` took."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.files import write_text
from analysis.load import Samples

KEY = ["shape", "workload", "system", "implementation"]
COLUMNS = [*KEY, "device", "kernel", "calls_per_step", "us_per_step", "share"]
DEVICE_TIME, WALL_TIME, IDLE = "(device time)", "(wall time)", "(idle)"


def write_kernels(folder: Path, samples: Samples) -> None:
    """Write kernels.csv where kernels were profiled; see `kernel_table`."""
    table = kernel_table(samples)
    if len(table):
        write_text(folder / "kernels.csv", table.to_csv(index=False, float_format="%.6g"))


def kernel_table(samples: Samples) -> pd.DataFrame:
    """What rank 0's device did in a step of each system, the longest first.

    Args:
        samples: of a layer benchmark.

    Returns:
        Per shape, workload and system a row for each kernel, with its calls and microseconds a step and its share of
        the device's time, then three rows that are no kernels: `(device time)`, the sum of them; `(wall time)`, the
        median step_time of the timed rounds, which no profiler slowed; and on a GPU `(idle)`, the wall time in which no
        kernel ran, whose share is of the wall time (below 0 when the profiled steps took longer than the timed ones).
        `device` is `cuda`; or `cpu`, where kernels are torch's operators and their time is without what they called.
    """
    cells = samples.table.groupby(KEY, sort=False)
    rows = [[*key, *row] for key, own in cells for row in _system_rows(own)]
    return pd.DataFrame(rows, columns=COLUMNS)


def _system_rows(own: pd.DataFrame) -> Iterator[list[object]]:
    def by_part(metric: str) -> pd.Series:
        return own[own["metric"] == metric].set_index("part")["value"]

    times, calls = by_part("kernel_time").sort_values(ascending=False) * 1e6, by_part("kernel_calls")
    if not len(times):
        return
    total, wall = times.sum(), by_part("step_time").median() * 1e6
    device = str(times.index[0]).partition("/")[0]
    for part, time in times.items():
        yield [device, str(part).partition("/")[2], calls[part], time, time / total]
    yield [device, DEVICE_TIME, calls.sum(), total, 1.0]
    yield [device, WALL_TIME, np.nan, wall, np.nan]
    for busy in by_part("busy_time") * 1e6:  # one, or none on a CPU
        yield [device, IDLE, np.nan, wall - busy, 1 - busy / wall]
