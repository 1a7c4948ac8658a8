"""An allocation of Slurm, where it is here and where it is only planned: its shape, its switches, its network."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import psutil

PLANNED = "MOE_SUITE_PLANNED"
SWITCHES = "MOE_SUITE_SWITCHES"
"""The leaf switch of every node, in the order of the nodes, as the job's own process found them: `s0,s0,s1,s1`."""


@dataclass(frozen=True)
class Shape:
    """What a job asks for.

    Args:
        num_nodes, ranks_per_node: one task a rank.
        device: `cuda` has a GPU for each.
    """

    num_nodes: int
    ranks_per_node: int
    device: Literal["cpu", "cuda"]

    def __str__(self) -> str:
        what = ("GPU" if self.device == "cuda" else "CPU rank") + "s" * (self.ranks_per_node > 1)
        return f"{self.num_nodes} node{'s' * (self.num_nodes > 1)} x {self.ranks_per_node} {what}"


@contextmanager
def planned(shape: Shape) -> Iterator[None]:
    """Inside, configs are validated and settled as in a job of that shape, wherever this process runs."""
    assert PLANNED not in os.environ, "one plan at a time"
    os.environ[PLANNED] = f"{shape.num_nodes} {shape.ranks_per_node} {shape.device}"
    try:
        yield
    finally:
        del os.environ[PLANNED]


def plan_here(env: Mapping[str, str]) -> Shape | None:
    """The shape that `planned` was entered with, else None."""
    if PLANNED not in env:
        return None
    num_nodes, ranks_per_node, device = env[PLANNED].split()
    return Shape(int(num_nodes), int(ranks_per_node), "cuda" if device == "cuda" else "cpu")


def nodes_per_switch(switches: Sequence[str]) -> int | None:
    """How many nodes each leaf switch holds, where that makes a level: several switches, of equally many nodes, two at
    least, that follow one another.

    Args:
        switches: of every node, in the order of the ranks.
    """
    names = list(dict.fromkeys(switches))
    size = len(switches) // max(1, len(names))
    blocks = [name for name in names for _ in range(size)]
    return size if len(names) > 1 and size > 1 and blocks == list(switches) else None


def switches_here(env: Mapping[str, str]) -> list[str]:
    """The leaf switch of every node of this allocation; empty where nobody knows them."""
    return env.get(SWITCHES, "").split(",") if env.get(SWITCHES) else []


def interface_towards(host: str) -> str | None:
    """The network interface through which this machine reaches another one.

    Returns:
        None for a name without an address, a host without a way to it, and this machine itself.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing: it only asks for the route
            own, target = probe.getsockname()[0], address[0]
    except OSError:
        return None
    if own == target:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if own in [item.address.partition("%")[0] for item in addresses]:
            return name
    return None
