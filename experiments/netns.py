"""Two or more nodes on one Linux machine: a network namespace for each, joined by a bridge, the links shaped by tbf.

The traffic is real TCP through the kernel, and the ratio of a node's own bandwidth to the network's is real, too. The
bridge lives in a namespace of its own, so that neither the machine's addresses nor its firewall play a part, and
removing the namespaces removes everything.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from moe.errors import ConfigError, Problem

INTERFACE = "eth0"
NAME = re.compile(r"^moe(\d+)(switch|node\d+)$")
MAX_NODES = 250  # what a /24 network holds, with some to spare
MIN_BURST_BYTES = 262144
BURST_S = 0.002


@dataclass(frozen=True)
class Node:
    """One node: `namespace` for `ip netns exec`, and its IPv4 `address` on the interface eth0."""

    namespace: str
    address: str


@contextmanager
def shaped_nodes(num_nodes: int, rate_mbit: float | None = None) -> Iterator[list[Node]]:
    """Make `num_nodes` network namespaces that reach each other; removed at the end, also by an exception or SIGTERM.

    What a killed process left behind is removed by the next call.

    Args:
        num_nodes: how many, 1 .. 250.
        rate_mbit: rate of every node's link in each direction, in Mbit/s; None leaves the links unshaped.

    Raises:
        ConfigError: not Linux, not root, `ip` or `tc` missing, a number out of range, or a kernel that refuses.
    """
    _require(num_nodes, rate_mbit)
    _remove_leftovers()
    switch = f"moe{os.getpid()}switch"
    nodes = [Node(f"moe{os.getpid()}node{index}", f"10.77.0.{index + 1}") for index in range(num_nodes)]
    names = [switch, *(node.namespace for node in nodes)]
    with _sigterm_raises():
        try:
            _make(switch, nodes, rate_mbit)
            yield nodes
        finally:
            _remove(names)


def existing_namespaces() -> list[str]:
    """Names of this suite's namespaces on this machine, whichever process made them."""
    listed = _run("ip", "netns", "list").stdout.split("\n")
    return [name for name in (line.split(" ")[0] for line in listed) if NAME.match(name)]


def _require(num_nodes: int, rate_mbit: float | None) -> None:
    problems = []
    if not 1 <= num_nodes <= MAX_NODES:
        rule = f"network namespaces make 1 to {MAX_NODES} nodes"
        problems.append(Problem("cluster.levels", f"{num_nodes} nodes", rule, "declare fewer nodes"))
    if rate_mbit is not None and not rate_mbit > 0:
        rule = "the rate of a link in Mbit/s is above 0"
        problems.append(
            Problem("cluster.rate_mbit", rate_mbit, rule, "say cluster.rate_mbit=1000, or null for no limit")
        )
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if sys.platform != "linux":
        problems.append(_refusal("they exist on Linux only"))
    elif os.geteuid() != 0:
        problems.append(_refusal("this user is not root"))
    elif missing:
        problems.append(_refusal(f"{' and '.join(missing)} can't be found (package iproute2)"))
    if problems:
        raise ConfigError(*problems)


def _refusal(why: str) -> Problem:
    rule = f"network namespaces need Linux, root and the tools ip and tc, and {why}"
    return Problem("cluster.launch", "netns", rule, "use cluster=local_2x2 (plain loopback), or start as root")


def _make(switch: str, nodes: list[Node], rate_mbit: float | None) -> None:
    _step("ip", "netns", "add", switch)
    _step("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
    _step("ip", "-n", switch, "link", "set", "bridge", "up")
    for index, node in enumerate(nodes):
        port, namespace = f"port{index}", node.namespace
        _step("ip", "netns", "add", namespace)
        _step("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", namespace)
        _step("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
        _step("ip", "-n", namespace, "addr", "add", f"{node.address}/24", "dev", INTERFACE)
        _step("ip", "-n", namespace, "link", "set", INTERFACE, "up")
        _step("ip", "-n", namespace, "link", "set", "lo", "up")
        if rate_mbit is not None:
            _shape(namespace, INTERFACE, rate_mbit)  # what the node sends
            _shape(switch, port, rate_mbit)  # what it receives


def _shape(namespace: str, interface: str, rate_mbit: float) -> None:
    burst = max(MIN_BURST_BYTES, int(rate_mbit * 1e6 / 8 * BURST_S))
    shaper = ("tbf", "rate", f"{rate_mbit:g}mbit", "burst", str(burst), "latency", "100ms")
    _step("tc", "-n", namespace, "qdisc", "replace", "dev", interface, "root", *shaper)


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    # A session of its own: a Ctrl-C at the terminal must not cut a step, least of all a removal, in half.
    return subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)


def _step(*command: str) -> None:
    done = _run(*command)
    if done.returncode != 0:
        raise ConfigError(_refusal(f"`{' '.join(command)}` failed: {done.stderr.strip()}"))


def _remove(names: list[str]) -> None:
    """Remove those of the named namespaces that exist, undisturbed by signals."""
    stops = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    try:
        for name in names:
            done = _run("ip", "netns", "del", name)
            if done.returncode != 0 and name in existing_namespaces():
                warnings.warn(f"network namespace {name} could not be removed: {done.stderr.strip()}", stacklevel=2)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _remove_leftovers() -> None:
    _remove([name for name in existing_namespaces() if not _alive(_pid_of(name))])


def _pid_of(name: str) -> int:
    match = NAME.match(name)
    assert match, name
    return int(match.group(1))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Turn a SIGTERM that would end the process on the spot into SystemExit, so that `finally` clauses run."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, _exit_by_signal)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit_by_signal(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)
