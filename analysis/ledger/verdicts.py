"""The verdict on a claim: one rule, a number from result files, and what it was measured on. Nobody types one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from analysis.errors import ResultsError
from analysis.ledger.entries import Claim, Test
from analysis.ledger.evidence import Evidence
from analysis.ledger.results import Results, Unusable
from analysis.statistics import Interval

REPRODUCED, PARTLY, NOT_REPRODUCED = "reproduced", "partly", "not reproduced"
NOT_TESTED, REFUSED = "not tested here", "refused"
VERDICTS = (REPRODUCED, PARTLY, NOT_REPRODUCED, NOT_TESTED, REFUSED)

RULE = (
    "A number stands with its 95 % bootstrap interval over rounds, or the range over at most five seeds. "
    "**reproduced**: all of the interval is within the numbers of the claim. **partly**: it is not, but all of it lies "
    "on their side of no effect, so that the direction holds and the size does not (more than a range that the paper "
    "saw is another size, too); of a claim without a direction: the number is within, its interval is not. **not "
    "reproduced**: neither, which can also mean that the interval is too wide to tell. **refused**: a system that the "
    "claim needs refused to run. **not tested here**: there is no result, none that can be used, or a number that was "
    "fitted to the very one that is claimed."
)
"""How a verdict comes about; `verdict_of` does what this says."""


@dataclass(frozen=True)
class Verdict:
    """A claim, how one experiment tests it, and what came out.

    Attributes:
        claim, test: as in claims.yaml; no test where none is named.
        verdict: one of `VERDICTS`.
        interval: None where there is no number.
        kind, hardware: of the number; empty without one.
        reason: why there is no number, or no verdict on it.
        notes: sentences on what the runs behind the number did not share.
    """

    claim: Claim
    test: Test | None
    verdict: str
    interval: Interval | None = None
    kind: str = ""
    hardware: str = ""
    reason: str = ""
    notes: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The claim's id, and where it was tested."""
        return f"{self.claim.id}/{self.test.where}" if self.test is not None else self.claim.id

    def as_json(self) -> dict[str, Any]:
        """For `--json`: numbers or null."""
        numbers = self.interval._asdict() if self.interval is not None else dict.fromkeys(Interval._fields)
        return {
            "id": self.id,
            "paper": self.claim.paper,
            "verdict": self.verdict,
            **numbers,
            "unit": self.claim.unit,
            "kind": self.kind or None,
            "hardware": self.hardware or None,
            "says": self.claim.says,
            "stated": self.claim.stated,
            "stated_on": self.claim.stated_on or None,
            "setting": (self.test.setting or None) if self.test is not None else None,
            "reason": self.reason or None,
        }


def verdict_of(claim: Claim, interval: Interval) -> str:
    """The verdict on a number, see `RULE`."""
    ends = [min(interval.low, interval.value), max(interval.high, interval.value)]
    if all(map(claim.holds, ends)):
        return REPRODUCED
    if claim.no_effect is None:
        return PARTLY if claim.holds(interval.value) else NOT_REPRODUCED
    above = claim.at_least is not None and claim.at_least > claim.no_effect
    beyond = ends[0] > claim.no_effect if above else ends[1] < claim.no_effect
    return PARTLY if beyond else NOT_REPRODUCED


def judge(claim: Claim, test: Test, results: Results) -> Verdict:
    """One test of a claim.

    Raises:
        ResultsError: result files that contradict one another.
    """
    try:
        evidence = test.measure.evidence(results)
    except Unusable as reason:
        return Verdict(claim, test, REFUSED if reason.refused else NOT_TESTED, reason=str(reason))
    if not all(map(isfinite, evidence.interval)):
        return Verdict(claim, test, NOT_TESTED, reason="the statistic is no finite number")
    return _on(claim, test, evidence)


def _on(claim: Claim, test: Test, evidence: Evidence) -> Verdict:
    told = (evidence.interval, evidence.kind, evidence.hardware)
    if evidence.kind == "fitted":
        reason = "our number was fitted to the one that is claimed, and so is no evidence"
        return Verdict(claim, test, NOT_TESTED, *told, reason=reason, notes=evidence.notes)
    return Verdict(claim, test, verdict_of(claim, evidence.interval), *told, notes=evidence.notes)


def judge_all(claims: Sequence[Claim], root: Path, instead: Mapping[str, Path] | None = None) -> list[Verdict]:
    """All tests of all claims, in their order; a claim without a test has one row.

    Args:
        claims: of claims.yaml.
        root: folder of the results.
        instead: by a test's id the folder that it reads in place of its own.

    Raises:
        ResultsError: no such folder, an id that no test has, or result files that contradict one another.
    """
    if not root.is_dir():
        raise ResultsError(f"{root}: there is no such folder. Fix: name a folder of results, such as results.")
    return list(_judged(claims, Results(root), _replaced(claims, instead or {})))


def _judged(claims: Sequence[Claim], results: Results, instead: Mapping[str, Test]) -> Iterator[Verdict]:
    for claim in claims:
        if claim.untested:
            yield Verdict(claim, None, NOT_TESTED, reason=claim.untested)
        for test in claim.tests:
            yield judge(claim, instead.get(f"{claim.id}/{test.where}", test), results)


def _replaced(claims: Sequence[Claim], instead: Mapping[str, Path]) -> dict[str, Test]:
    """The tests that read another folder, by id."""
    tests = {f"{claim.id}/{test.where}": test for claim in claims for test in claim.tests}
    replaced = {}
    for name, folder in instead.items():
        if name not in tests:
            close = [known for known in tests if known.split("/")[0] == name.split("/")[0]] or list(tests)
            raise ResultsError(f"--with {name}: no test has this id. Fix: use one such as {', '.join(close[:4])}.")
        if not folder.exists():
            raise ResultsError(f"--with {name}={folder}: there is no such folder. Fix: run {tests[name].command}")
        measure = tests[name].measure
        key = next(key for key in ("folder", "table") if key in type(measure).model_fields)
        replaced[name] = tests[name].model_copy(update={"measure": measure.model_copy(update={key: str(folder)})})
    return replaced
