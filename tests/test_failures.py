"""experiments.failures: the kind of an error, and the report that explains the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments import failures
from experiments.failures import (
    RankFailure,
    Report,
    classify,
    count_oom_kills,
    describe,
    error_of,
    read_reports,
    report_of,
    root_cause,
    silent_death,
    write_report,
)
from moe.errors import ConfigError, Problem, Refused

GLOO_TIMEOUT = "[third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 2000ms for recv operation"
GLOO_CLOSED = "[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:35007."
GLOO_RESET = "[third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:20398: Connection reset by peer."
STORE_TIMEOUT = "Timed out after 301 seconds waiting for clients. 1/2 clients joined."
KEY_TIMEOUT = "wait timeout after 300000ms, keys: /default_pg/0//cpu//0/1"
NCCL_TIMEOUT = (
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=4, OpType=ALLREDUCE, Timeout(ms)=2000) ran "
    "for 2045 milliseconds before timing out."
)
NCCL_REMOTE = "NCCL error: remote process exited or there was a network error. ncclRemoteError: A call failed"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("boom"), "failed"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "failed"),
        (TimeoutError("The read operation timed out"), "failed"),  # a download, not another rank
        (SystemExit(3), "failed"),
        (MemoryError(), "oom"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes. Error 12"), "oom"),
        (RuntimeError(GLOO_TIMEOUT), "timeout"),
        (torch.distributed.DistStoreError(STORE_TIMEOUT), "timeout"),
        (torch.distributed.DistStoreError(KEY_TIMEOUT), "timeout"),
        (torch.distributed.DistBackendError(NCCL_TIMEOUT), "timeout"),
        (RuntimeError(GLOO_CLOSED), "lost_peer"),
        (RuntimeError(GLOO_RESET), "lost_peer"),
        (torch.distributed.DistBackendError(NCCL_REMOTE), "lost_peer"),
        (KeyboardInterrupt(), "interrupted"),
        (ConfigError(Problem("a", 1, "b", "c")), "config"),
        (Refused("no"), "refused"),
    ],
)
def test_kind_of_an_error(error: BaseException, kind: str) -> None:
    assert classify(error) == kind


def test_a_wrapped_error_keeps_its_kind() -> None:
    wrapper = ValueError("while training")
    wrapper.__cause__ = MemoryError()
    assert classify(wrapper) == "oom"


def report(rank: int, kind: str, when: float) -> Report:
    """A report with a reason that names its rank."""
    return Report(rank, kind, f"reason of {rank}", when)


@pytest.mark.parametrize(
    ("kinds", "cause"),
    [
        (["lost_peer", "failed", "lost_peer"], 1),
        (["lost_peer", "timeout", "failed"], 2),
        (["lost_peer", "lost_peer", "timeout"], 2),
        (["timeout", "timeout", "lost_peer"], 0),
        (["lost_peer", "oom", "failed"], 1),
        (["timeout", "interrupted", "lost_peer"], 1),
        (["failed", "lost_peer", "config"], 0),
    ],
)
def test_the_cause_is_not_a_mere_consequence(kinds: list[str], cause: int) -> None:
    reports = [report(rank, kind, float(rank)) for rank, kind in enumerate(kinds)]
    assert root_cause(reports).rank == cause
    assert root_cause(reports[::-1]).rank == cause


def test_reports_survive_the_disk(tmp_path: Path) -> None:
    problem = Problem("model.top_k", 9, "too many", "model.top_k=2")
    for rank, error in [(0, ConfigError(problem)), (2, Refused("This needs CUDA.")), (3, ValueError("boom"))]:
        write_report(tmp_path, report_of(rank, error))
    (config, refused, failed) = read_reports(tmp_path, 4)
    assert [config.rank, refused.rank, failed.rank] == [0, 2, 3]
    assert str(error_of(config, None, 1)) == "model.top_k=9: too many. Fix: model.top_k=2"
    assert isinstance(error_of(refused, None, 1), Refused)
    assert str(error_of(failed, tmp_path, 1)) == f"rank 3 failed: ValueError: boom (log: {tmp_path / 'rank3.log'})"


def test_the_line_of_ours_is_told_not_torchs() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2) @ torch.ones(3)
    assert describe(caught.value).startswith("RuntimeError: ")
    assert "(tests/test_failures.py:" in describe(caught.value)


def test_a_timeout_says_how_long_and_for_what() -> None:
    error = error_of(Report(1, "timeout", GLOO_TIMEOUT, 0.0), None, 2)
    assert isinstance(error, RankFailure)
    assert error.kind == "timeout"
    assert error.reason.startswith("rank 1 waited 2 s (timeout_s) for another rank: ")


@pytest.mark.parametrize(
    ("exit_code", "oom_kills", "kind", "reason"),
    [
        (-9, 0, "failed", "rank 1 was killed by signal 9"),
        (-9, 1, "oom", "rank 1 was killed by the kernel for want of memory"),
        (-11, 1, "failed", "rank 1 was killed by signal 11; the last line of its log: last words"),
        (7, 0, "failed", "rank 1 ended with exit code 7; the last line of its log: last words"),
    ],
)
def test_a_silent_death_is_told_by_the_parent(
    tmp_path: Path, exit_code: int, oom_kills: int, kind: str, reason: str
) -> None:
    log = tmp_path / "rank1.log"
    log.write_text("first\nlast words\n\nFatal Python error: Segmentation fault\n\nExtension modules: torch._C\n")
    death = silent_death(1, exit_code, log, 0, oom_kills)
    assert (death.kind, death.reason) == (kind, reason)


def test_nccls_watchdog_speaks_only_in_the_log_of_this_run(tmp_path: Path) -> None:
    log = tmp_path / "rank1.log"
    log.write_text(f"first\n{NCCL_TIMEOUT}\nterminate called after throwing an instance\n")
    death = silent_death(1, -6, log, 0, 0)
    assert (death.kind, death.reason) == ("timeout", NCCL_TIMEOUT)
    assert silent_death(1, -6, log, log.stat().st_size, 0).kind == "failed"


def test_out_of_memory_kills_are_counted_in_the_first_readable_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = tmp_path / "memory.events"
    group.write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    monkeypatch.setattr(failures, "_oom_counters", lambda: [tmp_path / "missing", group])
    assert count_oom_kills() == 2
    monkeypatch.setattr(failures, "_oom_counters", lambda: [tmp_path / "missing"])
    assert count_oom_kills() == 0
