"""What every figure must show, and that its text can be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from analysis.compare import write
from analysis.comparison import Comparison, compare
from analysis.plots.bytes import bytes_figure
from analysis.plots.loss import loss_figure
from analysis.plots.rows import reason_of, where
from analysis.plots.stages import stages_figure
from analysis.plots.throughput import throughput_figure
from analysis.style import KNOWN, caption, legend, look_of, new_figure, save, suite_style
from analysis.summary import summarise
from tests.analysis_results import (
    EMULATION,
    IMPLEMENTATIONS,
    LABELS,
    run_rows,
    status_row,
    write_parquet,
    write_run,
    write_samples,
)

FIGURES = ("loss", "throughput", "bytes", "stages")
REFUSAL = (
    "needs NCCL: run on GPUs, or leave it out of systems=[...]; see the page of that package for how to install it"
)


@dataclass(frozen=True, eq=False)
class Scene:
    """A comparison and its summary."""

    comparison: Comparison
    summary: pd.DataFrame


@cache  # tests look at figures, none changes one
def draw(scene: Scene, name: str) -> Figure:
    """One figure of a comparison, laid out."""
    with suite_style():
        if name == "loss":
            figure = loss_figure(scene.comparison)
        else:
            make = {"throughput": throughput_figure, "bytes": bytes_figure, "stages": stages_figure}[name]
            figure = make(scene.comparison, scene.summary)
        figure.draw_without_rendering()
    return figure


def whole(outputs: Path) -> Comparison:
    """Everything there."""
    runs = [write_run(outputs, system, seed) for system in IMPLEMENTATIONS for seed in (0, 1)]
    return compare(runs, write_samples(outputs, rounds=6))


def broken(outputs: Path) -> Comparison:
    """One system refused, one seed failed, one missing."""
    runs = [write_run(outputs, "flat", 0), write_run(outputs, "flat", 1), write_run(outputs, "reference", 0)]
    runs += [write_run(outputs, "deepspeed", 0), write_run(outputs, "deepspeed", 1, "failed", "rank 3 died")]
    runs += [write_run(outputs, "fairscale", seed, "refused", REFUSAL) for seed in (0, 1)]
    refused = pd.DataFrame([row for seed in (0, 1) for row in status_row("fairscale", seed, f"refused: {REFUSAL}")])

    def refuse(table: pd.DataFrame) -> pd.DataFrame:
        return pd.concat([table[table["system"] != "fairscale"], refused])

    return compare(runs, write_samples(outputs, change=refuse, rounds=6))


def nothing(outputs: Path) -> Comparison:
    """No run is done and nothing was timed."""
    runs = [write_run(outputs, system, 0, "oom", "out of memory") for system in ("flat", "deepspeed")]
    return compare(runs, outputs / "nowhere")


def crowd(outputs: Path) -> Comparison:
    """Nine systems, unknown ones with long names, one of them fifty times slower."""
    names = ["flat", "deepspeed", "reference", *(f"my_own_dispatcher_{index}" for index in range(6))]
    runs = []
    for name in names:
        folder = write_run(outputs, "flat", 0).rename(outputs / name)
        rename_run(folder, name)
        runs.append(folder)
    tables = []

    def multiply(table: pd.DataFrame) -> pd.DataFrame:
        for index, name in enumerate(names):
            slower = table.assign(system=name, implementation="native")
            slower.loc[slower["metric"] == "step_time", "value"] *= 1 + 6 * index
            tables.append(slower)
        return pd.concat(tables)

    return compare(runs, write_samples(outputs, ["flat"], multiply, rounds=6))


def rename_run(folder: Path, system: str) -> None:
    """Make a run of `flat` one of another system."""
    footer = LABELS | {"system": system, "seed": 0, "implementation": "native"}
    write_parquet(folder / "metrics.parquet", pd.DataFrame(run_rows("flat", 0)), footer)
    for name in ("config.yaml", "manifest.json"):
        (folder / name).unlink()


def set_up(make: Callable[[Path], Comparison], folders: pytest.TempPathFactory) -> Scene:
    """A comparison of files in a fresh folder, with its summary."""
    comparison = make(folders.mktemp("outputs"))
    return Scene(comparison, summarise(comparison))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """The comparison that has everything."""
    return set_up(whole, tmp_path_factory)


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """The comparison with refused, failed and missing cells."""
    return set_up(broken, tmp_path_factory)


@pytest.fixture(scope="module", params=["good", "bad", "nothing", "crowd"])
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """One comparison of each kind."""
    if request.param in ("good", "bad"):
        return request.getfixturevalue(request.param)
    return set_up({"nothing": nothing, "crowd": crowd}[request.param], tmp_path_factory)


def texts(figure: Figure) -> list[Text]:
    """All text that is visible: of ticks only those inside their axis' range."""
    ticks = {tick for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for tick in axis.findobj(Text)}
    shown = [text for text in figure.findobj(Text) if text not in ticks]
    for axes in figure.axes:
        shown += [axes.xaxis.label, axes.yaxis.label]
        for axis, (low, high) in ((axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim()))):
            inside = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            shown += [tick.label1 for tick in inside if tick.label1.get_visible()]
    return [text for text in shown if text.get_visible() and text.get_text().strip()]


def all_text(figure: Figure) -> str:
    """Everything that can be read in a figure, as one line."""
    return " ".join(text.get_text().replace("\n", " ") for text in texts(figure))


def extent(text: Text, figure: Figure) -> Bbox:
    """Where the text stands, in pixels, a little shrunk: touching boxes are no overlap."""
    assert isinstance(figure.canvas, FigureCanvasAgg)
    box = text.get_window_extent(figure.canvas.get_renderer())
    return Bbox.from_extents(box.x0 + 1, box.y0 + 1, max(box.x1 - 1, box.x0 + 1), max(box.y1 - 1, box.y0 + 1))


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_overlaps_or_leaves_the_page(scene: Scene, name: str) -> None:
    figure = draw(scene, name)
    boxes = [(text.get_text(), extent(text, figure)) for text in texts(figure)]
    assert len(boxes) > 5
    page = figure.bbox
    for text, box in boxes:
        assert page.x0 <= box.x0 <= box.x1 <= page.x1, f"{text!r} leaves the page"
        assert page.y0 <= box.y0 <= box.y1 <= page.y1, f"{text!r} leaves the page"
    clashes = [(one, other) for (one, a), (other, b) in combinations(boxes, 2) if a.overlaps(b)]
    assert not clashes


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_names_systems_kind_and_cluster(good: Scene, name: str) -> None:
    figure = draw(good, name)
    text = all_text(figure)
    for system, implementation in IMPLEMENTATIONS.items():
        assert f"{system} ({implementation})" in text
    assert f"local_2x2: 4 gloo ranks on one machine, {EMULATION}." in text
    assert sum(item.get_text() == "measured" for item in texts(figure)) == len(figure.axes)


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("loss", ["loss, nats per token", "nats per token", "step"]),
        ("throughput", ["tokens per second,\nratio to flat (native)"]),
        ("bytes", ["MiB per training step, sum over ranks"]),
        ("stages", ["time of one timed step, ms"]),
    ],
)
def test_axes_have_units(good: Scene, name: str, labels: list[str]) -> None:
    figure = draw(good, name)
    found = {axes.get_xlabel() for axes in figure.axes} | {axes.get_ylabel() for axes in figure.axes}
    assert found - {""} == set(labels)


@pytest.mark.parametrize("name", FIGURES)
def test_what_is_missing_is_told(bad: Scene, name: str) -> None:
    text = all_text(draw(bad, name))
    assert "fairscale (upstream)" in text
    assert "refused" in text
    told = {"loss": "deepspeed seed 1 (failed)", "bytes": "deepspeed: 1 of 2 seeds"}
    assert told.get(name, "") in text


def first_row(axes: Axes) -> list[Rectangle]:
    """The bars of the first system, from left to right as drawn."""
    return [bar for bar in axes.patches if isinstance(bar, Rectangle) and bar.get_y() < 0]


def test_bars_are_as_long_as_the_summary_says_and_stand_end_to_end(good: Scene) -> None:
    summary = good.summary.set_index(["system", "metric"])["value"]
    stages = ("gate", "dispatch", "experts", "combine")
    parts = [f"{direction}/{stage}" for direction in ("forward", "backward") for stage in stages]
    drawn = {1e3: [first_row(draw(good, "stages").axes[0])], 2**-20: [first_row(ax) for ax in draw(good, "bytes").axes]}
    classes = ("alltoall", "reduction")
    expected = {
        1e3: [[summary["flat", f"stage_time/{part}"] for part in parts]],
        2**-20: [[summary["flat", f"bytes/{level}/{kind}"] for kind in classes] for level in ("node", "network")],
    }
    for scale, rows in drawn.items():
        for bars, values in zip(rows, expected[scale], strict=True):
            ends = np.cumsum(values) * scale
            assert [bar.get_x() for bar in bars] == pytest.approx([0, *ends[:-1]])
            assert [bar.get_x() + bar.get_width() for bar in bars] == pytest.approx(list(ends))
            half = len(bars) // 2  # forward before backward, token traffic before reductions: told apart by the hatch
            assert [bool(bar.get_hatch()) for bar in bars] == [False] * half + [True] * half
    assert [axes.get_title(loc="left") for axes in draw(good, "bytes").axes] == [
        "over level node",
        "over level network",
    ]


def test_every_round_is_a_point(good: Scene) -> None:
    axes = draw(good, "throughput").axes[0]
    rounds = [points for points in axes.collections if isinstance(points, PathCollection)]
    assert [np.shape(points.get_offsets()) for points in rounds] == [(12, 2)] * 3


def test_every_seed_is_a_line_and_coinciding_systems_take_turns(good: Scene) -> None:
    main: Axes = draw(good, "loss").axes[0]
    curves = [line for line in main.lines if np.size(line.get_xdata()) == 60]
    assert len(curves) == 4 * 3
    dashed = [line for line in curves if line.get_linestyle() == "--"]
    assert len({line.get_color() for line in dashed}) == 3
    held_out = [line for line in main.lines if line.get_linestyle() == "None"]
    assert [np.size(line.get_xdata()) for line in held_out] == [2 * 4] * 4


def test_known_systems_differ_and_unknown_ones_are_stable() -> None:
    assert len(set(KNOWN.values())) == len(KNOWN)
    assert len({look.colour for look in KNOWN.values()}) == len(KNOWN)
    unknown = look_of("somebody_elses_moe")
    assert unknown == look_of("somebody_elses_moe")
    assert unknown not in KNOWN.values()
    assert len({look_of(f"system_{index}") for index in range(40)}) > 15


def test_an_upstream_package_s_variant_looks_unlike_our_system_of_that_name() -> None:
    assert look_of("tutel 2DH") != look_of("tutel_2dh") == look_of("Tutel_2DH")
    schedules = ("sequential", "tutel_overlap", "tutel_improved", "pipemoe", "pipemoe_lina", "schemoe", "fsmoe")
    assert len({look_of(name).colour for name in schedules}) == len(schedules)


def test_the_style_is_the_callers_again_afterwards() -> None:
    before = dict(mpl.rcParams)
    with suite_style():
        assert mpl.rcParams["pdf.fonttype"] == 42
    assert dict(mpl.rcParams) == before


def test_a_caption_is_wrapped_to_the_page() -> None:
    with suite_style():
        figure, (axes,) = new_figure(2.0)
        axes.plot([0, 1])
        caption(figure, "A sentence of words, " * 20, "", "The last one.")
        figure.draw_without_rendering()
    text = next(text for text in texts(figure) if "sentence" in text.get_text())
    assert text.get_text().replace("\n", " ").endswith("words, The last one.")
    assert len(text.get_text().splitlines()) > 3
    assert extent(text, figure).x1 <= figure.bbox.x1
    assert figure.get_figheight() > 2.0, "the panels keep their height"


@pytest.mark.parametrize("length", [5, 20, 45])
def test_a_legend_has_as_many_columns_as_the_page_has_room_for(length: int) -> None:
    labels = [f"{index} {'x' * length}" for index in range(7)]
    with suite_style():
        figure, (axes,) = new_figure(2.0)
        legend(figure, [axes.plot([0, index])[0] for index in range(7)], labels, 4)
        figure.draw_without_rendering()
    (drawn,) = figure.legends
    assert drawn.get_window_extent().x1 <= figure.bbox.x1
    columns = {round(text.get_window_extent().x0) for text in drawn.get_texts()}
    assert len(columns) == {5: 4, 20: 2, 45: 1}[length]
    assert (figure.get_figheight() > 2.0) == (length > 5)


def test_a_legend_without_labels_is_none() -> None:
    figure, _ = new_figure(2.0)
    legend(figure, [], [], 3)
    assert not figure.legends


def test_captions_name_the_hardware_of_the_runs(tmp_path: Path) -> None:
    run = write_run(tmp_path, "flat", 0)
    manifest = json.loads((run / "manifest.json").read_text())
    for num_gpus, device, told in ((2, "cpu", "2"), (4, "cuda", "4"), (8, "cuda", "4 of 8"), (8, "cpu", "8")):
        found = {"hardware": {"gpus": ["NVIDIA H200, 139 GiB"] * num_gpus}}
        found["cluster"] = manifest["cluster"] | {"device": device}
        (run / "manifest.json").write_text(json.dumps(manifest | found))
        library = {"cpu": "gloo", "cuda": "NCCL"}[device]
        expected = f"On {told} x NVIDIA H200, cluster local_2x2 (4 {library} ranks"
        assert where(compare([run], None)).startswith(expected)
        write(tmp_path / "out", [run], None)
        assert f"\nMeasured {expected.replace('On', 'on')}" in (tmp_path / "out" / "summary.md").read_text()


def test_a_reason_is_told_without_the_exception_s_name() -> None:
    assert reason_of("refused: moe.errors.Refused: Tutel would pad") == "refused: Tutel would pad"
    assert reason_of("refused: torch.compile fails. Fix: don't.") == "refused: torch.compile fails. Fix: don't."


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with suite_style():
            figure, (axes,) = new_figure(1.5)
            axes.plot([0, 1], label="a")
            save(figure, tmp_path / name)
    for suffix in (".png", ".pdf"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()
