"""REPRODUCTION.md: every claim with its verdict, what ours was measured on, and how to measure it again."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from analysis.ledger.evidence import NO_HARDWARE
from analysis.ledger.verdicts import RULE, VERDICTS, Verdict
from analysis.tables import NOTHING, markdown_row, with_interval

HEAD = ("claim", "stated", "ours", "verdict", "kind", "hardware")
_COMMIT = re.compile(r"\b[0-9a-f]{40}\b")
TITLE = "What of the papers' claims holds here"
INTRODUCTION = (
    "`python -m analysis.claims` writes this page from the result files in [results](results) and the claims in "
    "[analysis/claims.yaml](analysis/claims.yaml); a test holds that it is up to date. No verdict is typed by hand. A "
    "verdict is on our setting, which is hardly ever the paper's: read it with the hardware beside it and the setting "
    "below the table. Kind says whether our number is measured, modelled or simulated."
)


def page(verdicts: Sequence[Verdict]) -> str:
    """The whole page, in Markdown."""
    papers = list(dict.fromkeys(row.claim.paper for row in verdicts))
    lines = [f"# {TITLE}", "", INTRODUCTION, "", RULE, "", *_counts(verdicts, papers)]
    for paper in papers:
        own = [row for row in verdicts if row.claim.paper == paper]
        lines += ["", f"## {_title(paper)}", "", markdown_row(HEAD), markdown_row(["---"] * len(HEAD))]
        lines += [markdown_row(_cells(row)) for row in own]
        for claim_id in dict.fromkeys(row.claim.id for row in own):
            lines += ["", *_details([row for row in own if row.claim.id == claim_id])]
    machines = dict.fromkeys(row.hardware for row in verdicts if row.hardware and row.hardware != NO_HARDWARE)
    lines += ["", "## Hardware", "", *(f"- {machine}" for machine in sorted(machines))] if machines else []
    return "\n".join(lines) + "\n"


def _title(paper: str) -> str:
    return "The suite's own goals" if paper == "suite" else paper


def _counts(verdicts: Sequence[Verdict], papers: Sequence[str]) -> Iterator[str]:
    yield markdown_row(["tests of", *VERDICTS])
    yield markdown_row(["---"] * (1 + len(VERDICTS)))
    for paper in papers:
        found = Counter(row.verdict for row in verdicts if row.claim.paper == paper)
        yield markdown_row([_title(paper), *(str(found[verdict]) for verdict in VERDICTS)])


def _cells(row: Verdict) -> list[str]:
    number = with_interval(row.interval)
    number += f" {row.claim.unit}" if number != NOTHING else ""
    hardware = row.hardware.split(" (")[0] or NOTHING  # in full below
    return [row.id, row.claim.stated, number, row.verdict, row.kind or NOTHING, hardware]


def _details(rows: Sequence[Verdict]) -> Iterator[str]:
    """One claim, with each of its tests."""
    claim = rows[0].claim
    where = f"; on {claim.stated_on}" if claim.stated_on else ""
    threshold = "" if claim.threshold == "paper" else f" Threshold: {claim.threshold}."
    yield f"**{claim.id}**: {claim.says} ({claim.source}{where}).{threshold}"
    yield ""
    for row in rows:
        if row.test is None:
            yield f"- {row.verdict}: {row.reason}."
            continue
        told = [f"`{row.test.command}`", *([row.test.setting] if row.test.setting else [])]
        told += [f"{row.verdict}: {row.reason}"] if row.reason else []
        told += [_COMMIT.sub(lambda commit: commit[0][:10], note.rstrip(".")) for note in row.notes]
        yield f"- {row.test.where}: {'. '.join(told)}."
