"""What MOE_TASK starts in place of Python in these tests: a task in which one rank does something at a step.

MOE_TEST_ACTS is JSON: by label of the run's system or by seed, {"rank": 1, "step": 3, "act": ...}, where act is

    raise   an exception
    memory  more and more of it, above any job's limit here, as if it trained all the time; for rank 0
    kill    SIGKILL to itself
    hang    sleep for good
    wait    until a stop was asked for, or the file "until" is there, as if it trained all the time; for rank 0
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

STEP_S = 0.05
PIECE_BYTES, MOST_PIECES = 100 << 20, 40


def main() -> None:
    """Arguments are those of the interpreter: `-m slurm.task <folder>`."""
    acts = json.loads(os.environ.get("MOE_TEST_ACTS", "{}"))
    assert sys.argv[1] == "-m", sys.argv
    if acts:
        _install(acts)
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def _install(acts: dict[str, Any]) -> None:
    from experiments.callbacks import Recorder

    record = Recorder.on_train_batch_end

    def acted(self: Recorder, trainer: Any, *more: Any) -> None:
        config = self.config
        act = acts.get(config.system.label) or acts.get(str(config.seed)) or {}
        if act and (self.info.rank, trainer.global_step) == (act["rank"], act["step"]):
            print("interface:", os.environ.get("GLOO_SOCKET_IFNAME"), flush=True)
            _do(act, self, trainer.global_step)
        record(self, trainer, *more)

    Recorder.on_train_batch_end = acted  # type: ignore[method-assign, assignment]


def _do(acting: dict[str, Any], recorder: Any, step: int) -> None:
    act, until = acting["act"], Path(acting.get("until", recorder.info.stop_file))
    if act == "raise":
        raise ValueError("on purpose")
    if act == "memory":
        kept: list[bytes] = []
        while True:
            if len(kept) < MOST_PIECES:
                kept.append(b"x" * PIECE_BYTES)
            recorder.progress_log.note(step, "training")  # no hang: a busy machine may take its time
            time.sleep(STEP_S)
    if act == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "hang":
        time.sleep(1e6)
    while act == "wait" and not until.exists():
        recorder.progress_log.note(step, "training")  # no hang
        time.sleep(STEP_S)


if __name__ == "__main__":
    main()
