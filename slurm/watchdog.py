"""Ranks that hang: when to say so, and which of them it is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from experiments.progress_log import Line

WATCHDOG_S = 90.0
PATIENCE = 5.0
"""Silence may last that many times the longest one so far: steps of minutes are no hang."""
MAX_RANKS = 8
"""Told by number, of those in one place."""

FRAME = re.compile(r'^  File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<name>\S+)', re.MULTILINE)
THREAD = re.compile(r"^(?:Current thread|Thread) 0x\w+.* \(most recent call first\):$", re.MULTILINE)
OUTERMOST = ("_run_module_as_main", "<module>")
"""Calls that the main thread's stack ends in: of `python -m module`, and of a script."""


def silence_allowed_s(lines: Sequence[Line], watchdog_s: float) -> float | None:
    """How long a run may say nothing after its last line.

    Args:
        lines: of its progress since it started.
        watchdog_s: the least that is allowed; 0 or less allows any silence.

    Returns:
        None: anything. So it is before the first training step and while the run validates or saves, where the limit
        of a collective (`trainer.timeout_s`) holds. After the first step alone the time up to it counts.
    """
    if watchdog_s <= 0 or not lines or lines[-1].phase != "training":
        return None
    gaps = {
        phase: [
            b.when - a.when for a, b in zip(lines, lines[1:], strict=False) if (a.phase, b.phase) == (phase, "training")
        ]
        for phase in ("training", "starting")
    }
    return max(watchdog_s, PATIENCE * max(gaps["training"] or gaps["starting"], default=0.0))


def whereabouts(dumps: Mapping[int, str], hosts: Sequence[str]) -> str:
    """Which ranks stand elsewhere than the others, from the stacks that faulthandler wrote into their logs.

    Args:
        dumps: by rank, what its log gained since it was asked; empty for a rank that did not answer.
        hosts: by rank, the node that it is on.
    """
    places = {rank: place(text) for rank, text in dumps.items()}
    silent = [rank for rank, where in places.items() if where is None]
    known = {rank: where for rank, where in places.items() if where is not None}
    nodes = ", ".join(dict.fromkeys(hosts[rank] for rank in silent))
    told = [f"{_ranks(silent)} on {nodes} did not answer"] if silent else []
    for where, _ in sorted(Counter(known.values()).items(), key=lambda item: item[1]):
        told.append(f"{_ranks([rank for rank, own in known.items() if own == where])} in {where}")
    return "; ".join(told)


def place(dump: str) -> str | None:
    """The innermost call of the main thread; None without a dump."""
    for stack in THREAD.split(dump)[1:]:
        frames = list(FRAME.finditer(stack))
        if frames and frames[-1]["name"] in OUTERMOST:
            inner = frames[0]
            return f"{inner['name']} ({'/'.join(inner['file'].split('/')[-2:])}:{inner['line']})"
    return None


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:MAX_RANKS])) + f" and {len(ranks) - MAX_RANKS} more" * (len(ranks) > MAX_RANKS)
    return f"rank{'s' * (len(ranks) > 1)} {shown}"
