"""Reads claims.yaml: what the papers claim, and what each claim is tested with. A verdict has no place in it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from analysis.errors import ResultsError
from analysis.ledger import comparisons, layers
from analysis.load import one_line

CLAIMS = Path(__file__).resolve().parents[1] / "claims.yaml"

AnyStatistic = Annotated[
    comparisons.Throughput
    | comparisons.ValidationLoss
    | comparisons.Replicas
    | comparisons.PartShare
    | comparisons.HarnessShare
    | layers.LayerTime
    | layers.Floor
    | layers.SimulatorError
    | layers.TableCell,
    Field(discriminator="statistic"),
]
"""All that a claim can be tested with, told apart by the key `statistic`."""


class Test(BaseModel):
    """One of our experiments that tests a claim.

    Attributes:
        where: a short name for the place, the end of the row's id.
        command: that makes the results.
        setting: what differs from the setting of the claim; empty where nothing does.
        measure: the statistic and the result files that it takes (`comparisons` and `layers` beside this file).
    """

    __test__ = False  # no pytest class
    model_config = ConfigDict(extra="forbid", frozen=True)

    where: str = Field(pattern=r"^[a-z0-9_]+$")
    command: str = Field(min_length=1)
    setting: str = ""
    measure: AnyStatistic


class Claim(BaseModel):
    """One claim.

    Attributes:
        id: names it for good.
        paper: whose it is; `suite` for the goals of this suite.
        says: it in a sentence.
        source: where it stands.
        stated_on: what it was measured on; empty for the suite's goals.
        unit: of the numbers here and of the statistics.
        at_least, at_most: the numbers that hold it, at least one of the two.
        no_effect: what would be measured if there were nothing to it; None where it has no direction.
        threshold: who set those numbers: the paper, or this suite where the paper gives none.
        untested: why no experiment tests it; empty where one does.
        tests: the experiments.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[a-z0-9_]+$")
    paper: str = Field(min_length=1)
    says: str = Field(min_length=1)
    source: str = Field(min_length=1)
    stated_on: str = ""
    unit: str = Field(min_length=1)
    at_least: float | None = None
    at_most: float | None = None
    no_effect: float | None = None
    threshold: str = Field(pattern=r"^(paper|ours.*)$")
    untested: str = ""
    tests: list[Test] = Field(default_factory=list)

    @model_validator(mode="after")
    def _whole(self) -> Claim:
        if self.at_least is None and self.at_most is None:
            raise ValueError("needs at_least, at_most or both")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"at_least={self.at_least} is above at_most={self.at_most}")
        if self.no_effect is not None and self.holds(self.no_effect):
            raise ValueError(f"no_effect={self.no_effect} must not hold the claim")
        if bool(self.tests) == bool(self.untested):
            raise ValueError("needs either tests or, in `untested`, the reason why there is none")
        twice = [name for name, count in Counter(test.where for test in self.tests).items() if count > 1]
        if twice:
            raise ValueError(f"has two tests of {twice[0]}")
        return self

    def holds(self, value: float) -> bool:
        """Whether a number is within at_least and at_most."""
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    @property
    def stated(self) -> str:
        """The numbers as text, such as `1.01 to 1.61 x`."""
        if self.at_least is not None and self.at_most is not None:
            return f"{self.at_least:g} to {self.at_most:g} {self.unit}"
        if self.at_least is not None:
            return f"at least {self.at_least:g} {self.unit}"
        return f"at most {self.at_most:g} {self.unit}"


class _Ledger(BaseModel):
    model_config = ConfigDict(extra="forbid")

    claims: list[Claim] = Field(min_length=1)


def read_claims(path: Path = CLAIMS) -> list[Claim]:
    """All claims, in the order of the file.

    Raises:
        ResultsError: the file can't be read, a key is unknown (such as a verdict), missing or wrong, or an id stands
            there twice.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ResultsError(f"{path}: can't be read ({one_line(error)[:120]}). Fix: mend its YAML.") from error
    try:
        claims = _Ledger.model_validate(content).claims
    except ValidationError as error:
        raise ResultsError(f"{path}: {_first(error, content)}") from error
    twice = [name for name, count in Counter(claim.id for claim in claims).items() if count > 1]
    if twice:
        raise ResultsError(f"{path}: id={twice[0]} stands there twice. Fix: give each claim an id of its own.")
    return claims


def _first(error: ValidationError, content: object) -> str:
    """The first problem of a file as key, value, rule and fix."""
    problem = error.errors()[0]
    place = list(problem["loc"])
    key = ".".join(str(part) for part in place)
    claims = content.get("claims") if isinstance(content, dict) else None
    if isinstance(claims, list) and len(place) > 1 and isinstance(place[1], int) and isinstance(claims[place[1]], dict):
        key = ".".join([str(claims[place[1]].get("id", f"claims.{place[1]}")), *(str(part) for part in place[2:])])
    rule = {
        "extra_forbidden": "is no key of a claim; verdicts are computed, never written down. Fix: remove it.",
        "missing": "is missing. Fix: give it.",
    }.get(problem["type"], f"{problem['msg'].removeprefix('Value error, ')}. Fix: see the other claims of this file.")
    value = "" if problem["type"] in ("missing", "value_error") else f"={str(problem['input'])[:60]}"
    return f"{key}{value}: {rule}"
