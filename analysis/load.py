"""Reads what a run left behind. One that did not finish is a `Run` too, with status and reason but without numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from analysis.errors import ResultsError

SCHEMA_VERSION = 1
FOOTER_KEY = b"moe_suite"
STATUSES = ("running", "done", "failed", "oom", "refused", "timeout", "interrupted")
RUN_COLUMNS = ("step", "metric", "part", "value", "unit")
SAMPLE_COLUMNS = ("system", "implementation", "shape", "workload", "seed", "round", "metric", "part", "value", "unit")
PROBLEM_COLUMNS = ("shape", "workload", "system", "implementation", "seed", "status", "reason")
UNKNOWN = "unknown"

_INTEGERS = {"step", "seed", "round"}
_RUN_ID = re.compile(r"^(?P<system>[^-]+)-.+-s(?P<seed>\d+)-[0-9a-f]{10}$")
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster where libyaml is built in


class _Unreadable(Exception):
    """A file that is there but does not hold what it should."""


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        path: the folder.
        system: its label, which is its name where none was given.
        implementation: `native`, `upstream` or `unknown` (nothing was written that says it).
        seed: None when nothing says it.
        status: of status.json, or `missing` (no folder or no status), or `corrupt` (a file can't be read).
        reason: why it is not done, one line; empty for a done run.
        metadata: the footer of metrics.parquet; empty without one.
        metrics: columns step, metric, part, value, unit; empty unless the run is done.
        manifest, config: of manifest.json and config.yaml; empty without one.
    """

    path: Path
    system: str
    implementation: str
    seed: int | None
    status: str
    reason: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    metrics: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(RUN_COLUMNS)))
    manifest: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        """Whether its numbers may be used."""
        return self.status == "done"

    @property
    def level_names(self) -> list[str]:
        """Names of the cluster's levels, innermost first, without the rank itself; empty when nothing says them."""
        for cluster in self._clusters():
            levels = cluster.get("levels") or []
            names = [level["name"] for level in levels if isinstance(level, dict) and "name" in level]
            if names:
                return [name for name in names if name != "self"]
        return []

    def declared(self, key: str) -> str:
        """`cluster` (its name), `emulation` or `device` as manifest.json or config.yaml say; "" when neither does."""
        field_name = "name" if key == "cluster" else key
        return next((str(cluster[field_name]) for cluster in self._clusters() if cluster.get(field_name)), "")

    @property
    def num_ranks(self) -> int:
        """How many ranks it has; 0 when nothing declares them."""
        return next((prod(fanouts) for _, fanouts in self._fanouts()), 0)

    @property
    def ranks(self) -> str:
        """How many ranks of which library, such as `4 gloo ranks on one machine`; "" when nothing declares them."""
        for cluster, fanouts in self._fanouts():
            library = {"cpu": "gloo ", "cuda": "NCCL "}.get(str(cluster.get("device")), "")
            alone = self.manifest.get("num_machines", 1) == 1  # ranks that were joined may be on several
            here = " on one machine" if alone and cluster.get("launch") in ("spawn", "netns") else ""
            num_ranks = prod(fanouts)
            return f"{num_ranks} {library}rank{'s' * (num_ranks > 1)}{here}"
        return ""

    def _fanouts(self) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Declarations of the cluster that say it level by level, and those numbers."""
        for cluster in self._clusters():
            levels = cluster.get("levels") or []
            fanouts = [level["fanout"] for level in levels if isinstance(level, dict) and "fanout" in level]
            if fanouts and all(isinstance(fanout, int) for fanout in fanouts):
                yield cluster, fanouts

    def _clusters(self) -> list[dict[str, Any]]:
        clusters = (self.manifest.get("cluster"), self.config.get("cluster"))
        return [cluster for cluster in clusters if isinstance(cluster, dict)]


@dataclass(frozen=True)
class Samples:
    """One folder of interleaved samples.

    Attributes:
        path: the folder.
        status, reason: `done`, `missing` or `corrupt`, and why.
        metadata: the footer of samples.parquet.
        table: columns as SAMPLE_COLUMNS, status rows left out.
        problems: columns as PROBLEM_COLUMNS: one row per shape, workload, system and seed that has a status row, such
            as a refusal.
    """

    path: Path
    status: str
    reason: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    table: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(SAMPLE_COLUMNS)))
    problems: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(PROBLEM_COLUMNS)))


def one_line(text: object) -> str:
    """Text of a reason without line breaks or runs of blanks."""
    return " ".join(str(text).split())


def _read_table(
    path: Path, columns: tuple[str, ...], metrics: Collection[str] | None = None
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Columns and footer of a result file of the suite; raises `_Unreadable` with a short reason."""
    try:
        with path.open("rb") as opened:  # once, as a run that still writes may put a new file in its place
            metadata = pq.ParquetFile(opened).metadata
            schema = metadata.schema.to_arrow_schema()
            absent = [name for name in columns if name not in schema.names]
            if absent:
                raise _Unreadable(f"{path.name} lacks the column {', '.join(absent)}")
            footer = json.loads((schema.metadata or {}).get(FOOTER_KEY, b"null"))
            if metrics is not None and not metrics:
                table = schema.empty_table().select(list(columns))
            else:
                # Text is decoded once for each value that there is, not for each row, which takes half of the time.
                texts = [name for name in columns if pa.types.is_string(schema.field(name).type)]
                table = pq.ParquetFile(opened, metadata=metadata, read_dictionary=texts).read(columns=list(columns))
        if metrics:
            table = table.filter(pc.field("metric").isin(list(metrics)))
    except (OSError, pa.ArrowException, ValueError) as error:
        raise _Unreadable(f"{path.name} can't be read ({one_line(error)[:120]})") from error
    if not isinstance(footer, dict):
        raise _Unreadable(f"{path.name} has no {FOOTER_KEY.decode()} footer")
    if footer.get("schema_version") != SCHEMA_VERSION:
        raise _Unreadable(
            f"{path.name} has schema_version {footer.get('schema_version')}, this analysis reads {SCHEMA_VERSION}"
        )
    frame = table.to_pandas(strings_to_categorical=True)
    for name in columns:
        kind = frame[name].dtype
        if name == "value":
            fits = pd.api.types.is_float_dtype(kind)
        elif name in _INTEGERS:
            fits = pd.api.types.is_integer_dtype(kind)
        else:
            fits = isinstance(kind, pd.CategoricalDtype) or len(frame) == 0
        if not fits:
            raise _Unreadable(f"{path.name} has values of type {kind} in the column {name}")
    return frame, footer


def _read_mapping(path: Path) -> dict[str, Any]:
    """A JSON or YAML file that holds a mapping; empty when there is no such file."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=_Loader)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _Unreadable(f"{path.name} can't be read ({one_line(error)[:120]})") from error
    if not isinstance(content, dict):
        raise _Unreadable(f"{path.name} holds no mapping")
    return content


def _identity(path: Path, footer: dict[str, Any], config: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    """System, seed and implementation of a run folder, from every file that says them.

    Raises:
        ResultsError: two files of the folder disagree, as after files were swapped.
    """
    system_config = config["system"] if isinstance(config.get("system"), dict) else {}
    name = _RUN_ID.match(path.name)
    sources: dict[str, dict[str, Any]] = {
        "metrics.parquet": footer,
        "manifest.json": manifest,
        "config.yaml": {
            "system": system_config.get("name"),
            "label": system_config.get("label"),
            "seed": config.get("seed"),
        },
        "the folder's name": {"system": name["system"], "seed": int(name["seed"]), "run_id": path.name} if name else {},
    }
    identity: dict[str, Any] = {}
    for key in ("system", "label", "seed", "implementation", "run_id"):
        said = {where: source[key] for where, source in sources.items() if source.get(key) is not None}
        if len(set(map(str, said.values()))) > 1:
            told = ", ".join(f"{where} says {value}" for where, value in said.items())
            raise ResultsError(
                f"{path}: its files disagree on {key}: {told}. Labels or files were swapped. "
                "Fix: delete the folder and run it again."
            )
        identity[key] = next(iter(said.values()), None)
    return identity


def _twice(table: pd.DataFrame) -> pd.DataFrame:
    """Rows whose step, metric and part stood there before."""
    if not len(table):
        return table
    metrics, parts = table["metric"].cat, table["part"].cat
    cells = table["step"].to_numpy() * len(metrics.categories) + metrics.codes
    cells = np.sort(cells * len(parts.categories) + parts.codes, kind="stable")
    if (cells[1:] > cells[:-1]).all():  # as good as always, and found fast, since rows come in the order of steps
        return table.iloc[:0]
    return table[table.duplicated(["step", "metric", "part"])]


def load_run(path: Path, metrics: Collection[str] | None = None) -> Run:
    """Read one run folder; tolerates every way in which a run can be incomplete.

    Args:
        path: outputs/<run id>, need not exist.
        metrics: read only these metrics, None for all.

    Raises:
        ResultsError: the folder's files name different systems, seeds or runs.
    """
    path = Path(path)
    files: dict[str, dict[str, Any]] = {}
    broken = ""
    for name in ("status.json", "config.yaml", "manifest.json"):
        try:
            files[name] = _read_mapping(path / name)
        except _Unreadable as error:
            files[name], broken = {}, broken or str(error)
    table = pd.DataFrame(columns=list(RUN_COLUMNS))
    footer: dict[str, Any] = {}
    if (path / "metrics.parquet").exists():
        try:
            table, footer = _read_table(path / "metrics.parquet", RUN_COLUMNS, metrics)
        except _Unreadable as error:
            broken = broken or str(error)
    elif files["status.json"].get("status") == "done":
        broken = broken or "status.json says done, but there is no metrics.parquet"
    twice = _twice(table)
    if len(twice):
        broken = broken or f"metrics.parquet holds {twice.iloc[0].metric} of step {twice.iloc[0].step} twice"

    status = str(files["status.json"].get("status", ""))
    reason = one_line(files["status.json"].get("reason", ""))
    if not path.is_dir():
        status, reason = "missing", "there is no such run folder"
    elif broken:
        status, reason = "corrupt", broken
    elif not status:
        status, reason = "missing", "the run folder has no status.json: the run never started or was killed at once"
    elif status not in STATUSES:
        status, reason = "corrupt", f"status.json says {status}, which is no status"
    elif status == "running":
        reason = reason or f"not finished, at step {files['status.json'].get('step', '?')}"
    identity = _identity(path, footer, files["config.yaml"], files["manifest.json"])
    return Run(
        path=path,
        system=str(identity["label"] or identity["system"] or path.name),
        implementation=str(identity["implementation"] or UNKNOWN),
        seed=identity["seed"],
        status=status,
        reason="" if status == "done" else reason or "no reason was recorded",
        metadata=footer,
        metrics=table if status == "done" else table.iloc[:0],
        manifest=files["manifest.json"],
        config=files["config.yaml"],
    )


def _why_no_samples(path: Path) -> tuple[str, str]:
    """(status, reason) of a measurement that left no samples: its own words where status.json has some."""
    told = _read_mapping(path / "status.json")
    status = str(told.get("status", "missing"))
    if status not in STATUSES or status == "done":
        return "missing", "there is no samples.parquet"
    return status, one_line(told.get("reason", "")) or "no samples.parquet yet"


def load_samples(path: Path) -> Samples:
    """Read one folder of interleaved samples (samples.parquet); a missing or corrupt file is a status, not an error.

    Raises:
        ResultsError: one cell (system, shape, workload, seed, round, metric, part) stands there twice, or one system is
            labelled with two implementations.
    """
    path = Path(path)
    file = path / "samples.parquet"
    try:
        if not file.exists():
            return Samples(path, *_why_no_samples(path))
        frame, footer = _read_table(file, SAMPLE_COLUMNS)
    except _Unreadable as error:
        return Samples(path, "corrupt", str(error))
    texts = ["system", "implementation", "shape", "workload", "metric", "part", "unit"]
    frame[texts] = frame[texts].astype(object)
    labels = frame.groupby("system", sort=False)["implementation"].nunique()
    if (labels > 1).any():
        raise ResultsError(
            f"{file}: {labels[labels > 1].index[0]} is labelled both native and upstream. Fix: measure again."
        )
    is_status = frame["metric"] == "status"
    table = frame[~is_status].reset_index(drop=True)
    key = ["system", "shape", "workload", "seed", "round", "metric", "part"]
    twice = table[table.duplicated(key)]
    if len(twice):
        cell = ", ".join(f"{name}={twice.iloc[0][name]}" for name in key)
        raise ResultsError(f"{file}: the cell {cell} stands there twice. Fix: measure again into an empty folder.")
    told = frame[is_status].drop_duplicates(list(PROBLEM_COLUMNS[:-2]))
    words = [str(text).partition(":") for text in told["part"]]
    problems = told[list(PROBLEM_COLUMNS[:-2])].assign(
        status=[status.strip() for status, _, _ in words],
        reason=[one_line(reason) or "no reason was recorded" for _, _, reason in words],
    )
    return Samples(path, "done", "", footer, table, problems[~problems["status"].isin(["ok", "done"])])
