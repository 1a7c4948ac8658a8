"""Handing cells to Slurm: job arrays, through submitit, with the site's settings."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import submitit

from experiments.allocation import Shape
from moe.errors import ConfigError, Problem, SuiteError
from slurm.job import REPOSITORY, run_cell
from slurm.records import SweepFolder
from slurm.scheduler import minutes_of

SAVE_S = 120
"""Seconds before a job's limit at which it is told to save; Slurm may be a minute early."""
SBATCH_VARIABLES = {"time": "SBATCH_TIMELIMIT", "mem": "SBATCH_MEM_PER_NODE"}
"""Options of sbatch whose environment variable is not SBATCH_<NAME>."""
ACCESS = ("SLURM_CLUSTERS", "SLURM_CONF", "SLURM_JWT")
"""How Slurm is reached."""
PLACE = ("ACCOUNT", "CLUSTERS", "CONSTRAINT", "EXPORT", "PARTITION", "QOS", "RESERVATION", "TIMELIMIT", "WCKEY")
"""SBATCH_ variables that say where jobs run, for whom and how long, and nothing of their size."""
MAX_JOBS_OF_AN_ARRAY = 1000
"""Slurm's default (MaxArraySize is one more)."""


@dataclass(frozen=True)
class Resources:
    """What every job of a sweep asks for.

    Args:
        shape: nodes, and tasks of each.
        gpus_per_node: 0 for ranks on CPUs.
        cpus_per_task: None leaves it to Slurm.
        time: limit, as sbatch takes it.
        max_parallel: jobs at once.
        options: more options of sbatch, `{"partition": "gpu"}`; an empty value is an option without one.

    Raises:
        ConfigError: an option that could be more than one, or no time limit.
    """

    shape: Shape
    gpus_per_node: int
    cpus_per_task: int | None
    time: str
    max_parallel: int
    options: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        minutes_of(self.time)
        for name, value in self.options.items():  # they become lines of a script
            if not re.fullmatch(r"[a-z][a-z0-9-]*", name, re.ASCII) or not (value + "x").isprintable():
                rule = "is no option of sbatch: a name of small letters, digits and `-`, and a value on one line"
                raise ConfigError(Problem("--sbatch", f"{name}={value}", rule, "write --sbatch partition=gpu"))

    @property
    def node_hours(self) -> float:
        """Of one job, at most."""
        return self.shape.num_nodes * minutes_of(self.time) / 60


def settle_environment() -> None:
    """Make this process's environment what jobs are submitted from.

    What shapes jobs goes: SLURM_, SALLOC_ and SBATCH_ variables but `ACCESS` and `PLACE`. An interactive allocation
    (salloc, srun --pty) leaves them in the shell, sbatch takes them for options, and jobs inherit them. Then comes what
    `site_variables` says.

    Raises:
        SuiteError: bash can't read the site's settings.
    """
    kept = (*ACCESS, *(f"SBATCH_{name}" for name in PLACE))
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SALLOC_", "SBATCH_"))]:
        if name not in kept:
            del os.environ[name]
    os.environ.update(site_variables())


def site_variables() -> dict[str, str]:
    """What slurm/site.env (or MOE_SITE_ENV) adds to this environment, as bash reads it; SuiteError if it can't."""
    path = Path(os.environ.get("MOE_SITE_ENV", REPOSITORY / "slurm" / "site.env"))
    if not path.is_file():
        return {}
    script = 'set -ae; source "$1"; env -0'
    done = subprocess.run(["bash", "-c", script, "bash", str(path)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SuiteError(f"{path} can't be read by bash: {done.stderr.strip()}")
    pairs = (entry.partition("=") for entry in done.stdout.split("\0") if entry)
    return {name: value for name, _, value in pairs if name.startswith(("SBATCH_", "SLURM_", "MOE_"))}


def submit(sweep: SweepFolder, numbers: Sequence[int], resources: Resources) -> dict[int, str]:
    """Submit cells of a sweep as one array, and keep the job ids.

    Args:
        sweep: with its cells written.
        numbers: of the cells to submit, one at least.
        resources: of each job.

    Returns:
        Slurm's job id by cell.

    Raises:
        ConfigError: no Slurm here, or more jobs than an array holds.
        SuiteError: sbatch refused; its words.
    """
    if shutil.which("srun") is None:
        rule = "needs Slurm's commands, and srun is not on this machine"
        raise ConfigError(Problem("slurm", "", rule, "submit from a login node; --dry-run works without"))
    if len(numbers) > MAX_JOBS_OF_AN_ARRAY:
        rule = f"is more jobs than an array of Slurm holds ({MAX_JOBS_OF_AN_ARRAY})"
        raise ConfigError(Problem("cells", len(numbers), rule, "split the sweep"))
    executor = submitit.SlurmExecutor(folder=sweep.path / "submitit", python='exec "$MOE_PYTHON"')
    executor.update_parameters(**parameters(sweep, resources))
    for name in ("time", *resources.options):
        os.environ.pop(SBATCH_VARIABLES.get(name, f"SBATCH_{name.upper().replace('-', '_')}"), None)
    try:
        jobs = executor.map_array(run_cell, [str(sweep.cell_folder(number)) for number in numbers])
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise SuiteError(f"sbatch refused: {error}") from error
    submitted = {number: job.job_id for number, job in zip(numbers, jobs, strict=True)}
    sweep.add_submission(submitted)
    return submitted


def parameters(sweep: SweepFolder, resources: Resources) -> dict[str, object]:
    """Of submitit's executor."""
    options: dict[str, object] = {name: value or True for name, value in resources.options.items()}
    more = {"signal": f"B:USR2@{SAVE_S}", "requeue": True, "time": resources.time, **options}
    found: dict[str, object] = {
        "job_name": "moe-" + "".join(c if c.isalnum() else "-" for c in sweep.path.name),
        "nodes": resources.shape.num_nodes,
        "ntasks_per_node": resources.shape.ranks_per_node,
        "cpus_per_task": resources.cpus_per_task,
        "gpus_per_node": resources.gpus_per_node or None,
        "array_parallelism": resources.max_parallel,
        "stderr_to_stdout": True,
        "use_srun": False,  # the job's own process starts the ranks
        "setup": [
            "trap '' USR2  # until Python listens",
            f"cd {shlex.quote(str(REPOSITORY))}",
            f"MOE_SUBMITTER={shlex.quote(sys.executable)}",
            "source slurm/job.env",
            f"export PYTHONPATH={shlex.quote(str(REPOSITORY))}${{PYTHONPATH:+:$PYTHONPATH}}",
        ],
        "additional_parameters": more,
    }
    return {name: value for name, value in found.items() if value is not None}
