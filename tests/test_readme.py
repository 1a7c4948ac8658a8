"""What the README shows is what there is."""

from __future__ import annotations

import re
from pathlib import Path

from analysis.performance import BLOCK, performance_block
from experiments.registry import discover

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_worked_example_is_the_file_and_short() -> None:
    shown = re.search(r"<!-- example:begin (\S+) -->\n```python\n(.*?)```\n<!-- example:end -->", README, re.DOTALL)
    assert shown is not None
    assert shown[2] == (ROOT / shown[1]).read_text()
    assert shown[2].count("\n") < 60


def test_the_table_of_systems_is_the_registry() -> None:
    table = README.split("<!-- systems:begin -->")[1].split("<!-- systems:end -->")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (\w+)", table, re.MULTILINE))
    assert rows == {name: system.implementation for name, system in discover().items()}


def test_the_performance_table_is_what_its_folders_give() -> None:
    for shown in BLOCK.finditer(README):
        folders = [ROOT / name for name in shown["folders"].split()]
        assert shown[0] == performance_block(folders, ROOT)
    assert README.count("performance:begin") == README.count("performance:end") == len(BLOCK.findall(README))


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
