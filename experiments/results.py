"""The folder of one run: what stands in it, how it is written, and how it is read back.

Nothing here ever leaves half a file: every write goes to a temporary name in the same folder, is flushed to the disk
and then renamed. A write that fails leaves the previous version whole.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, get_args, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from omegaconf import OmegaConf

from moe.errors import SuiteError

RunStatus = Literal["running", "done", "failed", "oom", "refused", "timeout", "interrupted"]
FOOTER_KEY = b"moe_suite"
SCHEMA_VERSION = 1
METRICS_FOOTER = ("run_id", "system", "implementation", "seed", "kind", "cluster", "emulation")
COLUMN_TYPES = {int: pa.int64(), float: pa.float64(), str: pa.string()}
ROUTING_ARRAYS = {
    "steps": (np.int64, 1),
    "dispatch_counts": (np.int32, 4),
    "replica_counts": (np.int16, 3),
    "expert_of_slot": (np.int16, 3),
    "target_shares": (np.float64, 2),
    "sample_step": (np.integer, 0),
    "sample_expert_ids": (np.int16, 3),
}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
MORE_SPACE = "free some space on that disk, or set output_dir to a folder on another one; then start the run again"


class ResultsWriteError(SuiteError):
    """A result could not be written; the file's previous version, if there was one, is untouched.

    Args:
        path: the file.
        reason: the operating system's words.
        fix: what the user can do.
    """

    def __init__(self, path: Path, reason: str, fix: str) -> None:
        self.path = path
        super().__init__(f"{path} could not be written: {reason}; its previous version is untouched. Fix: {fix}")


def write_error(path: Path, error: OSError) -> ResultsWriteError:
    """What the operating system said about writing `path`, with a fix."""
    if error.errno in DISK_FULL:
        fix = MORE_SPACE
    elif error.errno in NOT_ALLOWED:
        fix = "make the folder writable, or set output_dir to one that is"
    else:
        fix = "look after that folder, or set output_dir to another one"
    return ResultsWriteError(path, error.strerror or str(error), fix)


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that becomes `path` when the block ends well, and vanishes when it does not.

    Its temporary name starts with a dot and holds our process id. What a killed process left behind is removed by the
    next write of the same file.

    Raises:
        ResultsWriteError: for any OSError on the way, the disk being full above all.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _remove_drafts(path)
        try:
            with draft.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error) from error


def _remove_drafts(path: Path) -> None:
    for draft in path.parent.glob(f".{path.name}.*.tmp"):
        writer = draft.suffixes[-2].lstrip(".")
        if not writer.isdecimal() or int(writer) == os.getpid() or not _alive(int(writer)):
            draft.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself
    finally:
        os.close(descriptor)


def write_table(
    path: Path, row_type: type[NamedTuple], rows: Iterable[Sequence[Any]], footer: Mapping[str, Any]
) -> None:
    """Write rows as Parquet, with a JSON footer that says what they are.

    Args:
        path: the file; its folder must exist.
        row_type: names and types (int, float, str) of the columns, e.g. `MetricRow`.
        rows: values in that order.
        footer: JSON-able; the version of the schema is added.

    Raises:
        ResultsWriteError: the write failed.
    """
    fields = get_type_hints(row_type)
    columns = list(zip(*rows, strict=True)) or [()] * len(fields)
    schema = pa.schema([(name, COLUMN_TYPES[kind]) for name, kind in fields.items()])
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    said = json.dumps({"schema_version": SCHEMA_VERSION, **footer}).encode()
    with atomic_write(path) as file:
        pq.write_table(pa.table(arrays, schema.with_metadata({FOOTER_KEY: said})), file, compression="zstd")


def read_footer(path: Path) -> dict[str, Any]:
    """The JSON footer of a table that `write_table` wrote."""
    footer: dict[str, Any] = json.loads(pq.read_schema(path).metadata[FOOTER_KEY])
    return footer


def now() -> str:
    """The time, ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class MetricRow(NamedTuple):
    """One number of a run. `part` is empty, or a level, a stage, or `<level>/<class>`; `unit` is spelled out."""

    step: int
    metric: str
    part: str
    value: float
    unit: str


@dataclass(frozen=True)
class Status:
    """How far a run came.

    Args:
        status: one of `RunStatus`.
        reason: why it ended, empty for `running` and `done`.
        step: optimizer steps taken.
        updated: ISO 8601, UTC.
    """

    status: RunStatus
    reason: str = ""
    step: int = 0
    updated: str = ""


class RunDir:
    """The folder `outputs/<run id>/`.

    Args:
        path: the folder; made by `create`.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def logs(self) -> Path:
        """Folder of the ranks' logs."""
        return self.path / "logs"

    @property
    def journal(self) -> Path:
        """What is measured of a benchmark that is not complete: see `experiments.samples.append_samples`."""
        return self.path / "samples.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, `step_<n>/` each."""
        return self.path / "checkpoints"

    @property
    def measurements(self) -> Path:
        """Folder of what the run measured of its cluster before it started; outside its own, which may start anew."""
        return self.path.parent / "clusters" / self.path.name

    @property
    def metrics_path(self) -> Path:
        """The long table of metrics."""
        return self.path / "metrics.parquet"

    @property
    def is_complete(self) -> bool:
        """Whether the run is done and its metrics are there, so that it need not run again."""
        status = self.status()
        return status is not None and status.status == "done" and self.metrics_path.exists()

    def create(self, config: Mapping[str, Any], overrides: Sequence[str]) -> None:
        """Make the folder, write config.yaml and overrides.yaml, and say `running`; keeps checkpoints and metrics."""
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise write_error(self.path, error) from error
        self._write_text("config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(config))))
        self._write_text("overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(list(overrides))))
        self.set_status("running")

    def config(self) -> dict[str, Any]:
        """The config that `create` wrote."""
        loaded = OmegaConf.to_container(OmegaConf.load(self.path / "config.yaml"))
        assert isinstance(loaded, dict), loaded
        return {str(key): value for key, value in loaded.items()}

    def status(self) -> Status | None:
        """The last status; None when there is none that can be read, and then the run counts as never started."""
        path = self.path / "status.json"
        if not path.exists():
            return None
        try:
            status = Status(**json.loads(path.read_text()))
        except (ValueError, TypeError):  # not JSON (or not text), or not our fields: somebody else's hand
            return None
        return status if status.status in get_args(RunStatus) else None

    def set_status(self, status: RunStatus, reason: str = "", step: int | None = None) -> None:
        """Say how far the run is; `step` None keeps the last one said."""
        if step is None:
            last = self.status()
            step = 0 if last is None else last.step
        self._write_text("status.json", json.dumps(asdict(Status(status, reason, step, now())), indent=1) + "\n")

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Write manifest.json, usually `experiments.provenance.manifest`."""
        self._write_text("manifest.json", json.dumps(manifest, indent=1) + "\n")

    def read_manifest(self) -> dict[str, Any]:
        """What `write_manifest` wrote; empty when there is none that can be read."""
        try:
            manifest = json.loads((self.path / "manifest.json").read_text())
        except (OSError, ValueError):
            return {}
        return manifest if isinstance(manifest, dict) else {}

    def write_metrics(self, rows: Iterable[MetricRow], footer: Mapping[str, Any]) -> None:
        """Write metrics.parquet whole; the footer holds at least `METRICS_FOOTER`."""
        missing = [name for name in METRICS_FOOTER if name not in footer]
        assert not missing, f"a footer without {missing}"
        write_table(self.metrics_path, MetricRow, rows, footer)

    def read_metrics(self) -> list[MetricRow]:
        """The metrics, in the order in which they were written; none before the first write."""
        if not self.metrics_path.exists():
            return []
        table = pq.read_table(self.metrics_path, columns=list(MetricRow._fields))
        return [MetricRow(**row) for row in table.to_pylist()]

    def stamp(self, key: Literal["started", "ended"]) -> None:
        """Write the time into the manifest that is there."""
        self.write_manifest({**self.read_manifest(), key: now()})

    def write_routing(self, **arrays: NDArray[Any]) -> None:
        """Write routing.npz whole: what the gates chose.

        Args:
            arrays: `steps` int64 [steps]; `dispatch_counts` (copies that each rank's tokens chose for each expert)
                int32 [steps, moe_layers, W, E]; `replica_counts` (slots that each expert had in the step, where experts
                have replicas: `moe.system.MoELayer.replicas_E`) int16 [steps, moe_layers, E]; `expert_of_slot`
                (where they change places) int16 [steps, moe_layers, E]; `sample_step` int scalar and
                `sample_expert_ids` (the joint choices of all its tokens) int16 [moe_layers, T_global, K]; what the
                layers' `observations` tell. Any of them may be missing.
        """
        for name, array in arrays.items():
            kind, num_dims = ROUTING_ARRAYS.get(name, (np.number, array.ndim))
            assert np.issubdtype(array.dtype, kind) and array.ndim == num_dims, (name, array.dtype, array.shape)
        with atomic_write(self.path / "routing.npz") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # the stubs take them for `allow_pickle`

    def read_routing(self) -> dict[str, NDArray[Any]] | None:
        """What `write_routing` wrote, None before the first write."""
        path = self.path / "routing.npz"
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def _write_text(self, name: str, text: str) -> None:
        with atomic_write(self.path / name) as file:
            file.write(text.encode())
