"""Which entry points an experiment, a file of conf/experiment, is for: those that have every key it sets."""

from __future__ import annotations

from pathlib import Path

import yaml

from experiments.schemas import SCHEMAS, Kind

GROUP = "experiment"


def foreign_keys(path: Path, kind: Kind) -> list[str]:
    """What an experiment sets that an entry point does not have; empty when the experiment is for it.

    Args:
        path: of the experiment's YAML.
        kind: the entry point.

    Returns:
        Top-level keys and groups, each once, in the order of the file; those of experiments that it builds on first.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    chosen = [key for item in content.get("defaults", []) if isinstance(item, dict) for key in item]
    groups = [key.removeprefix("override ").strip().lstrip("/").partition("/")[0] for key in chosen]
    built_on = [item for item in content.get("defaults", []) if isinstance(item, str) and item != "_self_"]
    inherited = [key for name in built_on for key in foreign_keys(path.with_name(f"{name}.yaml"), kind)]
    keys = [*groups, *(key for key in content if key != "defaults")]
    own = [key for key in keys if key != "hydra" and key not in SCHEMAS[kind].model_fields]
    return list(dict.fromkeys([*inherited, *own]))


def experiments_for(kind: Kind, folder: Path) -> list[str]:
    """Names of the experiments that an entry point takes, sorted.

    Args:
        kind: the entry point.
        folder: with the group's folder in it, such as conf/.
    """
    return sorted(path.stem for path in (folder / GROUP).glob("*.yaml") if not foreign_keys(path, kind))
