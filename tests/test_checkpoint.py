"""experiments.checkpoint: saved by four ranks, loaded by two and by one, by other systems; and damaged ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from experiments import checkpoint, registry
from experiments.checkpoint import (
    canonical_entries,
    latest_checkpoint,
    load_checkpoint,
    named_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
)
from experiments.launch import run_ranks
from experiments.model import GPT
from experiments.results import ResultsWriteError
from moe.errors import ConfigError
from moe.mesh import Mesh, create_mesh
from moe.topology import cluster_of
from tests import rank_models
from tests.rank_models import MODELS, SAVED, digests, gathered, runs, trainee
from tests.tiny import rank_here

NAMES = [name for name in SAVED if runs(name)]
PAIRS = [("flat", "flat"), *((source, "flat") for source in NAMES[1:]), *(("flat", name) for name in NAMES[1:])]


@pytest.fixture(scope="module")
def two_ranks(model_facts: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks found in the checkpoints of four."""
    return run_ranks(
        "tests.rank_models:reload",
        {"folder": str(model_facts[0]), "pairs": PAIRS},
        num_ranks=2,
        ranks_per_node=1,
        log_dir=tmp_path_factory.mktemp("two_ranks"),
        timeout_s=60,
    )


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """This process as the only rank."""
    with rank_here(tmp_path_factory.mktemp("one_rank")) as info:
        yield create_mesh(cluster_of([1]), info.device)


def test_what_is_saved_is_named_alike_by_every_system(model_facts: tuple[Path, dict[str, Any]]) -> None:
    saved = model_facts[1]["saved"]
    assert list(saved) == NAMES
    for facts in saved.values():
        assert facts["digests"].keys() == saved["flat"]["digests"].keys()
        assert facts["losses"] == pytest.approx(saved["flat"]["losses"], rel=1e-5)
        assert {digest for key, digest in facts["digests"].items() if key.endswith("/step")} == {"2.0"}


@pytest.mark.parametrize(("source", "name"), PAIRS)
def test_four_ranks_save_and_two_ranks_load(
    source: str, name: str, model_facts: tuple[Path, dict[str, Any]], two_ranks: dict[str, Any]
) -> None:
    """Every tensor and both of its moments, the experts' included, bit for bit; and training goes on alike."""
    found = two_ranks[f"{source} to {name}"]
    assert found["digests"] == model_facts[1]["saved"][source]["digests"]
    assert found["state"] == {"told": source}
    assert found["loss"] == pytest.approx(two_ranks["flat to flat"]["loss"], rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_four_ranks_save_and_one_rank_loads(name: str, model_facts: tuple[Path, dict[str, Any]], mesh: Mesh) -> None:
    found = rank_models.load(model_facts[0], name, "flat", mesh)
    assert found["digests"] == model_facts[1]["saved"][name]["digests"]


def test_two_ranks_save_anew_and_one_rank_loads(
    model_facts: tuple[Path, dict[str, Any]], two_ranks: dict[str, Any], mesh: Mesh
) -> None:
    gpt, optimizer, _ = trainee(registry.create("reference"), mesh)
    assert load_checkpoint(model_facts[0] / "again_2" / "step_3", gpt, optimizer) == {"told": "again"}
    assert gathered(gpt, optimizer) == two_ranks["flat to flat"]["later"]
    assert two_ranks["flat to flat"]["later"] != two_ranks["flat to flat"]["digests"]


def test_the_random_state_is_each_ranks_own(tmp_path: Path, mesh: Mesh) -> None:
    gpt, optimizer, _ = trainee(registry.create("flat"), mesh)
    torch.manual_seed(17)
    save_checkpoint(tmp_path / "step_1", gpt, optimizer, {})
    expected = torch.rand(3)
    torch.manual_seed(18)
    load_checkpoint(tmp_path / "step_1", gpt, optimizer)
    assert torch.equal(torch.rand(3), expected)
    (tmp_path / "step_1" / "rng_0.pt").rename(tmp_path / "rng_0.pt")  # a rank that the world before did not have
    _edit_checksums(tmp_path / "step_1", lambda checksums: checksums.pop("rng_0.pt"))
    load_checkpoint(tmp_path / "step_1", gpt, optimizer)


def _edit_checksums(folder: Path, edit: Callable[[dict[str, int]], Any]) -> None:
    checksums = json.loads((folder / "checksums.json").read_text())
    edit(checksums)
    (folder / "checksums.json").write_text(json.dumps(checksums))


def test_an_optimizer_without_state_is_saved_as_one_that_has_not_stepped(tmp_path: Path, mesh: Mesh) -> None:
    gpt, optimizer, _ = trainee(registry.create("flat"), mesh)
    save_checkpoint(tmp_path / "step_0", gpt, optimizer, {})
    load_checkpoint(tmp_path / "step_0", gpt, optimizer)
    for parameter in gpt.parameters():
        state = optimizer.state[parameter]
        assert float(state["step"]) == 0
        assert not state["exp_avg"].any() and not state["exp_avg_sq"].any()


# Damage


@pytest.fixture
def saved(model_facts: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A checkpoint of four ranks, to be spoilt."""
    return Path(shutil.copytree(model_facts[0] / "flat" / "step_2", tmp_path / "step_2"))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit": (lambda folder: _flip(folder / "__2_0.distcp"), r"its file __2_0\.distcp is corrupt"),
    "a truncated file": (
        lambda folder: (folder / "__0_0.distcp").write_bytes((folder / "__0_0.distcp").read_bytes()[:-1]),
        r"its file __0_0\.distcp is corrupt",
    ),
    "an empty file": (lambda folder: (folder / "trainer.pt").write_bytes(b""), r"its file trainer\.pt is corrupt"),
    "a missing file": (lambda folder: (folder / "__1_0.distcp").unlink(), r"its file __1_0\.distcp is missing"),
    "no metadata": (lambda folder: (folder / ".metadata").unlink(), r"its file \.metadata is missing"),
    "no checksums": (
        lambda folder: (folder / "checksums.json").unlink(),
        r"checksums\.json is missing or not readable",
    ),
    "half the checksums": (
        lambda folder: (folder / "checksums.json").write_text('{"trainer.pt": 12'),
        r"checksums\.json is missing or not readable",
    ),
    "other checksums": (lambda folder: (folder / "checksums.json").write_text("3"), r"checksums\.json is missing or"),
    "no folder": (lambda folder: shutil.rmtree(folder), "there is no such folder"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_left_as_it_is(damage: str, saved: Path, mesh: Mesh) -> None:
    spoil, message = DAMAGE[damage]
    spoil(saved)
    before = {path.name: path.read_bytes() for path in saved.glob("*")}
    gpt, optimizer, _ = trainee(registry.create("flat"), mesh)
    weights = dict(digests(gpt, None))
    with pytest.raises(ConfigError, match=message) as caught:
        load_checkpoint(saved, gpt, optimizer)
    (problem,) = caught.value.problems
    assert (problem.key, problem.value) == ("checkpoint", saved)
    assert problem.rule.startswith("a checkpoint must be whole and fit the model, but ")
    assert problem.fix.startswith("remove that folder to go on from the one before it")
    assert "force=true" in problem.fix
    assert {path.name: path.read_bytes() for path in saved.glob("*")} == before
    assert dict(digests(gpt, None)) == weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_dim": 16}, r"does not fit this model \(Size mismatch .* layers/1/experts/0/w1\)"),
        (
            {"num_experts": 12},
            r"does not fit this model \(Missing key in checkpoint state_dict: layers/1/experts/(8|9|10|11)/w1",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    change: dict[str, int], message: str, saved: Path, mesh: Mesh
) -> None:
    model = MODELS["plain"].model_copy(update=change)
    gpt, optimizer, _ = trainee(registry.create("flat"), mesh, model=model)
    with pytest.raises(ConfigError, match=message):
        load_checkpoint(saved, gpt, optimizer)


# Folders


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None
    for name in ("step_9", "step_10", ".step_12.tmp", "step_11.bad", "step_", "step_x", "other"):
        (tmp_path / name).mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "step_10"
    (tmp_path / "step_2").mkdir()
    remove_old_checkpoints(tmp_path, keep=2)
    assert {path.name for path in tmp_path.glob("step_*")} == {"step_9", "step_10", "step_11.bad", "step_", "step_x"}


def test_a_name_is_a_run_or_a_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (2, 4):
        (run / "checkpoints" / f"step_{step}").mkdir(parents=True)
    assert named_checkpoint(str(run), 9) == run / "checkpoints" / "step_4"
    assert named_checkpoint(str(run / "checkpoints" / "step_2"), 9) == run / "checkpoints" / "step_2"
    for wrong in (tmp_path, run / "checkpoints" / "step_3", tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=r"^trainer\.resume_from=.*: there is no checkpoint: .*Fix: name the"):
            named_checkpoint(str(wrong), 9)
    with pytest.raises(
        ConfigError, match=r"^trainer\.max_steps=4: must be above the steps that were done when .*step_4"
    ):
        named_checkpoint(str(run), 4)


# Failed writes


@pytest.fixture
def model(mesh: Mesh) -> tuple[GPT, Optimizer]:
    """Something to save."""
    return trainee(registry.create("flat"), mesh)[:2]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "No space left on device; .*Fix: free some space on that disk"),
        (OSError(13, "Permission denied"), "Permission denied; .*Fix: make the folder writable"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
            "torch could not write all of it, as on a full disk; .*Fix: free some space on that disk",
        ),
    ],
)
def test_what_can_not_be_written_leaves_nothing_half_and_the_old_one_whole(
    tmp_path: Path, model: tuple[GPT, Optimizer], monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    save_checkpoint(tmp_path / "step_1", *model, {"told": 1})

    def fail(*_arguments: Any, **_more: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint.dcp.FileSystemWriter, "write_data", fail)
    for step in (1, 2):
        with pytest.raises(ResultsWriteError, match=rf"step_{step} could not be written: {message}"):
            save_checkpoint(tmp_path / f"step_{step}", *model, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
    assert load_checkpoint(tmp_path / "step_1", *model) == {"told": 1}


def test_an_error_that_is_no_failed_write_stays_what_it_is(
    tmp_path: Path, model: tuple[GPT, Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: Any, **_more: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(checkpoint.dcp.FileSystemWriter, "write_data", fail)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        save_checkpoint(tmp_path / "step_1", *model, {})


def test_what_a_killed_run_left_half_written_is_cleared_away(tmp_path: Path, model: tuple[GPT, Optimizer]) -> None:
    (tmp_path / ".step_7.tmp").mkdir()
    (tmp_path / ".step_7.tmp" / "__0_0.distcp").write_bytes(b"half")
    save_checkpoint(tmp_path / "step_1", *model, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path, model: tuple[GPT, Optimizer]) -> None:
    save_checkpoint(tmp_path / "step_1", *model, {"told": 1})
    with torch.no_grad():
        next(canonical_entries(model[0])).parameter.add_(1.0)
    expected = dict(digests(model[0], None))
    save_checkpoint(tmp_path / "step_1", *model, {"told": 2})
    with torch.no_grad():
        next(canonical_entries(model[0])).parameter.add_(1.0)
    assert load_checkpoint(tmp_path / "step_1", *model) == {"told": 2}
    assert dict(digests(model[0], None)) == expected
