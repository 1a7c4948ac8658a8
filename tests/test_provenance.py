"""experiments.provenance: facts about the code and the machine, and nothing about its owner."""

from __future__ import annotations

import getpass
import hashlib
import json
import platform
import socket
import subprocess
from pathlib import Path

import pytest
import torch

from experiments.provenance import git_state, lock_sha256, manifest


def git(folder: Path, *arguments: str) -> str:
    """Run git as somebody."""
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_git_state_of_clean_dirty_and_no_checkout(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    git(checkout, "init", "-q")
    (checkout / "file").write_text("one")
    git(checkout, "add", "file")
    git(checkout, "commit", "-q", "-m", "first")
    commit = git(checkout, "rev-parse", "HEAD")
    assert git_state(checkout) == {"commit": commit, "dirty": False}
    (checkout / "new").touch()
    assert git_state(checkout) == {"commit": commit, "dirty": True}
    (checkout / "new").unlink()
    (checkout / "file").write_text("two")
    assert git_state(checkout) == {"commit": commit, "dirty": True}
    assert git_state(tmp_path) == {"commit": None, "dirty": None}


def test_without_git_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state() == {"commit": None, "dirty": None}


def test_lock_hash(tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    assert lock_sha256(lock) is None
    lock.write_bytes(b"torch==2.13.0\n")
    assert lock_sha256(lock) == hashlib.sha256(b"torch==2.13.0\n").hexdigest()


def test_manifest_is_plain_data_without_names() -> None:
    made = manifest("flat-tiny-s3-0", 3, {"name": "local_2x2", "levels": []}, "2025-01-01T00:00:00+00:00")
    text = json.dumps(made)
    assert (made["run_id"], made["seed"], made["ended"]) == ("flat-tiny-s3-0", 3, None)
    assert made["python"] == platform.python_version()
    assert made["versions"]["torch"] == torch.__version__
    assert made["hardware"]["cores"] >= 1
    assert made["hardware"]["memory_bytes"] > 2**28
    assert isinstance(made["hardware"]["gpus"], list)
    assert json.loads(text) == made
    for private in (f'"{socket.gethostname()}"', f'"{Path.home()}', f'"{getpass.getuser()}"'):
        assert private not in text
