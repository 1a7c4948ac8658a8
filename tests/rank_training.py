"""What ranks do for the tests of training: train, and at a chosen step of a chosen run die, or wait for the parent."""

from __future__ import annotations

import fcntl
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

from experiments import training
from experiments.callbacks import Recorder
from experiments.ranks import RankInfo
from experiments.strategy import ExpertParallelStrategy


def run_rank(payload: dict[str, Any], info: RankInfo) -> str | None:
    """`experiments.training.run_rank`, but for `payload["acts"]`: {run_dir, step, and "die", "die_amid" or "wait"}.

    `die`: every rank kills itself after that step, before it is recorded. `die_amid`: that rank kills itself in the
    step that comes then, between its backward pass and the reduction of gradients. `wait`: rank 0 says so with the file
    `wait`, and goes on when it gets the lock on that file.
    """
    record, post_backward = Recorder.on_train_batch_end, ExpertParallelStrategy.post_backward

    def acted(self: Recorder, trainer: Any, *more: Any) -> None:
        for act in payload["acts"]:
            if (act["run_dir"], act["step"]) == (str(self.run_dir.path), trainer.global_step):
                _act(act, info)
        record(self, trainer, *more)

    def reduced(self: ExpertParallelStrategy, *more: Any) -> None:
        assert self.lightning_module is not None
        trainer: Any = self.lightning_module.trainer
        (recorder,) = (callback for callback in trainer.callbacks if isinstance(callback, Recorder))
        for act in payload["acts"]:
            here = (act["run_dir"], act["step"], act.get("die_amid"))
            if here == (str(recorder.run_dir.path), trainer.global_step, info.rank):
                os.kill(os.getpid(), signal.SIGKILL)
        post_backward(self, *more)

    with (
        mock.patch.object(ExpertParallelStrategy, "post_backward", reduced),
        mock.patch.object(Recorder, "on_train_batch_end", acted),
    ):
        return training.run_rank(payload, info)


def _act(act: dict[str, Any], info: RankInfo) -> None:
    if "die" in act:
        os.kill(os.getpid(), signal.SIGKILL)
    if "wait" in act and info.rank == 0:
        locked = Path(act["wait"])
        locked.with_name(f"{locked.name}.reached").touch()
        with locked.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
