"""Runs of real ranks: every system side by side, killed, interrupted and resumed ones, and ranks of torchrun."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import cells
from experiments.cells import CellFailure, run_cells, run_dir_of
from experiments.launch import RankFailure, run_ranks
from experiments.results import RunDir, Status
from tests.rank_models import runnable
from tests.tiny import ONE_RANK, TWO_RANKS, by_step, repeatable, run_ranks_here, tiny, tiny_config

REPOSITORY = Path(__file__).resolve().parent.parent
SYSTEMS = runnable()
OTHERS = [name for name in ("reference", "deepspeed") if name in SYSTEMS]
"""Systems whose checkpoints flat goes on from: one that shards its experts otherwise, and one from upstream."""


@contextmanager
def acting(acts: list[dict[str, Any]], on_poll: Callable[[], None] | None = None) -> Iterator[None]:
    """Let the ranks of `run_cells` do what `tests.rank_training` offers."""

    def launch(target: str, payload: dict[str, Any], **more: Any) -> Any:
        assert target == "experiments.training:run_rank"
        return run_ranks("tests.rank_training:run_rank", {**payload, "acts": acts}, on_poll=on_poll, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "run_ranks", launch)
        yield


@contextmanager
def ctrl_c_while_waiting(lock: Path, stop_file: Path) -> Iterator[Callable[[], None]]:
    """An `on_poll` that presses Ctrl-C once rank 0 waits for the lock, and lets it go on when the wish is known."""
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        pressed: list[bool] = []

        def press() -> None:
            if not pressed and lock.with_name(f"{lock.name}.reached").exists():
                pressed.append(True)
                os.kill(os.getpid(), signal.SIGINT)
            elif stop_file.exists():
                fcntl.flock(held, fcntl.LOCK_UN)

        yield press


NO_AUX = "model.aux_loss_weight=0.0"


@dataclass
class Story:
    """Runs of two ranks: every system's, and in folders of their own flat's twice more, killed and interrupted, and
    SwiftMoE's, of which a rank dies amid a step.

    Args:
        runs: every system by name, and flat going on from the last checkpoint of some, `from <system>`, and flat
            without the auxiliary loss, `no aux`.
        killed, interrupted, broken: the folders of these.
    """

    runs: dict[str, RunDir]
    killed: RunDir
    interrupted: RunDir
    broken: RunDir
    failures: list[CellFailure] = field(default_factory=list)
    after_kill: Status | None = None
    kept_by_kill: list[str] = field(default_factory=list)
    after_break: Status | None = None
    kept_by_break: list[str] = field(default_factory=list)
    after_ctrl_c: Status | None = None
    kept_by_ctrl_c: list[str] = field(default_factory=list)
    ctrl_c: str = ""


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Story:
    """Four starts of the ranks: importing Lightning is what takes time, so they share what can be shared."""
    base = tmp_path_factory.mktemp("story")
    runs = {name: tiny_config(base, text, TWO_RANKS, f"system={name}") for name in SYSTEMS}
    for name in ("flat", *OTHERS):
        folder = f"trainer.resume_from={run_dir_of(runs[name]).path}"
        runs[f"from {name}"] = tiny_config(base, text, TWO_RANKS, "trainer.max_steps=8", folder)
    runs["no aux"] = tiny_config(base, text, TWO_RANKS, NO_AUX)
    killed, interrupted = (tiny_config(base / name, text, TWO_RANKS) for name in ("killed", "interrupted"))
    broken = tiny_config(base / "broken", text, TWO_RANKS, "system=swiftmoe")
    folders = {name: run_dir_of(run) for name, run in runs.items()}
    story = Story(folders, run_dir_of(killed), run_dir_of(interrupted), run_dir_of(broken))
    dies = {"run_dir": str(story.killed.path), "step": 5, "die": True}
    with acting([dies, {"run_dir": str(story.broken.path), "step": 5, "die_amid": 1}]):
        story.failures = run_cells([*runs.values(), killed, broken], [])
    story.after_kill, story.kept_by_kill = story.killed.status(), names(story.killed.checkpoints)
    story.after_break, story.kept_by_break = story.broken.status(), names(story.broken.checkpoints)
    story.killed.set_status("running")  # as a parent that dies with its ranks leaves it

    lock = base / "lock"
    with ctrl_c_while_waiting(lock, story.killed.logs / "stop_requested") as press:
        with acting([{"run_dir": str(story.interrupted.path), "step": 3, "wait": str(lock)}], press):
            with pytest.raises(RankFailure) as stop:
                run_cells([killed, interrupted], [])
    story.ctrl_c = str(stop.value)
    story.after_ctrl_c, story.kept_by_ctrl_c = story.interrupted.status(), names(story.interrupted.checkpoints)
    assert run_cells([killed, interrupted, broken], []) == []
    return story


def names(folder: Path) -> list[str]:
    """Sorted names of all that is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def assert_same_run(run_dir: RunDir, straight: RunDir) -> None:
    """Bit for bit the same numbers: none missing, none twice, in the same order."""
    state = run_dir.status()
    assert state is not None
    assert (state.status, state.step) == ("done", 6)
    assert repeatable(run_dir) == repeatable(straight)
    routing, expected = run_dir.read_routing(), straight.read_routing()
    assert routing is not None and expected is not None
    assert routing.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(routing[name], array), name


def test_a_run_that_is_killed_says_so_and_keeps_its_last_checkpoint(story: Story) -> None:
    assert [run_dir_of(failure.config).path for failure in story.failures] == [story.killed.path, story.broken.path]
    assert story.after_kill is not None
    assert story.after_kill.status == "failed"
    assert "was killed by signal 9" in story.after_kill.reason
    assert story.kept_by_kill == ["step_2", "step_4"]


def test_a_run_that_was_killed_ends_like_one_that_was_not(story: Story) -> None:
    assert_same_run(story.killed, story.runs["flat"])
    metrics = {row.metric for row in repeatable(story.runs["flat"])}
    exact = {"loss", "val_loss", "aux_loss", "grad_norm", "bytes", "dropped_copies", "learning_rate", "routed_share"}
    assert metrics == exact
    assert {row.part for row in repeatable(story.runs["flat"]) if row.metric == "bytes"} >= {"network/alltoall"}


def test_a_rank_that_dies_amid_a_step_ends_the_run_which_goes_on_from_its_checkpoint(story: Story) -> None:
    """Rank 1 dies after its backward pass, when the other one waits for its gradients."""
    assert story.after_break is not None
    assert (story.after_break.status, story.after_break.step) == ("failed", 4)
    assert story.after_break.reason.startswith("rank 1 was killed by signal 9")
    assert story.kept_by_break == ["step_2", "step_4"]
    assert_same_run(story.broken, story.runs["swiftmoe"])


def test_ctrl_c_saves_and_says_so(story: Story) -> None:
    assert story.ctrl_c == "the run was interrupted: stopped by SIGINT"
    assert story.after_ctrl_c is not None
    assert story.after_ctrl_c.status == "interrupted"
    assert story.after_ctrl_c.step in (3, 4), (
        "at the next gathering of the ranks, which is the checkpoint's at the latest"
    )
    assert story.after_ctrl_c.reason == "stopped on request; the same command goes on from the last checkpoint"
    assert story.kept_by_ctrl_c == ["step_2", f"step_{story.after_ctrl_c.step}"]


def test_a_run_that_was_interrupted_ends_like_one_that_was_not(story: Story) -> None:
    assert_same_run(story.interrupted, story.runs["flat"])


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_trains_as_the_reference_does(name: str, story: Story) -> None:
    run_dir, reference = story.runs[name], story.runs["reference"]
    for metric, at_first, later in (
        ("loss", 1e-5, 1e-3),
        ("aux_loss", 1e-5, 5e-2),
        ("grad_norm", 1e-4, 5e-2),
        ("val_loss", 1e-3, 1e-3),
    ):
        got, expected = by_step(run_dir, metric), by_step(reference, metric)
        assert list(got) == list(expected)
        for step, value in expected.items():
            assert got[step] == pytest.approx(value, rel=later if step else at_first), f"{metric} of step {step}"
    routing, expected_routing = run_dir.read_routing(), reference.read_routing()
    assert routing is not None and expected_routing is not None
    assert np.array_equal(routing["dispatch_counts"][0].sum(1), expected_routing["dispatch_counts"][0].sum(1))
    assert routing["sample_step"] == 5
    counted = [np.bincount(ids_TK.ravel(), minlength=4) for ids_TK in routing["sample_expert_ids"]]
    assert np.array_equal(counted, routing["dispatch_counts"][-1].sum(1)), "the sample is of the step that it says"


@pytest.mark.parametrize("name", OTHERS)
def test_flat_goes_on_from_another_systems_checkpoint(name: str, story: Story) -> None:
    own, other = story.runs["from flat"], story.runs[f"from {name}"]
    for metric, tolerance in (("loss", 1e-4), ("val_loss", 1e-4), ("grad_norm", 5e-2)):
        expected = by_step(own, metric)
        assert list(expected) == ([8] if metric == "val_loss" else [6, 7])
        assert by_step(other, metric) == pytest.approx(expected, rel=tolerance)


def test_two_ranks_train_as_one_does(story: Story, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is the mean over all tokens, wherever they are, and so is its gradient.

    Not so the auxiliary loss, which each rank has over its own tokens. Later steps are only near: sums in another order
    differ in their last bits, which Adam's first steps enlarge, and then a token takes another of two equal experts.
    """
    monkeypatch.setattr(cells, "run_ranks", run_ranks_here)
    alone = tiny_config(tmp_path, text, ONE_RANK, NO_AUX)
    assert run_cells([alone], []) == []
    one, two = run_dir_of(alone), story.runs["no aux"]
    for metric, at_first in (("loss", 1e-6), ("grad_norm", 1e-5)):
        assert by_step(two, metric)[0] == pytest.approx(by_step(one, metric)[0], rel=at_first)
    for metric in ("loss", "val_loss"):
        assert by_step(two, metric) == pytest.approx(by_step(one, metric), rel=1e-2)


def test_torchrun_ranks_train_the_same(
    tmp_path: Path, text: Path, story: Story, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    command = [*torchrun, "-m", "experiments.train", *tiny(tmp_path, text, TWO_RANKS)]
    loopback = "lo" if sys.platform == "linux" else "lo0"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback}
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)
    spawned = story.runs["flat"]
    assert_same_run(RunDir(tmp_path / spawned.path.name), spawned)
    assert capfd.readouterr().out.count("results: ") == 1  # one of the two speaks
