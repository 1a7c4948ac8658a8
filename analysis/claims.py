"""What holds of the papers' claims on our results: `python -m analysis.claims` writes REPRODUCTION.md.

`--json` prints one object for each test of each claim instead. `--results DIR` reads another folder than results/, and
`--with ID=FOLDER` takes one test's results from elsewhere, such as outputs/compare; both print only, unless `--write`
names a file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.errors import ResultsError, exit_code
from analysis.files import write_text
from analysis.ledger.entries import CLAIMS, read_claims
from analysis.ledger.page import page
from analysis.ledger.verdicts import Verdict, judge_all
from analysis.tables import NOTHING, aligned, with_interval

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "results", ROOT / "REPRODUCTION.md"


def format_verdicts(verdicts: Sequence[Verdict]) -> str:
    """One line each for a terminal."""
    rows = [
        {
            "status": row.verdict,
            "claim": row.id,
            "stated": row.claim.stated,
            "ours": with_interval(row.interval),
            "kind": row.kind or NOTHING,
        }
        for row in verdicts
    ]
    return aligned(pd.DataFrame(rows)) + "\n"


@exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line, with its exit code."""
    parser = argparse.ArgumentParser(prog="python -m analysis.claims", description=__doc__)
    parser.add_argument("--results", type=Path, help="folder of the results (default: results/)")
    parser.add_argument("--with", dest="instead", metavar="ID=FOLDER", action="append", default=[])
    parser.add_argument("--claims", type=Path, default=CLAIMS, help="another list of claims")
    parser.add_argument("--json", action="store_true", help="print the verdicts as JSON, write nothing")
    parser.add_argument("--write", type=Path, help="file to write (default: REPRODUCTION.md, of results/ alone)")
    given = parser.parse_args(arguments)
    claims = read_claims(given.claims)
    verdicts = judge_all(claims, given.results or RESULTS, dict(map(_pair, given.instead)))
    if given.json:
        print(json.dumps([row.as_json() for row in verdicts], indent=2, allow_nan=False))
        return
    print(format_verdicts(verdicts), end="")
    ours = given.results is None and not given.instead and given.claims == CLAIMS
    path = given.write or (PAGE if ours else None)
    if path is not None:
        write_text(path, page(verdicts))
        print(f"\nwritten: {path}")


def _pair(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not equals or not folder:
        raise ResultsError(f"--with {text}: must be ID=FOLDER. Fix: such as --with ta_moe_over_deepspeed/netns_2x2=...")
    return name, Path(folder).resolve()


if __name__ == "__main__":
    sys.exit(main())
