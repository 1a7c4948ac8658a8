"""What changed between two folders of results: `python -m analysis.diff A B`, cell by cell.

A and B are two layer benchmarks, two comparisons, two folders of simulated or modelled tables, or two folders that hold
some of these under the same names: of two commits, two clusters, or two versions of a package. Prints the ratio of B to
A with its interval and whether it differs, for every cell that is not alike; `--write FILE` writes all cells as CSV.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.diff_cells import ALIKE, DIFFERS, UNKNOWN, Key, Measured, Side, compared, joined, side_of
from analysis.errors import ResultsError, exit_code
from analysis.files import write_text
from analysis.statistics import FEW, Interval
from analysis.tables import aligned, with_interval

COLUMNS = ["place", "system", "metric", "a", "b", "unit", "ratio", "low", "high", "verdict", "why"]
READING = (
    "B / A: of medians over rounds with a 95 % bootstrap interval, both sides resampled for themselves as they were "
    f"measured apart (up to {FEW} rounds: with the range of all ratios); of losses, drops and bytes seed by seed, with "
    "the range over seeds. A cell differs where that leaves out 1, a computed one where it is another number; one seed "
    "or one value can't tell. Where nothing changed, some 5 % of the cells with rounds differ by chance."
)


def diff(first: Path, second: Path) -> tuple[pd.DataFrame, list[str]]:
    """All cells of two folders of results.

    Args:
        first, second: A and B.

    Returns:
        Rows with COLUMNS, and sentences: on what was measured where the two sides are not alike, and on what only one
        of them has.

    Raises:
        ResultsError: a folder that is not there or empty, no cell that both have, results of several kinds under one
            name, or files that contradict one another.
    """
    sides = side_of(first), side_of(second)
    keys = [key for key in sides[0].cells if key in sides[1].cells]
    if not keys:
        told = [", ".join(sorted({place for place, _, _ in side.cells})[:4]) or "nothing" for side in sides]
        raise ResultsError(
            f"{first} and {second} have no cell in common: one holds {told[0]}, the other {told[1]}. Fix: name two "
            "benchmarks of the same shapes, two comparisons, or two folders of such with the same names."
        )
    for place, kind in sides[0].kinds.items():
        other = sides[1].kinds.get(place, kind)
        if kind != other:
            raise ResultsError(
                f"{place}: {kind} in {first} and {other} in {second}. Fix: such numbers don't belong side by side."
            )
    rows = [_row(key, sides[0].cells[key], sides[1].cells[key]) for key in keys]
    return pd.DataFrame(rows, columns=COLUMNS), [*_unlike(*sides), *_lonely(*sides)]


def _row(key: Key, first: Measured, second: Measured) -> dict[str, Any]:
    ratio, verdict, why = compared(first, second)
    place, system, metric = key
    medians = {"a": float(np.median(first.values)), "b": float(np.median(second.values))}
    number = dict(zip(("ratio", "low", "high"), ratio or (float("nan"),) * 3, strict=True))
    shared = {"place": place, "system": system, "metric": metric, "unit": first.unit}
    return shared | medians | number | {"verdict": verdict, "why": why}


def _unlike(first: Side, second: Side) -> Iterator[str]:
    """On what the two sides were measured, where that is not the same."""
    for name in dict.fromkeys([*first.told, *second.told]):
        said = [", ".join(sorted(side.told.get(name, {"not told"}))) for side in (first, second)]
        if said[0] != said[1]:
            yield f"{name}: {said[0]} in A, {said[1]} in B"


def _lonely(first: Side, second: Side) -> Iterator[str]:
    """What only one side has: whole systems with all their places in one sentence, single cells by name."""
    for own, other, name in ((first, second, "A"), (second, first, "B")):
        cells = {key[:2] for key in other.cells}
        whole: dict[str, list[str]] = {}
        for place, system in dict.fromkeys(key[:2] for key in own.cells):
            if (place, system) not in cells:
                whole.setdefault(system, []).append(place)
        for system, places in whole.items():
            yield f"only in {name}: {system}" + (f" under {'; '.join(places)}" if any(places) else "")
        for place, system, metric in own.cells:
            if (place, system, metric) not in other.cells and (place, system) in cells:
                yield f"only in {name}: {metric} of {joined(place, system)}"
    for side, name in ((first, "A"), (second, "B")):
        for (place, system), why in side.without.items():
            yield f"without numbers in {name}: {joined(place, system)}: {why}"


def format_diff(table: pd.DataFrame, notes: Sequence[str]) -> str:
    """For a terminal: the notes, cells that are not alike, and how many there are of each kind."""
    shown = table[table["verdict"] != ALIKE]
    cells = pd.DataFrame(
        {
            "place": shown["place"],
            "system": shown["system"],
            "metric": shown["metric"],
            "B / A": [with_interval(_interval(row), 4) for row in shown.itertuples()],
            "verdict": [f"{row.verdict} ({row.why})" if row.why else str(row.verdict) for row in shown.itertuples()],
        }
    )
    if not shown["place"].any():
        cells = cells.drop(columns="place")
    counts = table["verdict"].value_counts()
    told = ", ".join(f"{counts.get(verdict, 0)} {verdict}" for verdict in (DIFFERS, ALIKE, UNKNOWN))
    blocks = ["\n".join(notes)] if notes else []
    blocks += [aligned(cells, left=("place", "system", "metric", "verdict"))] if len(shown) else []
    blocks.append(f"{len(table)} cells: {told}.\n{READING}")
    return "\n\n".join(blocks) + "\n"


def _interval(row: Any) -> Interval | None:
    return Interval(row.ratio, row.low, row.high) if np.isfinite(row.ratio) else None


@exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line, with its exit code."""
    parser = argparse.ArgumentParser(prog="python -m analysis.diff", description=__doc__)
    parser.add_argument("first", type=Path, metavar="A", help="folder of results")
    parser.add_argument("second", type=Path, metavar="B", help="folder of results that ratios are of")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write all cells as CSV")
    given = parser.parse_args(arguments)
    table, notes = diff(given.first, given.second)
    print(format_diff(table, notes), end="")
    if given.write is not None:
        write_text(given.write, table.to_csv(index=False))
        print(f"\nwritten: {given.write}")


if __name__ == "__main__":
    sys.exit(main())
