"""Finds every system: the concrete `System` subclasses in the files of baselines/ and methods/."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

from experiments.problems import did_you_mean
from moe.errors import ConfigError, Problem
from moe.system import System

ROOMS = ("baselines", "methods")


@functools.cache
def discover(rooms: tuple[str, ...] = ROOMS) -> dict[str, type[System]]:
    """All systems by name, sorted.

    Importing an adapter must not need its upstream package: the adapter says in `refusals` that it is not installed.

    Args:
        rooms: packages whose modules are imported and searched.

    Raises:
        ConfigError: two classes have the same name.
    """
    found: dict[str, type[System]] = {}
    for room in rooms:
        for module_info in pkgutil.iter_modules(importlib.import_module(room).__path__, f"{room}."):
            module = importlib.import_module(module_info.name)
            for system in vars(module).values():
                if not _is_system_of(system, module_info.name):
                    continue
                if system.name in found:
                    homes = f"{found[system.name].__module__} and {system.__module__}"
                    raise ConfigError(Problem("name", system.name, f"two systems have it: {homes}", "rename one"))
                found[system.name] = system
    return dict(sorted(found.items()))


def _is_system_of(candidate: Any, module_name: str) -> bool:
    """True for a concrete System class written in that module (not imported into it)."""
    return (
        inspect.isclass(candidate)
        and issubclass(candidate, System)
        and not inspect.isabstract(candidate)
        and candidate.__module__ == module_name
    )


def get(name: str, key: str = "system.name") -> type[System]:
    """The system of that name.

    Args:
        name: as in `System.name`.
        key: config key that the name came from, for the message.

    Raises:
        ConfigError: there is none; the message suggests the nearest.
    """
    systems = discover()
    if name not in systems:
        raise ConfigError(Problem(key, name, "there is no such system", did_you_mean(name, systems, "systems")))
    return systems[name]


def create(name: str, options: Mapping[str, Any] | None = None) -> System:
    """The system of that name with its options, which `experiments.config` has validated.

    Raises:
        ConfigError: there is no such system.
    """
    return get(name)(dict(options or {}))
