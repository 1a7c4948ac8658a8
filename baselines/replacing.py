"""A name of an upstream module that stands for something else during one call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(module: Any, name: str, stand_in: Any) -> Iterator[None]:
    """Let `module.name` be `stand_in` inside the block."""
    original = getattr(module, name)
    setattr(module, name, stand_in)
    try:
        yield
    finally:
        setattr(module, name, original)
