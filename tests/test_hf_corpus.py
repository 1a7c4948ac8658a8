"""Datasets of the Hub: real `datasets` objects, no network."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from experiments.corpus import DataConfig
from experiments.hf_corpus import hf_corpus
from experiments.tokenizer import SEPARATOR
from experiments.tokens import prepare
from moe.errors import ConfigError, Problem

HF = DataConfig(source="hf", name="wikitext", subset="wikitext-2-raw-v1", val_fraction=0.25)
ROWS = ["= Title =\n", "", "one\n", "  \n", None, "two\n", "three\n", "four\n"]


def rows(*texts: str | None, column: str = "text") -> datasets.Dataset:
    return datasets.Dataset.from_dict({column: list(texts), "other": list(range(len(texts)))})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `load_dataset` gives (`splits`, an exception is raised) and what it was asked for (`asked`)."""
    state: dict[str, Any] = {"asked": []}

    def load_dataset(*args: Any) -> Any:
        state["asked"].append(args)
        if isinstance(state["splits"], Exception):
            raise state["splits"]
        return datasets.DatasetDict(state["splits"])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return state


def problem_of(data: DataConfig) -> Problem:
    with pytest.raises(ConfigError) as error:
        list(hf_corpus(data).train())
    [problem] = error.value.problems
    return problem


def test_own_validation_split_is_held_out(hub: dict) -> None:
    hub["splits"] = {"train": rows(*ROWS), "validation": rows("held out\n"), "test": rows("never read\n")}
    corpus = hf_corpus(HF)
    assert list(corpus.train()) == ["= Title =\n", "one\n", "two\n", "three\n", "four\n"]
    assert list(corpus.train()) == list(corpus.train())
    assert list(corpus.val()) == ["held out\n"]


def test_short_name_of_wikitext_is_written_out_and_others_pass(hub: dict) -> None:
    hub["splits"] = {"train": rows("a", "b")}
    hf_corpus(HF)
    hf_corpus(HF.model_copy(update={"name": "owner/corpus", "subset": None}))
    assert hub["asked"] == [("Salesforce/wikitext", "wikitext-2-raw-v1"), ("owner/corpus", None)]


def test_without_validation_split_the_tail_is_held_out(hub: dict) -> None:
    hub["splits"] = {"train": rows(*(str(index) for index in range(8)))}
    corpus = hf_corpus(HF)
    assert [list(corpus.train()), list(corpus.val())] == [list("012345"), list("67")]


def test_library_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    problem = problem_of(HF)
    assert (problem.key, problem.value) == ("data.source", "hf")
    assert problem.rule == "needs the library `datasets`, which is not installed"
    assert problem.fix.startswith("pip install datasets, or data=text")


def test_no_internet() -> None:
    # The real library: tests/conftest.py put it into its offline mode.
    problem = problem_of(HF.model_copy(update={"name": "nobody/has-this-in-the-cache"}))
    assert (problem.key, problem.value) == ("data.name", "nobody/has-this-in-the-cache")
    assert problem.rule.startswith("needs internet or a copy in the Hugging Face cache (")
    assert problem.fix.startswith("go online, or data=text")


def test_unknown_dataset(hub: dict) -> None:
    hub["splits"] = datasets.exceptions.DatasetNotFoundError("Dataset 'wikitext' doesn't exist on the Hub")
    problem = problem_of(HF)
    assert (problem.key, problem.value) == ("data.name", "wikitext")
    assert problem.rule == "must be a dataset that can be loaded (Dataset 'wikitext' doesn't exist on the Hub)"
    assert problem.fix.startswith("check the name on huggingface.co/datasets, or data=text")


def test_unknown_subset_names_those_there_are(hub: dict) -> None:
    hub["splits"] = ValueError("BuilderConfig 'x' not found.\nAvailable: ['default']")
    problem = problem_of(HF)
    assert (problem.key, problem.value) == ("data.subset", "wikitext-2-raw-v1")
    assert problem.rule == "must fit the dataset (BuilderConfig 'x' not found. Available: ['default'])"
    assert problem.fix == "data.subset=NAME with one that the dataset has, or data.subset=null"


def test_name_without_owner(hub: dict) -> None:
    hub["splits"] = ValueError("Invalid HF URI. Repository id must be 'namespace/name', got 'imdb'.")
    problem = problem_of(HF.model_copy(update={"name": "imdb"}))
    assert (problem.key, problem.value) == ("data.name", "imdb")
    assert problem.rule.startswith("must be spelled OWNER/NAME")
    assert problem.fix == "copy the full name from its page on the Hub"


def test_no_train_split(hub: dict) -> None:
    hub["splits"] = {"test": rows("a"), "validation": rows("b")}
    problem = problem_of(HF)
    assert (problem.key, problem.value) == ("data.name", "wikitext")
    assert problem.rule == "must have a split named train, but has test, validation"
    assert problem.fix.startswith("choose another dataset, or data=text")


def test_text_column_is_missing(hub: dict) -> None:
    hub["splits"] = {"train": rows("a", column="content")}
    problem = problem_of(HF)
    assert (problem.key, problem.value) == ("data.text_field", "text")
    assert problem.rule == "must be one of the columns content, other"
    assert problem.fix == "data.text_field=COLUMN with the one that holds the text"


def test_text_column_holds_no_text(hub: dict) -> None:
    hub["splits"] = {"train": rows("a", "b")}
    problem = problem_of(HF.model_copy(update={"text_field": "other"}))
    assert (problem.key, problem.value) == ("data.text_field", "other")
    assert problem.rule == "must be a column of text, but holds int"
    assert problem.fix == "data.text_field=COLUMN with the one that holds the text"


def test_tokens_of_a_dataset_are_cached_by_its_name(hub: dict, tmp_path: Path) -> None:
    hub["splits"] = {"train": rows("some text\n", "", "more text\n"), "validation": rows("held out\n")}
    data = HF.model_copy(update={"cache_dir": str(tmp_path)})
    for _ in range(2):
        tokens = prepare(data, 300)
        assert tokens.decode(tokens.train) == f"some text\n{SEPARATOR}more text\n{SEPARATOR}"
        assert tokens.decode(tokens.val) == f"held out\n{SEPARATOR}"
        assert tokens.origin == ("data.name", "wikitext")
    assert len(hub["asked"]) == 1, "the second time the cache must answer, without the library"


def test_error_in_the_middle_of_the_rows_reaches_the_user(hub: dict, tmp_path: Path) -> None:
    hub["splits"] = {"train": rows("a", "b")}  # The tokenizer's own code pulls the rows here.
    with pytest.raises(ConfigError, match=r"data.text_field=other: must be a column of text, but holds int"):
        prepare(HF.model_copy(update={"cache_dir": str(tmp_path), "text_field": "other"}), 300)
