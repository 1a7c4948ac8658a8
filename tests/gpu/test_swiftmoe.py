"""SwiftMoE and its baselines on GPUs: bf16, NCCL, placements that change, an optimizer in the host's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.launch import run_ranks
from tests.gpu.rank_swiftmoe import MODEL_SYSTEMS, NUM_STEPS

Facts = list[dict[str, Any]]
SWIFT = [name for name in MODEL_SYSTEMS if name.startswith("swiftmoe")]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """What the ranks recorded, by rank."""
    assert torch.cuda.is_available(), "make test-gpu needs a machine with GPUs"
    folder: Path = tmp_path_factory.mktemp("swiftmoe_gpu")
    num_ranks = torch.cuda.device_count()
    return run_ranks(
        "tests.gpu.rank_swiftmoe:measure",
        {"folder": str(folder / "checkpoints")},
        num_ranks=num_ranks,
        ranks_per_node=num_ranks,
        device="cuda",
        log_dir=folder / "logs",
        timeout_s=120,
    )


def test_rows_come_from_where_they_were_sent(facts: Facts) -> None:
    assert all(found["exchanges"] == [True] * 3 for found in facts)


def test_layers_train_as_flats_wherever_replicas_are(facts: Facts) -> None:
    for found in facts:
        for errors in found["placements"]["errors"]:
            assert max(errors.values()) < 3e-2, errors


def test_replicas_are_the_same_bits_after_every_step(facts: Facts) -> None:
    for found in facts:
        assert all(found["placements"]["replicas"])
        for name in SWIFT:
            assert found["models"][name]["replicas"] == [True, True]


def test_experts_without_tokens_get_no_gradient(facts: Facts) -> None:
    for found in facts:
        assert found["idle experts"]["idle"] == [0.0] * 6
        assert min(found["idle experts"]["chosen"]) > 0


def test_rows_laid_out_by_their_bound_are_those_that_the_host_counts(facts: Facts) -> None:
    for found in facts:
        assert max(found["spare rows"].values()) < 2e-2, found["spare rows"]


@pytest.mark.parametrize("name", [name for name in MODEL_SYSTEMS if name != "flat"])
def test_models_train_as_flats(name: str, facts: Facts) -> None:
    for found in facts:
        expected = found["models"]["flat"]["losses"]
        assert expected[-1] < 0.93 * expected[0], "it learns"
        assert found["models"][name]["losses"] == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("name", SWIFT)
def test_placements_change_alike_on_all_ranks(name: str, facts: Facts) -> None:
    tables = facts[0]["models"][name]["tables"]
    assert all(found["models"][name]["tables"] == tables for found in facts)
    assert len({str(table) for table in tables}) > NUM_STEPS // 2


def test_the_host_waits_for_the_popularity_alone(facts: Facts) -> None:
    """Once a step, whatever the number of layers; beyond what flat's step waits for in its dispatch."""
    for found in facts:
        rest = list(found["models"]["swiftmoe"]["waits"])
        assert rest.count("swiftmoe_popularity.py") == 1, rest
        rest.remove("swiftmoe_popularity.py")
        assert sorted(rest) == sorted(found["models"]["flat"]["waits"])


def test_parts_of_a_step_are_clocked(facts: Facts) -> None:
    for found in facts:
        parts = found["models"]["swiftmoe"]["parts"]
        assert min(seconds for name, seconds in parts.items() if name not in ("optimizer", "migration")) > 0, parts


def test_an_offloaded_optimizer_is_in_pinned_memory(facts: Facts) -> None:
    for found in facts:
        assert found["models"]["swiftmoe offloaded"]["pinned"] == [True, True]
        assert found["models"]["swiftmoe offloaded"]["devices"] == ["cpu", "cuda"]
        assert found["models"]["swiftmoe"]["devices"] == ["cuda"]


@pytest.mark.parametrize("name", MODEL_SYSTEMS)
def test_a_checkpoint_goes_on(name: str, facts: Facts) -> None:
    for found in facts:
        told = found["models"][name]
        assert told["resumed"] == pytest.approx(told["went on"], rel=5e-3)
        assert max(told["resumed"]) < 0.93 * told["losses"][0], "of a model that has learnt"


def test_a_checkpoint_has_few_whole_experts_on_a_gpu_at_once(facts: Facts) -> None:
    for found in facts:
        told = found["whole experts"]
        assert told["devices"] == ["cpu"]
        assert told["peak"] < 4 * told["expert"], "one a rank, as it comes and as it goes"
        assert 3 * told["here"] > 4, "with both moments more are here"
