"""What the notebooks share: the folder they read, a paper's claims as a table, a figure as a picture in a cell."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from analysis.claims import RESULTS
from analysis.ledger.entries import read_claims
from analysis.ledger.verdicts import judge_all
from analysis.style import DPI, suite_style
from analysis.tables import with_interval

COLUMNS = ["claim", "stated", "ours", "unit", "verdict", "kind", "hardware", "reason"]


def folder_of(results: str) -> Path:
    """The folder of results that a notebook's parameter names; the published one for ""."""
    return Path(results).resolve() if results else RESULTS


def verdicts_of(paper: str, root: Path) -> pd.DataFrame:
    """What holds of a paper's claims, a row for each test of one, text cells in COLUMNS.

    Args:
        paper: as in claims.yaml, `suite` for this suite's own goals.
        root: folder of results.

    Raises:
        ResultsError: no such folder, or result files that contradict one another.
    """
    judged = judge_all([claim for claim in read_claims() if claim.paper == paper], root)
    rows = [
        (
            row.claim.says,
            row.claim.stated,
            with_interval(row.interval),
            row.claim.unit,
            row.verdict,
            row.kind,
            row.hardware,
            row.reason,
        )
        for row in judged
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


class Picture:
    """A figure that the last line of a notebook's cell shows."""

    def __init__(self, figure: Figure) -> None:
        written = io.BytesIO()
        figure.savefig(written, dpi=DPI, format="png")
        self._png = written.getvalue()

    def _repr_png_(self) -> bytes:
        return self._png


def picture(draw: Callable[..., Figure], *arguments: object) -> Picture:
    """Draw a figure in the suite's style.

    Args:
        draw: such as `analysis.plots.loss.loss_figure`.
        arguments: that it takes.
    """
    with suite_style():
        return Picture(draw(*arguments))
