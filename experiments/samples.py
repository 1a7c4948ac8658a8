"""Rows of interleaved measurements: the Parquet file that holds them, and before it is whole, a journal that grows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from experiments.results import write_error
from moe.metering import CLASSES
from moe.topology import Cluster


class SampleRow(NamedTuple):
    """One measured value of one system in one round; `part` names a stage, a level, or a reason."""

    system: str
    implementation: str
    shape: str
    workload: str
    seed: int
    round: int
    metric: str
    part: str
    value: float
    unit: str


class SampleWriter:
    """Collects the rows of one system under one shape, workload and seed.

    Args:
        system, implementation, shape, workload, seed: of all its rows.
    """

    def __init__(self, system: str, implementation: str, shape: str, workload: str, seed: int) -> None:
        self.key = (system, implementation, shape, workload, seed)
        self.rows: list[SampleRow] = []

    def add(self, metric: str, values: Iterable[float], unit: str, part: str = "") -> None:
        """One row per value, numbered as rounds from 0."""
        self.rows += [SampleRow(*self.key, turn, metric, part, float(v), unit) for turn, v in enumerate(values)]

    def add_bytes(self, sent: Tensor, cluster: Cluster) -> None:
        """Bytes of one step, [levels, classes], summed over ranks."""
        for level, row in zip(cluster.level_names, sent.tolist(), strict=True):
            for kind, value in zip(CLASSES, row, strict=True):
                if value:
                    self.add("bytes", [value], "B/step", f"{level}/{kind}")

    def add_status(self, status: str, reason: str) -> None:
        """The system has no numbers here, and why."""
        self.add("status", [float("nan")], "", f"{status}: {reason}")


def footer_of(kind: str, cluster: Cluster, **more: Any) -> dict[str, Any]:
    """Metadata of a result file."""
    return {"schema_version": 1, "kind": kind, "cluster": cluster.name, "emulation": cluster.emulation, **more}


def append_samples(path: Path, key: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Append the rows of one measurement to a journal; when this returns they are on the disk.

    Args:
        path: the journal, made if missing.
        key: names the measurement.
        rows: values in the order of `SampleRow`.

    Raises:
        ResultsWriteError: the write failed.
    """
    record = json.dumps({"of": list(key), "rows": [list(row) for row in rows]})
    try:
        with path.open("a") as file:
            file.write(f"\n{record}\n")  # on a line of its own, even where the record before broke off
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise write_error(path, error) from error


def read_samples(path: Path) -> dict[tuple[str, ...], list[list[Any]]]:
    """Rows by key, in the order in which `append_samples` wrote them; a record that broke off is passed over."""
    found: dict[tuple[str, ...], list[list[Any]]] = {}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found[tuple(record["of"])] = record["rows"]
    return found
