"""The numbers of a folder of results as tables: its comparisons, its layer benchmarks, and the papers' claims."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from analysis.comparison import compare
from analysis.errors import ResultsError
from analysis.figures.found import ComparisonFolder, Found, LayerFolder
from analysis.layer import people_table as layer_table
from analysis.layer import write_layer
from analysis.ledger.verdicts import RULE, VERDICTS, Verdict
from analysis.machine import machine_of
from analysis.report.elements import bullets, details, table, text
from analysis.style import png_alone
from analysis.summary import summarise
from analysis.tables import NOTHING, READING, odd_rows, people_table, with_interval

BASELINE = "flat"


def summaries(found: Found) -> str:
    """Tables of all comparisons and layer benchmarks, as HTML."""
    lines = []
    for one in found.comparisons:
        lines += [f"<h3>{text(one.name)}</h3>", *_whole(_comparison(one))]
    for layer in found.layers:
        lines += [f"<h3>{text(layer.name)}</h3>", *_whole(_layer(layer))]
    if found.comparisons:
        lines.append(details("How to read the comparisons", bullets(READING)))
    return "\n".join(lines) or "<p>No comparison and no benchmark of a layer.</p>"


def _whole(lines: Iterator[str]) -> list[str]:
    """The lines, or a sentence where files contradict one another."""
    try:
        return list(lines)
    except ResultsError as error:
        return [f'<p class="failure">{text(error)}</p>']


def _comparison(one: ComparisonFolder) -> Iterator[str]:
    comparison = compare(one.run_dirs, one.samples_dir, one.baseline)
    summary = summarise(comparison)
    yield f"<p>{text(comparison.kind.capitalize())} on {text(one.machine)}.</p>"
    rows = people_table(summary)
    cells = ([text(cell) for cell in row] for row in rows.itertuples(index=False))
    yield table(list(rows.columns), cells, f"Comparison {one.name}", "systems")
    problems = odd_rows(summary)
    if problems:
        yield "<p>Without numbers:</p>" + bullets(problems)
    if comparison.notes:
        yield "<p>Not alike:</p>" + bullets(comparison.notes)


def _layer(layer: LayerFolder) -> Iterator[str]:
    kind = str(layer.samples.metadata.get("kind", "measured"))
    baseline = BASELINE if BASELINE in layer.methods else next(iter(layer.methods))
    yield f"<p>{text(kind.capitalize())} on {text(machine_of(layer.path))}. Speeds are over {text(baseline)}.</p>"
    with tempfile.TemporaryDirectory() as folder, png_alone():
        rows = layer_table(write_layer(layer.path, baseline, Path(folder)))
    yield table(
        rows.head, ([text(cell) for cell in row] for row in rows.rows), f"Layer benchmark {layer.name}", "layers"
    )


def claims(verdicts: Sequence[Verdict], judged_on: Path) -> str:
    """Verdicts by paper, as HTML.

    Args:
        verdicts: of `analysis.ledger.verdicts.judge_all`.
        judged_on: the folder of the results that they are of.
    """
    folder = text(judged_on.resolve().name)
    lines = [
        f"<p>Judged on the results in <code>{folder}</code>, whatever else this page shows.</p>",
        details("How a verdict comes about", f"<p>{text(RULE.replace('**', ''))}</p>"),
    ]
    for paper in dict.fromkeys(row.claim.paper for row in verdicts):
        own = [row for row in verdicts if row.claim.paper == paper]
        counts = Counter(row.verdict for row in own)
        told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
        head = ("claim", "stated", "ours", "verdict", "kind", "hardware")
        title = "The suite's own goals" if paper == "suite" else paper
        lines.append(details(f"{title}: {told}", table(head, map(_cells, own), f"Claims of {paper}", "claims")))
    return "\n".join(lines)


def _cells(row: Verdict) -> list[str]:
    number = with_interval(row.interval)
    unit = f" {row.claim.unit}" if number != NOTHING else ""
    more = [row.test.setting if row.test is not None else "", row.reason, *row.notes]
    said = f"{text(row.claim.says)} <small>({text(row.claim.source)})</small>"
    said += "".join(f"<small class='more'>{text(one)}</small>" for one in more if one)
    verdict = f'<span class="verdict {row.verdict.replace(" ", "-")}">{text(row.verdict)}</span>'
    return [
        said,
        text(row.claim.stated),
        text(number + unit),
        verdict,
        text(row.kind or NOTHING),
        text(row.hardware or NOTHING),
    ]
