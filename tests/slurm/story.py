"""What happens on the private cluster; starting ranks is what takes time, so tests look at it afterwards."""

from __future__ import annotations

import json
import re
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.load import load_run
from experiments.progress_log import read_progress
from experiments.results import RunDir
from slurm.records import read_events
from tests.slurm.cluster import Slurm, wait_for
from tests.tiny import tiny

ACTING = Path(__file__).with_name("acting_task.py")
AT_STEP = 3
STEPS = 16
"""Ranks agree on stopping when they share their numbers: at the first step, and ten steps later."""
OPTIONS = ("--nodes=2", "--ntasks-per-node=2", "--exclusive", "--mem=5000", "--time=30")
SMALL = ("--nodes", "1", "--tasks-per-node", "2", "--time", "30", "--sbatch", "mem=2500")
WATCHDOG_S = 8


@dataclass
class World:
    """Where the story takes place.

    Args:
        slurm: the cluster.
        folder: for results; the sweeps' folders are in it, too.
        text: to train on.
    """

    slurm: Slurm
    folder: Path
    text: Path
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.python.write_text(f'#!/bin/bash\necho "$*" >> {self.started}\nexec {sys.executable} "$@"\n')
        self.python.chmod(stat.S_IRWXU)

    @property
    def python(self) -> Path:
        """The Python that the site wants for its jobs."""
        return self.folder / "python"

    @property
    def started(self) -> Path:
        """What that Python was started with."""
        return self.folder / "started"

    @property
    def sweeps(self) -> Path:
        """Where sweeps leave their folders."""
        return self.folder / "slurm"

    def overrides(self, output: str, *more: str) -> list[str]:
        """A command line whose results go to a folder of their own."""
        steps = [f"trainer.max_steps={STEPS}", "trainer.checkpoint_every=100", "cluster=auto"]
        return [*tiny(self.folder / output, self.text, *steps), *more]

    def environment(self, acts: dict[str, Any] | None = None) -> dict[str, str]:
        """Of a user, whose ranks do something at a step."""
        told = {name: {"step": AT_STEP, **act} for name, act in (acts or {}).items()}
        return {
            "MOE_SWEEPS_DIR": str(self.sweeps),
            "MOE_SITE_ENV": str(self.folder / "none"),
            "MOE_WATCHDOG_S": str(WATCHDOG_S),
            "MOE_TASK": f"{sys.executable} {ACTING}",
            "MOE_TEST_ACTS": json.dumps(told),
            "MOE_PYTHON": str(self.python),
        }

    def sbatch(self, output: str, *more: str, acts: dict[str, Any] | None = None) -> str:
        """Submit train.sbatch for flat on two nodes of two; the job's id."""
        log = self.folder / f"{output}.out"
        words = ["sbatch", "--parsable", *OPTIONS, f"--output={log}", "slurm/train.sbatch"]
        return self.slurm.run(*words, *self.overrides(output, *more), env=self.environment(acts)).strip()

    def sweep(self, name: str, *arguments: str, acts: dict[str, Any] | None = None) -> str:
        """Submit a sweep; what it prints."""
        return self.slurm.python("slurm.sweep", *arguments, "--name", name, env=self.environment(acts))

    def status(self, name: str, *more: str) -> str:
        """The status table of a sweep; resubmissions are without acts."""
        return self.slurm.python("slurm.status", name, *more, env=self.environment())

    def jobs(self, name: str) -> dict[int, str]:
        """Job ids of a sweep by cell."""
        return {int(number): job for number, job in re.findall(r"^(\d+) +(\d+\S*)", self.status(name), re.MULTILINE)}

    def run(self, output: str, seed: int | None = None, system: str = "flat") -> RunDir:
        """The folder of a run, once it is there."""
        pattern = f"{system}-*" if seed is None else f"{system}-*-s{seed}-*"
        wait_for(lambda: any((self.folder / output).glob(pattern)), f"run {pattern} in {output}")
        return RunDir(next((self.folder / output).glob(pattern)))

    def wait_for_step(self, run: RunDir) -> None:
        """Until a run has trained a first step, so that it is about to act."""
        wait_for(lambda: any(line.step for line in read_progress(run.path)), f"step of {run.path}")


def preempted(world: World) -> None:
    """A run that a job of another partition drives out, and that goes on afterwards; and one that was left alone."""
    straight = world.sbatch("straight", ODD_CACHE.format(folder=world.folder))
    world.notes["straight"] = world.slurm.wait(straight)
    job = world.sbatch("preempted", acts={"0": {"rank": 0, "act": "wait"}})
    world.wait_for_step(world.run("preempted"))
    slurm = world.slurm
    urgent = slurm.run(
        "sbatch", "--parsable", "--partition=urgent", *OPTIONS, "--output=/dev/null", "--wrap", "true"
    ).strip()
    slurm.wait(urgent)
    slurm.release(job)
    world.notes["preempted"] = slurm.wait(job)
    world.notes["events"] = read_events(world.sweeps / f"job-{job}" / "cells" / "0")
    world.notes["preempted table"] = world.status(f"job-{job}")


ODD_CACHE = "data.cache_dir=\"{folder}/odd $(touch {folder}/evil) `touch {folder}/evil` 'it' * ;&|\n two\""
"""A value that a shell would take apart, with a line break in it."""

ACTS = {
    "1": {"rank": 1, "act": "raise"},
    "2": {"rank": 0, "act": "memory"},
    "3": {"rank": 1, "act": "kill"},
    "4": {"rank": 1, "act": "hang"},
    "5": {"rank": 0, "act": "wait"},
    "6": {"rank": 0, "act": "wait"},
}
"""By seed."""


def swept(world: World) -> None:
    """Seven cells: one trains, one raises, one needs too much memory, one is killed, one hangs, one is near its limit,
    and one is cancelled. Then all but the done ones again, of which another sweep has one meanwhile."""
    seeds = f"seed={','.join(map(str, range(7)))}"
    told = world.overrides("swept", seeds)
    world.notes["dry run"] = world.slurm.python("slurm.sweep", *told, *SMALL, "--dry-run", env=world.environment())
    world.notes["submitted"] = world.sweep("swept", *told, *SMALL, "--max-parallel", "2", acts=ACTS)
    jobs = world.jobs("swept")
    world.wait_for_step(world.run("swept", 5))
    world.notes["at work"] = world.status("swept")
    world.notes["read meanwhile"] = {path.name: load_run(path) for path in (world.folder / "swept").glob("flat-*")}
    world.slurm.run("scancel", "--signal=USR2", "--batch", jobs[5])  # as Slurm does before a limit
    world.slurm.release(jobs[5])
    world.wait_for_step(world.run("swept", 6))
    world.slurm.run("scancel", jobs[6])
    world.notes["states"] = world.slurm.wait(*jobs.values())
    world.notes["table"] = world.status("swept")
    world.notes["done first"] = world.run("swept", 0).read_manifest()
    go_on = world.folder / "go_on"
    acts = {"1": {"rank": 0, "act": "wait", "until": str(go_on)}}
    world.sweep("other", *world.overrides("swept", "seed=1"), *SMALL, acts=acts)
    world.notes["resubmitted"] = world.status("swept", "--resubmit", "failed,oom,timeout,interrupted")
    world.notes["meanwhile"] = world.slurm.python("slurm.sweep", *told, *SMALL, env=world.environment())
    go_on.touch()
    world.notes["other state"] = world.slurm.wait(*world.jobs("other").values())
    world.notes["states again"] = world.slurm.wait(*world.jobs("swept").values())
    world.notes["table again"] = world.status("swept")
    world.notes["nothing left"] = world.slurm.python("slurm.sweep", *told, *SMALL, env=world.environment())


def compared(world: World) -> None:
    """Two systems that share an allocation; one fails, and the other is trained and timed nevertheless. Submitted from
    inside an interactive allocation, which is much smaller."""
    told = world.overrides("compared", "system=flat,ta_moe", "seed=0", "timing.rounds=1", "timing.warmup=0")
    sweep = [sys.executable, "-m", "slurm.sweep", *told, *SMALL, "--share-allocation", "--name", "compared"]
    env = world.environment({"flat": {"rank": 1, "act": "raise"}})
    limits = {"SBATCH_MEM_PER_NODE": "100", "SBATCH_CPUS_PER_GPU": "3"}
    world.slurm.run("salloc", "--nodes=1", "--ntasks=1", "--mem=100", "--time=5", *sweep, env={**env, **limits})
    jobs = world.jobs("compared")
    world.notes["compared"] = world.slurm.wait(*jobs.values())
    world.notes["compared job"] = world.slurm.run("scontrol", "show", "job", jobs[0])
    world.notes["compared table"] = world.status("compared")


def launched(world: World) -> None:
    """Hydra's own launcher."""
    launcher = {"nodes": 1, "tasks_per_node": 2, "mem_gb": 2, "timeout_min": 5}
    told = [f"hydra.launcher.{key}={value}" for key, value in launcher.items()]
    arguments = ["-m", "hydra/launcher=submitit_slurm", *told, *world.overrides("launched")]
    world.slurm.python("experiments.train", *arguments)


def unplugged(world: World) -> None:
    """A job whose second node goes away."""
    two_nodes = ("--nodes", "2", "--tasks-per-node", "1", *SMALL[4:])
    cut = world.folder / "cut"
    acts = {"0": {"rank": 0, "act": "wait", "until": str(cut)}}
    # The watchdog is to say it, and has no limit while a run validates.
    told = world.overrides("unplugged", "seed=0", "trainer.timeout_s=300", "trainer.val_every=100")
    world.sweep("unplugged", *told, *two_nodes, acts=acts)
    world.wait_for_step(world.run("unplugged"))
    with world.slurm.unplugged(1):
        cut.touch()
        folder = world.sweeps / "unplugged" / "cells" / "0"
        wait_for(lambda: any(event.event == "ended" for event in read_events(folder)), "end of a job without a node")
        world.notes["unplugged table"] = world.status("unplugged")
