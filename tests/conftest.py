"""What holds for every test: no network, and no clock that can fail it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from tests.tiny import Configure

# A test that would download something fails instead; set before anything imports the libraries that read them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

# Without a GPU, Triton's kernels are interpreted; this is read when Triton is imported, whoever does that first.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Whoever starts the tests in the background makes them, and every process that they start, ignore Ctrl-C; the tests of
# Ctrl-C send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Hypothesis' default deadline of 200 ms is a timing assertion; on a busy machine it fails for no reason.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def rank_facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What four ranks of two nodes recorded for the tests of moe/, by part and rank; one start for all of them."""
    from experiments.launch import run_ranks

    return run_ranks(
        "tests.rank_parts:measure",
        {},
        num_ranks=4,
        ranks_per_node=2,
        log_dir=tmp_path_factory.mktemp("rank_parts"),
        timeout_s=60,
    )


@pytest.fixture(scope="session")
def model_facts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder of checkpoints that four ranks saved, and what they recorded of every system's models."""
    from experiments.launch import run_ranks

    folder = tmp_path_factory.mktemp("rank_models")
    payload = {"folder": str(folder)}
    logs = folder / "logs"
    facts = run_ranks("tests.rank_models:measure", payload, num_ranks=4, ranks_per_node=2, log_dir=logs, timeout_s=60)
    return folder, facts


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real text that no test changes; its tokens are built once."""
    from tests.tiny import write_text

    return write_text(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """Makes a config of one rank from overrides; runs of it take place in this process."""
    from experiments import cells
    from tests.tiny import ONE_RANK, run_ranks_here, tiny_config

    monkeypatch.setattr(cells, "run_ranks", run_ranks_here)
    return lambda *overrides: tiny_config(tmp_path / "out", text, ONE_RANK, *overrides)
