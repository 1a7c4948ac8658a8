"""The cluster group of a config, and what the machine and the launcher say about it."""

from __future__ import annotations

import os
from math import prod
from typing import Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
)

from experiments.allocation import nodes_per_switch, plan_here, switches_here
from experiments.join import ranks_here
from experiments.split import MAX_SOCKET_THREADS, MAX_SOCKETS, socket_variables, split_emulation
from moe.costs import AlphaBeta
from moe.topology import Cluster, CollectiveCosts, Level

STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)


class LevelConfig(BaseModel):
    """One level above the rank itself; a message of n bytes costs alpha_s + n * beta_s_per_byte."""

    model_config = STRICT
    name: str = Field(min_length=1, examples=["node"], description="what results and figures call it")
    fanout: int = Field(ge=1, examples=[2], description="groups of the level below in one group of this level")
    alpha_s: float | None = Field(default=None, ge=0, allow_inf_nan=False, description="seconds; null: not measured")
    beta_s_per_byte: float | None = Field(default=None, ge=0, allow_inf_nan=False, description="null: not measured")


class CostConfig(BaseModel):
    """n bytes cost alpha_s + n * beta_s_per_byte."""

    model_config = STRICT
    alpha_s: float = Field(ge=0, allow_inf_nan=False, examples=[1e-6], description="seconds")
    beta_s_per_byte: float = Field(ge=0, allow_inf_nan=False, examples=[1e-10])


class CollectivesConfig(BaseModel):
    """Even all-to-alls by bytes that a rank sends in all; of the D levels of more than one group the outermost is the
    first (see `moe.topology.CollectiveCosts`)."""

    model_config = STRICT
    standard: CostConfig = Field(
        examples=["{alpha_s: 1.0e-05, beta_s_per_byte: 1.0e-10}"], description="all ranks together"
    )
    inter: list[CostConfig] = Field(examples=["[]"], description="D - 1: ranks at equal places, across a level")
    intra: list[CostConfig] = Field(examples=["[]"], description="D - 1: the ranks inside that level's parts")

    def costs(self) -> CollectiveCosts:
        """As the rest of the suite knows them."""
        standard, *others = (AlphaBeta(c.alpha_s, c.beta_s_per_byte) for c in (self.standard, *self.inter, *self.intra))
        return CollectiveCosts(standard, tuple(others[: len(self.inter)]), tuple(others[len(self.inter) :]))


class ClusterConfig(BaseModel):
    """conf/cluster: which ranks there are, how a plain start gets them, and what a level stands for."""

    model_config = STRICT
    name: str = Field(min_length=1, examples=["local_2x2"])
    levels: list[LevelConfig] | None = Field(
        default=None, description="innermost first; null: as launched, or as local GPUs"
    )
    local_copy: CostConfig | None = Field(default=None, description="the level `self`; null: not measured")
    collectives: CollectivesConfig | None = Field(
        default=None, examples=["null"], description="as experiments.comm measures them; left out: not measured"
    )
    launch: Literal["spawn", "netns", "join", "split"] = Field(
        "spawn", description="join: torchrun or srun must start the ranks; split: one host's GPUs as NCCL's nodes"
    )
    emulation: str = Field(
        default="", description="what stands in for a real cluster; goes into every result; split writes its own"
    )
    rate_mbit: float | None = Field(default=None, gt=0, allow_inf_nan=False, examples=[500], description="netns only")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    profile: bool = Field(default=False, description="measure the costs that null leaves open before a run starts")
    sockets_per_thread: int | None = Field(
        default=None, ge=1, le=MAX_SOCKETS, examples=[4], description="split only; null: NCCL's default"
    )
    socket_threads: int | None = Field(
        default=None, ge=1, le=MAX_SOCKET_THREADS, examples=[4], description="split only; null: NCCL's default"
    )

    @field_validator("collectives")
    @classmethod
    def _of_every_level(cls, value: CollectivesConfig | None, info: ValidationInfo) -> CollectivesConfig | None:
        """One Inter and one Intra for every level but the innermost; levels with problems of their own tell theirs."""
        if value is None or "levels" not in info.data:
            return value
        if info.data["levels"] is None:
            raise ValueError("collectives are those of levels that are written out, and levels is null")
        depth = sum(level.fanout > 1 for level in info.data["levels"])
        if depth == 0:
            raise ValueError("one rank has no collectives")
        if (len(value.inter), len(value.intra)) != (depth - 1, depth - 1):
            raise ValueError(
                f"{depth} level{'s' * (depth > 1)} of more than one group need {depth - 1} costs each in inter and "
                f"intra, not {len(value.inter)} and {len(value.intra)}: measure them with python -m experiments.comm"
            )
        return value

    @model_serializer(mode="wrap")
    def _as_if_unknown(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without collectives that nobody measured, and without a profile that nobody wants: such a cluster's runs
        keep the ids that they had before."""
        content: dict[str, Any] = handler(self)
        for key, unused in (("collectives", None), ("profile", False)):
            if content.get(key, ...) is unused:
                del content[key]
        return content

    @property
    def is_measured(self) -> bool:
        """Whether somebody declared or measured what it costs."""
        return self.local_copy is not None or any(level.beta_s_per_byte is not None for level in self.levels or [])

    @property
    def world_size(self) -> int:
        """Number of ranks, as declared or derived."""
        return prod(level.fanout for level in self.levels or derived_levels())

    @property
    def variables(self) -> dict[str, str]:
        """Environment that its ranks need, all of them alike."""
        return socket_variables(self.sockets_per_thread, self.socket_threads)


def derived_levels() -> list[LevelConfig]:
    """Levels where the config declares none: the launched ranks as nodes on a network, else a rank for every GPU.

    Nodes of one leaf switch of Slurm's topology are a level of their own where `nodes_per_switch` says so.
    """
    here = ranks_here(os.environ)
    if here is None:
        num_ranks = 1 if plan_here(os.environ) else max(1, torch.cuda.device_count())
        return [LevelConfig(name="node", fanout=num_ranks)]
    levels = [LevelConfig(name="node", fanout=here.local_world_size)]
    switches, outermost = switches_here(os.environ), here.num_nodes
    if (size := nodes_per_switch(switches)) is not None and len(switches) == here.num_nodes:
        levels.append(LevelConfig(name="switch", fanout=size))
        outermost //= size
    if here.num_nodes > 1:
        levels.append(LevelConfig(name="network", fanout=outermost))
    return levels


def gpus_suffice(num_ranks: int) -> bool:
    """Whether every rank that this machine must hold can have a GPU of its own.

    Under torchrun or srun, which may show a process only its own GPU, one visible GPU is enough. A planned job has the
    GPUs that it asks for.
    """
    if (plan := plan_here(os.environ)) is not None:
        return plan.device == "cuda" and num_ranks <= plan.num_nodes * plan.ranks_per_node
    needed = num_ranks if ranks_here(os.environ) is None else 1
    return torch.cuda.is_available() and torch.cuda.device_count() >= needed


def resolve_cluster(config: ClusterConfig) -> ClusterConfig:
    """The same cluster with its levels, its device and a split host's emulation settled: `auto` is CUDA if it suffices
    for all ranks."""
    device, levels, emulation = config.device, config.levels or derived_levels(), config.emulation
    if device == "auto":
        device = "cuda" if config.launch != "netns" and gpus_suffice(config.world_size) else "cpu"
    if config.launch == "split":
        size = levels[0].fanout
        emulation = split_emulation(config.world_size // size, size, config.sockets_per_thread, config.socket_threads)
    return config.model_copy(update={"levels": levels, "device": device, "emulation": emulation})


def cluster_from(config: ClusterConfig) -> Cluster:
    """The cluster as the rest of the suite knows it, with the level `self` innermost."""
    levels = config.levels or derived_levels()
    above = [Level(level.name, level.fanout, level.alpha_s, level.beta_s_per_byte) for level in levels]
    copy = config.local_copy
    itself = Level("self", 1) if copy is None else Level("self", 1, copy.alpha_s, copy.beta_s_per_byte)
    collectives = None if config.collectives is None else config.collectives.costs()
    return Cluster(config.name, (itself, *above), config.emulation, collectives)
