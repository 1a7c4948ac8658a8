"""A page's table of a layer benchmark: one system beside the best upstream package.

`python -m analysis.performance results/<folder> ...` prints it; `--write results/FINDINGS.md` puts it between the lines
`<!-- performance:begin -->` and `<!-- performance:end -->` and names the folders in the first.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from analysis.errors import ResultsError, exit_code
from analysis.files import write_text
from analysis.load import Samples, load_samples
from analysis.machine import machine_of
from analysis.statistics import Interval, bootstrap_mean_ratio, bootstrap_median, bootstrap_ratio
from analysis.tables import NOTHING, binary_bytes, markdown_row, significant

OURS = "flat"
BLOCK = re.compile(r"<!-- performance:begin(?P<folders>[^>\n]*) -->\n.*?<!-- performance:end -->", re.DOTALL)
"""The table in a page, with the folders that it is made of."""

HEAD = (
    "shape",
    f"{OURS}, ms",
    "floor / time",
    "speed over the best upstream",
    "best upstream",
    f"peak memory of {OURS}",
    "leanest upstream without drops",
)


@dataclass(frozen=True)
class Cell:
    """One system under one shape, with a time.

    Attributes:
        system, implementation: as in the results.
        times, floor: of every round, in s, [rounds]; the floor empty in a run of before there was one.
        peak_bytes: of the rank that held most.
        dropped_copies: of one step, over all ranks.
    """

    system: str
    implementation: str
    times: np.ndarray
    floor: np.ndarray
    peak_bytes: float
    dropped_copies: float


def performance_block(folders: Sequence[Path], root: Path) -> str:
    """The tables of some folders between their two markers.

    Args:
        folders: of layer benchmarks, published ones for a page; each gives a table for every workload.
        root: folder of the page, which links and marker are relative to.

    Raises:
        ResultsError: a folder without samples.
    """
    names = [Path(os.path.relpath(folder.resolve(), root.resolve())).as_posix() for folder in folders]
    tables = [table for folder, name in zip(folders, names, strict=True) for table in _tables(folder, name)]
    return "\n".join([f"<!-- performance:begin {' '.join(names)} -->", *tables, "<!-- performance:end -->"])


def _tables(folder: Path, name: str) -> Iterator[str]:
    samples = load_samples(folder)
    if samples.status != "done":
        raise ResultsError(f"{folder}: {samples.reason}. Fix: name the folder of a layer benchmark.")
    kind = str(samples.metadata.get("kind", "measured")).capitalize()
    for workload in dict.fromkeys([*samples.table["workload"], *samples.problems["workload"]]):
        head = f"{kind} under {workload} routing on {machine_of(folder)}; files in [{name}]({name}):"
        rows = [markdown_row(HEAD), markdown_row(["---"] * len(HEAD)), *_rows(samples, workload)]
        untimed = list(_untimed(samples, workload))
        yield "\n".join([head, "", *rows, "", *untimed, *([""] if untimed else [])])


def _rows(samples: Samples, workload: str) -> Iterator[str]:
    floors: list[tuple[np.ndarray, np.ndarray]] = []
    speeds: list[tuple[np.ndarray, np.ndarray]] = []
    shapes = _shapes(samples, workload)
    for shape in shapes:
        cells = cells_of(samples, shape, workload)
        upstream = [cell for cell in cells if cell.implementation == "upstream"]
        ours = next((cell for cell in cells if cell.system == OURS), None)
        best = min(upstream, key=lambda cell: np.median(cell.times), default=None)
        lean = [cell for cell in upstream if cell.dropped_copies == 0]
        leanest = min(lean, key=lambda cell: cell.peak_bytes, default=None)
        row = [shape, _reason(samples, shape, workload), NOTHING, NOTHING, "none ran", NOTHING, "none"]
        if ours is not None:
            row[1] = _text(bootstrap_median(ours.times * 1e3))
            row[5] = binary_bytes(ours.peak_bytes, 3)
            if len(ours.floor):
                floors.append((ours.floor, ours.times))
                row[2] = significant(bootstrap_ratio(*floors[-1]).value, 3)
        if best is not None:
            row[4] = best.system + (" (drops copies)" if best.dropped_copies else "")
        if ours is not None and best is not None:
            speeds.append((best.times, ours.times))
            row[3] = _text(bootstrap_ratio(*speeds[-1]))
        if leanest is not None:
            row[6] = f"{binary_bytes(leanest.peak_bytes, 3)} ({leanest.system})"
        yield markdown_row(row)
    if len(shapes) > 1 and (floors or speeds):
        floor = significant(bootstrap_mean_ratio(floors).value, 3) + _of(floors, shapes) if floors else NOTHING
        speed = _text(bootstrap_mean_ratio(speeds)) + _of(speeds, shapes) if speeds else NOTHING
        yield markdown_row(["geometric mean", "", floor, speed, "", "", ""])


def _of(pairs: Sequence[object], shapes: Sequence[str]) -> str:
    """What a mean leaves out, where it does."""
    return "" if len(pairs) == len(shapes) else f" (of {len(pairs)} of {len(shapes)} shapes)"


def _text(interval: Interval) -> str:
    value, low, high = (significant(number, 3) for number in interval)
    return f"{value} [{low}, {high}]"


def _shapes(samples: Samples, workload: str) -> list[str]:
    """In the order of the run: problems stand apart from numbers, so a shape without any number comes last."""
    declared = samples.metadata.get("shapes", {})
    told = [frame[frame["workload"] == workload]["shape"] for frame in (samples.table, samples.problems)]
    found = list(dict.fromkeys([*told[0], *told[1]]))
    return [*(shape for shape in declared if shape in found), *(shape for shape in found if shape not in declared)]


def cells_of(samples: Samples, shape: str, workload: str) -> list[Cell]:
    """The systems that have a time under one shape and workload."""
    table = samples.table
    own = table[(table["shape"] == shape) & (table["workload"] == workload)].sort_values("round")
    cells = []
    for (system, implementation), rows in own.groupby(["system", "implementation"], sort=False):
        values = {str(metric): group["value"].to_numpy() for metric, group in rows.groupby("metric")}
        if "step_time" in values:
            numbers = [max(values.get(metric, [np.nan])) for metric in ("peak_memory", "dropped_copies")]
            cells.append(
                Cell(system, implementation, values["step_time"], values.get("floor_time", np.empty(0)), *numbers)
            )
    return cells


def _reason(samples: Samples, shape: str, workload: str) -> str:
    """Why our system has no number there."""
    told = samples.problems
    rows = told[(told["shape"] == shape) & (told["workload"] == workload) & (told["system"] == OURS)]
    return "; ".join(f"{row.status}: {row.reason}" for row in rows.itertuples()) or "was not measured"


def _untimed(samples: Samples, workload: str) -> Iterator[str]:
    """One line for every system and reason, with the shapes under which it has no numbers."""
    told: dict[tuple[str, str], list[str]] = {}
    for row in samples.problems[samples.problems["workload"] == workload].itertuples():
        told.setdefault((str(row.system), f"{row.status}: {row.reason}"), []).append(str(row.shape))
    for (system, reason), shapes in told.items():
        yield f"- {system} has no numbers under {', '.join(shapes)}: {reason}"


def write_block(readme: Path, folders: Sequence[Path]) -> None:
    """Replace the table in a page.

    Raises:
        ResultsError: no markers in it, a folder without samples, or a write that failed.
    """
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if len(BLOCK.findall(text)) != 1:
        raise ResultsError(
            f"{readme}: must hold `<!-- performance:begin -->` and `<!-- performance:end -->` once, each in a line of "
            "its own. Fix: put the two lines where the table shall stand."
        )
    block = performance_block(folders, readme.parent)
    write_text(readme, BLOCK.sub(lambda _found: block, text))


@exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line, with its exit code."""
    parser = argparse.ArgumentParser(prog="python -m analysis.performance", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="folders with samples.parquet, such as results/h200x2")
    parser.add_argument("--write", type=Path, metavar="PAGE.md", help="replace the table in this file")
    options = parser.parse_args(arguments)
    if options.write is not None:
        write_block(options.write, options.folders)
        print(f"written: {options.write}")
    else:
        print(performance_block(options.folders, Path.cwd()))


if __name__ == "__main__":
    sys.exit(main())
