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


def run_rank(payload: dict[str, Any], info: RankInfo) -> str | None:
    """`experiments.training.run_rank`, but for `payload["acts"]`: {run_dir, step, and "die" or "wait"} each.

    `die`: every rank kills itself after that step, before it is recorded. `wait`: rank 0 says so with the file `wait`,
    and goes on when it gets the lock on that file.
    """
    record = Recorder.on_train_batch_end

    def acted(self: Recorder, trainer: Any, *more: Any) -> None:
        for act in payload["acts"]:
            if (act["run_dir"], act["step"]) == (str(self.run_dir.path), trainer.global_step):
                _act(act, info)
        record(self, trainer, *more)

    with mock.patch.object(Recorder, "on_train_batch_end", acted):
        return training.run_rank(payload, info)


def _act(act: dict[str, Any], info: RankInfo) -> None:
    if "die" in act:
        os.kill(os.getpid(), signal.SIGKILL)
    if info.rank == 0:
        locked = Path(act["wait"])
        locked.with_name(f"{locked.name}.reached").touch()
        with locked.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
