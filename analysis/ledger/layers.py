"""Statistics of layer benchmarks and of computed tables that claims.yaml can name, with the keys that they take there.

All of them give an `Evidence`, or raise `Unusable` with the reason why there is no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import Field

from analysis.errors import ResultsError
from analysis.layer import communication_s
from analysis.ledger.evidence import NO_HARDWARE, Evidence, Statistic
from analysis.ledger.results import Results, Unusable
from analysis.load import Samples, one_line
from analysis.machine import machine_of
from analysis.performance import Cell, cells_of
from analysis.statistics import Interval, bootstrap_mean_ratio, over_seeds
from analysis.validation import read_validation

BEST_UPSTREAM = "best upstream"


class LayerTime(Statistic):
    """Time of another system's layer over this one's, the geometric mean over shapes; of all of it or of what is not
    the experts. Over `best upstream`: the fastest upstream package of each shape."""

    statistic: Literal["layer_time"]
    folder: str
    system: str
    over: str
    shapes: list[str] | None = None
    of: Literal["layer", "communication"] = "layer"

    def evidence(self, results: Results) -> Evidence:
        """See `Statistic`."""
        folder = results.only(self.folder)
        samples = results.layer(folder)
        pairs = []
        for shape, workload in _cases(samples, self.shapes):
            cells = cells_of(samples, shape, workload)
            base = self._base(samples, cells, shape)
            times = [self._times(samples, name, shape, workload) for name in (base, self.system)]
            if len(times[0]) != len(times[1]):
                rounds = f"{base} {len(times[0])} and {self.system} {len(times[1])} under {shape}"
                raise Unusable(f"rounds are missing: {rounds}")
            pairs.append((times[0], times[1]))
        return Evidence(bootstrap_mean_ratio(pairs), _kind(samples), machine_of(folder))

    def _base(self, samples: Samples, cells: Sequence[Cell], shape: str) -> str:
        if self.over != BEST_UPSTREAM:
            return self.over
        upstream = [cell for cell in cells if cell.implementation == "upstream"]
        if not upstream:
            raise Unusable(f"no upstream package ran under {shape}")
        return min(upstream, key=lambda cell: float(np.median(cell.times))).system

    def _times(self, samples: Samples, system: str, shape: str, workload: str) -> np.ndarray:
        own = _cell(samples, system, shape, workload)
        found = own[own["metric"] == "step_time"].sort_values("round")["value"].to_numpy()
        return _positive(communication_s(own) if self.of == "communication" else found, f"{system} under {shape}")


class Floor(Statistic):
    """Time of the experts' products and bare exchanges over the layer's, the geometric mean over shapes."""

    statistic: Literal["floor"]
    folder: str
    system: str
    shapes: list[str] | None = None

    def evidence(self, results: Results) -> Evidence:
        """See `Statistic`."""
        folder = results.only(self.folder)
        samples = results.layer(folder)
        pairs = []
        for shape, workload in _cases(samples, self.shapes):
            own = _cell(samples, self.system, shape, workload).sort_values("round")
            floor, times = (
                _positive(own[own["metric"] == metric]["value"].to_numpy(), f"{metric} of {self.system} under {shape}")
                for metric in ("floor_time", "step_time")
            )
            pairs.append((floor, times))
        return Evidence(bootstrap_mean_ratio(pairs), _kind(samples), machine_of(folder))


class SimulatorError(Statistic):
    """Mean of |simulated - measured| / measured of the step time in per cent, over pairs of a system and a shape that
    costs were not fitted to."""

    statistic: Literal["simulator_error"]
    folder: str
    pairs: int = Field(ge=1)

    def evidence(self, results: Results) -> Evidence:
        """See `Statistic`."""
        rows = read_validation(results.only(self.folder))
        if len(rows) < self.pairs:
            raise Unusable(f"{len(rows)} pairs of a system and a shape, and {self.pairs} are needed")
        errors = 100 * rows["relative_error"].abs()
        if not np.isfinite(errors).all():
            raise Unusable("a time is no positive number")
        twice = rows[rows.duplicated(["run", "system", "shape"])]
        if len(twice):
            raise ResultsError(
                f"{self.folder}: {twice['system'].iloc[0]} and {twice['shape'].iloc[0]} stand there twice."
            )
        return Evidence(over_seeds(errors.to_numpy()), "simulated", "; ".join(rows["machine"].unique()))


class TableCell(Statistic):
    """A cell of a table that a simulation or a model wrote: column `ours` of the one row that has all the keys."""

    statistic: Literal["table_cell"]
    table: str
    row: dict[str, str]
    tell: Literal["number", "above_one_percent"] = "number"

    def evidence(self, results: Results) -> Evidence:
        """See `Statistic`."""
        path = results.only(self.table)
        try:
            table = pd.read_csv(path, dtype=str)
        except (OSError, ValueError) as error:
            raise ResultsError(f"{path}: can't be read ({one_line(error)[:80]}). Fix: write it anew.") from error
        absent = [name for name in ("ours", "kind", *self.row) if name not in table]
        if absent:
            raise ResultsError(f"{path}: it has no column {', '.join(absent)}. Fix: write it anew.")
        rows = table[(table[list(self.row)] == pd.Series(self.row)).all(axis=1)]
        told = ", ".join(self.row.values())
        if not len(rows):
            raise Unusable(f"{path.name} has no row of {told}")
        if len(rows) > 1:
            raise ResultsError(f"{path}: the row of {told} stands there {len(rows)} times. Fix: write it anew.")
        value = float(pd.to_numeric(rows["ours"], errors="coerce").iloc[0])
        if not np.isfinite(value):
            raise Unusable(f"{path.name}: the number of {told} is {rows['ours'].iloc[0]}")
        return Evidence(Interval(value, value, value), str(rows["kind"].iloc[0]), NO_HARDWARE)


def _kind(samples: Samples) -> str:
    return str(samples.metadata.get("kind", "measured"))


def _cases(samples: Samples, shapes: Sequence[str] | None) -> list[tuple[str, str]]:
    """(shape, workload) of every one that is asked for; each shape was measured under one workload."""
    both = pd.concat([samples.table, samples.problems])[["shape", "workload"]].drop_duplicates()
    found = dict(both.itertuples(index=False, name=None))
    if len(found) < len(both):
        raise ResultsError(f"{samples.path}: a shape has several workloads. Fix: measure one workload per folder.")
    missing = [shape for shape in shapes or [] if shape not in found]
    if missing or not found:
        raise Unusable(f"shape {', '.join(missing)} was not measured" if missing else "nothing was measured")
    return [(shape, found[shape]) for shape in shapes or found]


def _cell(samples: Samples, system: str, shape: str, workload: str) -> pd.DataFrame:
    """Rows of one system under one shape."""
    key = {"system": system, "shape": shape, "workload": workload}
    own, told = (frame[(frame[list(key)] == pd.Series(key)).all(axis=1)] for frame in (samples.table, samples.problems))
    if len(told):
        reasons = "; ".join(f"{row.status}: {row.reason}" for row in told.itertuples())
        raise Unusable(f"{system} under {shape}: {reasons}", refused=set(told["status"]) == {"refused"})
    if not len(own):
        raise Unusable(f"{system} was not measured under {shape}")
    return own


def _positive(values: np.ndarray, what: str) -> np.ndarray:
    if not len(values):
        raise Unusable(f"no time of {what}")
    if not (np.isfinite(values) & (values > 0)).all():
        raise Unusable(f"a time of {what} is no positive number")
    return values
