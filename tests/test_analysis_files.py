"""Reading tables: what is wrong with one is told with its file and how to get a right one."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.errors import ResultsError
from analysis.files import read_csv
from analysis.fsmoe_tables import read_simulated
from analysis.hiermoe_tables import read_tables
from analysis.roofline import read_roofline
from analysis.validation import read_validation


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"table\.csv: not a readable CSV \(.*No such file.*\)\. Fix: make it\."),
        ("", r"table\.csv: not a readable CSV \(No columns to parse from file\)\. Fix: make it\."),
        ("a,b\n1,2,3\n1,2,3,4,5\n", r"table\.csv: not a readable CSV \(Error tokenizing data.*\)\. Fix: make it\."),
        ("a,c\n1,2\n", r"table\.csv: it has no column b, d\. Fix: make it\."),
        ("a,b,d\n", r"table\.csv: it has no rows\. Fix: make it\."),
    ],
)
def test_a_table_that_is_of_no_use_is_an_error(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "table.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ResultsError, match=message) as told:
        read_csv(path, ["a", "b", "d"], "Fix: make it.")
    assert "\n" not in str(told.value)


def test_a_good_table_is_read_with_pandas_options(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("a,b,more\n1,NA,3\n")
    assert read_csv(tmp_path / "table.csv", ["a", "b"], "", keep_default_na=False)["b"].tolist() == ["NA"]


@pytest.mark.parametrize(
    ("read", "fix"),
    [
        (read_roofline, "Fix: name the table of a roofline, with what, name"),
        (read_tables, "experiments.hiermoe"),
        (lambda path: read_simulated(path, "(?P<all>.*)"), "experiments.simulate`"),
        (lambda path: read_validation(path.parent), "experiments.validate"),
    ],
)
def test_each_table_says_how_it_is_made(tmp_path: Path, read, fix: str) -> None:
    path = tmp_path / "validation.csv"
    for text, message in (("a\n1\n", "it has no column"), ("", "not a readable CSV")):
        path.write_text(text)
        with pytest.raises(ResultsError, match=message) as told:
            read(path)
        assert fix in str(told.value)
