"""What the README shows is what there is."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from analysis.performance import BLOCK, performance_block
from experiments.registry import discover

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
FINDINGS = (ROOT / "results" / "FINDINGS.md").read_text()


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
    for shown in BLOCK.finditer(FINDINGS):
        folders = [ROOT / "results" / name for name in shown["folders"].split()]
        assert shown[0] == performance_block(folders, ROOT / "results")
    assert FINDINGS.count("performance:begin") == FINDINGS.count("performance:end") == len(BLOCK.findall(FINDINGS)) == 1


@pytest.mark.parametrize(
    "page", ["README.md", "REPRODUCTION.md", "results/FINDINGS.md", "results/README.md", "slurm/README.md"]
)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text())
    assert links or page == "slurm/README.md"
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_commands_name_modules_and_experiments_that_there_are() -> None:
    modules = set(re.findall(r"python -m ((?:experiments|analysis|slurm|tests)[\w.]*)", README))
    assert len(modules) > 15
    assert [name for name in modules if find_spec(name) is None] == []
    shown = set(re.findall(r"experiment=(\w+)", README)) | set(
        re.findall(r"`((?:native|ta_moe|hiermoe|swiftmoe|fsmoe)_\w+)`", README)
    )
    known = {path.stem for path in (ROOT / "conf" / "experiment").iterdir()} | set(discover())
    assert shown <= known, shown - known
    assert known - set(discover()) - shown <= {"smoke", "simulator_validation_gpu"}, "experiments that nobody finds"
