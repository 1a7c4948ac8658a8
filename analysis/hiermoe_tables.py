"""Reads what `experiments.hiermoe` and `experiments.comm` wrote: HierMoE's numbers beside the paper's, and fits."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.errors import ResultsError
from analysis.files import read_csv
from analysis.layer import PeopleTable
from analysis.load import FOOTER_KEY, one_line
from analysis.tables import NOTHING, significant

COLUMNS = ("table", "quantity", "paper", "ours", "unit", "kind", "source")
KINDS = ("modelled", "measured routing", "paper")
TITLES = {
    "II": "Table II, share of copies that need not travel",
    "reference": "The paper's models on its 32 GPUs",
    "IV": "Table IV, speed-up of all-to-all over Megatron-LM",
    "peak": "How the fullest group is taken when swaps are scored",
    "period": "Iterations between swaps",
    "figure 9": "Figure 9, the paper's fits",
}
_DUPLICATION = re.compile(r"duplication, (?P<groups>\d+) groups, K=(?P<top_k>\d+)(?:, (?P<what>.+))?")
_SPEEDUP = re.compile(
    r"all-to-all speed-up of (?P<method>\S+) over Megatron-LM \(H1\), "
    r"(?P<variable>[KEG])=(?P<size>\d+), (?P<routing>.+)"
)
_COST = re.compile(r"(?P<number>alpha|beta) of (?P<name>\S+)")


def read_tables(path: Path) -> pd.DataFrame:
    """tables.csv, checked.

    Raises:
        ResultsError: no such file, a missing column, an unknown table or kind, or nothing in it.
    """
    fix = "Fix: write it with `python -m experiments.hiermoe`."
    table = read_csv(path, COLUMNS, fix)
    for column, allowed in (("table", tuple(TITLES)), ("kind", KINDS)):
        wrong = table[~table[column].isin(allowed)]
        if len(wrong):
            found = f"{column}={wrong[column].iloc[0]} in row {wrong.index[0]}"
            raise ResultsError(f"{path}: {found} is none of {', '.join(allowed)}. {fix}")
    for column in ("paper", "ours"):
        numbers = pd.to_numeric(table[column], errors="coerce")
        wrong = table[numbers.isna() & table[column].notna()]
        if len(wrong):
            raise ResultsError(f"{path}: {column}={wrong[column].iloc[0]} in row {wrong.index[0]} is no number. {fix}")
        table[column] = numbers
    return table


def _parsed(table: pd.DataFrame, name: str, pattern: re.Pattern[str]) -> pd.DataFrame:
    """The rows of one table with the named parts of their quantities as columns; numbers where they are digits."""
    own = table[table["table"] == name].reset_index(drop=True)
    parts = own["quantity"].str.extract(rf"^(?:{pattern.pattern})$")
    unread = own[parts.isna().all(axis=1)]
    if len(unread):
        raise ResultsError(
            f"tables.csv: {unread['quantity'].iloc[0]} is no quantity of table {name}. Fix: write it anew with "
            "`python -m experiments.hiermoe`."
        )
    for column in ("groups", "top_k", "size"):
        if column in parts:
            parts[column] = parts[column].astype(int)
    return own.join(parts)


def duplication_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Table II with the columns groups, top_k and what (whose routing was counted, NaN for the closed form)."""
    return _parsed(table, "II", _DUPLICATION)


def speedup_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Table IV with the columns method, variable (K, E or G), size and routing."""
    return _parsed(table, "IV", _SPEEDUP)


@dataclass(frozen=True)
class Line:
    """A fitted collective: alpha_s + n beta_s_per_byte, n being the bytes that a rank sends in all.

    Attributes:
        name: `standard`, `Inter-1`, ...
        alpha_s, beta_s_per_byte: of it.
        points: (n, seconds) that were measured; empty where only the line is known.
    """

    name: str
    alpha_s: float
    beta_s_per_byte: float
    points: tuple[tuple[float, float], ...] = ()


def paper_lines(table: pd.DataFrame) -> list[Line]:
    """Figure 9's fits."""
    numbers = _parsed(table, "figure 9", _COST).pivot(index="name", columns="number", values="paper")
    names = dict.fromkeys(_parsed(table, "figure 9", _COST)["name"])
    return [Line(name, numbers.loc[name, "alpha"] / 1e3, numbers.loc[name, "beta"] / 1e3) for name in names]


def measured_lines(folder: Path) -> tuple[list[Line], str]:
    """The fitted collectives of a cluster with the medians that they go through, and a sentence on the cluster.

    Args:
        folder: of `experiments.comm`, with comm.parquet.

    Raises:
        ResultsError: no timings there, or none of collectives.
    """
    path, fix = folder / "comm.parquet", "Fix: measure with `python -m experiments.comm`"
    try:
        schema = pq.read_schema(path)
        footer = json.loads((schema.metadata or {}).get(FOOTER_KEY, b"{}"))
        rows = pq.read_table(path, columns=["pattern", "level", "size_bytes", "seconds"]).to_pandas()
    except (OSError, pa.ArrowException, ValueError) as error:
        raise ResultsError(f"{path}: can't be read ({one_line(error)[:80]}). {fix}.") from error
    fits: list[dict[str, Any]] = footer.get("collectives") or []
    if not fits:
        raise ResultsError(f"{path}: has no fitted collectives (an older run, or one rank). {fix} force=true.")
    medians = rows.groupby(["pattern", "level", "size_bytes"])["seconds"].median()
    lines = []
    for fit in fits:
        own = medians.loc[(fit["pattern"], fit["level"])]
        points = tuple((float(part) * fit["ranks"], float(seconds)) for part, seconds in own.items())
        lines.append(Line(str(fit["name"]), fit["alpha_s"], fit["beta_s_per_byte"], points))
    emulation = footer.get("emulation")
    return lines, f"cluster {footer.get('cluster')}" + (f": {emulation}." if emulation else ".")


def format_tables(table: pd.DataFrame) -> str:
    """All tables for a terminal, the paper's numbers beside the suite's."""
    blocks = []
    for name, own in table.groupby("table", sort=False):
        rows = [
            [row.quantity, _number(row.paper), _number(row.ours), row.unit, "-" if row.kind == "paper" else row.kind]
            for row in own.itertuples()
        ]
        text = PeopleTable(["quantity", "the paper's", "ours", "unit", "ours is"], rows).to_plain_text()
        blocks.append(f"{TITLES[str(name)]}\n{text}\n")
    return "\n".join(blocks) + "\nWhere the paper says so, and what is not verified: column source of tables.csv\n"


def _number(value: float) -> str:
    return NOTHING if pd.isna(value) else significant(float(value), 3)
