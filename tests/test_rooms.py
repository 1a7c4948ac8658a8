"""Which room of the suite may import which: the direction is what keeps methods swappable and analysis light."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED: dict[str, set[str]] = {
    "moe": set(),
    "baselines": {"moe"},
    "methods": {"moe"},
    "experiments": {"moe", "baselines", "methods", "analysis"},
    "slurm": {"moe", "baselines", "methods", "experiments", "analysis"},
    "analysis": set(),
}
TORCH_FREE = {"analysis": {"torch", "lightning", "deepspeed", "fairscale"}}
"""Third-party packages that a room must run without."""


def imported(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, top-level name) of every import in a file, also of those inside functions; relative ones are resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, package if node.level else str(node.module).split(".")[0]


def violations(source: str, room: str) -> list[tuple[int, str]]:
    """Imports of `source`, a file of `room`, that point the wrong way."""
    forbidden = (set(ALLOWED) - ALLOWED[room] - {room}) | TORCH_FREE.get(room, set())
    return [(line, name) for line, name in imported(source, room) if name in forbidden]


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files, f"{room}/ holds no Python file"
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for line, name in violations(path.read_text(encoding="utf-8"), room)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "room"),
    [
        ("import experiments.train", "moe"),
        ("from baselines import flat", "moe"),
        ("def build():\n    from experiments.config import load_run", "methods"),
        ("import methods", "baselines"),
        ("import torch", "analysis"),
        ("from moe.topology import Cluster", "analysis"),
    ],
)
def test_a_wrong_import_is_seen(source: str, room: str) -> None:
    assert violations(source, room)


def test_right_imports_pass() -> None:
    assert not violations("from analysis.compare import write\nimport moe.mesh\nimport baselines", "experiments")
    assert not violations("from . import checks\nimport pandas", "analysis")
