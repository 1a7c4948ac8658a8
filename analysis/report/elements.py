"""Pieces of HTML. Whatever comes from a result file is text here, never markup."""

from __future__ import annotations

import base64
import html
import struct
from collections.abc import Iterable, Sequence

_PNG_SIZE = slice(16, 24)
"""Where a PNG file holds its width and height, four bytes each, big-endian."""

_WIDE_PIXELS = 900
"""Pictures from this width on take a whole line: those made for both columns of a paper."""


def text(value: object) -> str:
    """Text without markup."""
    return html.escape(str(value))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], label: str, kind: str = "") -> str:
    """A table that scrolls sideways where the window is narrower.

    Args:
        head: titles, plain text.
        rows: cells, as HTML.
        label: what a screen reader calls it, plain text.
        kind: class of the table.
    """
    titles = "".join(f'<th scope="col">{text(title)}</th>' for title in head)
    lines = "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(label)}">'
        f'<table class="{kind}"><thead><tr>{titles}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'
    )


def bullets(sentences: Iterable[str]) -> str:
    """A list of plain sentences."""
    return "<ul>" + "".join(f"<li>{text(sentence)}</li>" for sentence in sentences) + "</ul>"


def details(summary: str, body: str, is_open: bool = False) -> str:
    """A part that opens at a click.

    Args:
        summary: its line, plain text.
        body: HTML.
        is_open: whether it is open at first.
    """
    return f"<details{' open' if is_open else ''}><summary>{text(summary)}</summary>{body}</details>"


def picture(png: bytes, name: str) -> str:
    """A PNG inside the page.

    Args:
        png: the file.
        name: its caption, plain text.
    """
    width, height = struct.unpack(">II", png[_PNG_SIZE])
    kind = ' class="wide"' if width > _WIDE_PIXELS else ""
    source = base64.b64encode(png).decode("ascii")
    return (
        f'<figure{kind}><img src="data:image/png;base64,{source}" width="{width}" height="{height}" '
        f'alt="{text(name)}"><figcaption>{text(name)}</figcaption></figure>'
    )
