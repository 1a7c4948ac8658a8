"""results/: nothing of anybody's machine stands there, and a comparison has all that it is made again from."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[1] / "results"
TEXTS = sorted(path for path in RESULTS.rglob("*") if path.suffix in {".yaml", ".json", ".csv", ".md", ".log"})
COMPARISONS = sorted(RESULTS.glob("**/compare.json"))
SOMEBODY_S_FOLDER = re.compile(r"(?<![\w./])/(?:home|root|tmp|work|mnt|scratch|Users)/\S*")


def folders_named(text: str) -> list[str]:
    """Absolute paths in a text."""
    return SOMEBODY_S_FOLDER.findall(text)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(RESULTS)))
def test_no_folder_of_anybody_s_machine_is_named(path: Path) -> None:
    assert folders_named(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("text", ["output_dir: /tmp/d", "- output_dir=/scratch/x/outputs", "in '/home/me/runs'"])
def test_a_folder_that_is_named_is_found(text: str) -> None:
    assert len(folders_named(text)) == 1
    assert folders_named("tokens/step, ../runs/tmp/x, https://a.b/home/c") == []


@pytest.mark.parametrize("index", COMPARISONS, ids=lambda path: path.parent.parent.name)
def test_a_comparison_has_the_runs_that_it_names(index: Path) -> None:
    named = json.loads(index.read_text(encoding="utf-8"))
    assert named["runs"]
    for run in named["runs"]:
        assert (index.parent / run / "metrics.parquet").is_file(), run
    if named["samples"] is not None:
        assert (index.parent / named["samples"] / "samples.parquet").is_file()
