"""SwiftMoE's checkpoints: saved by any system on any number of ranks, loaded by any, and training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.launch import run_ranks
from tests.rank_swiftmoe_checkpoint import NAMES


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of checkpoints, and what four ranks recorded."""
    folder = tmp_path_factory.mktemp("swiftmoe_checkpoint")
    facts = run_ranks(
        "tests.rank_swiftmoe_checkpoint:save",
        {"folder": str(folder)},
        num_ranks=4,
        ranks_per_node=2,
        log_dir=folder / "logs",
        timeout_s=60,
    )
    return folder, facts


def test_a_new_model_goes_on_bit_for_bit(saved: tuple[Path, dict[str, Any]]) -> None:
    """Also one that has trained before: its weights, moments and placement are the checkpoint's."""
    for name in NAMES:
        assert saved[1][f"{name} to {name}"] == saved[1]["went on"][name]
        assert saved[1][f"{name} keeps state of"] == 0, "of whole experts that are no more"


def test_systems_take_over_from_one_another(saved: tuple[Path, dict[str, Any]]) -> None:
    expected = saved[1]["went on"]["flat"]
    for pair in ("flat to swiftmoe", "swiftmoe to flat"):
        assert saved[1][pair] == pytest.approx(expected, rel=1e-5)


def test_two_ranks_go_on_where_four_were(saved: tuple[Path, dict[str, Any]]) -> None:
    found = run_ranks(
        "tests.rank_swiftmoe_checkpoint:reload",
        {"folder": str(saved[0])},
        num_ranks=2,
        ranks_per_node=1,
        log_dir=saved[0] / "logs_of_two",
        timeout_s=60,
    )
    for losses in found.values():
        assert losses == pytest.approx(saved[1]["went on"]["flat"], rel=1e-5)
