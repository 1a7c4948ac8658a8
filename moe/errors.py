"""The suite's one exception family. A user's mistake is a `ConfigError`; our own broken invariant is an `assert`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class SuiteError(Exception):
    """Base of every error that the suite raises on purpose; its text is meant for the user."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration: the full key, its value, the rule it breaks, and how to mend it."""

    key: str
    value: Any
    rule: str
    fix: str

    def __str__(self) -> str:
        return f"{self.key}={self.value}: {self.rule}. Fix: {self.fix}"


class ConfigError(SuiteError):
    """All problems of one configuration, told at once.

    Args:
        problems: what is wrong, in the order in which a user reads the config. Must not be empty.
    """

    def __init__(self, *problems: Problem) -> None:
        assert problems, "a ConfigError without a problem"
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in problems))


class Refused(SuiteError):
    """A system says that it can't run this combination; becomes a row with status `refused` in the results.

    Args:
        reasons: plain sentences, at least one.
    """

    def __init__(self, *reasons: str) -> None:
        assert reasons, "a refusal without a reason"
        self.reasons = list(reasons)
        super().__init__(" ".join(reasons))
