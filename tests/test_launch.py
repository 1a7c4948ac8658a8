"""experiments.launch: the value of a run, and what is left and said when a run goes wrong."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from experiments import launch
from experiments.join import RanksHere
from experiments.launch import RankFailure, is_main_process, run_ranks
from moe.errors import ConfigError, Refused

REPOSITORY = Path(__file__).resolve().parent.parent
FUNCTIONS = "tests.rank_functions"


def run(function: str, payload: dict[str, Any], logs: Path, num_ranks: int = 2, **more: Any) -> Any:
    """`run_ranks` on one node, with a timeout that no healthy rank meets."""
    arguments: dict[str, Any] = {"ranks_per_node": num_ranks, "timeout_s": 60, **more}
    return run_ranks(f"{FUNCTIONS}:{function}", payload, num_ranks=num_ranks, log_dir=logs, **arguments)


def work(tmp_path: Path, value: Any, obedient: bool = True) -> dict[str, Any]:
    """Payload of `work_until_stopped`."""
    return {"ready": str(tmp_path), "value": value, "obedient": obedient}


def signals_when_ready(ready: Path, num_ranks: int, *numbers: int) -> Callable[[], None]:
    """An `on_poll` that sends us the signals, one per poll, once every rank is at work."""
    left = list(numbers)

    def send() -> None:
        if left and all((ready / f"rank{rank}").exists() for rank in range(num_ranks)):
            os.kill(os.getpid(), left.pop(0))

    return send


def wait_for_death(ready: Path, num_ranks: int) -> None:
    """Returns when no rank of `work_until_stopped` lives any more: each held a lock."""
    for rank in range(num_ranks):
        with (ready / f"rank{rank}").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)


def test_every_rank_runs_and_rank_0_answers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "12345678")  # the user's own choice stays
    (tmp_path / "stop_requested").touch()  # left behind by an earlier run
    (tmp_path / "error_rank0.json").touch()
    answer = run("introduce", {"greeting": "hello"}, tmp_path, 4, ranks_per_node=2, env={"EXTRA": "yes"})
    assert [person["rank"] for person in answer] == [0, 1, 2, 3]
    assert [person["local_rank"] for person in answer] == [0, 1, 0, 1]
    assert [person["node_rank"] for person in answer] == [0, 0, 1, 1]
    for person in answer:
        assert (person["world_size"], person["local_world_size"]) == (4, 2)
        assert (person["device"], person["threads"], person["extra"]) == ("cpu", "1", "yes")
        assert person["allocator"] == "12345678"
        assert person["stop"] is False
        assert person["ctrl_c_ignored"]
        assert person["blocked"] == []
    assert capfd.readouterr().out == "hello from rank 0\n"
    for rank in range(4):
        log = (tmp_path / f"rank{rank}.log").read_text()
        assert f"complaint from rank {rank}\n" in log
        assert ("hello from rank" in log) == (rank != 0)
    assert not list(tmp_path.glob("error_rank*"))


@pytest.mark.parametrize(
    ("how", "reason"),
    [("raise", r"^ValueError: boom \(tests/rank_functions\.py:\d+\)$"), ("kill", r"^rank 1 was killed by signal 9$")],
)
def test_the_rank_that_was_the_cause_is_named(tmp_path: Path, how: str, reason: str) -> None:
    with pytest.raises(RankFailure) as caught:
        run("fail", {"rank": 1, "how": how}, tmp_path)
    assert (caught.value.kind, caught.value.rank) == ("failed", 1)
    assert caught.value.log == tmp_path / "rank1.log"
    assert re.search(reason, caught.value.reason), caught.value.reason


def test_a_rank_that_hangs_is_a_timeout_of_those_that_wait(tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match=r"waited 2 s \(timeout_s\) for another rank") as caught:
        run("fail", {"rank": 1, "how": "hang"}, tmp_path, timeout_s=2)
    assert caught.value.kind == "timeout"
    assert caught.value.rank == 0


def test_errors_of_the_suite_cross_over_as_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model\.top_k=9: top_k is at most num_experts\. Fix: model\.top_k=4$"):
        run("fail", {"rank": 0, "how": "config"}, tmp_path, 1)
    with pytest.raises(Refused, match=r"^This system needs CUDA\.$"):
        run("fail", {"rank": 0, "how": "refused"}, tmp_path, 1)


def test_a_value_that_cannot_travel_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match="rank 0 failed: TypeError: Object of type object is not JSON serializable"):
        run("value_that_json_cannot_hold", {}, tmp_path, 1)


def test_an_unknown_function_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match="AttributeError: module 'tests.rank_functions' has no attribute 'nothing'"):
        run("nothing", {}, tmp_path, 1)


def test_ctrl_c_lets_the_ranks_save_and_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    press = signals_when_ready(tmp_path, 2, signal.SIGINT)
    with pytest.raises(RankFailure, match="the run was interrupted: stopped by SIGINT") as caught:
        run("work_until_stopped", work(tmp_path, None), tmp_path / "logs", on_poll=press)
    assert caught.value.kind == "interrupted"
    assert capfd.readouterr().err == "stopping: saving what there is (Ctrl-C again to stop at once)\n"
    assert not list((tmp_path / "logs").glob("error_rank*"))  # they ended by themselves
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_value_counts_even_after_a_stop(tmp_path: Path) -> None:
    press = signals_when_ready(tmp_path, 1, signal.SIGTERM)
    assert run("work_until_stopped", work(tmp_path, 17), tmp_path / "logs", 1, on_poll=press) == 17


def test_the_second_ctrl_c_ends_the_ranks_at_once(tmp_path: Path) -> None:
    press = signals_when_ready(tmp_path, 1, signal.SIGINT, signal.SIGINT)
    with pytest.raises(RankFailure, match="stopped at once by SIGINT and SIGINT") as caught:
        run("work_until_stopped", work(tmp_path, None, obedient=False), tmp_path / "logs", 1, on_poll=press)
    assert caught.value.kind == "interrupted"
    wait_for_death(tmp_path, 1)


def test_no_rank_outlives_its_parent(tmp_path: Path) -> None:
    arguments = {
        "target": f"{FUNCTIONS}:work_until_stopped",
        "payload": work(tmp_path, None, obedient=False),
        "num_ranks": 2,
        "ranks_per_node": 2,
        "log_dir": str(tmp_path / "logs"),
        "timeout_s": 60,
    }
    command = [sys.executable, "-m", "tests.launch_main", json.dumps(arguments)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "at work\n"
        parent.kill()
        assert parent.stdout.read() == ""  # rank 0 held the other end
    for path in tmp_path.glob("rank1.new"):  # it may have been a step behind
        path.rename(path.with_suffix(""))
    wait_for_death(tmp_path, 2)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def outcomes(processes: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    """What the main processes among these printed, when all have ended."""
    outputs = [process.communicate()[0] for process in processes]
    lines = [line for output in outputs for line in output.splitlines() if line.startswith("outcome ")]
    return [json.loads(line.removeprefix("outcome ")) for line in lines]


def joining(tmp_path: Path, **more: Any) -> str:
    """Arguments for `tests.launch_main` that join two ranks."""
    arguments = {"num_ranks": 2, "ranks_per_node": 2, "log_dir": str(tmp_path), "timeout_s": 60, "launch": "join"}
    return json.dumps({**arguments, **more})


def test_torchrun_ranks_are_joined_more_than_once(tmp_path: Path) -> None:
    arguments = joining(tmp_path, target=f"{FUNCTIONS}:exchange_in_kept_group", payload={"numbers": 5}, times=2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    process = subprocess.Popen(
        [*torchrun, "-m", "tests.launch_main", arguments], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert outcomes([process]) == [{"values": [[0.0, 100.0], [0.0, 100.0]]}]


def srun(arguments: str, nodes: int) -> list[dict[str, Any]]:
    """Outcomes of two tasks with the environment that `srun -n2` gives them on one node or on two."""
    processes = []
    for task in range(2):
        slurm = {
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_STEP_ID": str(nodes),
            "SLURM_PROCID": str(task),
            "SLURM_LOCALID": str(task if nodes == 1 else 0),
            "SLURM_NODEID": str(0 if nodes == 1 else task),
            "SLURM_NTASKS": "2",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_TASKS_PER_NODE": "2" if nodes == 1 else "1(x2)",
            "SLURM_STEP_NODELIST": "surely-no-such-host",
            "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        }
        command = [sys.executable, "-m", "tests.launch_main", arguments]
        processes.append(
            subprocess.Popen(
                command,
                cwd=REPOSITORY,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, **slurm},
            )
        )
    return outcomes(processes)


def test_srun_ranks_are_joined_and_rank_0_tells_whose_fault_it_was(tmp_path: Path) -> None:
    (outcome,) = srun(joining(tmp_path, target=f"{FUNCTIONS}:fail", payload={"rank": 1, "how": "raise"}), nodes=1)
    assert (outcome["error"], outcome["kind"]) == ("RankFailure", "failed")
    assert re.match(r"rank 1 failed: ValueError: boom", outcome["message"])


def test_srun_ranks_in_other_places_than_declared_are_refused_by_all(tmp_path: Path) -> None:
    arguments = joining(tmp_path, target=f"{FUNCTIONS}:exchange", payload={"numbers": 5}, launch="spawn")
    (outcome,) = srun(arguments, nodes=2)
    assert outcome["error"] == "ConfigError"
    assert outcome["message"] == (
        "cluster.levels=1 nodes x 2 ranks: rank 1 should be number 1 on node 0, but srun put it there as number 0 on "
        "node 1. Fix: start 2 ranks per node in blocks (srun --distribution=block), or use cluster=auto"
    )


def test_every_joining_has_keys_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(launch._meetings, "store", torch.distributed.HashStore())
    here = RanksHere("torchrun", 0, 1, 0, 1, 0, 1, "", "")
    first, second = launch._meet_here(here, 1), launch._meet_here(here, 1)
    first.set("key", "value")
    assert first.check(["key"])
    assert not second.check(["key"])


NCCL_OF_A_SPLIT = {"NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo", "NCCL_NSOCKS_PERTHREAD": "4"}
FAKE_RANK = """
import json, os, pathlib, sys
logs = pathlib.Path(sys.argv[1])
(logs / f"seen{os.environ['RANK']}.json").write_text(json.dumps(dict(os.environ)))
(logs / "result.json").write_text("17") if os.environ["RANK"] == "0" else None
"""


def nccl_of(env: Mapping[str, str]) -> dict[str, str]:
    """What NCCL would read."""
    return {name: value for name, value in env.items() if name.startswith("NCCL_")}


def test_every_node_of_a_split_host_is_a_host_to_nccl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four processes that are started as ranks of four GPUs, and tell what they were given."""
    monkeypatch.setenv("NCCL_HOSTID", "mine")  # the user's own would undo the split
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    start = subprocess.Popen

    def start_fake(command: list[str], **more: Any) -> subprocess.Popen[bytes]:
        assert command[1:3] == ["-m", "experiments.worker"]
        return start([sys.executable, "-c", FAKE_RANK, str(tmp_path)], **more)

    monkeypatch.setattr("experiments.crew.subprocess.Popen", start_fake)
    env = {"NCCL_NSOCKS_PERTHREAD": "4"}
    assert run("introduce", {}, tmp_path, 4, ranks_per_node=2, launch="split", device="cuda", env=env) == 17
    seen = [json.loads((tmp_path / f"seen{rank}.json").read_text()) for rank in range(4)]
    hosts = ["node0", "node0", "node1", "node1"]
    assert [nccl_of(rank) for rank in seen] == [{**NCCL_OF_A_SPLIT, "NCCL_HOSTID": host} for host in hosts]
    assert [rank["CUDA_VISIBLE_DEVICES"] for rank in seen] == ["0,1", "0,1", "2,3", "2,3"]


def torchrun_rank(rank: int, local_world_size: int) -> dict[str, str]:
    """The environment that torchrun gives to one of four ranks."""
    node, local_rank = divmod(rank, local_world_size)
    numbers = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_world_size}
    return {name: str(number) for name, number in {**numbers, "GROUP_RANK": node}.items()}


def test_a_joined_rank_of_a_split_host_has_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before NCCL starts, which is in `run_rank`."""
    seen: dict[int, dict[str, str]] = {}
    monkeypatch.setattr(launch, "run_rank", lambda _job, rank, *_, **_more: seen.update({rank: dict(os.environ)}))
    for rank in (1, 2, 3):
        with mock.patch.dict(os.environ, torchrun_rank(rank, 4)):
            more = {"ranks_per_node": 2, "launch": "split", "device": "cuda", "env": {"NCCL_NSOCKS_PERTHREAD": "4"}}
            run("introduce", {}, tmp_path, 4, **more)
    hosts = {1: "node0", 2: "node1", 3: "node1"}
    assert {rank: nccl_of(env) for rank, env in seen.items()} == {
        rank: {**NCCL_OF_A_SPLIT, "NCCL_HOSTID": host} for rank, host in hosts.items()
    }
    assert [env["LOCAL_RANK"] for env in seen.values()] == ["1", "2", "3"], "the GPUs are the host's"


def test_ranks_of_two_hosts_are_no_split_host(tmp_path: Path) -> None:
    rule = r"cluster\.launch=split: splits one host, and torchrun started the ranks on 2\. Fix: use cluster=auto"
    with mock.patch.dict(os.environ, torchrun_rank(2, 2)), pytest.raises(ConfigError, match=rule):
        run("introduce", {}, tmp_path, 4, ranks_per_node=2, launch="split", device="cuda")


def test_a_split_host_needs_nccl(tmp_path: Path) -> None:
    rule = (
        r"^cluster\.launch=split: splits a host for NCCL, which needs CUDA, and the device is cpu\. Fix: use cluster=l"
    )
    with pytest.raises(ConfigError, match=rule):
        run("introduce", {}, tmp_path, launch="split", ranks_per_node=1)


def test_joining_without_ranks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.launch=join: no ranks are here to join.*Fix: start with torchrun"):
        run("introduce", {}, tmp_path, launch="join")


def test_a_world_of_another_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert not is_main_process()
    message = r"cluster\.levels=1 nodes x 2 ranks: the cluster declares 2 ranks but 3 are here.*Fix: start 2 ranks"
    with pytest.raises(ConfigError, match=message):
        run("introduce", {}, tmp_path)


def test_namespaces_under_torchrun_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"cluster\.launch=netns: .* torchrun started this process"):
        run("introduce", {}, tmp_path, launch="netns")


def test_more_ranks_than_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    message = r"cluster\.levels=2 ranks: one rank needs one GPU, and this machine shows 1\. Fix: .*cluster\.device=cpu"
    with pytest.raises(ConfigError, match=message):
        run("introduce", {}, tmp_path, device="cuda")
