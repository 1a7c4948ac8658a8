"""experiments.cells: which runs take place, and what is said of those that do not end well.

The ranks of these runs are this process (`tests.tiny.run_ranks_here`); real ranks are in test_resume.py.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from experiments import cells, registry, results
from experiments.cells import announce_and_check, run_cells, run_dir_of
from experiments.config import RunConfig, load_run, run_id
from experiments.data import prepare
from experiments.launch import RankFailure
from experiments.results import FOOTER_KEY, ResultsWriteError, RunDir
from moe.errors import ConfigError, Refused
from moe.mesh import Mesh
from moe.system import LayerSpec, MoELayer, System
from tests.tiny import ONE_RANK, by_step, repeatable, run_ranks_here, tiny_config, write_text

REFUSING = ("system=fairscale", "+system.gate=upstream")  # which wants a capacity factor


class Broken(System):
    """Can't build its layer."""

    name = "broken"
    implementation = "native"
    summary = "fails"
    error: Exception = ValueError("no such kernel")

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """Fail."""
        raise self.error


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The run ids of every launch."""
    seen: list[list[str]] = []

    def launch(target: str, payload: dict[str, Any], **more: Any) -> Any:
        seen.append([Path(run["run_dir"]).name for run in payload["runs"]])
        return run_ranks_here(target, payload, **more)

    monkeypatch.setattr(cells, "run_ranks", launch)
    return seen


@pytest.fixture
def config(tmp_path: Path, text: Path, launched: list[list[str]]) -> Callable[..., RunConfig]:
    """Makes a config of one rank from overrides; runs of it take place in this process."""
    return lambda *overrides: tiny_config(tmp_path / "out", text, ONE_RANK, *overrides)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the system `broken` into the registry."""
    systems = {**registry.discover(), "broken": Broken}
    monkeypatch.setattr(registry, "discover", lambda: systems)


def status(config: RunConfig) -> tuple[str, str]:
    """Status and reason."""
    found = run_dir_of(config).status()
    assert found is not None
    return found.status, found.reason


def test_what_a_run_leaves(config: Callable[..., RunConfig]) -> None:
    run = config("seed=3")
    assert run_cells([run], ["seed=3"]) == []
    run_dir = run_dir_of(run)
    assert run_dir.path.name == run_id(run)
    files = {"config.yaml", "overrides.yaml", "manifest.json", "metrics.parquet", "routing.npz", "status.json"}
    assert {path.name for path in run_dir.path.iterdir()} == files | {"progress.jsonl", "logs", "checkpoints"}
    assert load_run(run_dir.config()) == run
    assert yaml.safe_load((run_dir.path / "overrides.yaml").read_text()) == ["seed=3"]
    state = run_dir.status()
    assert state is not None
    assert (state.status, state.reason, state.step) == ("done", "", 6)

    manifest = run_dir.read_manifest()
    assert (manifest["run_id"], manifest["seed"]) == (run_id(run), 3)
    assert manifest["cluster"]["levels"][0]["fanout"] == 1
    assert (manifest["system"], manifest["implementation"]) == ("flat", "native")
    assert manifest["text_sha256"] == prepare(run.data, run.model.vocab_size).fingerprint
    assert manifest["earlier_starts"] == []
    assert manifest["started"] <= manifest["ended"]
    assert set(manifest["git"]) == {"commit", "dirty"}
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["hardware"]["cores"] >= 1
    assert len(manifest["lock_sha256"]) == 64

    footer = json.loads(pq.read_schema(run_dir.metrics_path).metadata[FOOTER_KEY])
    wanted = {"run_id": run_id(run), "system": "flat", "implementation": "native", "seed": 3, "kind": "measured"}
    assert wanted.items() <= footer.items()
    routing = run_dir.read_routing()
    assert routing is not None
    assert routing["dispatch_counts"].shape == (6, 2, run.cluster.world_size, 4)
    assert (routing["dispatch_counts"].sum((2, 3)) == 4 * 16 * 2).all()  # sequences x tokens x choices
    assert routing["sample_expert_ids"].shape == (2, 64, 2)


def test_a_complete_run_is_not_run_again_unless_forced(
    config: Callable[..., RunConfig], launched: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run = config()
    run_cells([run], [])
    mark = run_dir_of(run).path / "mine.txt"
    mark.touch()
    assert run_cells([run], []) == []
    assert len(launched) == 1
    assert f"{run_id(run)} is complete (force=true runs it again)" in capsys.readouterr().out
    forced = config("force=true")
    assert run_id(forced) == run_id(run)
    before = repeatable(run_dir_of(run))
    run_cells([forced], [])
    assert len(launched) == 2
    assert not mark.exists()
    assert repeatable(run_dir_of(run)) == before


def test_a_run_on_text_that_has_changed_starts_anew(
    launched: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path)
    run = tiny_config(tmp_path / "out", text, ONE_RANK)
    run_cells([run], [])
    first = run_dir_of(run).read_manifest()["text_sha256"]
    assert cells.is_current(run)
    for file in text.rglob("*.*"):
        file.write_text(file.read_text().upper())
    assert not cells.is_current(run)
    mark = run_dir_of(run).path / "mine.txt"
    mark.touch()
    run_cells([run], [])
    assert len(launched) == 2
    assert "was made with other text: it starts anew" in capsys.readouterr().out
    assert not mark.exists()
    assert run_dir_of(run).read_manifest()["text_sha256"] != first


def test_a_second_start_tells_of_the_first(config: Callable[..., RunConfig]) -> None:
    run = config()
    run_cells([run], [])
    run_dir_of(run).set_status("failed", "the last time")
    first = run_dir_of(run).read_manifest()
    run_cells([run], [])
    told = {key: first[key] for key in ("started", "git")}
    assert run_dir_of(run).read_manifest()["earlier_starts"] == [told]


def test_too_little_text_is_told_before_a_folder_is_made(launched: list[list[str]], tmp_path: Path) -> None:
    run = tiny_config(tmp_path / "out", write_text(tmp_path), ONE_RANK, "trainer.global_batch_size=65536")
    with pytest.raises(
        ConfigError, match=r"data\.path=.*must give at least \d+ train tokens \(one global batch of 65536 x 16\)"
    ):
        announce_and_check([run])
    assert not run_dir_of(run).path.exists()


def test_only_what_is_not_complete_is_started(config: Callable[..., RunConfig], launched: list[list[str]]) -> None:
    runs = [config(f"seed={seed}") for seed in range(3)]
    run_cells(runs[1:2], [])
    run_dir_of(runs[2]).create(runs[2].model_dump(mode="json"), [])
    run_dir_of(runs[2]).set_status("failed", "the last time")
    run_cells(runs, [])
    assert launched == [[run_id(runs[1])], [run_id(runs[0]), run_id(runs[2])]]
    assert [status(run) for run in runs] == [("done", "")] * 3


def test_a_refused_run_is_a_status_and_the_others_go_on(
    config: Callable[..., RunConfig], launched: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    refused, run = config(*REFUSING), config()
    assert run_cells([refused, run], []) == []
    assert launched == [[run_id(run)]]
    assert status(refused)[0] == "refused"
    assert "Top2Gate knows only top_k=2 and capacity_factor=1.0" in status(refused)[1]
    assert "fairscale refuses: fairscale's Top2Gate" in capsys.readouterr().out
    assert status(run) == ("done", "")
    assert run_cells([refused], []) == []  # nothing left to launch


def test_a_complete_run_stays_complete_when_its_package_is_gone(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config()
    run_cells([run], [])
    monkeypatch.setattr(cells, "refusals_of", lambda config: ["The package is not installed."])
    run_cells([run], [])
    assert status(run) == ("done", "")


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (ValueError("no such kernel"), "failed", "ValueError: no such kernel"),
        (torch.OutOfMemoryError("CUDA out of memory"), "oom", "rank 0 ran out of memory: "),
        (Refused("This kernel needs an H100."), "refused", "This kernel needs an H100."),
    ],
)
@pytest.mark.usefixtures("broken")
def test_a_failure_is_a_status_and_the_next_goes_on(
    config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    launched: list[list[str]],
    error: Exception,
    kind: str,
    reason: str,
) -> None:
    monkeypatch.setattr(Broken, "error", error)
    first, wrong, last = config("seed=1"), load_run({**config().model_dump(mode="json"), "system": "broken"}), config()
    failures = run_cells([first, wrong, last], [])
    assert launched == [[run_id(run) for run in (first, wrong, last)], [run_id(last)]]
    assert [status(first), status(last)] == [("done", "")] * 2
    assert status(wrong)[0] == kind
    assert reason in status(wrong)[1]
    assert [failure.config for failure in failures] == ([] if kind == "refused" else [wrong])
    assert all(run_dir_of(run).read_manifest()["ended"] for run in (first, wrong, last))


def test_a_damaged_checkpoint_ends_all_and_says_so_of_each(config: Callable[..., RunConfig]) -> None:
    first, second = config(), config("seed=1")
    run_cells([first], [])
    run_dir_of(first).set_status("failed", "say")
    (run_dir_of(first).checkpoints / "step_6" / "trainer.pt").unlink()
    with pytest.raises(ConfigError, match=r"^checkpoint=.*step_6: .*its file trainer\.pt is missing"):
        run_cells([first, second], [])
    assert status(first)[0] == "failed"
    assert "trainer.pt is missing" in status(first)[1]
    assert status(second) == ("interrupted", f"not started: {run_id(first)} ended all runs")
    assert (run_dir_of(first).checkpoints / "step_6" / "checksums.json").exists()  # nothing was cleaned away


def test_ctrl_c_before_the_ranks_start(config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_arguments: Any, **_named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cells, "run_ranks", interrupted)
    runs = [config(), config("seed=1")]
    with pytest.raises(KeyboardInterrupt):
        run_cells(runs, [])
    assert status(runs[0]) == ("interrupted", "stopped by Ctrl-C")
    assert status(runs[1]) == ("interrupted", f"not started: {run_id(runs[0])} ended all runs")


def test_a_full_disk_amid_a_run(config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """The metrics of step 4 do not fit any more: the run fails, and goes on when there is room."""
    write = RunDir.write_metrics

    def full(self: RunDir, rows: Any, footer: Any) -> None:
        if any(row.step == 3 for row in rows):
            raise ResultsWriteError(self.metrics_path, "No space left on device", "free some space")
        write(self, rows, footer)

    monkeypatch.setattr(RunDir, "write_metrics", full)
    run, straight = config(), config("seed=0", "output_dir=" + str(config().output_dir) + "/straight")
    (failure,) = run_cells([run], [])
    assert failure.error.kind == "failed"
    assert status(run)[0] == "failed"
    assert "metrics.parquet could not be written: No space left on device" in status(run)[1]
    assert [path.name for path in run_dir_of(run).checkpoints.iterdir()] == ["step_2"]
    monkeypatch.undo()
    monkeypatch.setattr(cells, "run_ranks", run_ranks_here)
    assert run_cells([run, straight], []) == []
    assert repeatable(run_dir_of(run)) == repeatable(run_dir_of(straight))


def test_a_checkpoint_that_does_not_fit_the_disk(config: Callable[..., RunConfig]) -> None:
    """The operating system itself refuses: a file may not grow beyond 64 KiB, the checkpoint's is larger."""
    run = config()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    try:
        (failure,) = run_cells([run], [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "step_2 could not be written" in str(failure.error)
    assert "Fix: free some space on that disk, or set output_dir" in status(run)[1]
    assert list(run_dir_of(run).checkpoints.iterdir()) == []  # no half of it is left
    assert run_cells([run], []) == []
    assert status(run) == ("done", "")


def test_a_disk_so_full_that_not_even_the_status_fits(
    config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config()

    def full(path: Path) -> Any:
        raise ResultsWriteError(path, "No space left on device", "free some space")

    def lose_the_disk(*_arguments: Any, **_more: Any) -> None:
        monkeypatch.setattr(results, "atomic_write", full)
        raise RankFailure("failed", 0, "ResultsWriteError: no space")

    monkeypatch.setattr(cells, "run_ranks", lose_the_disk)
    with pytest.raises(ResultsWriteError, match=r"status\.json could not be written: No space left"):
        run_cells([run], [])
    assert status(run)[0] == "running"  # the last words that did fit


def test_a_start_from_nowhere_is_refused_before_the_ranks(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    run = config(f"trainer.resume_from={tmp_path / 'empty'}")
    message = r"^trainer\.resume_from=.*empty: there is no checkpoint: .*Fix: name the folder of a run, outputs/RUN_ID"
    with pytest.raises(ConfigError, match=message):
        announce_and_check([run])
    assert not run_dir_of(run).path.exists()


def test_a_start_from_beyond_the_end_is_refused(config: Callable[..., RunConfig]) -> None:
    run_cells([source := config()], [])
    beyond = config(f"trainer.resume_from={run_dir_of(source).path}")
    message = r"^trainer\.max_steps=6: must be above the steps that were done.*Fix: set trainer\.max_steps above 6"
    with pytest.raises(ConfigError, match=message):
        announce_and_check([beyond])
    longer = config(f"trainer.resume_from={run_dir_of(source).path}", "trainer.max_steps=8")
    announce_and_check([longer])
    run_cells([longer], [])
    assert list(by_step(run_dir_of(longer), "loss")) == [6, 7]
