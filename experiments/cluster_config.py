"""The cluster group of a config, and what the machine and the launcher say about it."""

from __future__ import annotations

import os
from math import prod
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from experiments.join import ranks_here
from experiments.split import MAX_SOCKET_THREADS, MAX_SOCKETS, socket_variables, split_emulation
from moe.topology import Cluster, Level

STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)


class LevelConfig(BaseModel):
    """One level above the rank itself; a message of n bytes costs alpha_s + n * beta_s_per_byte."""

    model_config = STRICT
    name: str = Field(min_length=1, examples=["node"], description="what results and figures call it")
    fanout: int = Field(ge=1, examples=[2], description="groups of the level below in one group of this level")
    alpha_s: float | None = Field(default=None, ge=0, allow_inf_nan=False, description="seconds; null: not measured")
    beta_s_per_byte: float | None = Field(default=None, ge=0, allow_inf_nan=False, description="null: not measured")


class CopyConfig(BaseModel):
    """A copy that leaves no device; n bytes cost alpha_s + n * beta_s_per_byte."""

    model_config = STRICT
    alpha_s: float = Field(ge=0, allow_inf_nan=False, examples=[1e-6], description="seconds")
    beta_s_per_byte: float = Field(ge=0, allow_inf_nan=False, examples=[1e-10])


class ClusterConfig(BaseModel):
    """conf/cluster: which ranks there are, how a plain start gets them, and what a level stands for."""

    model_config = STRICT
    name: str = Field(min_length=1, examples=["local_2x2"])
    levels: list[LevelConfig] | None = Field(
        default=None, description="innermost first; null: as launched, or as local GPUs"
    )
    local_copy: CopyConfig | None = Field(default=None, description="the level `self`; null: not measured")
    launch: Literal["spawn", "netns", "join", "split"] = Field(
        "spawn", description="join: torchrun or srun must start the ranks; split: one host's GPUs as NCCL's nodes"
    )
    emulation: str = Field(
        default="", description="what stands in for a real cluster; goes into every result; split writes its own"
    )
    rate_mbit: float | None = Field(default=None, gt=0, allow_inf_nan=False, examples=[500], description="netns only")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    sockets_per_thread: int | None = Field(
        default=None, ge=1, le=MAX_SOCKETS, examples=[4], description="split only; null: NCCL's default"
    )
    socket_threads: int | None = Field(
        default=None, ge=1, le=MAX_SOCKET_THREADS, examples=[4], description="split only; null: NCCL's default"
    )

    @property
    def world_size(self) -> int:
        """Number of ranks, as declared or derived."""
        return prod(level.fanout for level in self.levels or derived_levels())

    @property
    def variables(self) -> dict[str, str]:
        """Environment that its ranks need, all of them alike."""
        return socket_variables(self.sockets_per_thread, self.socket_threads)


def derived_levels() -> list[LevelConfig]:
    """Levels where the config declares none: the launched ranks as nodes on a network, else a rank for every GPU."""
    here = ranks_here(os.environ)
    if here is None:
        return [LevelConfig(name="node", fanout=max(1, torch.cuda.device_count()))]
    levels = [LevelConfig(name="node", fanout=here.local_world_size)]
    if here.num_nodes > 1:
        levels.append(LevelConfig(name="network", fanout=here.num_nodes))
    return levels


def gpus_suffice(num_ranks: int) -> bool:
    """Whether every rank that this machine must hold can have a GPU of its own.

    Under torchrun or srun, which may show a process only its own GPU, one visible GPU is enough.
    """
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
    return Cluster(config.name, (itself, *above), config.emulation)
