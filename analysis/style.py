"""How every figure looks: one palette, one size, a system's colour and marker for life, and what each panel must say.

Colours are Okabe and Ito's (2008), told apart with every common colour blindness, then Tol's muted set for the systems
that rarely stand beside the first ones, and CARTO's Prism for systems that this file does not know. A marker goes with
each colour, so that no figure depends on colour alone.
"""

from __future__ import annotations

import hashlib
import itertools
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine

from analysis.files import whole_file

COLUMN_INCHES = 3.4
"""Width of one column of a two-column paper; figures are made at print size, so that a point is a point."""

PAGE_INCHES = 7.0
"""Width of both columns."""

DPI = 200
SMALL_POINTS = 6.0
"""The smallest text of a figure but for the heads of panels: captions, and numbers beside bars."""

GREY = "#5f5f5f"
PALE = "#b8b8b8"


class Look(NamedTuple):
    """How one system is drawn, in every figure."""

    colour: str
    marker: str

    def size(self, points: float) -> float:
        """Of its marker, so that all markers look about as large: of a star only the middle is wide."""
        return 1.5 * points if self.marker == "*" else points


KNOWN = {
    "reference": Look("#000000", "D"),
    "flat": Look("#0072B2", "o"),
    "deepspeed": Look("#D55E00", "s"),
    "fairscale": Look("#009E73", "^"),
    "tutel": Look("#E69F00", "v"),
    "tutel 2dh": Look("#B07800", "<"),  # upstream's; `tutel_2dh` is a system of ours
    "fastmoe": Look("#CC79A7", "P"),
    "megatron": Look("#56B4E9", "X"),
    "fastermoe": Look("#999933", "<"),
    "fastermoe_upstream": Look("#AA4499", "P"),
    "smartmoe": Look("#44AA99", ">"),
    "flexmoe": Look("#DDCC77", "d"),
    "flexmoe 10": Look("#7A5C00", "d"),
    "flexmoe 50": Look("#B8920F", "v"),
    "flexmoe 100": Look("#E0C65A", "^"),
    "deepspeed_static": Look("#117733", "s"),
    "ta_moe": Look("#882255", "*"),
    "ta_moe synchronised": Look("#C27BA0", "p"),
    "ta_moe deepspeed mode": Look("#A64D79", "X"),
    "hiermoe": Look("#332288", "h"),
    "hd": Look("#6A5FC0", "H"),
    "hd1": Look("#9C93D6", "D"),
    "hd2": Look("#7DA0D8", "d"),
    "h1": Look("#A0A0A0", "^"),
    "h2": Look("#C4C4C4", "v"),
    "tutel_2dh": Look("#A65628", "v"),
    "allgather": Look("#1B9E9E", "h"),
    "swiftmoe": Look("#CC6677", "p"),
    "fsmoe": Look("#661100", "8"),
    "sequential": Look("#4D4D4D", "s"),
    "tutel_overlap": Look("#F0A860", "v"),
    "tutel_improved": Look("#C77C2B", "<"),
    "pipemoe": Look("#6F8F2F", "^"),
    "pipemoe_lina": Look("#9DBB61", "d"),
    "schemoe": Look("#8C6BB1", ">"),
    "combined": Look("#777777", "H"),
}
_MARKERS = ("o", "s", "^", "v", "P", "X", "<", ">", "D", "d", "*", "h", "p")
_FREE_COLOURS = (
    "#5F4690",
    "#38A6A5",
    "#E17C05",
    "#94346E",
    "#6F4070",
    "#1D6996",
    "#73AF48",
    "#EDAD08",
    "#CC503E",
    "#666666",
)
_FREE = [Look(colour, marker) for colour in _FREE_COLOURS for marker in _MARKERS]
_FREE = [look for look in _FREE if look not in KNOWN.values()]

_TINTS = (0.2, 0.32, 0.44, 0.56)

STAGE_COLOURS = {"gate": "#DDAA33", "dispatch": "#6699CC", "experts": "#BBBBBB", "combine": "#004488"}
"""Tol's high-contrast set and its light companions: stages are no systems and share no colour with one."""


def look_of(system: str) -> Look:
    """Colour and marker of a system: fixed for known ones, however they are spelled, for others a function of the name
    alone. A variant of a known one, such as `fastermoe gate`, has a tint of its colour."""
    known = KNOWN.get(system.lower()) or KNOWN.get(system.lower().replace(" ", "_"))
    if known is not None:
        return known
    digest = hashlib.sha256(system.encode()).digest()
    of = KNOWN.get(system.lower().partition(" ")[0])
    if of is not None:
        return Look(_tint(of.colour, _TINTS[digest[0] % len(_TINTS)]), _MARKERS[digest[1] % len(_MARKERS)])
    return _FREE[int.from_bytes(digest[:4], "big") % len(_FREE)]


def _tint(colour: str, towards_white: float) -> str:
    red, green, blue = to_rgb(colour)
    return to_hex((_lighter(red, towards_white), _lighter(green, towards_white), _lighter(blue, towards_white)))


def _lighter(part: float, towards_white: float) -> float:
    return part + (1 - part) * towards_white


_SETTINGS = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same glyphs on every machine
    "font.size": 7,
    "axes.labelsize": 7,
    "axes.titlesize": 7,
    "axes.titlepad": 4,
    "axes.labelpad": 2.5,
    "axes.linewidth": 0.6,
    "axes.edgecolor": "#333333",
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.pad": 2,
    "ytick.major.pad": 2,
    "grid.linewidth": 0.4,
    "grid.color": "#e3e3e3",
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.columnspacing": 1.2,
    "legend.handletextpad": 0.5,
    "legend.borderaxespad": 0.2,
    "hatch.linewidth": 0.5,
    "lines.linewidth": 1.0,
    "pdf.fonttype": 42,  # TrueType, so that the text of a figure stays text
    "ps.fonttype": 42,
    "svg.hashsalt": "moe",
    "figure.dpi": DPI,
}


@contextmanager
def suite_style() -> Iterator[None]:
    """Draw inside this block: the suite's style, restored to the caller's afterwards (a notebook keeps its own)."""
    with mpl.rc_context():
        sns.set_theme(context="paper", style="ticks", rc=_SETTINGS)
        yield


def new_figure(height_inches: float, width_inches: float = COLUMN_INCHES, **subplots: Any) -> tuple[Figure, list[Axes]]:
    """A figure with a list of its panels, row by row; `subplots` goes to `Figure.subplots`.

    Made without pyplot: no global list of figures, no display, and a notebook's backend stays as it is.
    """
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03, hspace=0.06, wspace=0.05)
    figure = Figure(figsize=(width_inches, height_inches), layout=layout)
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(squeeze=False, **subplots).flat)


def panel(axes: Axes, title: str, kind: str, grid: Literal["x", "y", "both"] = "x") -> None:
    """Head of a panel: its title on the left, `measured`, `modelled` or `simulated` on the right; grid and spines."""
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_title(
        kind,
        loc="right",
        fontsize=5.5,
        color=GREY,
        bbox={"boxstyle": "round,pad=0.25,rounding_size=0.6", "facecolor": "#f1f1f1", "edgecolor": "none"},
    )
    axes.grid(True, axis=grid)
    axes.set_axisbelow(True)
    sns.despine(ax=axes)


def legend(figure: Figure, handles: Sequence[Artist], labels: Sequence[str], columns: int) -> None:
    """The legend above the panels, in at most `columns` columns and no more than fit the page, evenly filled. Rows
    beyond those that `columns` columns take make the figure higher; without labels there is none."""
    if not labels:
        return
    size = float(mpl.rcParams["legend.fontsize"])
    # Lengths in a legend are in multiples of its font size.
    handle = size * (mpl.rcParams["legend.handlelength"] + mpl.rcParams["legend.handletextpad"])
    gap, border = size * mpl.rcParams["legend.columnspacing"], 2 * size * mpl.rcParams["legend.borderpad"]
    widths = [handle + 72 * _text_inches(label, size) for label in labels]
    planned = -(-len(labels) // columns)
    rows = planned
    for rows in range(planned, len(labels) + 1):
        found = _filled(widths, -(-len(widths) // rows))
        if border + sum(map(max, found)) + gap * (len(found) - 1) <= 72 * figure.get_figwidth():
            break
    figure.set_figheight(figure.get_figheight() + (rows - planned) * 1.5 * size / 72)
    figure.legend(handles, labels, loc="outside upper left", ncols=-(-len(labels) // rows))


def _filled(widths: Sequence[float], columns: int) -> list[list[float]]:
    """The columns of a legend as matplotlib fills them: one below the other, the first columns longer by one."""
    each, longer = divmod(len(widths), columns)
    ends = [each * column + min(column, longer) for column in range(columns + 1)]
    return [list(widths[start:end]) for start, end in itertools.pairwise(ends)]


def _text_inches(text: str, points: float) -> float:
    """How wide one line of text is."""
    renderer = RendererAgg(1, 1, 72)  # only to measure text: points, as 72 make an inch
    font = FontProperties(family="DejaVu Sans", size=points)
    return float(renderer.get_text_width_height_descent(text, font, False)[0]) / 72


_CAPTION_LINES = 3
"""For so many the heights of the figures have room."""


def caption(figure: Figure, *sentences: str) -> None:
    """Small print below the panels, wrapped to the figure's width: what the figure can't show, such as the cluster. A
    long one makes the figure higher, not its panels lower."""
    lines: list[str] = []
    for word in " ".join(sentence for sentence in sentences if sentence).split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _text_inches(longer, SMALL_POINTS) < 0.975 * figure.get_figwidth():
            lines[-1] = longer
        else:
            lines.append(word)
    spacing = 1.25
    figure.set_figheight(figure.get_figheight() + max(0, len(lines) - _CAPTION_LINES) * spacing * SMALL_POINTS / 72)
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=SMALL_POINTS, color=GREY, linespacing=spacing)


def shortened(text: str, length: int) -> str:
    """Text of at most `length` characters, cut at a word with an ellipsis."""
    return textwrap.shorten(text, length, placeholder=" …") if len(text) > length else text


_NO_DATE: dict[str, dict[str, Any]] = {"png": {"Software": None}, "pdf": {"CreationDate": None}}
_KINDS: ContextVar[tuple[str, ...]] = ContextVar("_KINDS", default=tuple(_NO_DATE))


@contextmanager
def png_alone() -> Iterator[None]:
    """Within this block `save` writes no PDF, which takes as long as the rest: for what only shows the figures."""
    before = _KINDS.set(("png",))
    try:
        yield
    finally:
        _KINDS.reset(before)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as `path`.png (200 dots per inch) and, outside of `png_alone`, `path`.pdf (vector).

    The same data give the same bytes: no date is stored.

    Raises:
        ResultsError: the file system refused; older figures are left whole.
    """
    # Laid out once: both files show the same picture, and text keeps its place whatever the format's own metrics.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for kind in _KINDS.get():
        with whole_file(path.with_name(f"{path.name}.{kind}")) as temporary:
            figure.savefig(temporary, dpi=DPI, format=kind, metadata=_NO_DATE[kind])
