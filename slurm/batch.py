"""One experiment over the allocation of this job, what slurm/train.sbatch runs: `python -m slurm.batch key=value`."""

from __future__ import annotations

import os
import sys

from moe.errors import ConfigError, Problem, SuiteError
from slurm import scheduler
from slurm.job import run_cell
from slurm.records import SweepFolder, sweeps_dir


def main(overrides: list[str]) -> None:
    """Plan the one cell, write it, run it; ends the process."""
    try:
        allocation = scheduler.allocation_of(os.environ)
        sweep = SweepFolder(sweeps_dir() / f"job-{allocation.job}")
        if not sweep.path.exists():  # else a later life of this job
            from slurm.planning import plan  # imports torch and every system, which later lives don't need

            cells = plan(overrides, allocation.shape)
            if len(cells) > 1:
                rule = f"are {len(cells)} experiments, and a job of train.sbatch is one"
                fix = "python -m slurm.sweep submits a job each, or all of a comparison as one: --share-allocation"
                raise ConfigError(Problem("overrides", " ".join(overrides), rule, fix))
            sweep.create([cell.cell for cell in cells], {})
        run_cell(str(sweep.cell_folder(0)))
    except SuiteError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
