"""Tables of papers, simulated from their own constants: `python -m experiments.simulate table5`.

Prints the numbers that the paper states beside ours; all of them go to outputs/simulate/<name>.csv. Of FSMoE
(arXiv 2501.10714): table2, table5, fig5, fig6, fig7, fig8, and contention, how much of table 5 hangs on the constant
that was fitted to it; `all` for every one. A row's kind says how ours came to be: simulated, modelled (by formulas
alone), or fitted to the very number beside it. Not modelled: uneven routing, skew between ranks (one rank stands for
all), and collectives that take streaming multiprocessors from the computation beside them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from analysis.errors import exit_code
from analysis.files import write_text
from experiments.fsmoe_models import figure_6_rows, figure_7_rows, figure_8_rows
from experiments.fsmoe_tables import Row, compared, contention_rows, figure_5_rows, table_2_rows, table_5_rows

TABLES: dict[str, Callable[[], list[Row]]] = {
    "table5": table_5_rows,
    "contention": contention_rows,
    "table2": table_2_rows,
    "fig5": figure_5_rows,
    "fig6": figure_6_rows,
    "fig7": figure_7_rows,
    "fig8": figure_8_rows,
}
"""What can be simulated, by the name that a user gives."""


def printed(rows: Sequence[Row]) -> str:
    """Rows as text, one a line, with the ratio of ours to what is stated."""
    lines = [f"{'testbed':8}{'costs':27}{'paper':>8}{'ours':>8}{'ratio':>8}  {'kind':11}quantity"]
    for row in rows:
        paper, ours = row["paper"], row["ours"]
        stated = "-" if paper is None else f"{paper:.4g}"
        ratio = f"{ours / paper:.3f}" if paper else "-"
        where = f"{row['testbed']:8}{row['costs']:27}"
        lines.append(f"{where}{stated:>8}{ours:>8.4g}{ratio:>8}  {row['kind']:11}{row['quantity']}, {row['unit']}")
    return "\n".join(lines)


@exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line, with its exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.simulate", description=__doc__)
    parser.add_argument("name", choices=[*TABLES, "all"], help="what to simulate")
    parser.add_argument("--folder", type=Path, default=Path("outputs/simulate"), help="where the CSV goes")
    given = parser.parse_args(arguments)
    for name in TABLES if given.name == "all" else [given.name]:
        started = time.perf_counter()
        rows = TABLES[name]()
        path = given.folder / f"{name}.csv"
        write_text(path, pd.DataFrame(rows).to_csv(index=False))
        if stated := compared(rows):
            print(printed(stated))
        seconds = time.perf_counter() - started
        print(f"written: {path} ({len(rows)} rows, {len(stated)} with a number of the paper's; {seconds:.1f} s)")


if __name__ == "__main__":
    sys.exit(main())
