"""analysis.hiermoe: the tables' figures, a cluster's fitted collectives, and the model beside timed dispatches."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from analysis.errors import ResultsError
from analysis.hiermoe import main
from analysis.hiermoe_levels import write_levels
from analysis.hiermoe_tables import duplication_rows, measured_lines, paper_lines, read_tables, speedup_rows
from analysis.plots.hiermoe import collectives_figure, duplication_figure, levels_figure, speedup_figure
from analysis.style import suite_style
from experiments import hiermoe
from tests.analysis_results import LABELS, layer_rows, write_manifest, write_parquet
from tests.test_analysis_figures import all_text, extent, texts
from tests.test_hiermoe_tables import SMALL, write_routing

FITS = [("standard", "all_to_all", "", 4, 1e-4, 2e-9), ("Inter-1", "inter", "network", 2, 2e-4, 1e-9)]
FIT_KEYS = ("name", "pattern", "level", "ranks", "alpha_s", "beta_s_per_byte")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tables.csv with the routing of one run, and comm.parquet of two collectives in comm/."""
    folder = tmp_path_factory.mktemp("hiermoe")
    ids = pd.Series(range(8)).to_numpy().reshape(1, 4, 2)
    routing = write_routing(folder / "flat-tiny-s0", ids, 8)
    assert hiermoe.main(["--out", str(folder), "--routing", str(routing), *SMALL]) == 0
    write_comm(folder / "comm", [dict(zip(FIT_KEYS, fit, strict=True)) for fit in FITS])
    return folder


def write_comm(folder: Path, fits: list[dict[str, Any]]) -> None:
    """Timings on the fitted lines."""
    rows = [
        {"pattern": pattern, "level": level, "size_bytes": part, "repeat": turn, "seconds": alpha + beta * part * ranks}
        for _, pattern, level, ranks, alpha, beta in FITS
        for part in (1000, 100_000)
        for turn in range(2)
    ]
    write_parquet(folder / "comm.parquet", pd.DataFrame(rows), LABELS | {"collectives": fits})


def laid_out(figure: Figure) -> Figure:
    """Drawn, with no text on other text or off the page."""
    figure.draw_without_rendering()
    boxes = [(text.get_text(), extent(text, figure)) for text in texts(figure)]
    for text, box in boxes:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
    assert not [(one, two) for (one, a), (two, b) in combinations(boxes, 2) if a.overlaps(b)]
    return figure


def heights(figure: Figure, index: int) -> list[float]:
    """Of the bars of one panel, in the order in which they were drawn."""
    return [bar.get_height() for bar in figure.axes[index].patches if isinstance(bar, Rectangle)]


def test_table_ii_has_the_paper_beside_both_of_ours(folder: Path) -> None:
    rows = duplication_rows(read_tables(folder / "tables.csv"))
    with suite_style():
        figure = laid_out(duplication_figure(rows))
    text = all_text(figure)
    for told in (
        "the paper's",
        "closed form of uniform choices (modelled)",
        "routing of flat on tiny, seed 0 (measured)",
    ):
        assert told in text
    assert [axes.get_title(loc="left") for axes in figure.axes] == [f"{size} groups" for size in (4, 8, 16, 32)]
    assert heights(figure, 0)[:3] == pytest.approx([12, 12.4, 50], abs=0.1), "K=2, 4 groups: all pairs are of one"
    assert len(heights(figure, 3)) == 8, "8 experts make no 32 groups"
    kinds = [axes.get_title(loc="right") for axes in figure.axes]
    assert kinds == ["modelled and measured", "modelled and measured", "modelled", "modelled"]


def test_table_iv_has_the_paper_left_of_ours(folder: Path) -> None:
    rows = speedup_rows(read_tables(folder / "tables.csv"))
    with suite_style():
        figure = laid_out(speedup_figure(rows))
    assert len(figure.axes) == 6
    assert heights(figure, 0)[0] == 0.95, "HD2 at K=6, the paper's"
    assert len(heights(figure, 0)) == 3 * 2 * 2
    assert len(heights(figure, 3)) == 3 * 3 * 2, "HierMoE where experts differ"
    text = all_text(figure)
    assert text.count("modelled") >= 6 and "No HierMoE under uniform routing" in text


def test_figure_9_has_the_paper_s_lines_and_a_cluster_s_points(folder: Path) -> None:
    paper = paper_lines(read_tables(folder / "tables.csv"))
    assert [line.name for line in paper][:2] == ["standard", "Inter-1"]
    assert paper[0].alpha_s == pytest.approx(7.22e-4) and paper[0].beta_s_per_byte == pytest.approx(5.7e-10)
    lines, where = measured_lines(folder / "comm")
    assert lines[0].points == ((4000.0, pytest.approx(1e-4 + 8e-6)), (400_000.0, pytest.approx(1e-4 + 8e-4)))
    assert where == "cluster local_2x2: plain loopback, declared levels."
    with suite_style():
        figure = laid_out(collectives_figure(paper, lines, where))
        laid_out(collectives_figure(paper, [], ""))
    assert [len(axes.lines) for axes in figure.axes] == [7, 4]
    assert [axes.get_title(loc="right") for axes in figure.axes] == ["modelled", "measured"]


def test_the_command_line_draws_and_prints(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), "--comm", str(folder / "comm")]) == 0
    for name in ("table_ii", "table_iv", "figure_9"):
        assert (folder / f"{name}.png").stat().st_size > 20_000
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    told = capsys.readouterr().out
    assert "the paper's" in told and "Table IV, speed-up of all-to-all over Megatron-LM" in told
    assert "duplication, 4 groups, K=2, flat-tiny-s0" in told


def test_what_is_no_table_is_an_error(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pd.read_csv(folder / "tables.csv", dtype=str)
    for change, message in [
        (table.drop(columns="paper"), "no column paper"),
        (table.assign(kind="guessed"), "kind=guessed in row 0 is none of modelled"),
        (table.assign(table="V"), "table=V in row 0"),
        (table.assign(ours="many"), "ours=many in row 0 is no number"),
        (table.assign(quantity="something"), "something is no quantity of table II"),
        (table.iloc[:0], "it has no rows"),
    ]:
        change.to_csv(tmp_path / "tables.csv", index=False)
        assert main([str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "not a readable CSV" in capsys.readouterr().err


def test_timings_without_collectives_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="can't be read"):
        measured_lines(tmp_path)
    write_comm(tmp_path, [])
    with pytest.raises(ResultsError, match="no fitted collectives .* force=true"):
        measured_lines(tmp_path)


MODELLED = {"1": 4e-3, "2": 2e-3}
MEASURED = {"HD1": 5e-3, "HD2": 2.5e-3, "hiermoe": 2.2e-3}


def benchmark(folder: Path, config: bool = True) -> Path:
    """A layer benchmark of HierMoE over one level, two and as its model says; and of flat, which has no model."""
    rows = layer_rows("flat", "big")
    for system, seconds in MEASURED.items():
        own = layer_rows(system, "big")
        cell = {key: own[0][key] for key in ("system", "implementation", "shape", "workload", "seed")} | {"unit": "s"}
        own += [cell | {"round": 0, "metric": "modelled_dispatch", "part": d, "value": s} for d, s in MODELLED.items()]
        stage = {"metric": "stage_time", "part": "forward/dispatch"}
        rows += own + [cell | stage | {"round": turn, "value": seconds * (1 + turn / 100)} for turn in range(3)]
    write_parquet(folder / "samples.parquet", pd.DataFrame(rows), LABELS)
    write_manifest(folder)
    if config:
        systems = [{"name": "hiermoe", "label": "HD1", "levels": 1}, {"name": "hiermoe", "label": "HD2", "levels": 2}]
        systems += [{"name": "hiermoe", "label": "hiermoe", "levels": "auto"}, {"name": "flat", "label": "flat"}]
        (folder / "config.yaml").write_text(yaml.safe_dump({"systems": systems}))
    return folder


@pytest.mark.parametrize("config", [True, False])
def test_the_model_stands_beside_the_clock(tmp_path: Path, config: bool) -> None:
    table = write_levels(benchmark(tmp_path, config)).set_index("system")
    assert list(table["levels"]) == [1, 2, 2]
    assert list(table["modelled_s"]) == [4e-3, 2e-3, 2e-3]
    assert table.loc["HD1", "measured_s"] == pytest.approx(5.05e-3)
    assert table.loc["HD1", "error"] == pytest.approx(4 / 5.05 - 1)
    assert list(table["modelled_best"]) == [False, True, True]
    assert list(table["measured_best"]) == [False, False, True]
    with suite_style():
        figure = laid_out(levels_figure(table.reset_index(), "On two made-up GPUs."))
    assert heights(figure, 0) == pytest.approx([4, 5.05, 2, 2.525, 2, 2.222])
    assert "modelled and measured" in all_text(figure)


def test_all_levels_is_the_most(tmp_path: Path) -> None:
    benchmark(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"systems": [{"name": "hiermoe", "levels": "all"}]}))
    table = write_levels(tmp_path)
    assert list(table["system"]) == ["hiermoe"], "the others are no HierMoE, as config.yaml says"
    assert list(table["levels"]) == [2]


def test_the_command_line_knows_a_layer_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(benchmark(tmp_path))]) == 0
    told = capsys.readouterr().out
    assert "-21 %" in told and "modelled and measured" in told
    assert (tmp_path / "levels.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--comm", str(tmp_path)])


def test_a_benchmark_without_a_model_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_parquet(tmp_path / "samples.parquet", pd.DataFrame(layer_rows("flat", "big")), LABELS)
    assert main([str(tmp_path)]) == 2
    assert "none of its systems tells modelled_dispatch" in capsys.readouterr().err
