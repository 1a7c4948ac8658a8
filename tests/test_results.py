"""experiments.results: round trips, and writes that fail without harm."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest

from experiments.results import MetricRow, ResultsWriteError, RunDir, atomic_write, read_footer, write_table

REPOSITORY = Path(__file__).resolve().parent.parent
FOOTER = {
    "run_id": "flat-tiny-s0-0123456789",
    "system": "flat",
    "implementation": "native",
    "seed": 0,
    "kind": "measured",
    "cluster": "local_2x2",
    "emulation": "plain loopback, declared levels",
}
ROWS = [MetricRow(1, "loss", "", 2.5, "nats/token"), MetricRow(1, "bytes", "node/alltoall", 4096.0, "B/step")]


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """A run that has just begun."""
    made = RunDir(tmp_path / "outputs" / "run")
    made.create({"seed": 3, "trainer": {"lr": 1e-05, "betas": [0.9, 0.95]}, "data": {"path": None}}, ["seed=3"])
    return made


def test_config_and_overrides_read_back_as_given(run_dir: RunDir) -> None:
    assert run_dir.config() == {"seed": 3, "trainer": {"lr": 1e-05, "betas": [0.9, 0.95]}, "data": {"path": None}}
    assert (run_dir.path / "overrides.yaml").read_text() == "- seed=3\n"
    assert run_dir.logs.is_dir()
    assert run_dir.checkpoints.is_dir()


def test_status_is_kept_with_its_step(run_dir: RunDir) -> None:
    begun = run_dir.status()
    assert begun is not None
    assert (begun.status, begun.reason, begun.step) == ("running", "", 0)
    assert begun.updated.endswith("+00:00")
    run_dir.set_status("running", step=40)
    run_dir.set_status("oom", "rank 1 ran out of memory")
    ended = run_dir.status()
    assert ended is not None
    assert (ended.status, ended.reason, ended.step) == ("oom", "rank 1 ran out of memory", 40)
    fields = json.loads((run_dir.path / "status.json").read_text())
    assert sorted(fields) == ["reason", "status", "step", "updated"]


def test_starting_again_keeps_what_the_first_start_wrote(run_dir: RunDir) -> None:
    run_dir.set_status("failed", "why", step=7)
    run_dir.write_metrics(ROWS, FOOTER)
    (run_dir.checkpoints / "step_7").mkdir()
    run_dir.create({"seed": 3}, [])
    status = run_dir.status()
    assert status is not None
    assert (status.status, status.step) == ("running", 7)
    assert run_dir.read_metrics() == ROWS
    assert (run_dir.checkpoints / "step_7").is_dir()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"status": "done", "colour": 1}', '{"status": "fine"}', "\0\xff"])
def test_a_status_from_another_hand_counts_as_none(run_dir: RunDir, text: str) -> None:
    (run_dir.path / "status.json").write_bytes(text.encode("latin-1"))
    assert run_dir.status() is None
    assert not run_dir.is_complete


def test_complete_means_done_with_metrics(run_dir: RunDir) -> None:
    assert not RunDir(run_dir.path / "nowhere").is_complete
    run_dir.write_metrics(ROWS, FOOTER)
    assert not run_dir.is_complete
    run_dir.set_status("done", step=2)
    assert run_dir.is_complete
    run_dir.metrics_path.unlink()
    assert not run_dir.is_complete


def test_metrics_round_trip_with_types_and_footer(run_dir: RunDir) -> None:
    assert run_dir.read_metrics() == []
    run_dir.write_metrics(ROWS, FOOTER)
    assert run_dir.read_metrics() == ROWS
    schema = pq.read_schema(run_dir.metrics_path)
    assert {field.name: str(field.type) for field in schema} == {
        "step": "int64",
        "metric": "string",
        "part": "string",
        "value": "double",
        "unit": "string",
    }
    assert json.loads(schema.metadata[b"moe_suite"]) == {"schema_version": 1, **FOOTER}
    assert read_footer(run_dir.metrics_path)["kind"] == "measured"


def test_no_rows_make_a_table_with_all_columns(run_dir: RunDir) -> None:
    run_dir.write_metrics([], FOOTER)
    assert pq.read_schema(run_dir.metrics_path).names == ["step", "metric", "part", "value", "unit"]
    assert run_dir.read_metrics() == []


def test_a_footer_must_say_what_the_run_was(run_dir: RunDir) -> None:
    with pytest.raises(AssertionError, match=r"a footer without \['seed'\]"):
        run_dir.write_metrics(ROWS, {name: value for name, value in FOOTER.items() if name != "seed"})


def test_any_named_tuple_makes_a_table(tmp_path: Path) -> None:
    class Sample(NamedTuple):
        system: str
        round: int
        value: float

    write_table(tmp_path / "samples.parquet", Sample, [Sample("flat", 0, float("nan"))], {"kind": "measured"})
    table = pq.read_table(tmp_path / "samples.parquet")
    assert [str(kind) for kind in table.schema.types] == ["string", "int64", "double"]
    assert np.isnan(table["value"][0].as_py())


def test_routing_round_trip(run_dir: RunDir) -> None:
    assert run_dir.read_routing() is None
    counts = np.arange(24, dtype=np.int32).reshape(2, 3, 2, 2)
    chosen = np.arange(30, dtype=np.int16).reshape(3, 5, 2)
    run_dir.write_routing(
        steps=np.array([0, 5]), dispatch_counts=counts, sample_step=np.array(5), sample_expert_ids=chosen
    )
    routing = run_dir.read_routing()
    assert routing is not None
    assert routing["steps"].tolist() == [0, 5]
    np.testing.assert_array_equal(routing["dispatch_counts"], counts)
    assert int(routing["sample_step"]) == 5
    np.testing.assert_array_equal(routing["sample_expert_ids"], chosen)
    assert routing["sample_expert_ids"].dtype == np.int16


def test_routing_of_a_wrong_shape_is_our_bug(run_dir: RunDir) -> None:
    with pytest.raises(AssertionError, match="dispatch_counts"):
        run_dir.write_routing(steps=np.array([0]), dispatch_counts=np.zeros((1, 4), dtype=np.int32))


def test_manifest_round_trip(run_dir: RunDir) -> None:
    run_dir.write_manifest({"seed": 3, "git": {"commit": None, "dirty": None}})
    assert run_dir.read_manifest() == {"seed": 3, "git": {"commit": None, "dirty": None}}


def names(folder: Path) -> list[str]:
    """All files of a folder, hidden ones included."""
    return sorted(path.name for path in folder.iterdir() if path.is_file())


@pytest.mark.parametrize("broken", ["os.replace", "os.fsync"])
def test_a_full_disk_leaves_the_old_file_whole(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    run_dir.write_metrics(ROWS, FOOTER)
    before = names(run_dir.path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(broken, full)
    with pytest.raises(ResultsWriteError) as caught:
        run_dir.write_metrics(ROWS * 2, FOOTER)
    monkeypatch.undo()
    assert str(caught.value) == (
        f"{run_dir.metrics_path} could not be written: No space left on device; its previous version is untouched. "
        "Fix: free some space on that disk, or set output_dir to a folder on another one; then start the run again"
    )
    assert run_dir.read_metrics() == ROWS
    assert names(run_dir.path) == before


@pytest.mark.parametrize("what", ["metrics", "routing", "status"])
def test_a_disk_that_is_really_full_leaves_the_old_files_whole(run_dir: RunDir, what: str) -> None:
    """The kernel itself refuses in a process whose files may not grow beyond 100 bytes."""
    old = np.zeros((1, 1, 1, 1), dtype=np.int32)
    run_dir.write_metrics(ROWS, FOOTER)
    run_dir.write_routing(steps=np.array([0]), dispatch_counts=old)
    run_dir.set_status("running", "first")
    before = {name: (run_dir.path / name).read_bytes() for name in names(run_dir.path)}
    program = f"""
import resource, sys
import numpy as np
from experiments.results import MetricRow, ResultsWriteError, RunDir
run_dir = RunDir({str(run_dir.path)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    if {what!r} == "metrics":
        run_dir.write_metrics([MetricRow(n, "loss", "", 1.0 / (n + 1), "nats/token") for n in range(10000)], {FOOTER!r})
    elif {what!r} == "routing":
        counts = np.arange(10000, dtype=np.int32).reshape(-1, 1, 1, 1)
        run_dir.write_routing(steps=np.arange(10000), dispatch_counts=counts)
    else:
        run_dir.set_status("failed", "x" * 1000)
except ResultsWriteError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (
        "could not be written: File too large; its previous version is untouched. Fix: free some space" in done.stdout
    )
    assert {name: (run_dir.path / name).read_bytes() for name in names(run_dir.path)} == before


def test_a_crash_between_write_and_rename_harms_nobody(run_dir: RunDir) -> None:
    run_dir.write_metrics(ROWS, FOOTER)
    program = f"""
import os
from pathlib import Path
from experiments.results import atomic_write
os.replace = lambda *paths: os._exit(9)
with atomic_write(Path({str(run_dir.metrics_path)!r})) as file:
    file.write(b"half a")
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=False).returncode == 9
    (draft,) = run_dir.path.glob(".metrics.parquet.*.tmp")
    assert run_dir.read_metrics() == ROWS
    run_dir.write_metrics(ROWS * 2, FOOTER)
    assert run_dir.read_metrics() == ROWS * 2
    assert not draft.exists()


def test_the_draft_of_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    draft = tmp_path / f".status.json.{os.getppid()}.tmp"
    draft.touch()
    with atomic_write(tmp_path / "status.json") as file:
        file.write(b"{}")
    assert draft.exists()


def test_an_error_of_the_caller_passes_through(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic_write(tmp_path / "file") as file:
        _half(file)
    assert names(tmp_path) == []


def _half(file: IO[bytes]) -> None:
    file.write(b"half a")
    raise KeyError


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "outputs").touch()
    message = r"outputs/run could not be written: Not a directory; .* Fix: .*output_dir"
    with pytest.raises(ResultsWriteError, match=message):
        RunDir(tmp_path / "outputs" / "run").create({}, [])


def test_a_folder_that_is_gone_is_told(run_dir: RunDir) -> None:
    with pytest.raises(ResultsWriteError, match=r"gone/status\.json could not be written: No such file or directory"):
        RunDir(run_dir.path / "gone").set_status("running")
