"""Rules over more than one key of a config. They run on whatever values could be read, so that a user who also made
a mistake elsewhere hears of both at once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from experiments.cluster_config import derived_levels, gpus_suffice
from experiments.join import check_size, ranks_here
from experiments.split import MAX_SOCKETS, is_split, split_emulation
from moe.errors import ConfigError, Problem
from moe.workload import MAX_TOP_K


class Values:
    """The raw values of a config, by dotted key; list items by number.

    Args:
        mapping: plain dicts, lists and scalars.
        failed: keys that have a problem of their own already.
    """

    def __init__(self, mapping: Mapping[str, Any], failed: set[str]) -> None:
        self.mapping = mapping
        self.failed = failed

    def raw(self, key: str) -> Any:
        """The value, None where there is none."""
        node: Any = self.mapping
        for part in key.split("."):
            if isinstance(node, Mapping):
                node = node.get(part)
            elif isinstance(node, list) and part.isdigit() and int(part) < len(node):
                node = node[int(part)]
            else:
                return None
        return node

    def whole(self, key: str) -> int | None:
        """A whole number to hold other keys against, None where there is none.

        One that fails for its sign still tells the size that was meant: `num_experts=-8 top_k=99` has two problems,
        and `num_experts=-8 top_k=2` has one.
        """
        value = self.raw(key)
        if not isinstance(value, int) or isinstance(value, bool):
            return None
        return value if key not in self.failed else abs(value) or None

    def own(self, key: str) -> int | None:
        """A whole number to report about: as `whole`, but None when the key has a problem already."""
        return None if key in self.failed else self.whole(key)

    def failed_below(self, group: str) -> bool:
        """Whether the group or anything in it has a problem already."""
        return any(key == group or key.startswith(f"{group}.") for key in self.failed)

    def length(self, key: str) -> int:
        """Items of a list, 0 where there is none."""
        value = self.raw(key)
        return len(value) if isinstance(value, list) else 0

    def world_size(self) -> int | None:
        """Ranks of the cluster, None when its levels are wrong."""
        if not isinstance(self.raw("cluster"), Mapping) or self.failed_below("cluster.levels"):
            return None
        if self.raw("cluster.levels") is None:
            return prod(level.fanout for level in derived_levels())
        fanouts = [self.own(f"cluster.levels.{index}.fanout") for index in range(self.length("cluster.levels"))]
        known = [fanout for fanout in fanouts if fanout is not None]
        return prod(known) if len(known) == len(fanouts) else None


def rules_of(kind: str, values: Values) -> list[Problem]:
    """Problems of one config, `kind` being the entry point it is for."""
    found = list(_cluster(values))
    if kind in ("train", "compare"):
        found += [*_model(values), *_trainer(values)]
    if kind in ("layer", "compare"):
        found += _one_label_each(values)
    if kind == "compare":
        found += [*_no_repeats(values, "seeds"), *_trained_weights(values)]
    if kind == "layer":
        found += [*_shapes(values), *_workload(values)]
    if kind == "comm":
        found += _no_repeats(values, "sizes_bytes")
    return found


def _at_most(values: Values, key: str, limit_key: str) -> Iterator[Problem]:
    value, limit = values.own(key), values.whole(limit_key)
    if value is not None and limit is not None and value > limit:
        rule = f"must be at most {limit_key}, which is {values.raw(limit_key)}"
        yield Problem(key, value, rule, f"lower it or raise {limit_key}")


def _multiple(values: Values, key: str, divisor: int | None, what: str, or_else: str) -> Iterator[Problem]:
    """`key` must be divisible by `divisor`, called `what`."""
    value = values.own(key)
    if value is None or divisor is None or value % divisor == 0:
        return
    below, above = value // divisor * divisor, -(-value // divisor) * divisor
    near = f"{below} or {above}" if below else f"{above}"
    yield Problem(key, value, f"must be divisible by {what}", f"set {key} to {near}, or {or_else}")


def _over_ranks(values: Values, key: str) -> Iterator[Problem]:
    world_size = values.world_size()
    what = f"the {world_size} ranks of cluster {values.raw('cluster.name')}"
    yield from _multiple(values, key, world_size, what, "choose a cluster of another size")


def _model(values: Values) -> Iterator[Problem]:
    yield from _over_ranks(values, "model.num_experts")
    yield from _at_most(values, "model.top_k", "model.num_experts")
    yield from _at_most(values, "model.moe_every", "model.num_layers")
    heads, kv_heads = values.whole("model.num_heads"), values.whole("model.num_kv_heads")
    yield from _multiple(
        values, "model.num_heads", kv_heads, f"model.num_kv_heads, which is {kv_heads}", "change model.num_kv_heads"
    )
    width = values.own("model.model_dim")
    if values.raw("model.head_dim") is not None or width is None or heads is None:
        return
    either = "change model.num_heads or give model.head_dim"
    yield from _multiple(values, "model.model_dim", heads, f"model.num_heads, which is {heads}", either)
    if width % heads == 0 and width // heads % 2:
        rule = f"gives heads of {width // heads}, but rotary positions turn pairs: a head's width must be even"
        yield Problem(
            "model.model_dim", width, rule, f"set model.model_dim to {heads * (width // heads + 1)}, or {either}"
        )


def _trainer(values: Values) -> Iterator[Problem]:
    yield from _over_ranks(values, "trainer.global_batch_size")
    yield from _at_most(values, "trainer.warmup_steps", "trainer.max_steps")


def _trained_weights(values: Values) -> Iterator[Problem]:
    trainer = values.raw("trainer")
    without = isinstance(trainer, Mapping) and trainer.get("checkpoint_every", 1) is None
    if without and values.raw("timing.weights") == "trained":
        rule = "needs each run's last checkpoint, but trainer.checkpoint_every is null"
        yield Problem("timing.weights", "trained", rule, "timing.weights=initial, or trainer.checkpoint_every=50")


def _shapes(values: Values) -> Iterator[Problem]:
    names = []
    for index in range(values.length("shapes")):
        key = f"shapes.{index}"
        yield from _over_ranks(values, f"{key}.num_experts")
        yield from _at_most(values, f"{key}.top_k", f"{key}.num_experts")
        yield from _at_most(values, f"{key}.num_experts", f"{key}.model_dim")  # a workload's logits are features
        top_k = values.own(f"{key}.top_k")
        if top_k is not None and top_k > MAX_TOP_K:
            rule = f"a routing workload holds at most {MAX_TOP_K} choices a token"
            yield Problem(f"{key}.top_k", top_k, rule, f"set {key}.top_k to {MAX_TOP_K} or less")
        name = values.raw(f"{key}.name")
        if name in names:
            yield Problem(f"{key}.name", name, "must differ from the other shapes' names", "rename it")
        names.append(name)


def _workload(values: Values) -> Iterator[Problem]:
    kind, exponent, path = (values.raw(f"workload.{name}") for name in ("kind", "exponent", "path"))
    for name, owner, value in (("exponent", "zipf", exponent), ("path", "replay", path)):
        if f"workload.{name}" in values.failed or "workload.kind" in values.failed:
            continue
        if kind == owner and value is None:
            example = "workload.exponent=1.0" if name == "exponent" else "workload.path=outputs/RUN_ID/routing.npz"
            yield Problem(f"workload.{name}", "null", f"workload.kind={owner} needs it", f"give {example}")
        if kind != owner and value is not None:
            rule = f"only workload.kind={owner} reads it"
            yield Problem(f"workload.{name}", value, rule, f"remove it, or choose workload={owner}")
    if kind == "replay" and isinstance(path, str) and path and not Path(path).expanduser().is_file():
        rule = f"there is no such file (looked at {Path(path).expanduser().absolute()})"
        yield Problem("workload.path", path, rule, "give the routing.npz of a run")


def _no_repeats(values: Values, key: str) -> Iterator[Problem]:
    seen: list[Any] = []
    for index in range(values.length(key)):
        item = values.raw(f"{key}.{index}")
        if item in seen:
            yield Problem(f"{key}.{index}", item, f"stands in {key} already", "remove it")
        seen.append(item)


def _one_label_each(values: Values) -> Iterator[Problem]:
    """Results carry the label alone, so that two variants under one label would share their rows."""
    seen: list[Any] = []
    for index in range(values.length("systems")):
        item = values.raw(f"systems.{index}")
        given = item if isinstance(item, Mapping) else {"name": item}
        name, key = given.get("name"), f"systems.{index}" + ".label" * ("label" in given)
        label = given.get("label", name)
        if label in seen:
            fix = f"remove it, or give a label of its own: {{name: {name}, label: {name} 2, option: value}}"
            yield Problem(key, label, "stands in systems already", fix)
        seen.append(label)


def _cluster(values: Values) -> Iterator[Problem]:
    if not isinstance(values.raw("cluster"), Mapping):
        return
    names = ["self"]
    for index in range(values.length("cluster.levels")):
        key = f"cluster.levels.{index}.name"
        name = values.raw(key)
        if isinstance(name, str) and name in names:
            yield Problem(key, name, "must differ from `self` and from the other levels' names", "rename it")
        names.append(name)
    launch, device = values.raw("cluster.launch"), values.raw("cluster.device")
    if values.raw("cluster.rate_mbit") is not None and launch != "netns" and not values.failed_below("cluster"):
        fix = "set it to null, or choose cluster=netns_2x2"
        yield Problem("cluster.rate_mbit", values.raw("cluster.rate_mbit"), "only cluster.launch=netns reads it", fix)
    if launch == "netns" and device == "cuda":
        fix = "set cluster.device=cpu, or cluster.launch=spawn"
        yield Problem(
            "cluster.device", device, "cluster.launch=netns shapes TCP, which NCCL inside one machine avoids", fix
        )
    yield from _split(values, launch, device)
    yield from _ranks(values, launch, device)


def _split(values: Values, launch: Any, device: Any) -> Iterator[Problem]:
    """What only a split host has, and what it needs."""
    names = ("sockets_per_thread", "socket_threads")
    if launch != "split":
        for name in names if not values.failed_below("cluster") else ():
            if values.raw(f"cluster.{name}") is not None:
                fix = "set it to null, or choose cluster=split_2x2"
                value = values.raw(f"cluster.{name}")
                yield Problem(f"cluster.{name}", value, "only cluster.launch=split reads it", fix)
        return
    yield from _split_host(values, device)
    numbers = [values.own(f"cluster.{name}") for name in names]
    if (numbers[0] or 1) * (numbers[1] or 1) > MAX_SOCKETS:
        rule = (
            f"times cluster.socket_threads, which is {numbers[1]}, must be at most {MAX_SOCKETS}, all that NCCL opens"
        )
        yield Problem("cluster.sockets_per_thread", numbers[0], rule, "lower one of them")
    world_size, size = values.world_size(), values.own("cluster.levels.0.fanout")
    if values.raw("cluster.levels") is None:
        size = derived_levels()[0].fanout
    if world_size is None or size is None or values.failed_below("cluster"):
        return
    if world_size == size:
        fix = "choose cluster=split_2x2, or give a second level"
        yield Problem("cluster.levels", f"1 node x {size} ranks", "cluster.launch=split needs nodes to split into", fix)
    emulation, told = values.raw("cluster.emulation"), split_emulation(world_size // size, size, *numbers)
    if emulation not in (None, "", told):
        rule = f"cluster.launch=split says itself what it is, here `{told}`"
        yield Problem("cluster.emulation", emulation, rule, 'set cluster.emulation="", or choose cluster=split_2x2')


def _split_host(values: Values, device: Any) -> Iterator[Problem]:
    """One host with a GPU for every rank; NCCL runs on nothing else."""
    world_size, here = values.world_size(), ranks_here(os.environ)
    rule = ""
    if device == "cpu":
        rule = "splits a host for NCCL, and cluster.device=cpu talks by gloo"
    elif world_size is not None and not gpus_suffice(world_size):
        rule = f"every rank needs a GPU of its own, for NCCL: {world_size} ranks, {torch.cuda.device_count()} GPUs seen"
    if rule:
        fix = "use a host of enough GPUs with cluster.device=cuda, a smaller cluster, or, on CPUs, cluster=local_2x2"
        yield Problem("cluster.launch", "split", rule, fix)
    elif here is not None and here.num_nodes > 1 and not is_split(here.node_rank):  # ranks of ours load it again
        rule = f"splits one host, and {here.starter} started the ranks on {here.num_nodes}"
        yield Problem("cluster.launch", "split", rule, "use cluster=auto, or start all ranks on one host")


def _ranks(values: Values, launch: Any, device: Any) -> Iterator[Problem]:
    """The cluster against the ranks and the GPUs that are here."""
    world_size, here = values.world_size(), ranks_here(os.environ)
    if launch == "join" and here is None:
        fix = "start under torchrun or srun, or set cluster.launch=spawn"
        yield Problem("cluster.launch", launch, "needs ranks that torchrun or srun started, and there are none", fix)
    if world_size is None:
        return
    if here is not None and values.raw("cluster.levels"):
        try:
            check_size(here, world_size, values.own("cluster.levels.0.fanout") or 1)
        except ConfigError as error:
            yield from error.problems
    if device == "cuda" and launch not in ("netns", "split") and not gpus_suffice(world_size):
        rule = f"every rank needs a GPU of its own: {world_size} ranks, {torch.cuda.device_count()} GPUs seen"
        yield Problem("cluster.device", device, rule, "set cluster.device=cpu, or choose a smaller cluster")
