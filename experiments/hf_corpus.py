"""Text of the Hugging Face Hub, through the `datasets` library (optional: it is imported only when asked for)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from experiments.corpus import USE_TEXT, Corpus, DataConfig
from moe.errors import ConfigError, Problem

_VALIDATION_SPLITS = ("validation", "valid", "val", "dev")
# The Hub still redirects old one-word names, but recent versions of `datasets` refuse them.
_FULL_NAMES = {"wikitext": "Salesforce/wikitext"}
_NAME_COLUMN = "data.text_field=COLUMN with the one that holds the text"


def hf_corpus(data: DataConfig) -> Corpus:
    """The rows of a Hugging Face dataset: one row is one document, rows without text are left out.

    The dataset's own validation split is held out where it has one, else the last `val_fraction` of the train rows
    (the tail, not single rows: neighbouring rows are often parts of one article).

    Args:
        data: a config of source `hf` without `problems()`.

    Raises:
        ConfigError: the library, the internet, the dataset, its subset, its train split or its text column is missing.
    """
    splits = _load(data)
    if "train" not in splits:
        rule = f"must have a split named train, but has {', '.join(splits)}"
        raise _error("name", data.name, rule, f"choose another dataset, or {USE_TEXT}")
    train, own = splits["train"], next((name for name in _VALIDATION_SPLITS if name in splits), None)
    if data.text_field not in train.column_names:
        rule = f"must be one of the columns {', '.join(train.column_names)}"
        raise _error("text_field", data.text_field, rule, _NAME_COLUMN)
    if own is not None:
        val = splits[own]
    else:
        cut = int(len(train) * (1 - data.val_fraction))
        train, val = train.select(range(cut)), train.select(range(cut, len(train)))
    return Corpus(lambda: _rows(train, data), lambda: _rows(val, data))


def _load(data: DataConfig) -> Any:
    try:
        import datasets
    except ImportError as error:
        rule = "needs the library `datasets`, which is not installed"
        raise _error("source", "hf", rule, f"pip install datasets, or {USE_TEXT}") from error
    assert data.name is not None, "DataConfig.problems() was not asked"
    try:
        return datasets.load_dataset(_FULL_NAMES.get(data.name, data.name), data.subset)
    except (ConnectionError, TimeoutError) as error:
        rule = f"needs internet or a copy in the Hugging Face cache ({_one_line(error)})"
        raise _error("name", data.name, rule, f"go online, or {USE_TEXT}") from error
    except ValueError as error:
        if "namespace" in str(error):
            rule = f"must be spelled OWNER/NAME ({_one_line(error)})"
            raise _error("name", data.name, rule, "copy the full name from its page on the Hub") from error
        rule = f"must fit the dataset ({_one_line(error)})"
        fix = "data.subset=NAME with one that the dataset has, or data.subset=null"
        raise _error("subset", data.subset, rule, fix) from error
    except (datasets.exceptions.DatasetsError, OSError) as error:
        rule = f"must be a dataset that can be loaded ({_one_line(error)})"
        raise _error("name", data.name, rule, f"check the name on huggingface.co/datasets, or {USE_TEXT}") from error


def _rows(split: Any, data: DataConfig) -> Iterator[str]:
    for rows in split.select_columns([data.text_field]).iter(batch_size=1000):
        for text in rows[data.text_field]:
            if text is not None and not isinstance(text, str):
                rule = f"must be a column of text, but holds {type(text).__name__}"
                raise _error("text_field", data.text_field, rule, _NAME_COLUMN)
            if text and text.strip():
                yield text


def _error(field: str, value: str | None, rule: str, fix: str) -> ConfigError:
    return ConfigError(Problem(f"data.{field}", value, rule, fix))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
