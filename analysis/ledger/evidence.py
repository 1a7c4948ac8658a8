"""A number for a claim, and what every statistic that gives one has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from analysis.ledger.results import Results
from analysis.statistics import Interval

NO_HARDWARE = "none"


@dataclass(frozen=True)
class Evidence:
    """A number for a claim.

    Attributes:
        interval: in the claim's unit; low = value = high where nothing was drawn at random.
        kind: `measured`, `modelled`, `simulated` or `fitted` (to the very number that the claim states).
        hardware: it was measured on; `none` where nothing was.
        notes: sentences on what the runs behind it did not share.
    """

    interval: Interval
    kind: str
    hardware: str
    notes: tuple[str, ...] = ()


class Statistic(BaseModel, ABC):
    """Base of all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @abstractmethod
    def evidence(self, results: Results) -> Evidence:
        """The number, from result files.

        Raises:
            Unusable: there is no result, or none that gives a number.
            ResultsError: files that contradict one another.
        """
