"""experiments.callbacks: what is made of the ranks' numbers, what a step's time holds, signals, progress."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from experiments import callbacks, module
from experiments.callbacks import Checkpointer, Progress, Recorder, Validator, Whereabouts
from experiments.cells import run_dir_of
from experiments.module import LanguageModel
from experiments.ranks import RankInfo
from moe.metering import LinkMeter
from tests.lone import lone_mesh
from tests.tiny import Configure, before_recording, by_step, train


def test_what_the_ranks_say_is_put_together(config: Configure, tmp_path: Path) -> None:
    """Means of losses; sums of copies and bytes; the slowest rank's times."""
    run = config("model.num_experts=2")
    mesh = lone_mesh(2)
    info = RankInfo(0, 2, 0, 2, 0, mesh.device, tmp_path / "stop")
    recorder = Recorder(run, mesh, info, LinkMeter(mesh.cluster, 0), run_dir_of(run), {}, 0)
    rank_0 = [0, 2.0, 0.1, 1e-3, 7.0, 5.0, 1.0, 3, 10, 20, 0, 0, 0, 64, 0, 0]
    rank_1 = [0, 4.0, 0.3, 1e-3, 7.0, 6.0, 3.0, 4, 30, 40, 0, 0, 0, 32, 16, 0]
    recorder._record(8, torch.tensor([rank_0, rank_1], dtype=torch.float64), 1, Whereabouts(None, None))
    tokens = run.trainer.global_batch_size * run.model.seq_len
    assert {(row.metric, row.part): row.value for row in recorder.rows} == {
        ("loss", ""): 5.5,
        ("aux_loss", ""): 2.0,
        ("dropped_copies", ""): 7.0,
        ("grad_norm", ""): 7.0,
        ("learning_rate", ""): 1e-3,
        ("step_time", ""): 4.0,
        ("tokens_per_s", ""): tokens / 4.0,
        ("harness_time", ""): 0.3,
        ("routed_share", "self"): 0.5,  # 10 and 40 of 100 copies stay on their rank
        ("routed_share", "node"): 0.5,
        ("bytes", "node/alltoall"): 96.0,
        ("bytes", "node/reduction"): 16.0,
    }
    assert {row.step for row in recorder.rows} == {8}
    assert [counts.tolist() for counts in recorder.counts] == [[[[10, 20], [30, 40]]]]


def test_shares_by_distance_follow_the_experts(config: Configure, tmp_path: Path) -> None:
    """Expert 1 lies on the first rank, expert 0 on the second: 20 and 30 of 100 copies stay on their rank."""
    run = config("model.num_experts=2")
    mesh = lone_mesh(2)
    info = RankInfo(0, 2, 0, 2, 0, mesh.device, tmp_path / "stop")
    recorder = Recorder(run, mesh, info, LinkMeter(mesh.cluster, 0), run_dir_of(run), {}, 0)
    head, tail = [0, 2.0, 0.1, 1e-3, 7.0, 5.0, 1.0, 3], [0, 0, 0, 64, 0, 0]
    numbers = torch.tensor([[*head, 10, 20, *tail], [*head, 30, 40, *tail]], dtype=torch.float64)
    places_LE = np.array([[1, 0]], dtype=np.int16)
    recorder._record(8, numbers, 1, Whereabouts(None, places_LE))
    shares = {row.part: row.value for row in recorder.rows if row.metric == "routed_share"}
    assert shares == {"self": 0.5, "node": 0.5}
    recorder._record(9, numbers * torch.tensor([[1.0], [2.0]]), 1, Whereabouts(None, places_LE))
    shares = {row.part: row.value for row in recorder.rows if row.metric == "routed_share" and row.step == 9}
    assert shares == {"self": pytest.approx(80 / 170), "node": pytest.approx(90 / 170)}


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        """Seconds."""
        return self.now

    def slow(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, seconds: float) -> None:
        """Make a method take so long."""
        method = getattr(owner, name)

        def slowed(*arguments: Any, **more: Any) -> Any:
            self.now += seconds
            return method(*arguments, **more)

        monkeypatch.setattr(owner, name, slowed)


@pytest.mark.parametrize("log_every", [1, 2, 4])
def test_a_step_is_timed_without_validation_and_checkpoint(
    config: Configure, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    clock = Clock()
    for owner in (callbacks, module):
        monkeypatch.setattr(owner, "time", SimpleNamespace(perf_counter=clock.read, thread_time=clock.read))
    clock.slow(monkeypatch, LanguageModel, "training_step", 2.0)
    clock.slow(monkeypatch, Recorder, "on_train_batch_start", 0.5)  # harness
    clock.slow(monkeypatch, Recorder, "_gather", 8.0)  # harness of the next interval, and no part of a step's time
    clock.slow(monkeypatch, Validator, "_loss", 100.0)
    clock.slow(monkeypatch, Checkpointer, "_save", 1000.0)
    run_dir = train(config(f"trainer.log_every={log_every}", "trainer.val_every=3", "trainer.checkpoint_every=1"))
    assert set(by_step(run_dir, "step_time").values()) == {2.5}
    first, *later = by_step(run_dir, "harness_time").items()
    assert first == (log_every - 1, 0.5)
    previous = first[0]
    for step, harness_s in later:
        assert harness_s == 0.5 + 8.0 / (step - previous)
        previous = step


def test_sigterm_stays_with_the_suite(config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's own handler would start a broadcast in the middle of the model's collectives."""
    seen: list[Any] = []
    before_recording(monkeypatch, lambda recorder, done: seen.append(signal.getsignal(signal.SIGTERM)))

    def handler(*_arguments: Any) -> None:
        raise AssertionError("nobody sends it")

    with handling(signal.SIGTERM, handler):
        train(config("trainer.max_steps=4"))
        assert seen == [handler] * 4
        assert signal.getsignal(signal.SIGTERM) is handler


@contextmanager
def handling(number: signal.Signals, handler: Callable[..., None]) -> Iterator[None]:
    """A signal handler for a while."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def test_progress_in_plain_lines(config: Configure) -> None:
    lines: list[str] = []
    progress = Progress(config("trainer.max_steps=40", "trainer.progress=lines"), 0, lines.append)
    for done in range(1, 41):
        progress.advance(done, 1.0 / done)
    assert lines == [f"flat seed 0: step {done}/40, loss {1 / done:.4f}" for done in range(4, 41, 4)]


def test_progress_as_a_bar_goes_on_where_the_run_does(config: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(config("trainer.max_steps=40", "trainer.progress=bar"), 20)
    assert progress.bar is not None and progress.bar.n == 20
    progress.advance(40, 2.0)
    shown = capsys.readouterr()
    assert "40/40" in shown.out and "loss=2.0000" in shown.out
    assert shown.err == ""  # which is the log of the rank
