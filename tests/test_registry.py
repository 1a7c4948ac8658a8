"""Systems are found by being in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import registry
from moe.errors import ConfigError
from moe.system import System

FILE = """
from baselines.flat import Flat
from moe.system import System

class Abstract(System):
    name = "abstract"

class {cls}(Flat):
    name = "{name}"
"""


def _room(folder: Path, room: str, files: dict[str, str]) -> str:
    """A package with one system a file: class name and system name."""
    (folder / room).mkdir()
    (folder / room / "__init__.py").touch()
    for cls, name in files.items():
        (folder / room / f"{cls.lower()}.py").write_text(FILE.format(cls=cls, name=name))
    return room


def test_the_issue_s_systems_are_there() -> None:
    found = registry.discover()
    assert {"flat", "deepspeed", "fairscale", "reference"} <= set(found)
    assert all(issubclass(system, System) and system.name == name for name, system in found.items())
    assert list(found) == sorted(found)


def test_a_new_file_is_a_new_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    room = _room(tmp_path, "room_of_one", {"Mine": "mine"})
    assert [(name, system.__name__) for name, system in registry.discover((room,)).items()] == [("mine", "Mine")]


def test_two_systems_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    room = _room(tmp_path, "room_of_two", {"One": "same", "Two": "same"})
    with pytest.raises(ConfigError, match="name=same: two systems have it: room_of_two.one and room_of_two.two. Fix"):
        registry.discover((room,))


def test_create_hands_over_the_options() -> None:
    assert registry.create("deepspeed", {"min_capacity": 7}).options.model_dump()["min_capacity"] == 7
    with pytest.raises(ConfigError, match=r"system.name=flatt: there is no such system. Fix: did you mean flat\?"):
        registry.create("flatt")
