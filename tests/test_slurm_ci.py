""".ci/run: all parts run, whoever runs it, and what did not run is not passed."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ["test", "test-slurm", "lint"]


@pytest.mark.parametrize(
    ("user", "broken", "parts", "code"),
    [
        (0, "none", PARTS, 0),
        (0, "test", PARTS, 1),
        (0, "test-slurm", PARTS, 1),
        (0, "lint", PARTS, 1),
        (1000, "none", ["test", "lint"], 1),
    ],
)
def test_all_parts_run_and_count(tmp_path: Path, user: int, broken: str, parts: list[str], code: int) -> None:
    programs = {
        "make": f'echo "$1" >> {tmp_path}/made\n[ "$1" != {broken} ]',
        "id": f"echo {user}",
        **dict.fromkeys(("apt-get", "ip", "tc", "chromium", "chromedriver"), "exit 9"),
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(ROOT / ".ci" / "run")], env=env, capture_output=True, text=True, check=False)
    assert (tmp_path / "made").read_text().split() == parts
    assert done.returncode == code
    assert done.stderr == (
        "" if user == 0 else ".ci/run: not passed, since the Slurm tests need root and did not run\n"
    )
