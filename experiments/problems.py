"""Turns what pydantic finds wrong into `Problem`s: the full dotted key, the value, the rule in words, the fix."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen, MultipleOf
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from moe.errors import Problem

MISSING = "(missing)"


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `name` most likely stands for, or None.

    Keys of the same group come first, then the same or nearly the same last part in any group: `num_experts` finds
    `model.num_experts`, and so does `modle.num_experts`.
    """
    pool = list(candidates)
    group, leaf = _split(name)
    siblings = {_split(candidate)[1]: candidate for candidate in pool if _split(candidate)[0] == group}
    close = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6)
    same_leaf = [candidate for candidate in pool if _split(candidate)[1] == leaf]
    if close and not same_leaf:
        return siblings[close[0]]
    likely = [candidate for candidate in pool if _likeness(_split(candidate)[1], leaf) >= 0.75]
    return max(likely, key=lambda key: (_likeness(_split(key)[1], leaf), _likeness(key, name)), default=None)


def _split(key: str) -> tuple[str, str]:
    """(group, last part) of a dotted key."""
    group, _, leaf = key.rpartition(".")
    return group, leaf


def _likeness(one: str, other: str) -> float:
    """0 (nothing alike) to 1 (equal)."""
    return difflib.SequenceMatcher(None, one, other).ratio()


def did_you_mean(name: str, candidates: Iterable[str], kind: str) -> str:
    """A fix for an unknown name: the nearest candidate if one is near, and all of them.

    Args:
        name: what was given.
        candidates: what exists.
        kind: plural of what they are, for the sentence: `systems`, `keys of model`.
    """
    pool = list(candidates)
    guess = nearest(name, pool)
    everything = f"the {kind} are {', '.join(pool)}" if pool else f"there are no {kind}"
    return f"did you mean {guess}? {everything[0].upper()}{everything[1:]}" if guess else everything


def schema_keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys of a schema, groups and leaves, in the order of its fields; list items have no keys."""
    keys = []
    for name, field in schema.model_fields.items():
        keys.append(prefix + name)
        inner = _model_in(field.annotation, through_lists=False)
        if inner is not None:
            keys += schema_keys(inner, f"{prefix}{name}.")
    return keys


def problems_of(error: ValidationError, schema: type[BaseModel], prefix: str = "") -> list[Problem]:
    """One problem for every wrong key.

    Args:
        error: what `schema.model_validate` raised.
        schema: the model that was validated.
        prefix: dotted key of the group that was validated, with its dot: `system.`.

    Returns:
        Problems in pydantic's order, which is the order of the fields.
    """
    found: list[Problem] = []
    for item in error.errors(include_url=False, include_context=True):
        location, value = item["loc"], item["input"]
        key = prefix + ".".join(str(part) for part in location)
        if item["type"] == "extra_forbidden":
            found += _unknown_keys(key, value, schema, prefix)
            continue
        field = _field_at(schema, location)
        example = f"for example {key}={_text(field.examples[0])}" if field is not None and field.examples else ""
        if item["type"] == "missing":
            rule, fix, value = "is required", f"add it, {example}".removesuffix(", "), MISSING
        elif item["type"] in ("value_error", "assertion_error"):
            rule, fix = str(item["ctx"]["error"]), example or "give another value"
        else:
            annotation, metadata = _annotation_at(schema, location)
            wanted = _describe(annotation, metadata)
            guess = nearest(value, _choices(annotation)) if isinstance(value, str) else None
            rule, fix = f"must be {wanted}", f"did you mean {guess}?" if guess else example or f"give {wanted}"
        found.append(Problem(key, _text(value) if isinstance(value, bool | None) else value, rule, fix))
    return found


def _unknown_keys(key: str, value: Any, schema: type[BaseModel], prefix: str) -> Iterator[Problem]:
    """An unknown key, or every leaf below it when it is a group."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _unknown_keys(f"{key}.{name}", inner, schema, prefix)
        return
    group = key.rpartition(".")[0]
    siblings = [_split(name)[1] for name in schema_keys(schema, prefix) if _split(name)[0] == group]
    where = f"keys of {group}" if group and siblings else "keys"
    guess = nearest(key, schema_keys(schema, prefix))
    names = ", ".join(siblings or schema.model_fields)
    fix = f"did you mean {guess}?" if guess else f"remove it; the {where} are {names}"
    yield Problem(key, value, "there is no such key", fix)


def _model_in(annotation: Any, through_lists: bool = True) -> type[BaseModel] | None:
    """The pydantic model inside `Model`, `Model | None` or, if asked, `list[Model]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) is list and not through_lists:
        return None
    models = (_model_in(inner, through_lists) for inner in typing.get_args(annotation))
    return next((model for model in models if model is not None), None)


def _field_at(schema: type[BaseModel], location: tuple[int | str, ...]) -> FieldInfo | None:
    """The field that a pydantic location names; of a list item, the list's."""
    model: type[BaseModel] | None = schema
    field = None
    for part in location:
        if isinstance(part, str):
            field = model.model_fields.get(part) if model is not None else None
            model = _model_in(field.annotation) if field is not None else None
    return field


def _annotation_at(schema: type[BaseModel], location: tuple[int | str, ...]) -> tuple[Any, list[Any]]:
    """Type and constraints of what a pydantic location names."""
    field = _field_at(schema, location)
    if field is None:
        return Any, []
    if not isinstance(location[-1], int):
        return field.annotation, field.metadata
    return _unpack(typing.get_args(_without_none(field.annotation))[0])


def _unpack(annotation: Any) -> tuple[Any, list[Any]]:
    """(type, constraints) of `Annotated[type, Field(...)]`."""
    if typing.get_origin(annotation) is not typing.Annotated:
        return annotation, []
    inner, *extras = typing.get_args(annotation)
    return inner, [rule for extra in extras for rule in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]


def _without_none(annotation: Any) -> Any:
    """`X` of `X | None`."""
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return annotation
    return next(inner for inner in typing.get_args(annotation) if inner is not type(None))


def _choices(annotation: Any) -> list[str]:
    """Members of a Literal, else nothing."""
    inner = _without_none(annotation)
    return [str(choice) for choice in typing.get_args(inner)] if typing.get_origin(inner) is Literal else []


def _describe(annotation: Any, metadata: list[Any]) -> str:
    """A type and its constraints in words: `a whole number of at least 1`."""
    inner = _without_none(annotation)
    if typing.get_origin(inner) is typing.Annotated:
        inner, inner_metadata = _unpack(inner)
        metadata = metadata + inner_metadata
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    bounds = {Ge: "of at least {.ge}", Gt: "above {.gt}", Le: "of at most {.le}", Lt: "below {.lt}"}
    bounds[MultipleOf] = "a multiple of {.multiple_of}"
    if _choices(inner):
        words = f"one of {', '.join(_choices(inner))}"
    elif typing.get_origin(inner) is list:
        words = f"a list{_lengths(metadata)}, each item {_describe(*_unpack(typing.get_args(inner)[0]))}"
        bounds = {}
    elif (model := _model_in(inner)) is not None:
        words = f"a group of the keys {', '.join(model.model_fields)}"
    else:
        words = names.get(inner, "a valid value")
    parts = [template.format(rule) for rule in metadata for kind, template in bounds.items() if isinstance(rule, kind)]
    words = " ".join([words, " and ".join(parts)]).strip()
    return words if inner is annotation or typing.get_origin(annotation) is typing.Annotated else f"{words}, or null"


def _lengths(metadata: list[Any]) -> str:
    """Constraints on the length of a list in words."""
    least = next((rule.min_length for rule in metadata if isinstance(rule, MinLen)), 0)
    most = next((rule.max_length for rule in metadata if isinstance(rule, MaxLen)), None)
    if most is None:
        return f" of at least {least}" if least else ""
    return f" of {most}" if least == most else f" of {least} to {most}"


def _text(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, list):
        return f"[{','.join(_text(item) for item in value)}]"
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return str(value)
