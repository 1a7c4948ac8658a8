"""The figures of `python -m analysis.figures` as HTML: for the page, and for notebooks, which show it by itself."""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from analysis.errors import ResultsError
from analysis.figures.__main__ import PAPERS
from analysis.figures.found import Found, Recipe
from analysis.ledger.entries import read_claims
from analysis.report.elements import details, picture, table, text
from analysis.style import png_alone


@dataclass(frozen=True)
class Group:
    """What one recipe drew.

    Attributes:
        name: of the recipe.
        pictures: PNG files by name.
        tables: CSV files by name.
        failure: why it drew no more, "" where it drew all.
    """

    name: str
    pictures: dict[str, bytes] = field(repr=False)  # which a notebook stores beside the HTML
    tables: dict[str, str] = field(repr=False)
    failure: str = ""


@dataclass(frozen=True)
class Gallery:
    """The figures of one paper; the last line of a notebook's cell shows it.

    Attributes:
        paper: its name.
        groups: one for each source.
        commands: that would make results to draw, told where there are none.
    """

    paper: str
    groups: Sequence[Group]
    commands: Sequence[str] = ()

    def __str__(self) -> str:
        """As HTML."""
        return "\n".join(self._lines())

    _repr_html_ = __str__

    def _lines(self) -> Iterator[str]:
        if not self.groups:
            how = " or ".join(f"<code>{text(command)}</code>" for command in self.commands)
            yield f"<p>Nothing of {text(self.paper)} here yet{f': run {how}' if how else ''}.</p>"
        for group in self.groups:
            yield f"<h4>{text(group.name)}</h4>"
            if group.failure:
                yield f'<p class="failure">Not drawn: {text(group.failure)}</p>'
            yield f'<div class="figures">{"".join(picture(png, name) for name, png in group.pictures.items())}</div>'
            yield from (details(f"{name}.csv", _as_table(name, content)) for name, content in group.tables.items())


def gallery(paper: str, found: Found, names: Collection[str] = ()) -> Gallery:
    """Draw the figures of a paper, or those of `suite` itself.

    Args:
        paper: of `analysis.figures.__main__.PAPERS`.
        found: of `look_into`.
        names: of the recipes to follow, such as a folder of results; none for all.
    """
    known = PAPERS[paper]
    recipes = [recipe for recipe in known.recipes(found) if not names or recipe.name in names]
    with tempfile.TemporaryDirectory() as folder, png_alone():
        groups = [_drawn(recipe, Path(folder) / str(index)) for index, recipe in enumerate(recipes)]
    tests = [test for claim in read_claims() if claim.paper == known.name for test in claim.tests]
    return Gallery(known.name, groups, list(dict.fromkeys(test.command for test in tests))[:2])


def _drawn(recipe: Recipe, folder: Path) -> Group:
    failure = ""
    try:
        recipe.write(folder)
    except ResultsError as error:
        failure = str(error)
    pictures = {path.stem: path.read_bytes() for path in sorted(folder.glob("*.png"))}
    tables = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.csv"))}
    return Group(recipe.name, pictures, tables, failure)


def _as_table(name: str, content: str) -> str:
    head, *rows = csv.reader(io.StringIO(content))
    return table(head, ([text(cell) for cell in row] for row in rows), name)
