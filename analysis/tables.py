"""The summary for people: a Markdown page and a plain text table, both made of summary.csv's rows alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from operator import methodcaller

import pandas as pd

from analysis.statistics import Interval
from analysis.summary import DIRECTIONS, STAGES, TRAIN_LOSS_STEPS

NOTHING = "-"
NOT_ASKED = "missing: not part of this measurement"
"""Status of a number that nobody set out to measure, such as the loss of systems that were only timed: no problem."""
_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def significant(value: float, digits: int = 4) -> str:
    """A number in `digits` significant digits; plain between 0.001 and a million, `-` when it is not a number."""
    if not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if not -4 < exponent < 6:
        return f"{value:.{digits - 1}e}"
    rounded = round(value, digits - 1 - exponent)
    return f"{rounded:.{max(0, digits - 1 - exponent)}f}"


def binary_bytes(num_bytes: float, digits: int = 4) -> str:
    """Bytes in the largest fitting binary unit, such as `12.50 MiB`; `-` when it is not a number."""
    if not math.isfinite(num_bytes):
        return NOTHING
    power = 0
    while abs(num_bytes) >= 1024 and power < len(_BINARY_UNITS) - 1:
        num_bytes /= 1024
        power += 1
    return f"{significant(num_bytes, digits)} {_BINARY_UNITS[power]}"


def with_interval(interval: Interval | None, digits: int = 3) -> str:
    """A number with its interval, such as `1.12 [1.04, 1.16]`; `-` without one, no brackets where it has no width."""
    if interval is None:
        return NOTHING
    value, low, high = (significant(number, digits) for number in interval)
    return value if interval.low == interval.value == interval.high else f"{value} [{low}, {high}]"


_OPTIONAL = ("train loss", "val loss", "rel. error")


class _Rows:
    """The rows of one system, by metric."""

    def __init__(self, rows: pd.DataFrame) -> None:
        self.rows = rows
        self.values = dict(zip(rows["metric"], rows["value"], strict=True))

    def number(self, metric: str, digits: int = 4, scale: float = 1.0) -> str:
        return significant(self.values.get(metric, math.nan) * scale, digits)

    def with_interval(self, metric: str, digits: int = 3) -> str:
        row = self.rows[self.rows["metric"] == metric]
        if not len(row) or not math.isfinite(row["value"].iloc[0]):
            return NOTHING
        value, low, high = (significant(row[name].iloc[0], digits) for name in ("value", "low", "high"))
        return f"{value} [{low}, {high}]"

    def largest(self, prefix: str, digits: int = 2) -> str:
        found = [value for metric, value in self.values.items() if metric.startswith(prefix)]
        return significant(max(found), digits) if found and all(map(math.isfinite, found)) else NOTHING

    def total_bytes(self, level: str) -> str:
        found = [value for metric, value in self.values.items() if metric.startswith(f"bytes/{level}/")]
        return binary_bytes(sum(found)) if found else NOTHING

    def stages(self, direction: str) -> str:
        found = [self.number(f"stage_time/{direction}/{stage}", 3, scale=1e3) for stage in STAGES]
        return NOTHING if set(found) == {NOTHING} else " / ".join(found)

    def status(self) -> str:
        """`ok`, or in a few words what is wrong; the whole reasons stand below the table."""
        odd = dict.fromkeys(status for status in self.rows["status"] if status not in ("ok", NOT_ASKED))
        if not odd:
            return "ok"
        words = [text.split(" (")[0] if ":" in text else text for text in odd]
        return ", ".join(dict.fromkeys(word.split(":")[0] for word in words))


def people_table(summary: pd.DataFrame) -> pd.DataFrame:
    """One row per system, text cells, columns as headings; intervals in brackets, `-` where there is no number. Losses
    and errors stand there if some system has them.

    Args:
        summary: rows as of `analysis.summary.summarise` or read back from summary.csv.
    """
    levels = list(dict.fromkeys(name.split("/")[1] for name in summary["metric"] if name.startswith("bytes/")))
    units = summary.loc[summary["metric"] == "tokens_per_s_ratio", "unit"]
    baseline = units.iloc[0].removeprefix("x ") if len(units) else "the baseline"
    columns: dict[str, Callable[[_Rows], str]] = {
        "status": _Rows.status,
        "train loss": lambda rows: rows.number("train_loss"),
        "val loss": lambda rows: rows.number("val_loss"),
        "tokens/s": lambda rows: rows.number("tokens_per_s", 3),
        f"tokens/s, ratio to {baseline}": lambda rows: rows.with_interval("tokens_per_s_ratio"),
        "dropped copies/step": lambda rows: rows.number("dropped_copies", 3),
        "rel. error": lambda rows: rows.largest("relative_error/"),
    }
    if levels:
        columns[f"sent over {levels[-1]} per step"] = lambda rows: rows.total_bytes(levels[-1])
    for direction in DIRECTIONS:
        columns[f"{direction} ms: {' / '.join(STAGES)}"] = methodcaller("stages", direction)
    table = []
    for (system, implementation), group in summary.groupby(["system", "implementation"], sort=False):
        rows = _Rows(group)
        table.append({"system": f"{system} ({implementation})"} | {name: tell(rows) for name, tell in columns.items()})
    empty = [name for name in _OPTIONAL if all(row[name] == NOTHING for row in table)]
    return pd.DataFrame(table).drop(columns=empty)


def odd_rows(summary: pd.DataFrame) -> list[str]:
    """One line for every thing that is missing, with its whole reason; empty when nothing is."""
    told = summary[summary["metric"] == "run"]
    lines = []
    for (system, implementation), rows in told.groupby(["system", "implementation"], sort=False):
        # One reason is told once, with all the seeds that it holds for.
        where: dict[tuple[str, str], list[str]] = {}
        for text in rows["status"]:
            head, _, reason = text.partition("): ")
            status, _, seed = head.partition(" (")
            where.setdefault((status, reason), []).append(seed)
        lines += [
            f"{system} ({implementation}): {status} ({'; '.join(seeds)}): {reason}"
            for (status, reason), seeds in where.items()
        ]
    others = summary[(summary["metric"] != "run") & ~summary["status"].isin(["ok", NOT_ASKED])]
    # A row whose system has a `run` row only repeats that reason.
    explained = set(told["system"])
    for (system, implementation, status), rows in others.groupby(["system", "implementation", "status"], sort=False):
        if system not in explained or status.startswith(("nan", "corrupt")) or "paired" in status:
            lines.append(f"{system} ({implementation}): {', '.join(rows['metric'])}: {status}")
    return lines


def to_markdown(summary: pd.DataFrame, caption: str, notes: list[str], figures: dict[str, str]) -> str:
    """The page summary.md: table, what is missing, how to read it, figures.

    Args:
        summary: see `people_table`.
        caption: one sentence on where the numbers were measured.
        notes: sentences on what the runs did not share.
        figures: {file name: what it shows}.
    """
    table = people_table(summary)
    lines = ["# Comparison", "", caption, "", markdown_row(table.columns), markdown_row(["---"] * len(table.columns))]
    lines += [markdown_row(row) for row in table.itertuples(index=False)]
    problems = odd_rows(summary)
    if problems:
        lines += ["", "## Without numbers", "", *(f"- {_escaped(problem)}" for problem in problems)]
    if notes:
        lines += ["", "## Not alike", "", *(f"- {_escaped(note)}" for note in notes)]
    lines += ["", "## How to read it", "", *(f"- {line}" for line in READING)]
    lines += ["", "## Figures", ""]
    for name, shows in figures.items():
        lines += [f"{shows} ([PDF]({name}.pdf))", "", f"![{shows}]({name}.png)", ""]
    return "\n".join(lines).rstrip() + "\n"


READING = (
    f"Train loss: mean over the last {TRAIN_LOSS_STEPS} recorded steps; val loss: last held-out pass. Mean over seeds.",
    "Tokens/s: median over interleaved rounds, the slowest rank's time per round. The ratio is a ratio of medians; in "
    "brackets its 95 % bootstrap interval, paired by seed and round.",
    "Rel. error: the largest relative difference to the dense reference over output and gradients, same weights and "
    "tokens.",
    "Bytes: summed over ranks. Token traffic is exact; reductions are counted as a ring moves them.",
    "Systems that give every expert equal capacity pad it: without a capacity factor, to the fullest expert of any "
    "rank. The padding is part of their times and bytes.",
    "Stage times: median over rounds of the slowest rank, each stage on its own. A stage ends where the system's own "
    "gate or experts module returns, and some gates also lay out slots: compare gate and dispatch together.",
    "summary.csv holds every number in full with its interval, unit and status.",
)


def _escaped(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def markdown_row(cells: Iterable[object]) -> str:
    """A row of a Markdown table; what would break it is escaped."""
    return "| " + " | ".join(_escaped(cell) for cell in cells) + " |"


def format_table(summary: pd.DataFrame) -> str:
    """The summary as plain text for a terminal: two narrow tables (results, stage times), then what is missing.

    Args:
        summary: see `people_table`.
    """
    table = people_table(summary)
    is_stage = [" ms: " in name for name in table.columns]
    blocks = [aligned(table.loc[:, [not stage for stage in is_stage]])]
    stages = table.loc[:, ["system", *table.columns[is_stage]]]
    if (stages.iloc[:, 1:] != NOTHING).any(axis=None):
        blocks.append(aligned(stages))
    problems = odd_rows(summary)
    if problems:
        blocks.append("\n".join(["without numbers:", *(f"  {problem}" for problem in problems)]))
    return "\n\n".join(blocks) + "\n"


def aligned(table: pd.DataFrame, left: Collection[str] = ("system", "status")) -> str:
    """A table of text cells for a terminal: headings, a rule, rows; the columns `left` start left."""
    cells = [list(table.columns), *([str(cell) for cell in row] for row in table.itertuples(index=False))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        # Names and statuses start left, numbers end right.
        padded = [
            cell.ljust(width) if name in left else cell.rjust(width)
            for name, cell, width in zip(table.columns, row, widths, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
