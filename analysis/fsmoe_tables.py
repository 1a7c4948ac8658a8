"""Reads what `experiments.simulate` wrote: FSMoE's tables and figures, our number beside the paper's in every row."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from analysis.errors import ResultsError
from analysis.files import read_csv

COLUMNS = ("quantity", "testbed", "costs", "paper", "ours", "unit", "kind", "source")
KINDS = ("simulated", "modelled", "fitted")
SCHEDULES = {
    "sequential": "DS-MoE",
    "tutel_overlap": "Tutel",
    "tutel_improved": "Tutel-Improved",
    "pipemoe": "PipeMoE",
    "pipemoe_lina": "PipeMoE+Lina",
    "schemoe_order_only": "ScheMoE (order)",
    "fsmoe_no_iio": "FSMoE-No-IIO",
    "fsmoe": "FSMoE",
}
"""What the paper calls our schedules, in its order."""


def read_simulated(path: Path, pattern: str) -> pd.DataFrame:
    """A table of `experiments.simulate` with the parts of its quantities as columns.

    Args:
        path: such as table5.csv.
        pattern: a regular expression with a named group for each part; rows that it does not match are left out.

    Raises:
        ResultsError: no such file, a missing column, no rows, an unknown kind, a row that stands there twice, a
            number that is none, or no row that matches.
    """
    fix = "Fix: write it with `python -m experiments.simulate`."
    table = read_csv(path, COLUMNS, fix)
    wrong = table[~table["kind"].isin(KINDS)]
    if len(wrong):
        raise ResultsError(f"{path}: kind={wrong['kind'].iloc[0]} is none of {', '.join(KINDS)}. {fix}")
    twice = table[table.duplicated(["quantity", "testbed", "costs"])]
    if len(twice):
        cell = ", ".join(str(twice[name].iloc[0]) for name in ("quantity", "testbed", "costs"))
        raise ResultsError(f"{path}: the row of {cell} stands there twice. {fix}")
    for name in ("paper", "ours"):
        numbers = pd.to_numeric(table[name], errors="coerce")
        if (numbers.isna() & (table[name].notna() | (name == "ours"))).any():
            row = table[numbers.isna()].iloc[0]
            raise ResultsError(f"{path}: {name}={row[name]} of {row['quantity']} is no number. {fix}")
        table[name] = numbers
    parts = table["quantity"].str.extract(f"^(?:{pattern})$")
    found = table.join(parts)[parts.notna().any(axis=1)].reset_index(drop=True)
    if found.empty:
        raise ResultsError(f"{path}: none of its rows is one of this table. {fix}")
    return found


def titled(testbed: str) -> str:
    """What a panel of a testbed is called."""
    return f"testbeds {testbed}" if "," in testbed else f"testbed {testbed}"
