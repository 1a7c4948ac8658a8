"""The one door through which the four entry points and the tests get a config: `load`.

conf/ holds the values. `experiments.schemas` says what a value may be, `experiments.config_rules` what may stand beside
what.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from experiments import registry
from experiments.cluster_config import ClusterConfig, LevelConfig, cluster_from, resolve_cluster
from experiments.config_rules import Values, rules_of
from experiments.corpus import DataConfig
from experiments.problems import did_you_mean, nearest, problems_of
from experiments.schemas import (
    SCHEMAS,
    AnyConfig,
    CommRunConfig,
    CompareConfig,
    Kind,
    LayerRunConfig,
    LayerShape,
    ModelConfig,
    RunConfig,
    SystemConfig,
    TimingConfig,
    TrainerConfig,
    WorkloadConfig,
)
from moe.errors import ConfigError, Problem

__all__ = [
    "SCHEMAS",
    "AnyConfig",
    "ClusterConfig",
    "CommRunConfig",
    "CompareConfig",
    "DataConfig",
    "Kind",
    "LayerRunConfig",
    "LayerShape",
    "LevelConfig",
    "ModelConfig",
    "RunConfig",
    "SystemConfig",
    "TimingConfig",
    "TrainerConfig",
    "WorkloadConfig",
    "cluster_from",
    "find_problems",
    "load",
    "load_comm",
    "load_compare",
    "load_layer",
    "load_run",
    "run_id",
]

LABEL_LENGTH = 40
COSMETIC = ("force", "output_dir", "trainer.progress", "trainer.timeout_s", "data.cache_dir", "write_to")
"""Keys that change no number of a run, and so not its id."""


def find_problems(kind: Kind, mapping: Mapping[str, Any], fields_only: bool = False) -> list[Problem]:
    """Everything wrong with a composed config, in the order of its groups; empty when nothing is.

    Args:
        kind: which entry point it is for.
        mapping: plain dicts, lists and scalars.
        fields_only: leave out what needs more than one key, or the registry.
    """
    schema, found = SCHEMAS[kind], []
    try:
        schema.model_validate(mapping)
    except ValidationError as error:
        found = problems_of(error, schema)
    if not fields_only:
        values = Values(mapping, {problem.key for problem in found})
        found += rules_of(kind, values)
        for key, system in _systems(mapping):
            found += [*_label_problems(key, system), *_system_problems(key, system)]
        found += _data_problems(mapping, values)
    order = list(schema.model_fields)
    return sorted(found, key=lambda problem: _position(problem.key.split(".")[0], order))


def load(kind: Kind, mapping: Mapping[str, Any]) -> AnyConfig:
    """Validate a composed config and settle what it leaves open: `auto` values, derived levels, defaults of options.

    Loading what `model_dump(mode="json")` of the result gives returns an equal config.

    Args:
        kind: which entry point it is for.
        mapping: plain dicts, lists and scalars.

    Raises:
        ConfigError: with all problems at once.
    """
    if problems := find_problems(kind, mapping):
        raise ConfigError(*problems)
    return _settled(SCHEMAS[kind].model_validate(mapping))


def load_run(mapping: Mapping[str, Any]) -> RunConfig:
    """`load` for experiments.train."""
    return cast(RunConfig, load("train", mapping))


def load_layer(mapping: Mapping[str, Any]) -> LayerRunConfig:
    """`load` for experiments.layer."""
    return cast(LayerRunConfig, load("layer", mapping))


def load_comm(mapping: Mapping[str, Any]) -> CommRunConfig:
    """`load` for experiments.comm."""
    return cast(CommRunConfig, load("comm", mapping))


def load_compare(mapping: Mapping[str, Any]) -> CompareConfig:
    """`load` for experiments.compare."""
    return cast(CompareConfig, load("compare", mapping))


def run_id(config: AnyConfig) -> str:
    """Name of the run's folder: what a reader looks for, then a hash of everything that can change a number.

    `flat-tiny-s0-1a2b3c4d5e` for a training run, else the entry point's name and the hash.
    """
    content = config.model_dump(mode="json")
    content["cluster"] = _declared(content["cluster"])
    for key in COSMETIC:
        group, _, name = key.rpartition(".")
        (content.get(group, {}) if group else content).pop(name, None)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    if isinstance(config, RunConfig):
        return f"{config.system.name}-{config.model.name}-s{config.seed}-{digest}"
    kind = next(kind for kind, schema in SCHEMAS.items() if isinstance(config, schema))
    return f"{kind}-{config.cluster.name}-{digest}"


def _declared(cluster: dict[str, Any]) -> dict[str, Any]:
    """A cluster without what a profile measures or Slurm's topology adds: those are facts of the nodes that a job got,
    as their clock rates are, and another allocation of the same shape goes on with the same run."""
    if not cluster.get("profile"):
        return cluster
    size, *outer = (level["fanout"] for level in cluster["levels"])
    fanouts = {"node": size, **({"network": prod(outer)} if outer else {})}
    levels = [LevelConfig(name=name, fanout=fanout).model_dump(mode="json") for name, fanout in fanouts.items()]
    unmeasured = {key: value for key, value in cluster.items() if key not in ("profile", "collectives")}
    return {**unmeasured, "levels": levels, "local_copy": None}


def _position(name: str, order: list[str]) -> int:
    return order.index(name) if name in order else len(order)


def _systems(mapping: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(key, system) of every system that is named by text; the others have a problem already."""
    found: list[tuple[str, Any]] = [("system", mapping.get("system"))]
    listed = mapping.get("systems")
    found += [(f"systems.{i}", item) for i, item in enumerate(listed if isinstance(listed, list) else [])]
    named = [(key, {"name": item} if isinstance(item, str) else item) for key, item in found]
    return [(key, item) for key, item in named if isinstance(item, Mapping) and isinstance(item.get("name"), str)]


def _label_problems(key: str, system: Mapping[str, Any]) -> Iterator[Problem]:
    """A label that would break a table or a path, or that a reader would take for another system."""
    label, name = system.get("label", system["name"]), system["name"]
    if label == name or not isinstance(label, str):
        return
    fits = 1 <= len(label) <= LABEL_LENGTH and label == label.strip() and label.isprintable()
    if not fits or {*"/\\"} & {*label}:
        rule = f"must be 1 to {LABEL_LENGTH} characters, no path separator or line break, no blank at either end"
        yield Problem(f"{key}.label", repr(label), rule, f"shorten it or leave it out, for example label: {name} 2")
    elif label in registry.discover():
        rule = f"is the name of another system, and this one is {name}"
        yield Problem(f"{key}.label", label, rule, f"choose another, for example {name} {label}")


def _system_problems(key: str, system: Mapping[str, Any]) -> list[Problem]:
    """An unknown name, or options that the system does not have or that have a wrong value."""
    name = system["name"]
    try:
        schema = registry.get(name, f"{key}.name").Options
    except ConfigError as error:
        return error.problems
    given = {option: value for option, value in system.items() if option not in SystemConfig.model_fields}
    unknown = [option for option in given if option not in schema.model_fields]
    found = [
        Problem(f"{key}.{option}", given[option], f"the system {name} has no such option", _option_fix(option, schema))
        for option in unknown
    ]
    try:
        schema.model_validate({option: given[option] for option in given if option not in unknown}, strict=True)
    except ValidationError as error:
        found += problems_of(error, schema, f"{key}.")
    return found


def _option_fix(option: str, schema: type[BaseModel]) -> str:
    fix = did_you_mean(option, schema.model_fields, "options")
    return fix if nearest(option, schema.model_fields) else f"remove it; {fix}"


def _data_problems(mapping: Mapping[str, Any], values: Values) -> list[Problem]:
    """What the data config says about itself, once its fields are right."""
    if values.failed_below("data") or not isinstance(mapping.get("data"), Mapping):
        return []
    return DataConfig.model_validate(mapping["data"]).problems()


def _settled(config: AnyConfig) -> AnyConfig:
    """The config with nothing left to the machine that reads it, so that its run id tells what ran."""
    cluster = resolve_cluster(config.cluster)
    precision = "bf16" if cluster.device == "cuda" else "fp32"
    update: dict[str, Any] = {"cluster": cluster}
    if isinstance(config, RunConfig | CompareConfig) and config.trainer.precision == "auto":
        update["trainer"] = config.trainer.model_copy(update={"precision": precision})
    if isinstance(config, LayerRunConfig) and config.dtype == "auto":
        update["dtype"] = precision
    if isinstance(config, RunConfig):
        update["system"] = _with_defaults(config.system)
    if isinstance(config, LayerRunConfig | CompareConfig):
        update["systems"] = [_with_defaults(system) for system in config.systems]
    return config.model_copy(update=update)


def _with_defaults(system: SystemConfig) -> SystemConfig:
    options = registry.get(system.name).Options.model_validate(system.options)
    return SystemConfig(name=system.name, label=system.label, **options.model_dump(mode="json"))
