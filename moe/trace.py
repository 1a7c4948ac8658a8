"""Timelines of tasks as files that chrome://tracing and Perfetto show."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe.simulator import Span


def chrome_trace(spans: Iterable[Span], rank: int) -> dict[str, Any]:
    """The Trace Event Format's JSON object: a complete event (`X`) for each task, microseconds, a row a resource.

    Args:
        spans: of one rank; no matter whether they were simulated or recorded.
        rank: becomes the process id.
    """
    spans = list(spans)
    resources = sorted({span.task.resource for span in spans})
    events: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": rank, "tid": row, "args": {"name": resource}}
        for row, resource in enumerate(resources)
    ]
    for task, start_s, end_s in spans:
        direction = "backward" if task.backward else "forward"
        events.append(
            {
                "name": f"{task.kind} {task.chunk}",
                "cat": f"{task.resource},{direction}",
                "ph": "X",
                "ts": start_s * 1e6,
                "dur": (end_s - start_s) * 1e6,
                "pid": rank,
                "tid": resources.index(task.resource),
                "args": {"layer": task.layer, "direction": direction, "resource": task.resource},
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_trace(path: Path, spans: Iterable[Span], rank: int) -> None:
    """Write `chrome_trace` of one rank to a file, whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(chrome_trace(spans, rank)), encoding="utf-8")
