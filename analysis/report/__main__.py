"""One self-contained HTML page of a folder of results: `python -m analysis.report outputs/`.

Writes report.html into the folder: summary tables, figures, the papers' claims, where the tokens of single runs went
(with a slider over the steps), and every run with its manifest. It asks no network for anything.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.claims import RESULTS
from analysis.errors import ResultsError, exit_code
from analysis.figures.__main__ import PAPERS
from analysis.figures.found import Found, look_into
from analysis.files import write_text
from analysis.ledger.entries import read_claims
from analysis.ledger.verdicts import judge_all
from analysis.report.elements import bullets, details, text
from analysis.report.gallery import gallery
from analysis.report.page import VIEWER, Section, page
from analysis.report.routing import viewer_data
from analysis.report.runs import Entry, entries, runs_table
from analysis.report.summaries import claims, summaries

FILE = "report.html"


def write_report(root: Path, out: Path, run: str = "", judged: Path | None = None) -> list[str]:
    """Write the page.

    Args:
        root: folder of results, such as outputs/.
        out: the HTML file.
        run: name of the run whose routing is shown first; "" for the first.
        judged: folder of the results that the claims are judged on, `root` itself included; None for no claims.

    Returns:
        Sentences on what was skipped.

    Raises:
        ResultsError: nothing to show, no such run, or a write that failed.
    """
    found, runs, refused = _look(root)
    data, missing = viewer_data(runs, run)
    galleries = {paper: gallery(paper, found) for paper in PAPERS}
    failures = [
        f"{paper}/{group.name}: {group.failure}"
        for paper, one in galleries.items()
        for group in one.groups
        if group.failure
    ]
    figures = "\n".join(f"<h3>{text(one.paper)}</h3>\n{one}" for one in galleries.values() if one.groups)
    skipped = list(dict.fromkeys([*refused, *found.refused, *found.skipped, *failures]))
    verdicts = claims(judge_all(read_claims(), judged), judged) if judged is not None else ""
    no_claims = "<p>No folder of published results lies beside this package; name one with <code>--claims</code>.</p>"
    sections = [
        Section("summary", "Summary", summaries(found)),
        Section("figures", "Figures", figures or "<p>Nothing to draw yet.</p>"),
        Section("routing", "Routing and link traffic", VIEWER + (_not_shown(missing) if missing else "")),
        Section("claims", "The papers' claims", verdicts or no_claims),
        Section("runs", "Runs and their manifests", runs_table(runs)),
        Section("skipped", "Skipped", bullets(skipped) if skipped else "<p>Nothing.</p>"),
    ]
    write_text(out, page(f"Report on {root.resolve().name}", _lead(found, runs), sections, data))
    return skipped


def _look(root: Path) -> tuple[Found, list[Entry], list[str]]:
    """What there is to draw, every run, and sentences on those whose files contradict one another."""
    if not root.is_dir():
        raise ResultsError(f"{root}: there is no such folder. Fix: name a folder of results, such as outputs.")
    runs, refused = entries(root)
    try:
        return look_into([root]), runs, refused
    except ResultsError:
        if not any(entry.run.is_done for entry in runs):
            raise
        return Found(), runs, refused  # single runs, of which no figure is made


def _not_shown(missing: Sequence[str]) -> str:
    return details(f"{len(missing)} of the runs are not shown", bullets(missing))


def _lead(found: Found, runs: Sequence[Entry]) -> str:
    trained = [entry for entry in runs if entry.what == "training"]
    done = sum(entry.status == "done" for entry in trained)
    counts = (
        (len(found.comparisons), "comparison"),
        (len(found.layers), "layer benchmark"),
        (len(trained), "training run"),
    )
    told = [f"{count} {name}{'s' * (count != 1)}" for count, name in counts if count]
    return f"{', '.join(told)}, {done} of them finished." if trained else f"{', '.join(told)}."


@exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line, with its exit code."""
    parser = argparse.ArgumentParser(prog="python -m analysis.report", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of results, such as outputs")
    parser.add_argument("--out", type=Path, help=f"file to write (default: {FILE} in the folder)")
    parser.add_argument("--run", default="", help="name of the run whose routing is shown first")
    parser.add_argument("--claims", type=Path, help="folder that the claims are judged on (default: results/)")
    given = parser.parse_args(arguments)
    out = given.out or given.folder / FILE
    judged = given.claims or (RESULTS if RESULTS.is_dir() else None)
    skipped = write_report(given.folder, out, given.run, judged)
    print(f"written: {out}")
    for sentence in skipped:
        print(f"skipped: {sentence}")


if __name__ == "__main__":
    sys.exit(main())
