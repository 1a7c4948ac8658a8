"""slurm.diagnosis and slurm.watchdog: how ranks ended, and which of them hang. Slurm's words are as it wrote them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from experiments.cli import EXIT_CONFIG, EXIT_FAILED, EXIT_INTERRUPTED
from experiments.failures import Report, report_path, write_report
from experiments.progress_log import Line, Phase
from slurm import diagnosis
from slurm.diagnosis import Death, Evidence, Verdict, report_paths, verdict
from slurm.watchdog import place, silence_allowed_s, whereabouts

KILLED = "srun: error: n1: task 3: Killed\nsrun: launch/slurm: _step_signal: Terminating StepId=3.0\n"
OVER_LIMIT = "slurmstepd-n1: error: StepId=2.0 exceeded memory limit (328294400 > 314572800), being killed\n"
CRASHED = (
    "srun: error: n1: task 3: Segmentation fault (core dumped)\n"
    "srun: error: n0: tasks 0-1: Terminated\nsrun: error: n1: task 2: Killed\n"
)
LOST = Report(0, "lost_peer", "RuntimeError: Connection closed by peer", 1.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a cell."""
    (tmp_path / "logs").mkdir()
    return tmp_path


def ended(
    folder: Path, srun: str = "", rank: str = "", oom_kills: int = 0, reports: tuple[Report, ...] = ()
) -> Verdict:
    """The verdict on what was left behind; an earlier start left words, too."""
    texts = {folder / "srun.log": srun, folder / "rank1.log": rank}
    earlier = "srun: error: n0: task 0: Out Of Memory\n"
    for path, text in texts.items():
        path.write_text(earlier + text)
    for report in reports:
        write_report(folder / "logs", report)
    return verdict(Evidence(137, [folder], dict.fromkeys(texts, len(earlier)), oom_kills, 60.0, 0.0))


@pytest.mark.parametrize(
    ("srun", "rank", "oom_kills", "status", "words"),
    [
        (KILLED, "", 0, "failed", "task 3 on n1 was killed by signal 9, by nobody who left a word"),
        (KILLED, "", 1, "oom", "task 3 on n1 was killed by signal 9, and the kernel killed for want"),
        (KILLED, OVER_LIMIT, 0, "oom", "for want of memory: slurmstepd-n1: error: StepId=2.0 exceeded memory limit"),
        ("srun: error: n1: task 1: Out Of Memory\n", "", 0, "oom", "for want of memory: srun: error: n1: task 1: Out"),
        ("", "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.0.\n", 0, "oom", "Detected 1 oom-kill event"),
        ("srun: error: Node failure on n1\n", "", 0, "failed", "node n1 failed, says Slurm"),
        ("srun: error: n0: tasks 0-1: Terminated\n", "", 0, "interrupted", "ended by SIGTERM before they could save"),
        (CRASHED, "", 0, "failed", "task 3 on n1: Segmentation fault (core dumped)"),
        (CRASHED, "Watchdog caught collective operation timeout\n", 0, "timeout", "timeout (task 3 on n1: Segm"),
        (
            "srun: error: n0: task 0: Exited with exit code 3\n",
            "",
            0,
            "failed",
            "task 0 on n0: Exited with exit code 3",
        ),
        ("srun: fatal: cannot do it\n", "", 0, "failed", "exit code 137; the last line: srun: fatal: cannot do it"),
        ("", "", 0, "failed", "srun ended with exit code 137; the last line: nothing"),
    ],
)
def test_what_slurm_left_behind(folder: Path, srun: str, rank: str, oom_kills: int, status: str, words: str) -> None:
    found = ended(folder, srun, rank, oom_kills)
    assert found.status == status
    assert words in found.reason


def test_what_a_rank_says_of_itself_counts_most(folder: Path) -> None:
    own = Report(1, "failed", "ValueError: boom", 2.0)
    assert ended(folder, KILLED, reports=(LOST, own)) == ("failed", "rank 1 failed: ValueError: boom")


@pytest.mark.parametrize(
    ("report", "status", "words"),
    [
        (Report(1, "oom", "torch.OutOfMemoryError: CUDA out of memory", 2.0), "oom", "rank 1 ran out of memory: torch"),
        (Report(0, "refused", "no", 1.0, reasons=["It can't."]), "refused", "It can't."),
        (
            Report(0, "config", "no", 1.0, problems=[{"key": "a", "value": "1", "rule": "is wrong", "fix": "say 2"}]),
            "failed",
            "a=1: is wrong. Fix: say 2",
        ),
    ],
)
def test_reports_become_statuses(folder: Path, report: Report, status: str, words: str) -> None:
    found = ended(folder, reports=(LOST, report))
    assert found.status == status
    assert words in found.reason


def test_what_ranks_say_of_one_another_counts_least(folder: Path) -> None:
    assert ended(folder, KILLED, reports=(LOST,)).reason.startswith("task 3 on n1 was killed")
    late = Report(0, "timeout", "Timed out waiting 60000ms", 3.0)
    assert ended(folder, reports=(late,)).status == "timeout"


def said(folder: Path, how: str, late_s: float) -> Evidence:
    """What is left of a task on another node of which srun says no more."""
    (folder / "srun.log").write_text(f"srun: error: n1: tasks 2-3: {how}\n")
    return Evidence(1, [folder], {folder / "srun.log": 0}, 0, 60.0, late_s)


@contextmanager
def unlisted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Folders list no reports, as on a network file system that believes what it knew."""
    glob = Path.glob
    with monkeypatch.context() as patch:
        patch.setattr(Path, "glob", lambda path, pattern: () if "error_rank" in pattern else glob(path, pattern))
        yield


def test_a_report_that_no_listing_shows_is_opened_by_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(folder / "logs", Report(3, "failed", "ValueError: boom", 2.0))
    with unlisted(monkeypatch):
        assert report_paths([folder]) == []
        found = verdict(said(folder, f"Exited with exit code {EXIT_FAILED}", 0.0))
    assert found == ("failed", "rank 3 failed: ValueError: boom")


@pytest.mark.parametrize("code", [EXIT_FAILED, EXIT_CONFIG])
def test_reports_that_come_late_are_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    late = [Report(2, "lost_peer", "closed", 1.0), Report(3, "failed", "ValueError: boom", 2.0)]
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        write_report(folder / "logs", late[len(pauses) - 1])

    monkeypatch.setattr(diagnosis.time, "sleep", pause)
    assert verdict(said(folder, f"Exited with exit code {code}", 600.0)).reason == "rank 3 failed: ValueError: boom"
    assert len(pauses) == len(late), "and no longer"


@pytest.mark.parametrize("how", [f"Exited with exit code {EXIT_INTERRUPTED}", "Killed", "Exited with exit code 127"])
def test_no_report_is_waited_for_that_nobody_wrote(folder: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    def pause(_seconds: float) -> None:
        raise AssertionError("there is nothing to wait for")

    monkeypatch.setattr(diagnosis.time, "sleep", pause)
    assert "ask 2-3 on n1" in verdict(said(folder, how, 600.0)).reason


def test_the_wait_for_reports_has_an_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(diagnosis.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(diagnosis.time, "sleep", lambda seconds: clock.append(clock.pop() + seconds))
    evidence = said(folder, f"Exited with exit code {EXIT_FAILED}", diagnosis.LATE_S)
    assert verdict(evidence).reason.startswith("srun ended with exit code 1: task 2-3 on n1")
    assert not diagnosis.failed_by_itself(evidence)
    assert diagnosis.LATE_S <= clock[0] < 40, "once for all questions"


def test_reports_to_come_have_a_name_in_every_folder(folder: Path) -> None:
    known = folder / "logs" / "error_rank7.json"
    known.touch()
    places = (folder, folder / "logs", folder / "none")
    assert report_paths([folder, folder / "none"], [2]) == sorted([known, *(report_path(at, 2) for at in places)])


def test_srun_shortens_the_names_of_tasks() -> None:
    assert [Death("n0", task, "Killed").ranks for task in ("4", "0-2", "1,3-4")] == [[4], [0, 1, 2], [1, 3, 4]]


def lines(*told: tuple[float, Phase]) -> list[Line]:
    """Of a run, by second and phase."""
    return [Line(when, step, phase, None) for step, (when, phase) in enumerate(told)]


@pytest.mark.parametrize(
    ("told", "allowed_s"),
    [
        (lines(), None),
        (lines((0, "starting")), None),
        (lines((0, "starting"), (40, "training")), 200),
        (lines((0, "starting"), (5, "training")), 90),
        (lines((0, "starting"), (200, "training"), (210, "training")), 90),
        (lines((0, "starting"), (40, "training"), (60, "training")), 100),
        (lines((0, "training"), (5, "saving"), (300, "training"), (305, "training")), 90),
        (lines((0, "training"), (5, "saving")), None),
        (lines((0, "training"), (5, "validating")), None),
    ],
)
def test_silence_that_is_no_hang(told: list[Line], allowed_s: float | None) -> None:
    assert silence_allowed_s(told, 90.0) == allowed_s
    assert silence_allowed_s(told, 0.0) is None


HANGING = """
import faulthandler, signal, threading
faulthandler.register(signal.SIGQUIT, all_threads=True)
def idle():
    threading.Event().wait()
threading.Thread(target=idle, daemon=True).start()
def stuck():
    print("here", flush=True)
    signal.pause()
stuck()
"""


@pytest.mark.parametrize("as_module", [True, False])
def test_a_stack_tells_where_the_main_thread_is(tmp_path: Path, as_module: bool) -> None:
    (tmp_path / "hanging.py").write_text(HANGING)
    command = ["-m", "hanging"] if as_module else [str(tmp_path / "hanging.py")]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, *command], cwd=tmp_path, stdout=subprocess.PIPE, stderr=log)
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        os.kill(process.pid, signal.SIGQUIT)
        while (where := place((tmp_path / "log").read_text())) is None:
            time.sleep(0.01)
        process.kill()
        process.communicate()
    assert re.fullmatch(r"stuck \(.*hanging\.py:\d+\)", where)


def dump(name: str, line: int) -> str:
    """What faulthandler writes about a process of two threads."""
    return (
        "some words\n"
        'Thread 0x00007f1 (most recent call first):\n  File "/lib/threading.py", line 324 in wait\n\n'
        "Current thread 0x00007f2 (most recent call first):\n"
        f'  File "/repo/moe/{name}.py", line {line} in {name}\n  File "/repo/slurm/task.py", line 9 in main\n'
        '  File "<frozen runpy>", line 88 in _run_code\n  File "<frozen runpy>", line 198 in _run_module_as_main\n'
    )


def test_the_rank_that_stands_elsewhere_is_named_first() -> None:
    dumps = {rank: dump("all_reduce", 5) for rank in range(12)} | {3: dump("expert", 7), 5: "", 6: "no stack"}
    hosts = [f"n{rank // 4}" for rank in range(12)]
    assert whereabouts(dumps, hosts) == (
        "ranks 5, 6 on n1 did not answer; rank 3 in expert (moe/expert.py:7); "
        "ranks 0, 1, 2, 4, 7, 8, 9, 10 and 1 more in all_reduce (moe/all_reduce.py:5)"
    )
