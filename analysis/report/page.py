"""The page as a whole: one file that asks no network for anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from analysis.report.elements import text

_HERE = Path(__file__).resolve().parent

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""Content security policy: the browser itself refuses whatever is not in the file."""

VIEWER = """
<p id="viewer-nothing" hidden>No finished run here recorded its routing.</p>
<div id="viewer" hidden>
<div class="controls">
<label>Run <select id="viewer-run"></select></label>
<label>Layer <select id="viewer-layer"></select></label>
<label class="slider"><span>Step <output id="viewer-step-name" for="viewer-step"></output></span>
<input id="viewer-step" type="range" min="0" value="0"></label>
</div>
<p id="viewer-label" class="kind"></p>
<div class="maps">
<div><h4>Routing: copies of tokens from rank (row) to expert (column)</h4>
<div id="viewer-experts" class="map"></div></div>
<div><h4>Links: copies from rank (row) to rank (column)</h4>
<div id="viewer-links" class="map"></div>
<p id="viewer-no-links" class="failure" hidden></p></div>
</div>
<p id="viewer-readout" aria-live="polite"></p>
<h4>Traffic by level of the cluster at this step</h4>
<div id="viewer-levels"></div>
</div>
"""


class Section(NamedTuple):
    """One part of the page: its name in links, its title, its HTML."""

    name: str
    title: str
    body: str


def page(title: str, lead: str, sections: Sequence[Section], viewer_data: str) -> str:
    """The HTML file.

    Args:
        title: plain text.
        lead: a plain sentence below it.
        sections: in order.
        viewer_data: JSON of `analysis.report.routing.viewer_data`.
    """
    links = " ".join(f'<a href="#{section.name}">{text(section.title)}</a>' for section in sections)
    parts = "\n".join(
        f'<section id="{section.name}">\n<h2>{text(section.title)}</h2>\n{section.body}\n</section>'
        for section in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>
{(_HERE / "page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<header><h1>{text(title)}</h1><p>{text(lead)}</p><nav>{links}</nav></header>
<main>
{parts}
</main>
<script type="application/json" id="viewer-data">{viewer_data}</script>
<script>
{(_HERE / "page.js").read_text(encoding="utf-8")}</script>
</body>
</html>
"""
