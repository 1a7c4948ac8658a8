"""Training so small that a test can afford it: a config of thousands of parameters, and ranks inside this process."""

from __future__ import annotations

import argparse
import inspect
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from experiments.cells import run_cells, run_dir_of
from experiments.cli import compose
from experiments.config import RunConfig, load_run
from experiments.failures import error_of, report_of
from experiments.ranks import STOP_FILE, RankInfo, resolve
from experiments.results import MetricRow, RunDir

if TYPE_CHECKING:
    from experiments.callbacks import Recorder

Configure = Callable[..., RunConfig]
"""What the fixture `config` is: overrides to a config."""

MODEL = [
    "model.vocab_size=300",
    "model.seq_len=16",
    "model.num_layers=4",
    "model.num_heads=2",
    "model.model_dim=16",
    "model.dense_hidden_dim=32",
    "model.hidden_dim=16",
    "model.num_experts=4",
]
TRAINER = [
    "trainer=quick",
    "trainer.max_steps=6",
    "trainer.global_batch_size=4",
    "trainer.warmup_steps=4",
    "trainer.val_every=2",
    "trainer.checkpoint_every=2",
    "trainer.timeout_s=120",
    "trainer.progress=none",
]
ONE_RANK = "cluster=local_1"
TWO_RANKS = "cluster.levels=[{name:node,fanout:1},{name:network,fanout:2}]"
TIMES = ("step_time", "tokens_per_s", "harness_time")
"""Metrics that no two runs share; all others must repeat exactly."""


def write_text(folder: Path) -> Path:
    """A folder of real text, and beside it room for its tokens."""
    text = folder / "text"
    text.mkdir(parents=True)
    for module in (argparse, shutil, tempfile, textwrap):
        (text / f"{module.__name__}.py").write_text(inspect.getsource(module))
    return text


def tiny(output_dir: Path, text: Path, *overrides: str) -> list[str]:
    """A command line; the last override of a key wins."""
    data = [f"data.path={text}", f"data.cache_dir={text.parent / 'cache'}", "data.val_fraction=0.3"]
    return [*MODEL, *TRAINER, *data, f"output_dir={output_dir}", *overrides]


def tiny_config(output_dir: Path, text: Path, *overrides: str) -> RunConfig:
    """The training config of that command line."""
    return load_run(compose("train", tiny(output_dir, text, *overrides)))


def repeatable(run_dir: RunDir) -> list[MetricRow]:
    """What must be equal, bit for bit and in its order, in two runs of one config."""
    return [row for row in run_dir.read_metrics() if row.metric not in TIMES]


def by_step(run_dir: RunDir, metric: str) -> dict[int, float]:
    """A metric without parts."""
    return {row.step: row.value for row in run_dir.read_metrics() if row.metric == metric}


@contextmanager
def rank_here(log_dir: Path) -> Iterator[RankInfo]:
    """This process as the only rank of a run, with a process group; torch's global settings are put back."""
    deterministic, state = torch.are_deterministic_algorithms_enabled(), torch.get_rng_state()
    num_threads, hook = torch.get_num_threads(), sys.excepthook
    torch.set_num_threads(1)  # as ranks have it: threads that wait for each other take long on a busy machine
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield RankInfo(0, 1, 0, 1, 0, torch.device("cpu"), log_dir / STOP_FILE)
    finally:
        dist.destroy_process_group()
        torch.use_deterministic_algorithms(deterministic)
        torch.set_rng_state(state)
        torch.set_num_threads(num_threads)
        sys.excepthook = hook


def run_ranks_here(target: str, payload: dict[str, Any], *, num_ranks: int, log_dir: Path, **_ignored: Any) -> Any:
    """What `experiments.launch.run_ranks` does, with one rank, which is this process: its errors come out alike."""
    assert num_ranks == 1
    stop_file = log_dir / STOP_FILE
    stop_file.unlink(missing_ok=True)
    with rank_here(log_dir) as info:
        try:
            return resolve(target)(payload, info)
        except Exception as error:
            raise error_of(report_of(0, error), log_dir, 60.0) from error


def train(config: RunConfig) -> RunDir:
    """The folder of a run that must end well."""
    assert run_cells([config], []) == []
    return run_dir_of(config)


def before_recording(monkeypatch: pytest.MonkeyPatch, action: Callable[[Recorder, int], None]) -> None:
    """Call `action(recorder, steps done)` after every step, before it is recorded."""
    from experiments.callbacks import Recorder  # imports Lightning, which takes seconds

    record = Recorder.on_train_batch_end

    def acted(self: Recorder, trainer: Any, *more: Any) -> None:
        action(self, trainer.global_step)
        record(self, trainer, *more)

    monkeypatch.setattr(Recorder, "on_train_batch_end", acted)
