"""Every rule of a config: the message names the key, the value, the rule and the fix, and all problems come at once."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from experiments.cli import compose
from experiments.config import (
    CompareConfig,
    Kind,
    RunConfig,
    SystemConfig,
    cluster_from,
    find_problems,
    load,
    load_compare,
    load_layer,
    load_run,
    run_id,
)
from experiments.problems import nearest
from moe.errors import ConfigError, Problem

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID")


@pytest.fixture(autouse=True)
def plain_start_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same machine for every test, whatever runs it."""
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    show_gpus(monkeypatch, 0)


@functools.cache
def _composed(kind: Kind) -> dict[str, Any]:
    return compose(kind)


def config(kind: Kind = "train", changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The default config with some dotted keys changed."""
    mapping = copy.deepcopy(_composed(kind))
    for key, value in (changes or {}).items():
        *groups, name = key.split(".")
        node: Any = mapping
        for group in groups:
            node = node[int(group)] if isinstance(node, list) else node.setdefault(group, {})
        node[int(name) if isinstance(node, list) else name] = value
    return mapping


def problems(kind: Kind, changes: dict[str, Any]) -> list[Problem]:
    """What `load` says about them."""
    with pytest.raises(ConfigError) as caught:
        load(kind, config(kind, changes))
    return caught.value.problems


def run_config(changes: dict[str, Any] | None = None) -> RunConfig:
    """The default training run, changed."""
    return load_run(config("train", changes))


WRONG_VALUES = [
    ("train", "model.num_experts", "eight", "must be a whole number of at least 1", "for example model.num_experts=8"),
    ("train", "model.num_experts", -3, "must be a whole number of at least 1", "for example model.num_experts=8"),
    ("train", "model.num_experts", 2.5, "must be a whole number of at least 1", "for example model.num_experts=8"),
    ("train", "model.num_experts", 6, "must be divisible by the 4 ranks of cluster local_2x2", "set .* to 4 or 8, or"),
    ("train", "model.num_experts", 2, "must be divisible by the 4 ranks of cluster local_2x2", "set .* to 4, or"),
    ("train", "model.top_k", 9, "must be at most model.num_experts, which is 8", "lower it or raise model.num_experts"),
    ("train", "model.top_k", 0, "must be a whole number of at least 1", "for example model.top_k=2"),
    (
        "train",
        "model.moe_every",
        5,
        "must be at most model.num_layers, which is 4",
        "lower it or raise model.num_layers",
    ),
    ("train", "model.model_dim", 130, "must be divisible by model.num_heads, which is 4", "set .* to 128 or 132, or"),
    ("train", "model.model_dim", 132, "a head's width must be even", "set model.model_dim to 136, or"),
    ("train", "model.num_kv_heads", 0, "must be a whole number of at least 1, or null", "for example"),
    ("train", "model.head_dim", 7, "at least 2 and a multiple of 2, or null", "for example model.head_dim=32"),
    ("train", "model.vocab_size", 100, "must be a whole number of at least 257", "for example model.vocab_size=2048"),
    ("train", "model.hidden_dim", 0, "must be a whole number of at least 1", "for example model.hidden_dim=256"),
    ("train", "model.dense_hidden_dim", -1, "must be a whole number of at least 1", "for example"),
    ("train", "model.capacity_factor", 0, "must be a number above 0, or null", "model.capacity_factor=1.25"),
    ("train", "model.activation", "swigelu", "must be one of gelu, swiglu", r"did you mean swiglu\?"),
    ("train", "model.norm", 3, "must be one of rms, layer", "give one of rms, layer"),
    ("train", "model.tie_embeddings", "maybe", "must be true or false", "give true or false"),
    ("train", "model", 3, "must be a group of the keys name, vocab_size, seq_len", "give a group of the keys"),
    ("train", "trainer.lr", "abc", "must be a number above 0", "for example trainer.lr=0.001"),
    ("train", "trainer.lr", float("inf"), "must be a number above 0", "for example trainer.lr=0.001"),
    ("train", "trainer.betas", [0.9], "must be a list of 2, each item a number of at least 0 and below 1", "0.9,0.95"),
    (
        "train",
        "trainer.global_batch_size",
        10,
        "divisible by the 4 ranks of cluster local_2x2",
        "set .* to 8 or 12, or",
    ),
    ("train", "trainer.warmup_steps", 101, "at most trainer.max_steps, which is 100", "lower it or raise trainer.max"),
    ("train", "trainer.precision", "bf61", "must be one of auto, fp32, bf16", r"did you mean bf16\?"),
    ("train", "seed", -1, "must be a whole number of at least 0", "for example seed=0"),
    ("train", "seed", True, "must be a whole number of at least 0", "for example seed=0"),
    ("train", "cluster.launch", "join", "needs ranks that torchrun or srun started", "cluster.launch=spawn"),
    ("train", "cluster.device", "cuda", "every rank needs a GPU of its own: 4 ranks, 0 GPUs", "set cluster.device=cpu"),
    ("train", "cluster.rate_mbit", 5.0, "only cluster.launch=netns reads it", "choose cluster=netns_2x2"),
    ("train", "cluster.levels.1.name", "node", "must differ from `self` and from the other levels", "rename it"),
    ("train", "cluster.levels.0.fanout", 0, "must be a whole number of at least 1", "cluster.levels.0.fanout=2"),
    ("train", "data.path", "/no/such/file", "there is no such file or folder", "check the spelling, or leave it out"),
    (
        "layer",
        "shapes.0.num_experts",
        6,
        "must be divisible by the 4 ranks of cluster local_2x2",
        "set .* to 4 or 8, or",
    ),
    (
        "layer",
        "shapes.0.top_k",
        17,
        "must be at most shapes.0.num_experts, which is 16",
        "lower it or raise shapes.0.num",
    ),
    ("layer", "workload.kind", "zip", "must be one of uniform, zipf, replay", r"did you mean zipf\?"),
    ("layer", "workload.exponent", 1.0, "only workload.kind=zipf reads it", "choose workload=zipf"),
    ("layer", "shapes", [], "must be a list of at least 1, each item a group of the keys name", "give a list"),
    ("comm", "sizes_bytes", [1024], "must be a list of at least 2, each item a whole number of at least 4", "1024"),
    ("compare", "timing.weights", "trainde", "must be one of initial, trained", r"did you mean trained\?"),
    ("compare", "timing.rounds", 0, "must be a whole number of at least 1", "for example timing.rounds=20"),
]


@pytest.mark.parametrize(("kind", "key", "value", "rule", "fix"), WRONG_VALUES)
def test_message_of_a_wrong_value(kind: Kind, key: str, value: Any, rule: str, fix: str) -> None:
    found = problems(kind, {key: value})
    assert [problem.key for problem in found] == [key]
    shown = str(value).lower() if isinstance(value, bool) else value
    assert found[0].value == shown
    assert re.search(rule, found[0].rule)
    assert re.search(fix, found[0].fix)
    assert str(found[0]) == f"{key}={shown}: {found[0].rule}. Fix: {found[0].fix}"


def test_a_workload_has_room_for_so_many_choices() -> None:
    (found,) = problems("layer", {"shapes.0.top_k": 65, "shapes.0.num_experts": 128})
    assert (found.key, found.rule) == ("shapes.0.top_k", "a routing workload holds at most 64 choices a token")
    assert found.fix == "set shapes.0.top_k to 64 or less"


def test_trained_weights_need_checkpoints() -> None:
    without = {"trainer.checkpoint_every": None}
    (found,) = problems("compare", without)
    assert (found.key, found.rule) == (
        "timing.weights",
        "needs each run's last checkpoint, but trainer.checkpoint_every is null",
    )
    assert run_config(without).trainer.checkpoint_every is None
    assert load("compare", config("compare", {**without, "timing.weights": "initial"}))


UNKNOWN_KEYS = [
    ("train", "num_experts", "did you mean model.num_experts?"),
    ("train", "model.num_expert", "did you mean model.num_experts?"),
    ("train", "modle.num_experts", "did you mean model.num_experts?"),
    ("train", "trainer.max_step", "did you mean trainer.max_steps?"),
    ("train", "data.pth", "did you mean data.path?"),
    ("train", "trainer.zzzzqq", "remove it; the keys of trainer are max_steps, global_batch_size,"),
    ("layer", "workload.exponnet", "did you mean workload.exponent?"),
    ("compare", "seed", "did you mean seeds?"),
]


@pytest.mark.parametrize(("kind", "key", "fix"), UNKNOWN_KEYS)
def test_unknown_key_gets_the_nearest_name(kind: Kind, key: str, fix: str) -> None:
    (found,) = problems(kind, {key: 16})
    assert (found.key, found.value, found.rule) == (key, 16, "there is no such key")
    assert found.fix.startswith(fix)


def show_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Makes this machine one with so many GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def split(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Changes that make the cluster split_2x2, and some more of it."""
    cluster = compose("train", ["cluster=split_2x2"])["cluster"]
    return {"cluster": {**cluster, **(changes or {})}}


def test_a_split_host_without_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = problems("train", split())
    assert str(found) == (
        "cluster.launch=split: every rank needs a GPU of its own, for NCCL: 4 ranks, 0 GPUs seen. Fix: use a host of "
        "enough GPUs with cluster.device=cuda, a smaller cluster, or, on CPUs, cluster=local_2x2"
    )
    show_gpus(monkeypatch, 4)
    (found,) = problems("train", split({"device": "cpu"}))
    assert (found.key, found.rule) == (
        "cluster.launch",
        "splits a host for NCCL, and cluster.device=cpu talks by gloo",
    )


def test_a_split_host_is_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    show_gpus(monkeypatch, 4)
    for name, value in {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    (found,) = problems("train", split())
    assert (found.key, found.rule) == ("cluster.launch", "splits one host, and torchrun started the ranks on 2")
    monkeypatch.setenv("NCCL_HOSTID", "node1")  # a rank that the suite started on a split host reads its config anew
    assert run_config(split()).cluster.launch == "split"


SPLIT_WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"levels": [{"name": "node", "fanout": 4}]}, "cluster.levels", "cluster.launch=split needs nodes to split into"),
    ({"levels": None}, "cluster.levels", "cluster.launch=split needs nodes to split into"),
    (
        {"emulation": "two hosts"},
        "cluster.emulation",
        "says itself what it is, here `split 2 x 2 on one host: NCCL_HOST",
    ),
    ({"sockets_per_thread": 0}, "cluster.sockets_per_thread", "of at least 1 and of at most 64, or null"),
    ({"socket_threads": 17}, "cluster.socket_threads", "of at least 1 and of at most 16, or null"),
    ({"sockets_per_thread": 8, "socket_threads": 9}, "cluster.sockets_per_thread", "which is 9, must be at most 64"),
    (
        {"launch": "spawn", "socket_threads": 2},
        "cluster.socket_threads",
        "only cluster.launch=split reads it",
    ),
]


@pytest.mark.parametrize(("changes", "key", "rule"), SPLIT_WRONG)
def test_what_a_split_host_can_not_be(
    changes: dict[str, Any], key: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_gpus(monkeypatch, 4)
    (found,) = problems("train", split(changes))
    assert (found.key, rule in found.rule) == (key, True), found


def test_results_of_a_split_host_say_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    show_gpus(monkeypatch, 4)
    plain = run_config(split())
    assert (plain.cluster.device, plain.cluster.variables) == ("cuda", {})
    assert cluster_from(plain.cluster).emulation == "split 2 x 2 on one host: NCCL_HOSTID, sockets over lo"
    more = run_config(split({"sockets_per_thread": 8, "socket_threads": 4}))
    assert more.cluster.variables == {"NCCL_NSOCKS_PERTHREAD": "8", "NCCL_SOCKET_NTHREADS": "4"}
    assert cluster_from(more.cluster).emulation == (
        "split 2 x 2 on one host: NCCL_HOSTID, sockets over lo, NCCL_NSOCKS_PERTHREAD=8, NCCL_SOCKET_NTHREADS=4"
    )
    assert load_run(more.model_dump(mode="json")) == more
    three = [{"name": name, "fanout": fanout} for name, fanout in (("node", 1), ("rack", 2), ("network", 2))]
    assert run_config(split({"levels": three})).cluster.emulation.startswith("split 4 x 1 on one host")


def test_unknown_system_gets_the_nearest_name() -> None:
    (found,) = problems("train", {"system.name": "flatt"})
    assert (found.key, found.value, found.rule) == ("system.name", "flatt", "there is no such system")
    assert found.fix.startswith("did you mean flat? The systems are ")
    (found,) = problems("layer", {"systems": ["flat", "referense"]})
    assert (found.key, found.value) == ("systems.1.name", "referense")
    assert "did you mean reference?" in found.fix


def test_options_are_the_system_s_own() -> None:
    wrong = {"system": {"name": "deepspeed", "use_rtss": True, "min_capacity": "four"}}
    unknown, mistyped = problems("train", wrong)
    assert (unknown.key, unknown.value) == ("system.use_rtss", True)
    assert unknown.rule == "the system deepspeed has no such option"
    assert unknown.fix.startswith("did you mean use_rts? The options are ")
    assert (mistyped.key, mistyped.value) == ("system.min_capacity", "four")
    assert mistyped.rule == "must be a whole number of at least 0"
    (found,) = problems("train", {"system": {"name": "reference", "overlap": 2}})
    assert found.fix == "remove it; there are no options"


def test_a_missing_key_is_named() -> None:
    mapping = config()
    del mapping["model"]["top_k"], mapping["trainer"]
    with pytest.raises(ConfigError) as caught:
        load_run(mapping)
    found = {problem.key: problem for problem in caught.value.problems}
    assert set(found) == {"model.top_k", "trainer"}
    assert str(found["model.top_k"]) == "model.top_k=(missing): is required. Fix: add it, for example model.top_k=2"


def test_all_problems_are_told_at_once_in_the_order_of_the_groups() -> None:
    changes = {"trainer.lr": "abc", "model.num_experts": -3, "model.top_k": 99, "data.path": "/no/such", "sed": 1}
    keys = [problem.key for problem in problems("train", changes)]
    assert keys == ["model.num_experts", "model.top_k", "data.path", "trainer.lr", "sed"]


def test_a_wrong_sign_does_not_blame_the_keys_that_were_right() -> None:
    assert [problem.key for problem in problems("train", {"model.num_experts": -8})] == ["model.num_experts"]
    assert [problem.key for problem in problems("train", {"cluster.levels": 3})] == ["cluster.levels"]


def test_heads_must_be_divisible_by_kv_heads() -> None:
    (found,) = problems("train", {"model.num_kv_heads": 3})
    assert (found.key, found.value) == ("model.num_heads", 4)
    assert found.rule == "must be divisible by model.num_kv_heads, which is 3"
    assert found.fix == "set model.num_heads to 3 or 6, or change model.num_kv_heads"


def test_workload_needs_what_it_reads(tmp_path: Path) -> None:
    (found,) = problems("layer", {"workload.kind": "zipf"})
    assert str(found).startswith("workload.exponent=null: workload.kind=zipf needs it. Fix: give workload.exponent=1.0")
    (found,) = problems("layer", {"workload.kind": "replay"})
    assert str(found).startswith("workload.path=null: workload.kind=replay needs it. Fix: give workload.path=outputs/")
    (found,) = problems("layer", {"workload.kind": "replay", "workload.path": str(tmp_path / "no.npz")})
    assert found.rule.startswith("there is no such file")
    (tmp_path / "trace.npz").touch()
    changes = {"workload.kind": "replay", "workload.path": str(tmp_path / "trace.npz")}
    assert load_layer(config("layer", changes)).workload.kind == "replay"


def test_nothing_is_listed_twice() -> None:
    found = problems("compare", {"systems": ["flat", {"name": "flat"}], "seeds": [0, 1, 0]})
    assert [str(problem) for problem in found] == [
        "systems.1=flat: stands in systems already. Fix: remove it, or give a label of its own: "
        "{name: flat, label: flat 2, option: value}",
        "seeds.2=0: stands in seeds already. Fix: remove it",
    ]
    shape = config("layer")["shapes"][0]
    (problem,) = problems("layer", {"shapes": [shape, dict(shape)]})
    assert problem.key == "shapes.1.name"


def test_a_world_size_that_the_cluster_denies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    (found,) = problems("train", {})
    assert found.key == "cluster.levels"
    assert found.rule == "the cluster declares 4 ranks but 8 are here, started by torchrun"
    assert "cluster=auto" in found.fix


def test_levels_are_derived_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    cluster = cluster_from(run_config({"cluster": compose("train", ["cluster=auto"])["cluster"]}).cluster)
    assert [(level.name, level.fanout) for level in cluster.levels] == [("self", 1), ("node", 4), ("network", 2)]


def test_levels_are_derived_from_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = run_config({"cluster.levels": None})
    assert (found.cluster.world_size, found.cluster.device, found.trainer.precision) == (2, "cuda", "bf16")
    assert run_config().cluster.device == "cpu", "four ranks need four GPUs"


def test_what_is_open_is_settled() -> None:
    found = run_config({"system": {"name": "deepspeed"}, "cluster.levels": None})
    assert found.system.options["min_capacity"] == 4
    assert (found.cluster.device, found.trainer.precision, found.cluster.world_size) == ("cpu", "fp32", 1)
    assert load_layer(config("layer")).dtype == "fp32"


@pytest.mark.parametrize("kind", ["train", "layer", "comm", "compare"])
def test_a_loaded_config_loads_again(kind: Kind) -> None:
    first = load(kind, config(kind))
    again = load(kind, first.model_dump(mode="json"))
    assert again == first
    assert run_id(again) == run_id(first)


def test_a_system_may_be_its_name_only() -> None:
    assert run_config({"system": "flat"}) == run_config({"system": {"name": "flat"}})
    found = load_compare(config("compare", {"systems": ["flat", {"name": "deepspeed", "use_rts": True}]}))
    assert [system.name for system in found.systems] == ["flat", "deepspeed"]
    assert found.systems[1].options["use_rts"] is True


@pytest.mark.parametrize("kind", ["layer", "compare"])
def test_variants_of_one_system_have_labels(kind: Kind) -> None:
    variant = {"name": "deepspeed", "label": "deepspeed rts", "use_rts": True}
    first, second = cast(CompareConfig, load(kind, config(kind, {"systems": ["deepspeed", variant]}))).systems
    assert (first.label, second.label, second.name) == ("deepspeed", "deepspeed rts", "deepspeed")
    assert second.options == {**first.options, "use_rts": True}, "a label is no option of the system"
    (found,) = problems(kind, {"systems": ["flat", variant, variant]})
    assert str(found).startswith("systems.2.label=deepspeed rts: stands in systems already. Fix: remove it, or give a")


@pytest.mark.parametrize("label", ["", " ", "a/b", "a\\b", "a\nb", "x" * 41, "flat "])
def test_a_label_must_fit_a_table_and_a_path(label: str) -> None:
    (found,) = problems("train", {"system": {"name": "flat", "label": label}})
    assert (found.key, found.value) == ("system.label", repr(label))
    assert found.rule == "must be 1 to 40 characters, no path separator or line break, no blank at either end"


def test_a_label_must_not_pass_for_another_system() -> None:
    (found,) = problems("layer", {"systems": [{"name": "flat", "label": "reference"}]})
    assert str(found).startswith("systems.0.label=reference: is the name of another system, and this one is flat. Fix:")
    (found,) = problems("train", {"system.label": 3})
    assert (found.key, found.rule) == ("system.label", "must be text")


def test_a_label_makes_another_run_of_the_same_system() -> None:
    plain, labelled = run_id(run_config()), run_id(run_config({"system": {"name": "flat", "label": "other"}}))
    assert plain != labelled and labelled.startswith("flat-tiny-s0-")


def test_a_comparison_is_every_system_with_every_seed() -> None:
    found = load_compare(config("compare", {"systems": ["flat", "reference"], "seeds": [3, 5]}))
    cells = [(run.system.name, run.seed) for run in found.runs()]
    assert cells == [("flat", 3), ("reference", 3), ("flat", 5), ("reference", 5)]
    trainer = {f"trainer.{key}": value for key, value in found.trainer.model_dump().items()}
    single = run_config({"seed": 5} | trainer)
    assert run_id(found.runs()[2]) == run_id(single), "a run of a comparison is the run of experiments.train"


COSMETIC_CHANGES: list[dict[str, Any]] = [
    {"force": True},
    {"output_dir": "elsewhere"},
    {"trainer.progress": "none"},
    {"trainer.timeout_s": 5},
    {"data.cache_dir": "elsewhere"},
    {"model.capacity_factor": None},
    {"trainer.lr": 1e-3},
    {"trainer.precision": "fp32"},  # what auto is here
]


@pytest.mark.parametrize("changes", COSMETIC_CHANGES)
def test_run_id_is_stable_under_what_changes_no_number(changes: dict[str, Any]) -> None:
    assert run_id(run_config(changes)) == run_id(run_config())


REAL_CHANGES: list[dict[str, Any]] = [
    {"seed": 1},
    {"system": {"name": "reference"}},
    {"model.num_experts": 16},
    {"model.capacity_factor": 1},
    {"trainer.lr": 2e-3},
    {"trainer.deterministic": False},
    {"data.val_fraction": 0.1},
    {"cluster.levels.0.fanout": 4},
    {"cluster.emulation": "other"},
]


def test_run_id_changes_with_everything_else() -> None:
    ids = [run_id(run_config(changes)) for changes in [{}, *REAL_CHANGES]]
    assert len(set(ids)) == len(ids)


def test_run_id_tells_what_a_reader_looks_for() -> None:
    assert re.fullmatch(r"flat-tiny-s3-[0-9a-f]{10}", run_id(run_config({"seed": 3})))
    assert re.fullmatch(r"layer-local_2x2-[0-9a-f]{10}", run_id(load("layer", config("layer"))))
    assert run_id(run_config({"system": SystemConfig(name="flat").model_dump()})) == run_id(run_config())


def test_whole_and_broken_numbers_of_one_value_give_one_id() -> None:
    assert run_id(run_config({"model.capacity_factor": 1})) == run_id(run_config({"model.capacity_factor": 1.0}))


def test_fields_only_leaves_out_what_needs_other_keys() -> None:
    mapping = config("train", {"model.top_k": 99, "model.num_experts": -3, "system.name": "nope"})
    assert [problem.key for problem in find_problems("train", mapping, fields_only=True)] == ["model.num_experts"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("deepsped", "deepspeed"), ("top_k", "model.top_k"), ("modle.top_k", "model.top_k"), ("x", None)],
)
def test_nearest(name: str, expected: str | None) -> None:
    assert nearest(name, ["deepspeed", "flat", "model.top_k", "shapes.top_kk"]) == expected
