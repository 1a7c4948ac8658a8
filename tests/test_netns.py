"""experiments.netns: real namespaces where we are root, the sentence of refusal where we are not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import netns
from experiments.launch import RankFailure, run_ranks
from experiments.netns import existing_namespaces, shaped_nodes
from moe.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parent.parent
REFUSAL = r"cluster\.launch=netns: network namespaces need Linux, root and the tools ip and tc, and .*Fix: use cluster="


def possible() -> bool:
    """Whether this machine lets us make namespaces."""
    return os.geteuid() == 0 and shutil.which("ip") is not None and shutil.which("tc") is not None


def own_namespaces() -> list[str]:
    """Namespaces that this process has made."""
    return [name for name in existing_namespaces() if name.startswith(f"moe{os.getpid()}")]


def test_ranks_exchange_over_shaped_links_that_are_gone_afterwards(tmp_path: Path) -> None:
    def exchange() -> object:
        return run_ranks(
            "tests.rank_functions:exchange",
            {"numbers": 50_000},
            num_ranks=4,
            ranks_per_node=2,
            launch="netns",
            rate_mbit=200,
            log_dir=tmp_path,
            timeout_s=60,
        )

    if not possible():
        with pytest.raises(ConfigError, match=REFUSAL):
            exchange()
        return
    assert exchange() == [0.0, 100.0, 200.0, 300.0]
    assert own_namespaces() == []


def test_links_are_shaped_in_both_directions_and_removed_in_any_case() -> None:
    if not possible():
        with pytest.raises(ConfigError, match=REFUSAL), shaped_nodes(2, 200):
            pass
        return
    with shaped_nodes(2, 200) as nodes:
        assert [node.address for node in nodes] == ["10.77.0.1", "10.77.0.2"]
        assert len(own_namespaces()) == 3
        shaped = [qdisc(node.namespace) for node in nodes] + [qdisc(f"moe{os.getpid()}switch")]
        assert [text.count("rate 200Mbit") for text in shaped] == [1, 1, 2]
    assert own_namespaces() == []
    with pytest.raises(KeyError), shaped_nodes(2):
        raise KeyError
    assert own_namespaces() == []


def qdisc(namespace: str) -> str:
    """What tc says about the links of a namespace."""
    return subprocess.run(["tc", "-n", namespace, "qdisc"], capture_output=True, text=True, check=True).stdout


def test_a_failing_rank_leaves_no_namespace(tmp_path: Path) -> None:
    expected = RankFailure if possible() else ConfigError
    with pytest.raises(expected) as caught:
        run_ranks(
            "tests.rank_functions:fail",
            {"rank": 1, "how": "raise"},
            num_ranks=2,
            ranks_per_node=1,
            launch="netns",
            log_dir=tmp_path,
            timeout_s=60,
        )
    if possible():
        assert "ValueError: boom" in str(caught.value)
        assert own_namespaces() == []


HOLD = """
import sys, threading
from experiments.netns import shaped_nodes
with shaped_nodes(2, 100) as nodes:
    print(nodes[0].namespace, flush=True)
    threading.Event().wait()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals_leave_no_namespace(number: int) -> None:
    """SIGTERM removes them on the way out; what SIGKILL leaves, the next call removes."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        namespace = holder.stdout.readline().strip()
        assert (namespace in existing_namespaces()) if possible() else namespace == ""
        if possible():
            holder.send_signal(number)
        _, complaint = holder.communicate()
    if not possible():
        assert "network namespaces need Linux, root" in complaint
        return
    assert holder.returncode == (128 + signal.SIGTERM if number == signal.SIGTERM else -signal.SIGKILL)
    if number == signal.SIGKILL:
        assert namespace in existing_namespaces()
        with shaped_nodes(1):
            pass
    assert namespace not in existing_namespaces()


def test_sigterm_to_the_parent_ends_the_ranks_and_the_namespaces(tmp_path: Path) -> None:
    arguments = {
        "target": "tests.rank_functions:work_until_stopped",
        "payload": {"ready": str(tmp_path), "value": None, "obedient": True},
        "num_ranks": 2,
        "ranks_per_node": 1,
        "launch": "netns",
        "log_dir": str(tmp_path / "logs"),
        "timeout_s": 60,
    }
    command = [sys.executable, "-m", "tests.launch_main", json.dumps(arguments)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        if possible():
            assert parent.stdout.readline() == "at work\n"
            assert [name for name in existing_namespaces() if name.startswith(f"moe{parent.pid}")]
            parent.send_signal(signal.SIGTERM)
        outcome = json.loads(parent.stdout.read().removeprefix("outcome "))
    if not possible():
        assert outcome["error"] == "ConfigError"
        return
    assert (outcome["kind"], outcome["message"]) == ("interrupted", "the run was interrupted: stopped by SIGTERM")
    assert [name for name in existing_namespaces() if name.startswith(f"moe{parent.pid}")] == []


def test_without_root_the_refusal_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match=REFUSAL) as caught, shaped_nodes(2):
        pass
    assert "this user is not root" in str(caught.value)


def test_without_the_tools_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(netns.shutil, "which", lambda tool: None)
    with pytest.raises(ConfigError, match=r"and ip and tc can't be found \(package iproute2\)"), shaped_nodes(2):
        pass


def test_all_wrong_numbers_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught, shaped_nodes(251, 0):
        pass
    text = str(caught.value)
    assert "cluster.levels=251 nodes: network namespaces make 1 to 250 nodes" in text
    assert "cluster.rate_mbit=0: the rate of a link in Mbit/s is above 0" in text
