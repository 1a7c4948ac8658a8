"""What ranks do for the tests of experiments.compare: time, until the user presses Ctrl-C amid the rounds."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from experiments import compare_bench
from experiments.progress_log import Phase
from experiments.ranks import RankInfo


def stop_amid_rounds(payload: dict[str, Any], info: RankInfo) -> list[list[Any]] | None:
    """`experiments.compare_bench.time_training`; when rank 1 has done so many rounds as `payload["stop_after"]` says,
    warmup counted, it presses Ctrl-C in the process `payload["parent"]`, and goes on once the wish is known."""
    phases_of = compare_bench.phases_of
    rounds: list[Phase] = []

    def pressing(folder: Path, rank: int) -> Callable[[Phase], None]:
        tell = phases_of(folder, rank)

        def note(phase: Phase) -> None:
            tell(phase)
            rounds.append(phase)
            if rank == 1 and phase == "training" and rounds.count(phase) == payload["stop_after"]:
                os.kill(payload["parent"], signal.SIGINT)
                while not info.stop_requested():
                    os.sched_yield()

        return note

    with mock.patch.object(compare_bench, "phases_of", pressing):
        return compare_bench.time_training(payload, info)
