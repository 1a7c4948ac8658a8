"""All figures and tables of the papers' comparisons from result files: `python -m analysis.figures [PAPER ...]`.

Reads results/ and, where there is one, outputs/, or the folders that --results names, and writes PNG and PDF figures,
CSV tables and an index into outputs/figures, a folder for each paper and one for the suite itself.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from analysis.errors import ResultsError, exit_code
from analysis.figures import fsmoe, hiermoe, suite, swiftmoe, ta_moe
from analysis.figures.found import Found, Recipe, look_into
from analysis.figures.parts import write_claims
from analysis.files import write_text
from analysis.ledger.entries import Claim, read_claims
from analysis.ledger.verdicts import judge_all

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "outputs" / "figures"


class Paper(NamedTuple):
    """What is drawn of one paper: its name in claims.yaml, and its recipes."""

    name: str
    recipes: Callable[[Found], Iterator[Recipe]]


PAPERS = {
    "ta_moe": Paper("TA-MoE", ta_moe.recipes),
    "hiermoe": Paper("HierMoE", hiermoe.recipes),
    "swiftmoe": Paper("SwiftMoE", swiftmoe.recipes),
    "fsmoe": Paper("FSMoE", fsmoe.recipes),
    "suite": Paper("suite", suite.recipes),
}


class Made(NamedTuple):
    """A recipe that was followed, and why it was not, or "" when it was."""

    paper: str
    recipe: Recipe
    failure: str


def make(papers: Sequence[str], roots: Sequence[Path], out: Path) -> tuple[list[Made], Found]:
    """Write the figures and tables of some papers, and index.md; what was made, and what was found.

    Args:
        papers: of PAPERS.
        roots: folders of results; the claims are judged on the first.
        out: folder to write to.

    Raises:
        ResultsError: nothing to draw in any of the folders.
    """
    found = look_into(roots)
    made = []
    for paper in papers:
        own = list(PAPERS[paper].recipes(found))
        claims = [claim for claim in read_claims() if claim.paper == PAPERS[paper].name]
        own.append(Recipe("claims", roots[:1], partial(_write_claims, claims, roots[0])))
        for recipe in own:
            made.append(Made(paper, recipe, _follow(recipe, out / paper / recipe.name)))
            print(f"{paper}/{recipe.name}: {made[-1].failure or 'made'}", file=sys.stderr)
    write_text(out / "index.md", index(made, found, out))
    return made, found


def _write_claims(claims: Sequence[Claim], root: Path, out: Path) -> None:
    write_claims(judge_all(claims, root), out)


def _follow(recipe: Recipe, folder: Path) -> str:
    try:
        recipe.write(folder)
    except ResultsError as error:
        return str(error)
    return ""


def index(made: Sequence[Made], found: Found, out: Path) -> str:
    """index.md: every figure and table by paper, and what could not be drawn."""
    notes = {one.path: one.notes for one in found.comparisons}
    lines = [
        "# Figures and tables",
        "",
        "Made by `python -m analysis.figures` from the folders named below each title.",
    ]
    for paper in dict.fromkeys(one.paper for one in made):
        lines += ["", f"## {PAPERS[paper].name}"]
        own = [one for one in made if one.paper == paper]
        for name in dict.fromkeys(one.recipe.name for one in own):
            sources = [source for one in own if one.recipe.name == name for source in one.recipe.sources]
            lines += ["", f"### {name}", "", f"From {', '.join(f'`{path}`' for path in dict.fromkeys(sources))}."]
            lines += [f"\nNot alike: {note}" for path in dict.fromkeys(sources) for note in notes.get(path, ())]
            lines += [f"\nNot drawn: {one.failure}" for one in own if one.recipe.name == name and one.failure]
            files = sorted((out / paper / name).glob("*"))
            tables = [path.name for path in files if path.suffix in (".csv", ".md", ".txt")]
            lines += (
                ["", "Tables: " + ", ".join(f"[{file}]({paper}/{name}/{file})" for file in tables)] if tables else []
            )
            lines += [f"\n![{path.stem}]({paper}/{name}/{path.name})" for path in files if path.suffix == ".png"]
    lines += ["", "## Skipped", "", *(f"- {text}" for text in [*found.refused, *found.skipped] or ["nothing"])]
    return "\n".join(lines) + "\n"


def own_roots() -> list[Path]:
    """results/ and outputs/ as far as they are there, from here: tables and index.md name no folder of this machine."""
    roots = [Path(os.path.relpath(ROOT / name)) for name in ("results", "outputs")]
    return [path for path in roots if path.is_dir()]


@exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line, with its exit code."""
    parser = argparse.ArgumentParser(prog="python -m analysis.figures", description=__doc__)
    parser.add_argument("papers", nargs="*", metavar="PAPER", help=f"of {', '.join(PAPERS)} (default: all)")
    parser.add_argument("--results", type=Path, action="append", help="folder to read, may be given several times")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to (default: outputs/figures)")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.papers if name not in PAPERS]
    if unknown:
        raise ResultsError(f"{unknown[0]}: no such paper. Fix: name some of {', '.join(PAPERS)}, or none for all.")
    roots = given.results or own_roots()
    made, found = make(given.papers or list(PAPERS), roots, given.out)
    failed = [one for one in made if one.failure]
    print(f"written: {given.out}/index.md, figures and tables of {len(made) - len(failed)} of {len(made)} sources")
    told = [*found.refused, *(f"{one.paper}/{one.recipe.name}: {one.failure}" for one in failed)]
    if told:
        raise ResultsError("not drawn:\n" + "\n".join(f"  {line}" for line in told))


if __name__ == "__main__":
    sys.exit(main())
