"""`python -m analysis.figures`: everything that there is results for is drawn, and what is of no use is told."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from analysis.compare import read_index
from analysis.comparison import compare
from analysis.figures import fsmoe
from analysis.figures.__main__ import PAPERS, Made, main, make, own_roots
from analysis.figures.found import look_into
from analysis.fsmoe_tables import read_simulated
from analysis.ledger.entries import read_claims
from analysis.ledger.verdicts import judge_all
from analysis.load import load_run
from analysis.plots.claims import claims_figure
from analysis.plots.communication import communication_figure
from analysis.plots.locality import locality_figure
from analysis.plots.profile import profile_figure
from analysis.plots.steps import steps_figure
from analysis.plots.throughput import throughput_figure
from analysis.style import suite_style
from analysis.summary import summarise
from analysis.topology import load_routings
from tests import swiftmoe_results, topology_results
from tests.analysis_results import LABELS, layer_rows, write_parquet, write_run
from tests.test_analysis_figures import all_text, extent, texts

RESULTS = Path(__file__).resolve().parent.parent / "results"
SYSTEMS = ("flat", "ta_moe", "deepspeed", "hiermoe", "fsmoe", "swiftmoe")


@dataclass(frozen=True)
class Drawn:
    """What one call made, and where."""

    made: list[Made]
    out: Path
    root: Path


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """Results of every paper, a system that nobody knows, and runs of no use, all drawn."""
    root, out = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("figures")
    topology_results.write_comparison(root / "toy_ta_moe")
    swiftmoe_results.write_comparison(root / "toy_swiftmoe")
    rows = [*layer_rows("flat", "small"), *layer_rows("flat", "large")]
    stages = [
        row | {"metric": "stage_time", "part": f"{direction}/{stage}", "value": 0.01, "unit": "s"}
        for row in rows
        if row["metric"] == "step_time"
        for direction in ("forward", "backward")
        for stage in ("gate", "dispatch", "experts", "combine")
    ]
    layer = pd.DataFrame([*rows, *stages])
    other = layer.assign(system="somebody's own", value=layer["value"] * 1.5)
    write_parquet(root / "layer" / "samples.parquet", pd.concat([layer, other]), LABELS)
    for name in ("hiermoe_tables", "fsmoe_simulated"):
        shutil.copytree(RESULTS / name, root / name, ignore=shutil.ignore_patterns("*.png"))
    write_run(root, "flat", 0, "interrupted", "the machine went away")
    half = write_run(root, "deepspeed", 0)
    (half / "metrics.parquet").write_bytes(b"PAR1")
    swapped = write_run(root, "fairscale", 0)
    (swapped / "config.yaml").write_text((swapped / "config.yaml").read_text().replace("fairscale", "reference"))
    return Drawn(make(list(PAPERS), [root], out)[0], out, root)


def test_every_paper_is_drawn_as_png_and_vector_pdf(drawn: Drawn) -> None:
    assert [one for one in drawn.made if one.failure] == []
    pictures = {path.relative_to(drawn.out).with_suffix("").as_posix() for path in drawn.out.rglob("*.png")}
    assert {
        *(f"ta_moe/toy_ta_moe/{name}" for name in ("dispatch", "locality", "loss_time", "communication", "throughput")),
        *(f"swiftmoe/toy_swiftmoe/{name}" for name in ("replicas", "survival", "target")),
        *(f"hiermoe/tables/{name}" for name in ("table_ii", "table_iv", "figure_9")),
        *(f"fsmoe/simulated/{name}" for name in ("table2", "table5", "contention", "fig5", "fig6", "fig7", "fig8")),
        *(f"suite/layer/{name}" for name in ("stages", "step_time", "profile")),
        "hiermoe/claims/claims",
        "fsmoe/claims/claims",
    } <= pictures
    for name in pictures:
        pdf = (drawn.out / f"{name}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF")
        assert b"/Type /Font" in pdf, f"{name} has no text in its PDF"


def test_the_index_shows_each_picture_and_tells_what_was_skipped(drawn: Drawn) -> None:
    index = (drawn.out / "index.md").read_text()
    shown = [line.split("](")[1].rstrip(")") for line in index.splitlines() if line.startswith("![")]
    assert sorted(shown) == sorted(path.relative_to(drawn.out).as_posix() for path in drawn.out.rglob("*.png"))
    skipped = index.split("## Skipped")[1]
    assert "interrupted: the machine went away" in skipped
    assert "corrupt: metrics.parquet can't be read" in skipped
    assert "its files disagree on system" in skipped


def test_tables_come_with_the_figures(drawn: Drawn) -> None:
    perplexity = pd.read_csv(drawn.out / "ta_moe" / "perplexity" / "perplexity.csv").set_index("system")
    assert perplexity.loc["flat", "perplexity"] == pytest.approx(np.exp(3.0))
    claims = pd.read_csv(drawn.out / "fsmoe" / "claims" / "claims.csv")
    assert set(claims["paper"]) == {"FSMoE"}
    assert (drawn.out / "swiftmoe" / "toy_swiftmoe" / "swiftmoe.csv").is_file()


def test_tables_and_index_name_no_folder_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkout" / "results").mkdir(parents=True)
    monkeypatch.setattr("analysis.figures.__main__.ROOT", tmp_path / "checkout")
    monkeypatch.chdir(tmp_path / "checkout")
    assert own_roots() == [Path("results")]
    monkeypatch.chdir(tmp_path)
    assert own_roots() == [Path("checkout/results")]


def test_contradictions_are_told_and_the_rest_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = topology_results.write_comparison(tmp_path / "results" / "toy").parent.parent
    rows = layer_rows("flat", "small")
    write_parquet(root / "layer" / "samples.parquet", pd.DataFrame([*rows, *rows]), LABELS)
    run = next((root / "toy").glob("ta_moe-*-s0-*"))
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"git": {"commit": "an older one"}}))
    run = next((root / "toy").glob("ta_moe-*-s1-*"))
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"git": {"commit": "a newer one"}}))
    assert main(["ta_moe", "suite", "--results", str(root), "--out", str(tmp_path / "out")]) == 2
    assert "stands there twice" in capsys.readouterr().err
    assert (tmp_path / "out" / "ta_moe" / "toy" / "dispatch.png").is_file()
    assert "Not alike: The runs do not share one code version" in (tmp_path / "out" / "index.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ta_moee"], "ta_moee: no such paper. Fix: name some of ta_moe, hiermoe, swiftmoe, fsmoe, suite"),
        (["--results", "{empty}"], "no finished results there"),
        (["--results", "{empty}/nowhere"], "there is no such folder"),
    ],
)
def test_a_mistake_is_told(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.format(empty=tmp_path) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


def test_comparisons_of_unlike_machines_are_no_one_grid(tmp_path: Path) -> None:
    for index, (num_experts, cores) in enumerate([(8, 2), (16, 2), (32, 64)]):
        folder = topology_results.write_comparison(
            tmp_path / f"e{index}", ("deepspeed", "ta_moe"), model={"num_experts": num_experts}, arrays={}
        )
        samples = {"hardware": {"cores": cores, "cpu": "Some CPU"}, "cluster": {"name": "toy_2x2"}}
        (folder.parent / "samples" / "manifest.json").write_text(json.dumps(samples))
    recipes = {recipe.name: recipe for recipe in PAPERS["ta_moe"].recipes(look_into([tmp_path]))}
    (grid,) = (recipe for name, recipe in recipes.items() if name.endswith("-speedups"))
    assert sorted(path.parent.name for path in grid.sources) == ["e0", "e1"]
    assert "e2" in recipes


def simulated(name: str) -> Figure:
    """One of the tables' figures."""
    draw, pattern = fsmoe.TABLES[name]
    return draw(read_simulated(RESULTS / "fsmoe_simulated" / name, pattern))


def published(figure: str) -> Figure:
    """A figure of a published comparison whose systems have long names."""
    comparison = compare(*read_index(RESULTS / "netns_2x2_ta_moe_deepspeed" / "compare"))
    draw = {
        "throughput": lambda: throughput_figure(comparison, summarise(comparison)),
        "locality": lambda: locality_figure(comparison, load_routings(comparison)[0]),
        "communication": lambda: communication_figure(comparison),
    }
    return draw[figure]()


def claims(paper: str) -> Figure:
    """The verdicts on one paper."""
    return claims_figure(judge_all([claim for claim in read_claims() if claim.paper == paper], RESULTS))


def steps() -> Figure:
    """Runs of swaps."""
    runs = [load_run(path) for path in sorted((RESULTS / "h100_split_2x1_hiermoe_swap").iterdir())]
    return steps_figure(runs, "measured", "On some machine.")


def profile() -> Figure:
    """Three systems over four cases, one without a number."""
    times = np.array([[1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 2.0, 9.0], [9.0, 4.0, np.nan, 8.0]])
    labels = {"flat": "flat (native)", "tutel": "tutel (upstream)", "mine": "mine (native)"}
    return profile_figure(times, labels, 4, "measured", "On some machine.")


@pytest.mark.parametrize(
    ("figure", "kind"),
    [
        *((lambda name=name: simulated(name), "simulated") for name in ("table5.csv", "contention.csv", "fig6.csv")),
        *((lambda name=name: simulated(name), "simulated") for name in ("fig7.csv", "fig8.csv")),
        *((lambda name=name: simulated(name), "modelled") for name in ("table2.csv", "fig5.csv")),
        *((lambda paper=paper: claims(paper), "") for paper in ("TA-MoE", "HierMoE", "FSMoE", "suite")),
        *((lambda name=name: published(name), "measured") for name in ("throughput", "locality", "communication")),
        (steps, "measured"),
        (profile, "measured"),
    ],
)
def test_text_keeps_to_its_place_and_each_panel_says_what_it_is(figure, kind: str) -> None:
    with suite_style():
        found: Figure = figure()
        found.draw_without_rendering()
    boxes = [(text.get_text(), extent(text, found)) for text in texts(found)]
    for text, box in boxes:
        assert found.bbox.x0 <= box.x0 <= box.x1 <= found.bbox.x1 + 1, f"{text!r} leaves the page"
        assert found.bbox.y0 <= box.y0 <= box.y1 <= found.bbox.y1 + 1, f"{text!r} leaves the page"
    upright = [(text.get_text(), extent(text, found)) for text in texts(found) if text.get_rotation() % 90 == 0]
    assert [(one, other) for (one, a), (other, b) in combinations(upright, 2) if a.overlaps(b)] == []
    panels = [axes for axes in found.axes if axes.axison]
    for axes in panels:
        told = axes.get_title(loc="right")
        assert told
        assert all(word in ("measured", "modelled", "simulated", "fitted", "and") for word in told.split())
    assert kind in all_text(found)
    assert any(axes.get_xlabel() for axes in panels) or any(axes.get_ylabel() for axes in panels)
