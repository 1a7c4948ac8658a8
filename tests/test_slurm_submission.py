"""slurm.sweep and slurm.submission: what sbatch gets, and what it never does."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.allocation import Shape
from moe.errors import ConfigError, SuiteError
from slurm import status, submission, sweep
from slurm.records import SweepFolder
from slurm.scheduler import QueuedJob, minutes_of
from slurm.submission import Resources, settle_environment, site_variables, submit
from tests.tiny import tiny

ODD = 'data.cache_dir="it\'s $(touch evil) `touch evil` * ;&|\n two"'
SBATCH = """#!/bin/bash
echo "$@" >> {folder}/calls
env > {folder}/environment
cp "${{@: -1}}" {folder}/script
echo Submitted batch job 77
"""


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A stand-in for sbatch on the path; the folder where it keeps what it got. Submitting changes the environment,
    which is given back."""
    before, folder = dict(os.environ), tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setattr(sweep, "queued", dict)
    for name in ("sbatch", "srun", "squeue"):
        (folder / name).write_text(SBATCH.format(folder=folder))
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("MOE_SWEEPS_DIR", str(tmp_path / "sweeps"))
    monkeypatch.setenv("MOE_SITE_ENV", str(tmp_path / "none"))
    for name in [name for name in os.environ if name.startswith(("SBATCH_", "SLURM_", "MOE_PYTHON"))]:
        monkeypatch.delenv(name)
    yield folder
    os.environ.clear()
    os.environ.update(before)


def environment(folder: Path) -> dict[str, str]:
    """What sbatch was called in."""
    lines = (folder / "environment").read_text().splitlines()
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def interpreter(path: Path) -> Path:
    """A stand-in for Python that prints its own name and its arguments."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('#!/bin/bash\necho "$0" "$@"\n')
    path.chmod(stat.S_IRWXU)
    return path


def submitted(folder: Path) -> str:
    """The batch script."""
    return (folder / "script").read_text()


def test_an_array_is_submitted_and_no_override_is_in_its_script(
    sbatch: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the odd folder is a relative one
    told = tiny(tmp_path / "out", text, "cluster=auto", "system=flat,deepspeed", "seed=0,1", ODD)
    options = ["--nodes", "2", "--tasks-per-node", "2", "--time", "1-12", "--max-parallel", "3", "--name", "first"]
    sweep.main([*told, *options, "--sbatch", "partition=a b", "--sbatch", "exclusive"])
    printed = capsys.readouterr().out
    assert "4 of 4 cells to run, each on 2 nodes x 2 CPU ranks for at most 1-12, up to 3 at once" in printed
    assert "at most 288.0 node hours" in printed
    assert "look: python -m slurm.status first" in printed
    script = submitted(sbatch)
    asked = ("array=0-3%3", "nodes=2", "ntasks-per-node=2", "time=1-12", "partition='a b'", "exclusive", "requeue")
    for option in (*asked, "signal=B:USR2@120", "open-mode=append", "job-name=moe-first"):
        assert f"#SBATCH --{option}\n" in script
    assert "evil" not in script
    assert "gpus" not in script
    assert subprocess.run(["bash", "-n", str(sbatch / "script")], check=False).returncode == 0
    assert re.search(
        r'^exec "\$MOE_PYTHON" -u -m submitit\.core\._submit \S+/sweeps/first/submitit$', script, re.MULTILINE
    )
    folder = SweepFolder(tmp_path / "sweeps" / "first")
    assert [folder.job_of(cell.number) for cell in folder.cells()] == [f"77_{number}" for number in range(4)]
    assert all(ODD in cell.overrides for cell in folder.cells())


def test_what_is_in_the_queue_is_not_submitted_twice(
    sbatch: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    queue = {"77_1": QueuedJob("PENDING", "Priority", None), "77_0": QueuedJob("FAILED", "None", None)}
    monkeypatch.setattr(sweep, "queued", lambda: queue)
    told = [*tiny(tmp_path / "out", text, "cluster=auto", "seed=0,1"), "--tasks-per-node", "2", "--time", "10"]
    sweep.main([*told, "--name", "first"])
    assert "2 of 2 cells to run" in capsys.readouterr().out
    sweep.main([*told, "--name", "second"])
    printed = capsys.readouterr().out
    assert re.search(r"^ +1  seed=1 .* in job 77_1 of sweep first already$", printed, re.MULTILINE)
    assert "1 of 2 cells to run" in printed
    assert SweepFolder(tmp_path / "sweeps" / "second").job_of(1) is None


def test_what_is_complete_or_refused_gets_no_job(
    sbatch: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = tiny(
        tmp_path / "out", text, "cluster=auto", "system=ta_moe", "system.mode=fastmoe", "model.capacity_factor=1.0"
    )
    sweep.main([*told, "--tasks-per-node", "2", "--time", "10"])
    printed = capsys.readouterr().out
    assert "0 of 1 cells to run" in printed
    assert "refused: TA-MoE" in printed
    assert "nothing to submit" in printed
    assert not (sbatch / "calls").exists()


def test_a_dry_run_writes_nothing_and_needs_no_slurm(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOE_SWEEPS_DIR", str(tmp_path / "sweeps"))
    monkeypatch.setattr(submission.shutil, "which", lambda _name: None)
    told = [*tiny(tmp_path / "out", text), "--gpus-per-node", "2", "--nodes", "2"]
    sweep.main([*told, "--dry-run"])
    assert "1 of 1 cells to run, each on 2 nodes x 2 GPUs for at most 1:00:00" in capsys.readouterr().out
    sweep.main([*told, "--dry-run", "--time", "30"])
    assert "1 of 1 cells to run, each on 2 nodes x 2 GPUs for at most 30" in capsys.readouterr().out
    assert not (tmp_path / "sweeps").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--time", "10"], r"--gpus-per-node=: nobody said how many ranks a node has\. Fix: say --gpus-per-node"),
        (["--tasks-per-node", "2", "--time", "soon"], r"--time=soon: is no time limit that is known here\. Fix: write"),
        (["--gpus-per-node", "4", "--tasks-per-node", "2", "--time", "1"], r"--tasks-per-node=2: one task a GPU"),
        (
            ["--tasks-per-node", "2", "--sbatch", "comment=a\ntouch x"],
            r"--sbatch=comment=a\ntouch x: is no option of sbatch",
        ),
        (["--tasks-per-node", "2", "--sbatch", "a b=c"], r"--sbatch=a b=c: is no option of sbatch"),
        (["--tasks-per-node", "2", "--time", "1", "--name", "a/b"], r"--name=a/b: is the name of a folder"),
        (["--tasks-per-node", "2", "--time", "1", "--name", "a%j"], r"--name=a%j: is the name of a folder"),
    ],
)
def test_options_that_make_no_job(
    sbatch: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        sweep.main(["system=flat", *options])
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_command_line_wins_over_the_site(sbatch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site.env"
    site.write_text(
        'SBATCH_PARTITION="gpu long"\nSBATCH_TIMELIMIT=10\nSBATCH_MEM_PER_NODE=1\n'
        'export MOE_SRUN="--container-image=a b"\nOTHER=1\nmoe_setup() {\n    exit 3\n}\n'
    )
    monkeypatch.setenv("MOE_SITE_ENV", str(site))
    settle_environment()
    assert os.environ["MOE_SRUN"] == "--container-image=a b"
    assert not {"OTHER", "moe_setup"} & set(os.environ)
    folder = SweepFolder(tmp_path / "sweep")
    folder.create([], {})
    submit(folder, [0], Resources(Shape(1, 2, "cuda"), 2, 8, "20", 4, {"mem": "0"}))
    told = environment(sbatch)
    assert told["SBATCH_PARTITION"] == "gpu long"
    assert not {"SBATCH_TIMELIMIT", "SBATCH_MEM_PER_NODE"} & set(told), "time and mem were given"
    script = submitted(sbatch)
    for option in ("gpus-per-node=2", "cpus-per-task=8", "time=20", "mem=0"):
        assert f"#SBATCH --{option}\n" in script
    assert "--array" not in script
    assert folder.job_of(0) == "77"


def test_what_an_allocation_left_in_the_shell_does_not_reach_jobs(
    sbatch: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = {
        **{"SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "3", "SLURM_CPU_BIND": "x"},
        **{"SLURM_MEM_PER_NODE": "100", "SBATCH_MEM_PER_NODE": "100", "SBATCH_GPUS_PER_NODE": "1"},
        **{"SBATCH_CPU_BIND": "x", "SBATCH_ARRAY_INX": "1", "SALLOC_PARTITION": "x", "SLURM_CLUSTERS": "x"},
    }
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_JWT": "token", "SBATCH_QOS": "mine", "SBATCH_ACCOUNT": "mine"}
    for name, value in {**left, **kept}.items():
        monkeypatch.setenv(name, value)
    site = tmp_path / "site.env"
    site.write_text("SBATCH_ACCOUNT=site\nSBATCH_GPUS_PER_NODE=4\nSLURM_CLUSTERS=site\nSBATCH_NETWORK=fast\n")
    monkeypatch.setenv("MOE_SITE_ENV", str(site))
    told = tiny(tmp_path / "out", text, "cluster=auto", "seed=0")
    sweep.main([*told, "--tasks-per-node", "2", "--time", "10"])
    found = environment(sbatch)
    settings = {"SBATCH_ACCOUNT": "site", "SBATCH_GPUS_PER_NODE": "4", "SLURM_CLUSTERS": "site"}
    expected = {**kept, **settings, "SBATCH_NETWORK": "fast"}
    assert {
        name: value for name, value in found.items() if name.startswith(("SLURM_", "SBATCH_", "SALLOC_"))
    } == expected


def test_the_status_looks_where_the_site_keeps_its_sweeps(
    sbatch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site.env"
    site.write_text(f"MOE_SWEEPS_DIR={tmp_path}/elsewhere\n")
    monkeypatch.setenv("MOE_SITE_ENV", str(site))
    with pytest.raises(SystemExit):
        status.main([])
    assert f"there is none in {tmp_path}/elsewhere" in capsys.readouterr().err


@pytest.mark.parametrize("chosen", ["", "by the shell", "by the site"])
def test_the_python_of_a_sweeps_jobs(
    sbatch: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    submitter, shells, sites = (interpreter(tmp_path / name / "its python") for name in ("submitter", "shell", "site"))
    monkeypatch.setattr(sys, "executable", str(submitter))
    if chosen:
        monkeypatch.setenv("MOE_PYTHON", str(shells))
    if chosen == "by the site":
        (tmp_path / "site.env").write_text(f'MOE_PYTHON="{sites}"\n')
        monkeypatch.setenv("MOE_SITE_ENV", str(tmp_path / "site.env"))
    told = tiny(tmp_path / "out", text, "cluster=auto", "seed=0,1")
    sweep.main([*told, "--tasks-per-node", "2", "--time", "10", "--name", "first"])
    script = ["bash", str(sbatch / "script")]
    done = subprocess.run(script, capture_output=True, text=True, check=True, env=environment(sbatch))
    expected = {"": submitter, "by the shell": shells, "by the site": sites}[chosen]
    assert done.stdout == f"{expected} -u -m submitit.core._submit {tmp_path}/sweeps/first/submitit\n"


def test_train_sbatch_runs_with_the_sites_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_PYTHON", raising=False)
    (tmp_path / "slurm").mkdir()
    for name in ("train.sbatch", "job.env"):
        (tmp_path / "slurm" / name).write_text((submission.REPOSITORY / "slurm" / name).read_text())
    (tmp_path / "slurm" / "batch.py").touch()
    own, sites = interpreter(tmp_path / ".venv" / "bin" / "python"), interpreter(tmp_path / "site" / "python")
    command = ["bash", "slurm/train.sbatch", "seed=1"]
    for settings, expected in (("", own), (f"MOE_PYTHON={sites}\n", sites)):
        (tmp_path / "slurm" / "site.env").write_text(settings)
        monkeypatch.delenv("MOE_SITE_ENV", raising=False)
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout == f"{expected} -m slurm.batch seed=1\n"


def test_a_site_that_bash_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site.env"
    site.write_text("source /no/such/file\n")
    monkeypatch.setenv("MOE_SITE_ENV", str(site))
    with pytest.raises(SuiteError, match=r"site\.env can't be read by bash: .*No such file"):
        site_variables()


def test_sbatch_may_refuse(sbatch: Path, tmp_path: Path) -> None:
    (sbatch / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid partition specified: x' >&2\nexit 1\n")
    folder = SweepFolder(tmp_path / "sweep")
    folder.create([], {})
    with pytest.raises(SuiteError, match="sbatch refused: .*invalid partition specified: x"):
        submit(folder, [0], Resources(Shape(1, 2, "cpu"), 0, None, "20", 4))
    assert folder.job_of(0) is None


def test_a_sweep_that_could_not_be_submitted_leaves_nothing(
    sbatch: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sbatch / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: no such partition' >&2\nexit 1\n")
    told = tiny(tmp_path / "out", text, "cluster=auto")
    with pytest.raises(SystemExit) as stop:
        sweep.main([*told, "--tasks-per-node", "2", "--time", "10", "--name", "first"])
    assert stop.value.code == 1
    assert "no such partition" in capsys.readouterr().err
    assert not (tmp_path / "sweeps" / "first").exists()


def test_an_array_has_a_limit(sbatch: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cells=1001: is more jobs than an array of Slurm holds \(1000\)\. Fix: sp"):
        submit(SweepFolder(tmp_path), list(range(1001)), Resources(Shape(1, 2, "cpu"), 0, None, "20", 4))


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("90:30", 91), ("4:00:00", 240), ("0:00:30", 1), ("2-12", 3600), ("1-0:30", 1470), ("1-1:1:1", 1502)],
)
def test_time_limits(text: str, minutes: int) -> None:
    assert minutes_of(text) == minutes


@pytest.mark.parametrize("text", ["", "soon", "-5", "1:2:3:4", "1-", "²"])
def test_no_time_limits(text: str) -> None:
    with pytest.raises(ConfigError, match="is no time limit that is known here"):
        minutes_of(text)
