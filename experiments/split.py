"""One host of several GPUs as several nodes of NCCL, `cluster.launch=split`: a network stack without a second host.

NCCL takes ranks of different NCCL_HOSTIDs for ranks of different hosts: it uses NVLink or PCIe inside each of them and
its network between them, here TCP sockets on the loopback interface.
"""

from __future__ import annotations

import os

SPLIT_KEYS = ("sockets_per_thread", "socket_threads")
"""Keys of a cluster that only split hosts list."""

MAX_SOCKET_THREADS = 16
MAX_SOCKETS = 64
"""Most that NCCL's socket transport takes (MAX_THREADS, MAX_SOCKETS in its net_socket.cc); beyond, it takes fewer than
it was told."""


def split_variables(node: int) -> dict[str, str]:
    """Environment that makes NCCL take a rank for one of host number `node`, from 0; set before NCCL starts.

    NCCL_NET keeps it off InfiniBand where the host has that, which would be neither a socket nor loopback.
    """
    return {"NCCL_HOSTID": f"node{node}", "NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo"}


def is_split(node: int) -> bool:
    """Whether this process is a rank that was started with `split_variables`."""
    return os.environ.get("NCCL_HOSTID") == split_variables(node)["NCCL_HOSTID"]


def socket_variables(sockets_per_thread: int | None, socket_threads: int | None) -> dict[str, str]:
    """Environment for the sockets of one connection; None leaves a number to NCCL."""
    given = {"NCCL_NSOCKS_PERTHREAD": sockets_per_thread, "NCCL_SOCKET_NTHREADS": socket_threads}
    return {name: str(number) for name, number in given.items() if number is not None}


def split_emulation(
    num_nodes: int, ranks_per_node: int, sockets_per_thread: int | None = None, socket_threads: int | None = None
) -> str:
    """The phrase that stands in every result: what was split, and by what."""
    told = f"split {num_nodes} x {ranks_per_node} on one host: NCCL_HOSTID, sockets over lo"
    numbers = socket_variables(sockets_per_thread, socket_threads)
    return ", ".join([told, *(f"{name}={number}" for name, number in numbers.items())])
