"""Every file of conf/ composes and validates, alone and mixed with the others, and hides no key from its reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import BaseModel

from experiments import registry
from experiments.cli import CONF, compose
from experiments.config import (
    SCHEMAS,
    ClusterConfig,
    DataConfig,
    Kind,
    ModelConfig,
    TrainerConfig,
    WorkloadConfig,
    load,
    load_layer,
)
from experiments.experiment_files import experiments_for
from experiments.simulated_cluster import SimulatedCluster
from experiments.split import SPLIT_KEYS

PRIMARY: dict[Kind, tuple[str, ...]] = {
    "train": ("system", "model", "data", "cluster", "trainer", "experiment"),
    "layer": ("cluster", "workload", "experiment"),
    "comm": ("cluster",),
    "compare": ("model", "data", "cluster", "trainer", "experiment"),
}
GROUPS: dict[str, type[BaseModel] | None] = {
    "system": None,
    "model": ModelConfig,
    "data": DataConfig,
    "cluster": ClusterConfig,
    "trainer": TrainerConfig,
    "workload": WorkloadConfig,
    "experiment": None,
    "simulated": SimulatedCluster,
}


def choices(group: str, kind: Kind | None = None) -> list[str]:
    """File names of a group; of the experiments those of one entry point, where it is given."""
    if group == "experiment" and kind is not None:
        return experiments_for(kind, CONF)
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def read(group: str, choice: str) -> dict[str, Any]:
    """One file, as it stands."""
    content: dict[str, Any] = yaml.safe_load((CONF / group / f"{choice}.yaml").read_text())
    return content


@pytest.fixture
def recorded(tmp_path: Path) -> str:
    """The file that workload=replay needs."""
    (tmp_path / "routing.npz").touch()
    return str(tmp_path / "routing.npz")


@pytest.fixture
def gpus_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Shows this process four GPUs where a choice stands for a cluster that is refused without them."""

    def show(choice: str) -> None:
        if choice.startswith("split_"):
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)

    return show


def test_there_is_no_file_that_these_tests_miss() -> None:
    files = {str(path.relative_to(CONF)) for path in CONF.rglob("*.yaml")}
    known = {f"{kind}.yaml" for kind in PRIMARY} | {"base.yaml"}
    known |= {f"{group}/{choice}.yaml" for group in GROUPS for choice in choices(group)}
    assert files == known
    assert set(PRIMARY) == set(SCHEMAS)


@pytest.mark.parametrize(
    ("kind", "group", "choice"),
    [(kind, group, choice) for kind, groups in PRIMARY.items() for group in groups for choice in choices(group, kind)],
)
def test_a_choice_validates(
    kind: Kind, group: str, choice: str, recorded: str, gpus_for: Callable[[str], None]
) -> None:
    gpus_for(choice)
    composed = compose(kind, [f"{group}={choice}"])
    if choice == "replay":
        composed["workload"]["path"] = recorded
    load(kind, composed)


@pytest.mark.parametrize("kind", ["train", "compare"])
@pytest.mark.parametrize("turn", range(7))
def test_choices_mix(kind: Kind, turn: int, gpus_for: Callable[[str], None]) -> None:
    """Each group at another of its files; over the turns every file of every group stands beside several others."""
    mixed = []
    for offset, group in enumerate(PRIMARY[kind]):
        files = choices(group, kind)
        choice = files[(turn + offset) % len(files)]
        gpus_for(choice)
        mixed.append(f"{group}={choice}")
    load(kind, compose(kind, mixed))


@pytest.mark.parametrize(
    ("group", "choice"), [(group, choice) for group in GROUPS for choice in choices(group) if GROUPS[group]]
)
def test_a_file_lists_every_key_of_its_group(group: str, choice: str) -> None:
    schema = GROUPS[group]
    assert schema is not None
    content = read(group, choice)
    if "defaults" not in content:
        elsewhere = set(SPLIT_KEYS) if group == "cluster" and content["launch"] != "split" else set()
        elsewhere |= {"profile"} if group == "cluster" and choice != "auto" else set()
        measured = {"collectives"} if group == "cluster" else set()  # only in what experiments.comm has written
        assert set(content) | measured == set(schema.model_fields) - elsewhere


@pytest.mark.parametrize("kind", PRIMARY)
def test_a_primary_config_lists_every_key(kind: Kind) -> None:
    assert set(compose(kind)) == set(SCHEMAS[kind].model_fields)


@pytest.mark.parametrize("group", ["system", "model", "cluster", "simulated"])
def test_the_name_inside_is_the_file_s(group: str) -> None:
    assert {choice: read(group, choice)["name"] for choice in choices(group)} == {name: name for name in choices(group)}


def test_every_system_has_a_file_and_every_file_a_system() -> None:
    assert choices("system") == list(registry.discover())


def test_the_command_line_wins_over_an_experiment() -> None:
    composed = compose("train", ["experiment=smoke", "model.num_layers=6", "trainer=default"])
    assert (composed["model"]["num_layers"], composed["trainer"]["max_steps"]) == (6, 100)
    assert compose("train", ["experiment=smoke"])["model"]["num_layers"] == 2


def test_every_experiment_is_for_an_entry_point() -> None:
    of_kind = {kind: choices("experiment", kind) for kind in PRIMARY if "experiment" in PRIMARY[kind]}
    assert of_kind["train"] == ["smoke"]
    assert {"smoke", "ta_moe_netns", "ta_moe_split"} <= set(of_kind["compare"])
    assert {"native_layer", "native_layer_growth"} <= set(of_kind["layer"])
    assert {name for names in of_kind.values() for name in names} == set(choices("experiment"))


def test_the_native_layer_is_flat_and_every_upstream_variant_without_drops() -> None:
    config = load_layer(compose("layer", ["experiment=native_layer", "workload=zipf"]))
    labels = ["flat", "tutel", "tutel overlap 2", "tutel 2DH", "fastmoe", "deepspeed"]
    assert [system.label for system in config.systems] == labels
    assert [shape.name for shape in config.shapes] == ["switch", "gshard", "mixtral", "qwen3", "deepseek"]
    assert {shape.tokens_per_rank for shape in config.shapes} == {8192}
    assert (config.capacity_factor, config.workload.kind, config.cluster.name) == (None, "zipf", "auto")


def test_the_emulated_rate_is_the_configured_one() -> None:
    composed = compose("train", ["cluster=netns_2x2", "cluster.rate_mbit=200"])
    assert "200 Mbit/s" in composed["cluster"]["emulation"]


@pytest.mark.parametrize(("choice", "size"), [("split_2x1", "2 x 1"), ("split_2x2", "2 x 2")])
def test_a_split_host_says_what_it_is(choice: str, size: str, gpus_for: Callable[[str], None]) -> None:
    gpus_for(choice)
    cluster = load("comm", compose("comm", [f"cluster={choice}"])).cluster
    assert cluster.emulation == f"split {size} on one host: NCCL_HOSTID, sockets over lo"
    assert f'"{cluster.emulation}"' in (CONF / "cluster" / f"{choice}.yaml").read_text()
