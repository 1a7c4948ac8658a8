"""One task of a job step: `python -m slurm.task <folder of the cell>`, started by srun, one for each rank."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from pathlib import Path

LAUNCHER_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
"""Of torchrun. srun started this task, so they are a login shell's or a container hook's, and not about these ranks."""


def main(folder: Path) -> None:
    """Do what the cell says, as this rank. What fails is a report in its folder, and an exit code."""
    faulthandler.enable()
    faulthandler.register(signal.SIGQUIT, all_threads=True)  # the watchdog asks where we are
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    from slurm.entry import enter  # torch and every system: minutes, from a cold file system

    enter(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
