"""The ledger of claims: one rule for verdicts, numbers from result files alone, and nothing made of corrupted ones."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from analysis.claims import PAGE, RESULTS, main
from analysis.comparison import compare
from analysis.errors import ResultsError
from analysis.ledger.entries import Claim, read_claims
from analysis.ledger.page import page
from analysis.ledger.verdicts import (
    NOT_REPRODUCED,
    NOT_TESTED,
    PARTLY,
    REFUSED,
    REPRODUCED,
    VERDICTS,
    judge_all,
    verdict_of,
)
from analysis.statistics import Interval
from analysis.summary import summarise
from tests.analysis_results import LABELS, layer_rows, status_row, write_parquet, write_run, write_samples
from tests.swiftmoe_results import write_comparison

ROOT = Path(__file__).resolve().parent.parent
SEEDS = [0, 1]
EXPERIMENT = re.compile(r"experiment=(\w+)")

THROUGHPUT = {"statistic": "throughput", "folder": "compare", "system": "flat", "over": "deepspeed", "seeds": SEEDS}
LAYER = {"statistic": "layer_time", "folder": "layer", "system": "flat", "over": "best upstream"}


def claim(measure: dict[str, Any] | None = None, **keys: Any) -> Claim:
    """A claim of `at least 1.2`, tested by one statistic; `keys` replace its own."""
    test = {"where": "here", "command": "python -m experiments.compare", "measure": measure or THROUGHPUT}
    own = {"id": "one", "paper": "P", "says": "so", "source": "table 1", "unit": "x", "threshold": "paper"}
    return Claim.model_validate(own | {"at_least": 1.2, "no_effect": 1.0, "tests": [test]} | keys)


def write_compare(root: Path) -> None:
    """compare/ of two seeds: deepspeed's step is 1.62 times flat's, reference's 2.7 times."""
    systems = ["flat", "deepspeed", "reference"]
    runs = [write_run(root, system, seed) for system in systems for seed in SEEDS]
    write_samples(root, systems)
    (root / "compare").mkdir()
    index = {"runs": [f"../{path.name}" for path in runs], "samples": "../samples", "baseline": "flat"}
    (root / "compare" / "compare.json").write_text(json.dumps(index))
    summary = summarise(compare(runs, root / "samples"))
    summary.to_csv(root / "compare" / "summary.csv", index=False)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results that nothing is wrong with: a comparison, a layer benchmark, a table."""
    root = tmp_path_factory.mktemp("results")
    write_compare(root)
    rows = [
        *layer_rows("flat", "small", 0.05),
        *layer_rows("flat", "large", 0.2),
        *layer_rows("tutel", "small", 0.1, implementation="upstream"),
        *layer_rows("tutel", "large", 0.8, implementation="upstream"),
        *layer_rows("fastmoe", "small", 0.3, implementation="upstream"),
        *layer_rows("fastmoe", "large", implementation="upstream", status="refused: it has no kernel for that"),
    ]
    write_parquet(root / "layer" / "samples.parquet", pd.DataFrame(rows), LABELS)
    table = pd.DataFrame({"quantity": ["a", "b"], "ours": [1.3, 1.21], "kind": ["simulated", "fitted"]})
    table.to_csv(root / "table.csv", index=False)
    return root


@pytest.fixture
def results(pristine: Path, tmp_path: Path) -> Path:
    """A copy to corrupt."""
    return Path(shutil.copytree(pristine, tmp_path / "results"))


def change_parquet(path: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """Rewrite a result file with its footer."""
    metadata = pq.read_schema(path).metadata[b"moe_suite"]
    write_parquet(path, change(pq.read_table(path).to_pandas()), json.loads(metadata))


@pytest.mark.parametrize(
    ("interval", "bounds", "verdict"),
    [
        ((1.3, 1.25, 1.4), {"at_least": 1.2, "no_effect": 1.0}, REPRODUCED),
        ((1.3, 1.1, 1.4), {"at_least": 1.2, "no_effect": 1.0}, PARTLY),
        ((1.1, 1.05, 1.15), {"at_least": 1.2, "no_effect": 1.0}, PARTLY),
        ((1.1, 0.99, 1.15), {"at_least": 1.2, "no_effect": 1.0}, NOT_REPRODUCED),
        ((0.8, 0.7, 0.9), {"at_least": 1.2, "no_effect": 1.0}, NOT_REPRODUCED),
        ((1.7, 1.65, 1.8), {"at_least": 1.2, "at_most": 1.6, "no_effect": 1.0}, PARTLY),
        ((1.4, 1.4, 1.4), {"at_least": 1.2, "at_most": 1.6, "no_effect": 1.0}, REPRODUCED),
        ((0.9, 0.8, 1.0), {"at_most": 1.0, "at_least": None, "no_effect": None}, REPRODUCED),
        ((0.9, 0.8, 1.1), {"at_most": 1.0, "at_least": None, "no_effect": None}, PARTLY),
        ((1.2, 0.9, 1.3), {"at_most": 1.0, "at_least": None, "no_effect": None}, NOT_REPRODUCED),
        ((0.8, 0.7, 0.9), {"at_most": 0.6, "at_least": None, "no_effect": 1.0}, PARTLY),
    ],
)
def test_one_rule_gives_the_verdict(interval: tuple[float, ...], bounds: dict[str, Any], verdict: str) -> None:
    assert verdict_of(claim(**bounds), Interval(*interval)) == verdict


def test_a_number_comes_with_interval_kind_hardware_and_verdict(pristine: Path) -> None:
    (row,) = judge_all([claim()], pristine)
    assert row.verdict == REPRODUCED
    assert row.interval is not None
    assert row.interval.low < 1.62 < row.interval.high
    assert row.kind == "measured"
    assert "hardware" in row.hardware
    (missed,) = judge_all([claim(at_least=2.0)], pristine)
    assert (missed.verdict, missed.interval) == (PARTLY, row.interval)


def test_the_best_upstream_package_is_that_of_each_shape(pristine: Path) -> None:
    (row,) = judge_all([claim(LAYER)], pristine)
    assert row.interval is not None
    assert row.interval.value == pytest.approx((2 * 4) ** 0.5, rel=0.02)
    (small,) = judge_all([claim(LAYER | {"over": "fastmoe", "shapes": ["small"]})], pristine)
    assert small.interval is not None
    assert small.interval.value == pytest.approx(6, rel=0.02)


def test_a_simulated_number_says_so_and_a_fitted_one_is_no_evidence(pristine: Path) -> None:
    cell = {"statistic": "table_cell", "table": "table.csv", "row": {"quantity": "a"}}
    simulated, fitted = judge_all([claim(cell), claim(cell | {"row": {"quantity": "b"}})], pristine)
    assert (simulated.verdict, simulated.kind, simulated.hardware) == (REPRODUCED, "simulated", "none")
    assert (fitted.verdict, fitted.kind) == (NOT_TESTED, "fitted")
    assert "no evidence" in fitted.reason


def test_replicas_are_compared_seed_by_seed_and_to_a_stated_target(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    shared = {"folder": "compare", "system": "swiftmoe", "over": "deepspeed", "seeds": SEEDS}
    drops = {"statistic": "replicas", "number": "dropped_copies"} | shared
    own = {"statistic": "part_share", "parts": ["popularity", "scheduler", "metadata"]} | shared
    dropped, share = judge_all(
        [claim(drops, at_least=50, no_effect=0), claim(own, at_least=None, at_most=9, no_effect=None)], tmp_path
    )
    assert dropped.interval == Interval(60.0, 60.0, 60.0)
    assert share.interval is not None
    assert 0 < share.interval.value < 9


def test_a_simulator_s_error_is_over_as_many_pairs_as_are_asked_for(tmp_path: Path) -> None:
    measured = pd.Series([1.0] * 8)
    rows = pd.DataFrame(
        {
            "run": "layer-x",
            "cluster": "local",
            "machine": "4 x B200",
            "system": [f"s{index}" for index in range(8)],
            "implementation": "native",
            "shape": "small",
            "measured_s": measured,
            "measured_low_s": measured,
            "measured_high_s": measured,
            "simulated_s": [1.1, 0.9] * 4,
        }
    )
    (tmp_path / "v").mkdir()
    rows.to_csv(tmp_path / "v" / "validation.csv", index=False)
    measure = {"statistic": "simulator_error", "folder": "v", "pairs": 8}
    bounds = {"at_least": None, "at_most": 12.0, "no_effect": None}
    (row,) = judge_all([claim(measure, **bounds)], tmp_path)
    assert (row.verdict, row.kind, row.hardware) == (REPRODUCED, "simulated", "4 x B200")
    assert row.interval == pytest.approx((10.0, 10.0, 10.0))
    (few,) = judge_all([claim(measure | {"pairs": 24}, **bounds)], tmp_path)
    assert (few.verdict, few.reason) == (NOT_TESTED, "8 pairs of a system and a shape, and 24 are needed")


def test_what_was_refused_and_what_has_no_result(pristine: Path) -> None:
    (refused,) = judge_all([claim(LAYER | {"over": "fastmoe"})], pristine)
    assert refused.verdict == REFUSED
    assert "it has no kernel for that" in refused.reason
    (absent,) = judge_all([claim(THROUGHPUT | {"folder": "nowhere/compare"})], pristine)
    assert (absent.verdict, absent.interval) == (NOT_TESTED, None)
    (untested,) = judge_all([claim(tests=[], untested="nobody has one")], pristine)
    assert (untested.id, untested.verdict, untested.reason) == ("one", NOT_TESTED, "nobody has one")


def nan_rounds(root: Path) -> None:
    change_parquet(root / "samples" / "samples.parquet", lambda t: t.assign(value=t["value"].mask(t["round"] == 3)))


def nan_losses(root: Path) -> None:
    path = next(root.glob("flat-*-s1-*")) / "metrics.parquet"
    change_parquet(path, lambda t: t.assign(value=t["value"].mask((t["metric"] == "loss") & (t["step"] > 50))))


def no_second_seed(root: Path) -> None:
    change_parquet(root / "samples" / "samples.parquet", lambda t: t[t["seed"] == 0])


def no_second_seed_in_the_index(root: Path) -> None:
    index = json.loads((root / "compare" / "compare.json").read_text())
    index["runs"] = [run for run in index["runs"] if "-s0-" in run]
    (root / "compare" / "compare.json").write_text(json.dumps(index))


def half_written(root: Path) -> None:
    path = next(root.glob("deepspeed-*-s0-*")) / "metrics.parquet"
    path.write_bytes(path.read_bytes()[:500])


def lost_run(root: Path) -> None:
    shutil.rmtree(next(root.glob("deepspeed-*-s1-*")))


@pytest.mark.parametrize(
    ("corrupt", "reason"),
    [
        (nan_rounds, "no positive number"),
        (nan_losses, "loss is not a number"),
        (no_second_seed, "no timed rounds of seed 1"),
        (no_second_seed_in_the_index, "no runs of seed 1"),
        (half_written, "corrupt"),
        (lost_run, "missing"),
    ],
)
def test_results_with_holes_give_a_reason_and_no_number(
    results: Path, corrupt: Callable[[Path], None], reason: str
) -> None:
    corrupt(results)
    (row,) = judge_all([claim()], results)
    assert (row.verdict, row.interval) == (NOT_TESTED, None)
    assert reason in row.reason
    assert row.as_json()["value"] is None


def twice(root: Path) -> None:
    change_parquet(root / "samples" / "samples.parquet", lambda t: pd.concat([t, t[t["system"] == "flat"]]))


def swapped_natives(root: Path) -> None:
    names = {"flat": "reference", "reference": "flat"}
    change_parquet(root / "samples" / "samples.parquet", lambda t: t.assign(system=t["system"].replace(names)))


def swapped_implementations(root: Path) -> None:
    names = {"flat": "deepspeed", "deepspeed": "flat"}
    change_parquet(root / "samples" / "samples.parquet", lambda t: t.assign(system=t["system"].replace(names)))


def swapped_runs(root: Path) -> None:
    one, other = (next(root.glob(f"{system}-*-s0-*")) / "metrics.parquet" for system in ("flat", "reference"))
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def run_twice(root: Path) -> None:
    index = json.loads((root / "compare" / "compare.json").read_text())
    index["runs"].append(index["runs"][0])
    (root / "compare" / "compare.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (twice, "stands there twice"),
        (swapped_natives, "labels or files were swapped"),
        (swapped_implementations, "labelled"),
        (swapped_runs, "disagree on system"),
        (run_twice, "stands in the comparison twice"),
    ],
)
def test_results_that_contradict_themselves_are_an_error(
    results: Path, corrupt: Callable[[Path], None], message: str
) -> None:
    corrupt(results)
    with pytest.raises(ResultsError, match=message):
        judge_all([claim()], results)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.assign(value=t["value"].mask(t["round"] == 3)), "no positive number"),
        (lambda t: t[~((t["system"] == "tutel") & (t["round"] == 3))], "rounds are missing"),
        (lambda t: t[t["shape"] != "large"], "large was not measured"),
        (lambda t: t[t["system"] != "tutel"], "tutel was not measured"),
    ],
)
def test_a_layer_with_holes_gives_a_reason_and_no_number(
    results: Path, change: Callable[[pd.DataFrame], pd.DataFrame], reason: str
) -> None:
    change_parquet(results / "layer" / "samples.parquet", change)
    (row,) = judge_all([claim(LAYER | {"shapes": ["small", "large"], "over": "tutel"})], results)
    assert (row.verdict, row.interval) == (NOT_TESTED, None)
    assert reason in row.reason


def test_a_layer_with_a_cell_twice_is_an_error(results: Path) -> None:
    change_parquet(results / "layer" / "samples.parquet", lambda t: pd.concat([t, t.head(40)]))
    with pytest.raises(ResultsError, match="stands there twice"):
        judge_all([claim(LAYER)], results)


def test_a_table_with_a_row_twice_or_nan_gives_no_number(results: Path) -> None:
    table = pd.DataFrame({"quantity": ["a", "a", "b"], "ours": [1.3, 1.4, None], "kind": ["simulated"] * 3})
    table.to_csv(results / "table.csv", index=False)
    cell = {"statistic": "table_cell", "table": "table.csv", "row": {"quantity": "b"}}
    (row,) = judge_all([claim(cell)], results)
    assert (row.verdict, row.interval) == (NOT_TESTED, None)
    with pytest.raises(ResultsError, match="stands there 2 times"):
        judge_all([claim(cell | {"row": {"quantity": "a"}})], results)


def test_a_failed_system_is_told_with_its_reason(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "flat", 0), write_run(tmp_path, "deepspeed", 0, "refused", "needs NCCL: use GPUs")]
    refusal = pd.DataFrame(status_row("deepspeed", 0, "refused: needs NCCL: use GPUs"))
    write_samples(tmp_path, ["flat"], lambda t: pd.concat([t[t["seed"] == 0], refusal]))
    (tmp_path / "compare").mkdir()
    index = {"runs": [f"../{run.name}" for run in runs], "samples": "../samples", "baseline": "flat"}
    (tmp_path / "compare" / "compare.json").write_text(json.dumps(index))
    (row,) = judge_all([claim(THROUGHPUT | {"seeds": [0]})], tmp_path)
    assert row.verdict == REFUSED
    assert "needs NCCL: use GPUs" in row.reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "reproduced"}, r"one\.verdict=reproduced: is no key of a claim; verdicts are computed"),
        ({"at_least": "much"}, r"one\.at_least=much: .*Fix:"),
        ({"at_least": None}, "needs at_least, at_most or both"),
        ({"no_effect": 1.5}, "no_effect=1.5 must not hold the claim"),
        ({"untested": "why"}, "needs either tests or"),
        ({"says": None}, r"one\.says=None"),
    ],
)
def test_a_mistake_in_the_list_of_claims_is_told(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    content = claim().model_dump(exclude_none=True) | change
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump({"claims": [content]}))
    with pytest.raises(ResultsError, match=message):
        read_claims(tmp_path / "claims.yaml")


def test_an_id_stands_there_once(tmp_path: Path) -> None:
    content = claim().model_dump(exclude_none=True)
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump({"claims": [content, content]}))
    with pytest.raises(ResultsError, match="id=one stands there twice"):
        read_claims(tmp_path / "claims.yaml")


@pytest.fixture(scope="module")
def published() -> list[dict[str, Any]]:
    """What the command prints as JSON for results/."""
    return [row.as_json() for row in judge_all(read_claims(), RESULTS)]


def test_the_published_page_is_what_the_command_writes() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(judge_all(read_claims(), RESULTS)), "run python -m analysis.claims"


def test_every_published_row_says_all_that_it_must(published: list[dict[str, Any]]) -> None:
    assert len({row["id"] for row in published}) == len(published)
    assert {"TA-MoE", "HierMoE", "SwiftMoE", "FSMoE", "ScheInfer", "suite"} == {row["paper"] for row in published}
    for row in published:
        assert row["verdict"] in VERDICTS
        if row["value"] is None:
            assert row["reason"], row["id"]
        else:
            assert row["kind"] in ("measured", "modelled", "simulated", "fitted")
            assert row["hardware"]
            assert row["kind"] != "measured" or row["hardware"] != "none"
            assert row["low"] <= row["value"] <= row["high"]


def test_commands_name_experiments_that_there_are_and_measurements_elsewhere_say_so() -> None:
    for one in read_claims():
        for test in one.tests:
            for name in EXPERIMENT.findall(test.command):
                assert (ROOT / "conf" / "experiment" / f"{name}.yaml").is_file(), name
            assert test.setting or one.paper == "suite", f"{one.id}/{test.where} does not say what differs"


def test_the_command_prints_json_or_takes_results_from_elsewhere(
    pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"claims": [claim(THROUGHPUT | {"folder": "nowhere"}).model_dump(exclude_none=True)]}
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump(content))
    shared = ["--claims", str(tmp_path / "claims.yaml"), "--results", str(tmp_path)]
    assert main([*shared, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert {"id", "paper", "verdict", "value", "low", "high", "unit", "kind", "hardware"} <= set(row)
    assert row["verdict"] == NOT_TESTED
    assert main([*shared, "--with", f"one/here={pristine / 'compare'}", "--write", str(tmp_path / "page.md")]) == 0
    assert "reproduced" in capsys.readouterr().out
    assert re.search(
        r"\| one/here \| at least 1\.2 x \| 1\.\d+ \[.*\] x \| reproduced \|", (tmp_path / "page.md").read_text()
    )
    assert main([*shared, "--with", "two=there"]) == 2
    assert "no test has this id" in capsys.readouterr().err
    assert main(["--results", str(tmp_path / "nowhere")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
