"""slurm.task, and what a job tells its ranks through their environment."""

from __future__ import annotations

import faulthandler
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra

from experiments import cells, train
from experiments.allocation import Shape
from experiments.cells import run_cells, run_dir_of
from experiments.cli import CONF, compose
from experiments.config import run_id
from experiments.launch import RankFailure
from experiments.ranks import GIVEN_UP, JOB_STOP_FILE, stop_file_in
from experiments.stop import StopRequest
from moe.errors import SuiteError
from slurm import task
from slurm.diagnosis import read_reports
from slurm.planning import plan
from slurm.records import Cell
from tests.tiny import ONE_RANK, Configure, tiny


@pytest.fixture
def cell(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> Cell:
    """A run of one rank, written into a folder."""
    monkeypatch.chdir(tmp_path)  # which the task changes, too
    monkeypatch.setattr(faulthandler, "enable", lambda: None)
    monkeypatch.setattr(faulthandler, "register", lambda *_arguments, **_more: None)
    (planned,) = plan([*tiny(tmp_path / "out", text, ONE_RANK), "data.val_fraction=0.25"], Shape(1, 1, "cpu"))
    planned.cell.save(tmp_path / "cell")
    return planned.cell


def entry_point(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> list[Any]:
    """Puts something in the place of experiments.train; what it is called with."""
    calls: list[Any] = []

    def main(*arguments: Any) -> None:
        calls.extend(arguments)
        if error is not None:
            raise error

    monkeypatch.setattr(train, "main", main)
    return calls


def test_a_task_runs_the_cells_entry_point(cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = entry_point(monkeypatch)
    task.main(tmp_path / "cell")
    config, overrides = calls
    assert str(run_dir_of(config).path) == cell.folders[0]
    assert "data.val_fraction=0.25" in overrides


def test_a_task_can_say_where_it_hangs_before_anything_heavy_is_imported() -> None:
    program = """
import faulthandler, os, runpy, sys
heavy = {"torch", "hydra", "experiments", "slurm.entry"}
def register(number, **more):
    print(number, *heavy & set(sys.modules), flush=True)
    os._exit(0)
faulthandler.register = register
sys.argv = ["slurm.task", "no folder"]
runpy.run_module("slurm.task", run_name="__main__", alter_sys=True)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=CONF.parent, capture_output=True, text=True, check=True)
    assert done.stdout == f"{signal.SIGQUIT}\n"


def test_another_cluster_than_planned_is_refused(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = entry_point(monkeypatch)
    replace(cell, folders=["/elsewhere/flat-tiny-s0-0000000000"]).save(tmp_path / "cell")
    with pytest.raises(SystemExit) as stop:
        task.main(tmp_path / "cell")
    assert stop.value.code == 2
    assert calls == []
    message = (
        "cluster=local_1: was planned for 1 node x 1 CPU rank, and here are 1 ranks on cpu. Fix: ask Slurm for what"
    )
    assert message in capsys.readouterr().err
    assert [report.kind for report in read_reports([tmp_path / "cell"])] == ["config"]


@pytest.mark.parametrize(
    ("error", "code", "kinds"),
    [
        (SuiteError("no"), 1, ["failed"]),
        (RankFailure("failed", 1, "rank 1 failed: x"), 1, []),  # whose ranks have reported it beside the run
        (RankFailure("interrupted", None, "stopped"), 130, []),
    ],
)
@pytest.mark.usefixtures("cell")
def test_what_fails_is_an_exit_code_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, kinds: list[str]
) -> None:
    entry_point(monkeypatch, error)
    with pytest.raises(SystemExit) as stop:
        task.main(tmp_path / "cell")
    assert stop.value.code == code
    assert [report.kind for report in read_reports([tmp_path / "cell"])] == kinds


@pytest.mark.usefixtures("cell")
def test_what_nobody_expected_is_reported_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry_point(monkeypatch, MemoryError())
    with pytest.raises(MemoryError):
        task.main(tmp_path / "cell")
    (report,) = read_reports([tmp_path / "cell"])
    assert report.kind == "oom"
    assert "MemoryError" in report.traceback


def test_a_run_that_its_job_gave_up_is_a_failure_and_not_tried(
    config: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launched(*_arguments: Any, **_more: Any) -> None:
        raise AssertionError("it was given up")

    monkeypatch.setattr(cells, "run_ranks", launched)
    run = config()
    folder = run_dir_of(run)
    folder.create({}, [])
    folder.set_status("oom", "too large")
    monkeypatch.setenv(GIVEN_UP, f"another,{run_id(run)}")
    (failure,) = run_cells([run], [])
    assert (failure.config, failure.error.kind, failure.error.reason) == (run, "oom", "too large")
    assert folder.status() is not None


def test_a_jobs_wish_to_stop_is_its_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stop_file_in(tmp_path) == tmp_path / "stop_requested"
    shared = tmp_path / "job" / "stop"
    shared.parent.mkdir()
    monkeypatch.setenv(JOB_STOP_FILE, str(shared))
    assert stop_file_in(tmp_path) == shared
    with StopRequest(stop_file_in(tmp_path)) as stop:
        assert not stop.requested
        shared.touch()
        assert stop.requested
        assert stop.by == "the job that started the ranks"


def test_configs_are_composed_inside_an_entry_point_too() -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        before = GlobalHydra.instance().hydra
        assert compose("comm")["repeats"] > 0
        assert GlobalHydra.instance().hydra is before
        assert hydra.compose("train").seed == 0
