"""experiments.layer, stopped: what it keeps, what it says, and how the same command goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import isnan, nan
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import analysis.layer
from analysis.load import load_samples
from experiments import bench_run, layer, layer_bench, progress_log, provenance
from experiments.cli import EXIT_FAILED, EXIT_INTERRUPTED
from experiments.launch import RankFailure, run_ranks
from experiments.progress_log import Line
from experiments.provenance import sources_sha256
from experiments.results import ResultsWriteError, RunDir
from experiments.samples import append_samples, read_samples
from tests.tiny import ONE_RANK, TWO_RANKS, run_ranks_here

SIZES = "tokens_per_rank: 24, model_dim: 32, hidden_dim: 16, num_experts: 4, top_k: 2"
COMMAND = [
    f"shapes=[{','.join(f'{{name: {name}, {SIZES}}}' for name in 'abc')}]",
    "systems=[flat,reference]",
    "rounds=2",
    "warmup=1",
]
Start = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the figure, which takes longer than all the rest; and whoever edits the sources meanwhile may do so."""
    monkeypatch.setattr(provenance, "sources_sha256", lambda: "0" * 64)
    monkeypatch.setattr(analysis.layer, "stages_figure", lambda *_arguments: None)
    monkeypatch.setattr(analysis.layer, "save", lambda *_arguments: None)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Start the command, with one rank, which is this process.

    `start(*overrides, stop_after=None, fail_at=None, code=0)` asks it to stop after so many measurements, or lets that
    shape fail; checks the exit code; and returns what was measured: shapes, and `kernels a` for those of a shape.
    """
    measured: list[str] = []
    events: dict[str, Any] = {}

    def observed(function: Callable[..., Any], prefix: str) -> Callable[..., Any]:
        def call(case: layer_bench.Case, *more: Any) -> Any:
            if case.shape == events["fail_at"]:
                raise RuntimeError("no such kernel")
            rows = function(case, *more)
            measured.append(f"{prefix}{case.shape}")
            return rows

        return call

    def ranks_here(target: str, payload: dict[str, Any], **more: Any) -> Any:
        value = run_ranks_here(target, payload, **more)
        if value is None:
            raise RankFailure("interrupted", None, "stopped by SIGTERM")
        return value

    monkeypatch.setattr(layer_bench, "measure_case", observed(layer_bench.measure_case, ""))
    monkeypatch.setattr(layer_bench, "profile_case", observed(layer_bench.profile_case, "kernels "))
    monkeypatch.setattr(layer_bench, "stop_agreed", lambda _info: len(measured) == events["stop_after"])
    monkeypatch.setattr(layer_bench, "peak_memory_bytes", lambda *_arguments: 1)  # which collects garbage, slowly
    monkeypatch.setattr(bench_run, "run_ranks", ranks_here)

    def run(*overrides: str, stop_after: int | None = None, fail_at: str | None = None, code: int = 0) -> list[str]:
        measured.clear()
        events.update(stop_after=stop_after, fail_at=fail_at)
        assert command_line(monkeypatch, ONE_RANK, f"output_dir={tmp_path}", *overrides) == code
        return list(measured)

    return run


def command_line(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> int:
    """The exit code of the command."""
    monkeypatch.setattr("sys.argv", ["layer", *COMMAND, *overrides])
    try:
        layer.main()
    except SystemExit as end:
        return int(str(end.code))
    return 0


def folder_in(outputs: Path) -> Path:
    """Of the only run."""
    (folder,) = outputs.glob("layer-*")
    return folder


def samples_in(outputs: Path) -> pd.DataFrame:
    """Of the only run."""
    return pd.read_parquet(folder_in(outputs) / "samples.parquet")


def of_shape(samples: pd.DataFrame, shape: str) -> pd.DataFrame:
    """Its rows."""
    return samples[samples["shape"] == shape].reset_index(drop=True)


def test_ranks_that_were_stopped_go_on_with_the_shapes_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(bench_run, "run_ranks", lambda _, *more, **named: run_ranks(STOPPING, *more, **named))
        assert command_line(monkeypatch, TWO_RANKS, f"output_dir={tmp_path}") == EXIT_INTERRUPTED
    folder = folder_in(tmp_path)
    told = capfd.readouterr()
    assert f"1 of 3 shapes are measured, in {folder}; the same command goes on from there" in told.out
    first = of_shape(samples_in(tmp_path), "a")
    assert set(first["metric"]) >= {"step_time", "stage_time", "relative_error"}
    assert command_line(monkeypatch, TWO_RANKS, f"output_dir={tmp_path}") == 0
    printed = capfd.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("layer ")] == [
        f"layer {name}: measured flat, reference" for name in "bc"
    ]
    pd.testing.assert_frame_equal(of_shape(samples_in(tmp_path), "a"), first)
    assert not len(load_samples(folder).problems)


STOPPING = "tests.rank_layer:stop_after_one"


def test_what_is_missing_is_told_as_missing(start: Start, tmp_path: Path) -> None:
    assert start(stop_after=1, code=EXIT_INTERRUPTED) == ["a"]
    status = RunDir(folder_in(tmp_path)).status()
    assert status is not None and status.status == "interrupted"
    assert status.reason == "the run was interrupted: stopped by SIGTERM; 1 of 3 shapes are measured"
    samples = load_samples(folder_in(tmp_path))
    assert set(samples.table["shape"]) == {"a"}
    told = {(row.shape, row.system, row.implementation, row.status) for row in samples.problems.itertuples()}
    assert told == {(shape, system, "native", "missing") for shape in "bc" for system in ("flat", "reference")}
    summary = pd.read_csv(folder_in(tmp_path) / "summary.csv")
    states = summary.groupby("shape")["status"].unique().map(list).to_dict()
    missing = ["missing: not measured yet, 1 of 3 shapes are measured"]
    assert states == {"a": ["ok"], "b": missing, "c": missing}


def test_a_run_with_a_stop_ends_as_one_without(start: Start, tmp_path: Path) -> None:
    start(stop_after=1, code=EXIT_INTERRUPTED)
    assert start(stop_after=1, code=EXIT_INTERRUPTED) == ["b"]
    assert start() == ["c"]
    folder = folder_in(tmp_path)
    assert not (folder / "samples.jsonl").exists()
    stopped, status = samples_in(tmp_path), RunDir(folder).status()
    footer = load_samples(folder).metadata
    assert status is not None and (status.status, status.reason) == ("done", "")
    assert start("force=true") == ["a", "b", "c"]
    keys = list(stopped.columns.drop("value"))
    pd.testing.assert_frame_equal(stopped[keys], samples_in(tmp_path)[keys])
    assert load_samples(folder).metadata == footer
    assert set(pd.read_csv(folder / "summary.csv")["status"]) == {"ok"}


def test_a_stop_amid_the_kernels_costs_none_that_are_listed(start: Start, tmp_path: Path) -> None:
    assert start("profile=true", stop_after=4, code=EXIT_INTERRUPTED) == ["a", "b", "c", "kernels a"]
    status = RunDir(folder_in(tmp_path)).status()
    assert status is not None and status.reason.endswith("; 3 of 3 shapes are measured, the kernels of 1")
    assert start("profile=true") == ["kernels b", "kernels c"]
    kernels = samples_in(tmp_path).query("metric == 'kernel_time'")
    assert list(kernels["shape"].unique()) == ["a", "b", "c"]


def test_a_shape_that_fails_costs_none_that_are_measured(start: Start, tmp_path: Path) -> None:
    assert start(fail_at="c", code=EXIT_FAILED) == ["a", "b"]
    status = RunDir(folder_in(tmp_path)).status()
    assert status is not None and status.status == "failed"
    assert "no such kernel" in status.reason and status.reason.endswith("; 2 of 3 shapes are measured")
    assert start() == ["c"]


def test_a_run_that_was_killed_goes_on(start: Start, tmp_path: Path) -> None:
    """As after SIGKILL: the journal alone, whose last record broke off."""
    start(stop_after=2, code=EXIT_INTERRUPTED)
    folder = folder_in(tmp_path)
    (folder / "samples.parquet").unlink()
    RunDir(folder).set_status("running")
    journal = folder / "samples.jsonl"
    journal.write_bytes(journal.read_bytes()[:-100])
    assert start(stop_after=1, code=EXIT_INTERRUPTED) == ["b"]
    assert start() == ["c"]
    assert list(samples_in(tmp_path)["shape"].unique()) == ["a", "b", "c"]


def test_a_stop_before_the_first_shape_leaves_no_samples(start: Start, tmp_path: Path) -> None:
    assert start(stop_after=0, code=EXIT_INTERRUPTED) == []
    assert load_samples(folder_in(tmp_path)).status == "interrupted"
    assert start() == ["a", "b", "c"]


def test_rounds_are_told_to_whoever_watches(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_log, "EVERY_S", 0.0)
    start()
    texts = (folder_in(tmp_path) / progress_log.FILE).read_text().splitlines()
    phases = [Line(**json.loads(text)).phase for text in texts]
    a_shape = ["training"] * 3 + ["starting"]  # two rounds behind one to warm up
    assert phases == ["starting", *a_shape * 3]
    assert {Line(**json.loads(text)).step for text in texts} == {0}


def test_force_starts_anew(start: Start) -> None:
    start(stop_after=1, code=EXIT_INTERRUPTED)
    assert start("force=true") == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "other"),
    [("hardware", {"cpu": "another"}), ("sources_sha256", "other")],
)
def test_other_code_or_another_machine_starts_anew(
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    other: Any,
) -> None:
    start(stop_after=1, code=EXIT_INTERRUPTED)
    monkeypatch.setattr(provenance, name, lambda: other)
    assert start() == ["a", "b", "c"]
    folder = folder_in(tmp_path)
    assert f"{folder} was begun with other {name}: it starts anew" in capsys.readouterr().out
    assert "earlier_starts" not in RunDir(folder).read_manifest()


def test_a_node_with_a_few_bytes_less_goes_on(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    start(stop_after=1, code=EXIT_INTERRUPTED)
    here = provenance.hardware()
    monkeypatch.setattr(provenance, "hardware", lambda: here | {"memory_bytes": here["memory_bytes"] - 4096})
    assert start() == ["b", "c"]


def test_another_commit_of_the_same_code_goes_on(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(stop_after=1, code=EXIT_INTERRUPTED)
    manifest = RunDir(folder_in(tmp_path)).read_manifest()
    monkeypatch.setattr(provenance, "git_state", lambda: {"commit": "0" * 40, "dirty": False})
    assert start() == ["b", "c"]
    told = RunDir(folder_in(tmp_path)).read_manifest()
    assert told["earlier_starts"] == [{"started": manifest["started"], "git": manifest["git"]}]
    assert told["git"]["commit"] == "0" * 40


def test_the_hash_is_of_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    for folder in ("moe", "tests"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "layer.py").write_text("1\n")
    before = sources_sha256()
    (tmp_path / "tests" / "layer.py").write_text("2\n")
    assert sources_sha256() == before
    (tmp_path / "moe" / "layer.py").write_text("2\n")
    assert sources_sha256() != before


def test_records_behind_one_that_broke_off_are_read(tmp_path: Path) -> None:
    journal = tmp_path / "samples.jsonl"
    assert read_samples(journal) == {}
    append_samples(journal, ("times", "a"), [["flat", 0.1 + 0.2]])
    append_samples(journal, ("times", "b"), [["flat", 2.0]])
    whole = journal.read_text()
    journal.write_text(whole[:-5])
    assert list(read_samples(journal)) == [("times", "a")]
    append_samples(journal, ("times", "c"), [["flat", nan]])
    found = read_samples(journal)
    assert list(found) == [("times", "a"), ("times", "c")]
    assert found["times", "a"] == [["flat", 0.1 + 0.2]]
    assert isnan(found["times", "c"][0][1])


def test_a_journal_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ResultsWriteError, match=r"samples\.jsonl could not be written"):
        append_samples(tmp_path / "missing" / "samples.jsonl", ("times", "a"), [])
