"""The command line of the four entry points: Hydra, with every mistake told before anything runs or is written.

Hydra finds one mistake at a time, at the cell of a sweep where it stands. Here the overrides of all cells are parsed,
composed and validated first; then Hydra does what it was asked for.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, ValueType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config import Kind, find_problems, load
from experiments.experiment_files import GROUP, experiments_for, foreign_keys
from experiments.launch import RankFailure, is_main_process
from experiments.problems import did_you_mean
from moe.errors import ConfigError, Problem, SuiteError

CONF = Path(__file__).resolve().parent.parent / "conf"
HYDRA_VERSION_BASE = "1.3"
EXIT_CONFIG, EXIT_FAILED, EXIT_INTERRUPTED = 2, 1, 130

Task = Callable[[Any, list[str]], None]


def hydra_main(kind: Kind) -> Callable[[Task], Callable[[], None]]:
    """Make `function(config, overrides)` the main function of an entry point.

    The config has been validated (`experiments.config.load`), the overrides are those of the command line, in a sweep
    those of the run. A `SuiteError` becomes a short list on stderr and exit code 2 (configuration) or 1 (any other);
    the other runs of a sweep still take place. Ctrl-C ends a sweep, with exit code 130.

    Args:
        kind: name of the primary config, conf/<kind>.yaml.
    """

    def decorate(function: Task) -> Callable[[], None]:
        failures: list[SuiteError] = []

        @functools.wraps(function)
        def task(composed: DictConfig) -> None:
            settings = HydraConfig.get()
            overrides = [override.removeprefix("++") for override in settings.overrides.task]
            if settings.mode is RunMode.MULTIRUN:
                _say(f"run {settings.job.num + 1} of the sweep: {' '.join(overrides)}", sys.stdout)
            try:
                function(load(kind, plain(composed)), overrides)
            except SuiteError as error:
                if settings.runtime.choices["hydra/launcher"] != "basic":
                    raise  # in a process of another job, which has to say by itself that it failed
                _say(error_text(error), sys.stderr)
                if isinstance(error, RankFailure) and error.kind == "interrupted":
                    raise KeyboardInterrupt from error  # the rest of a sweep was stopped too
                failures.append(error)

        @functools.wraps(function)
        def main() -> None:
            failures.clear()
            try:
                with _arguments([sys.argv[0], *check_arguments(kind, sys.argv[1:])]):
                    hydra.main(config_path=str(CONF), config_name=kind, version_base=HYDRA_VERSION_BASE)(task)()
            except SuiteError as error:
                failures.append(error)
                _say(error_text(error), sys.stderr)
            except KeyboardInterrupt as stop:
                if stop.__cause__ is None:
                    _say("interrupted", sys.stderr)
                sys.exit(EXIT_INTERRUPTED)
            if failures:
                sys.exit(EXIT_CONFIG if any(isinstance(error, ConfigError) for error in failures) else EXIT_FAILED)

        return main

    return decorate


def compose(kind: str, overrides: Sequence[str] = (), extra_folder: str | None = None) -> dict[str, Any]:
    """The composed config as plain dicts, not yet validated.

    Args:
        kind: name of the primary config.
        overrides: as on the command line, without sweeps.
        extra_folder: one more folder of config groups.

    Raises:
        HydraException: an override that Hydra can't apply.
    """
    with _composer():
        return _compose(kind, list(overrides), extra_folder)


def compose_cells(kind: Kind, overrides: Sequence[str]) -> list[tuple[list[str], dict[str, Any]]]:
    """The runs of a sweep: for each its overrides and its composed config, checked but not yet settled.

    Args:
        kind: name of the primary config.
        overrides: as on the command line, `key=a,b` for several values.

    Raises:
        ConfigError: with the problems of all overrides and of all runs.
    """
    checker = _Checker(kind, None)
    with _composer():
        problems = checker.check(kind, list(overrides), True)
    if problems:
        raise ConfigError(*problems)
    return [([text.removeprefix("++") for text in cell], composed) for cell, composed in checker.composed]


def plain(composed: DictConfig) -> dict[str, Any]:
    """A composed config as dicts, lists and scalars, interpolations resolved."""
    return cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))


def error_text(error: Exception) -> str:
    """What the user reads: for a config one numbered line a problem, else the message."""
    if not isinstance(error, ConfigError):
        return str(error)
    count = len(error.problems)
    title = "1 problem" if count == 1 else f"{count} problems"
    return "\n".join([f"{title} in the configuration:", *(f"  {i}. {p}" for i, p in enumerate(error.problems, 1))])


def check_arguments(kind: Kind, arguments: Sequence[str]) -> list[str]:
    """Check a command line without running it.

    Args:
        kind: name of the primary config.
        arguments: what follows the program's name.

    Returns:
        The arguments for Hydra; `key=value` reads `++key=value`, so that keys which a system's options or the schema
        know but no YAML lists can be given too. That they exist was checked here.

    Raises:
        ConfigError: with the problems of all overrides and of all cells of a sweep.
    """
    flags = get_args_parser().parse_args(list(arguments))
    if flags.help or flags.hydra_help or flags.shell_completion or flags.info or flags.experimental_rerun:
        return list(arguments)
    checker = _Checker(flags.config_name or kind, flags.config_dir)
    with _composer():
        problems = checker.check(kind, flags.overrides, flags.multirun or "hydra.mode=MULTIRUN" in flags.overrides)
    if problems:
        raise ConfigError(*problems)
    return [checker.for_hydra.get(argument, argument) for argument in arguments]


class _Checker:
    """Checks the overrides of one command line; to be used inside `_composer`."""

    def __init__(self, primary: str, extra_folder: str | None) -> None:
        self.primary = primary
        self.extra_folder = extra_folder
        self.for_hydra: dict[str, str] = {}
        self.bad_groups: set[str] = set()
        self.composed: list[tuple[list[str], dict[str, Any]]] = []

    def check(self, kind: Kind, overrides: list[str], multirun: bool) -> list[Problem]:
        """All problems of these overrides, each told once."""
        problems: list[Problem] = []
        axes: list[list[str]] = []  # for every good override, its values, each as an override
        for text in overrides:
            try:
                override = self._parser().parse_override(text)
            except HydraException as error:
                rule = f"can't be read ({str(error).splitlines()[0]})"
                problems.append(Problem(text.partition("=")[0], text.partition("=")[2], rule, "write key=value"))
                continue
            found = [*self._sweep_problems(override, multirun), *self._group_problems(kind, override)]
            problems += found
            if not found:
                axes.append(self._cells(override, text))
        for cell in itertools.product(*axes):
            problems += self._cell_problems(kind, list(cell))
        return list({str(problem): problem for problem in problems}.values())

    def _parser(self) -> OverridesParser:
        return OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())

    def _files(self, group: str) -> list[str]:
        """Choices of a group; empty when there is no such group."""
        loader = GlobalHydra.instance().config_loader()
        return loader.get_group_options(group, overrides=_search_path(self.extra_folder))

    def _is_group(self, key: str) -> bool:
        return bool(self._files(key))

    def _cells(self, override: Override, text: str) -> list[str]:
        """The override once for every value it sweeps over, in the form that goes to Hydra."""
        prefix = ""
        is_value = not override.is_hydra_override() and not self._is_group(override.key_or_group)
        if override.type is OverrideType.CHANGE and is_value:
            prefix, self.for_hydra[text] = "++", f"++{text}"
        if not override.is_sweep_override():
            return [prefix + text]
        return [f"{prefix}{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]

    def _sweep_problems(self, override: Override, multirun: bool) -> Iterator[Problem]:
        if not override.is_sweep_override():
            return
        key, value = override.key_or_group, override.get_value_string()
        if not override.is_discrete_sweep():
            yield Problem(key, value, "has no list of values to run", "list them: key=a,b, choice(a,b) or range(0,3)")
        elif not multirun:
            could_be_list = override.value_type is ValueType.SIMPLE_CHOICE_SWEEP and not self._is_group(key)
            fix = "add -m to run each" + (f", or write {key}=[{value}] for a list" if could_be_list else "")
            yield Problem(key, value, "is several values, and this is one run", fix)

    def _group_problems(self, kind: Kind, override: Override) -> Iterator[Problem]:
        """A choice that its group does not have, or a group or an experiment that this entry point does not take."""
        group = override.key_or_group
        if not self._is_group(group) or override.type is OverrideType.DEL:
            return
        if override.type is OverrideType.CHANGE and group not in self._choices:
            groups = sorted(name for name in self._choices if not name.startswith("hydra/"))
            rule = f"experiments.{self.primary} takes no such group"
            fix = did_you_mean(group, groups, "groups")
            yield Problem(group, override.get_value_string(), rule, fix)
            self.bad_groups.add(group)
            return
        options = self._files(group)
        values = list(override.sweep_iterator()) if override.is_discrete_sweep() else [override.value()]
        for choice in itertools.chain.from_iterable(v if isinstance(v, list) else [v] for v in values):
            if choice not in options and not (choice is None and self._choices.get(group) is None):
                shown = "null" if choice is None else choice
                fix = did_you_mean(str(shown), options, f"choices of {group}")
                yield Problem(group, shown, f"there is no conf/{group}/{shown}.yaml", fix)
                self.bad_groups.add(group)
            elif group == GROUP and choice is not None:
                yield from self._experiment_problems(kind, str(choice))

    def _experiment_problems(self, kind: Kind, choice: str) -> Iterator[Problem]:
        """An experiment of another entry point, which Hydra would fail on with a key amid its file."""
        folders = [*([Path(self.extra_folder)] if self.extra_folder else []), CONF]
        path = next(path for folder in folders if (path := folder / GROUP / f"{choice}.yaml").is_file())
        if keys := foreign_keys(path, kind):
            rule = f"is for another entry point: experiments.{kind} has no {', '.join(keys)}"
            mine = sorted({name for folder in folders for name in experiments_for(kind, folder)})
            yield Problem(GROUP, choice, rule, f"the experiments of experiments.{kind} are {', '.join(mine)}")
            self.bad_groups.add(GROUP)

    def _cell_problems(self, kind: Kind, overrides: list[str]) -> list[Problem]:
        """Problems of one run.

        After a wrong group choice the group's default stands in for it, so that problems elsewhere are told as well;
        but what the default does not go together with is no problem of the user's.
        """
        try:
            composed = _compose(self.primary, overrides, self.extra_folder)
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            reason = " ".join(str(error.__cause__ or error).split("\n")[0].split())
            rule = f"can't be composed ({reason})"
            return [Problem("overrides", " ".join(overrides), rule, "see --cfg job for the keys")]
        self.composed.append((overrides, composed))
        problems = find_problems(kind, composed)
        if not self.bad_groups:
            return problems
        alone = find_problems(kind, composed, fields_only=True)
        given = {override.lstrip("+~").partition("=")[0] for override in overrides}
        unsure = bool(self.bad_groups & {"cluster", "experiment"})  # every group is held against the cluster
        return [
            problem
            for problem in problems
            if (problem in alone and problem.key in given)
            or not (unsure or problem.key.split(".")[0] in self.bad_groups)
        ]

    @functools.cached_property
    def _choices(self) -> Any:
        """What the primary config chooses for each group that it takes."""
        folder = _search_path(self.extra_folder)
        return hydra.compose(self.primary, folder, return_hydra_config=True).hydra.runtime.choices


def _search_path(extra_folder: str | None) -> list[str]:
    return [f"hydra.searchpath=[file://{Path(extra_folder).absolute()}]"] if extra_folder else []


def _compose(kind: str, overrides: list[str], extra_folder: str | None) -> dict[str, Any]:
    return plain(hydra.compose(kind, [*overrides, *_search_path(extra_folder)]))


@contextmanager
def _composer() -> Iterator[None]:
    """Hydra, ready to compose from conf/, whether or not it is in use already, as it is inside an entry point."""
    in_use = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base=HYDRA_VERSION_BASE):
            yield
    finally:
        GlobalHydra.instance().hydra = in_use


@contextmanager
def _arguments(argv: list[str]) -> Iterator[None]:
    """Hydra's main reads `sys.argv`."""
    before, sys.argv = sys.argv, argv
    try:
        yield
    finally:
        sys.argv = before


def _say(text: str, stream: Any) -> None:
    """Print on one rank only, however many torchrun or srun started."""
    if is_main_process():
        print(text, file=stream, flush=True)
