"""The summary: every number comes from the inputs, and whatever is wrong with them is visible or an error."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import image

from analysis.compare import main, write
from analysis.comparison import Comparison, compare
from analysis.errors import ResultsError
from analysis.style import COLUMN_INCHES, DPI
from analysis.summary import COLUMNS, summarise
from analysis.tables import binary_bytes, format_table, people_table, significant, to_markdown
from tests.analysis_results import (
    ERROR_PARTS,
    IMPLEMENTATIONS,
    STAGES,
    Change,
    run_rows,
    sample_rows,
    status_row,
    unchanged,
    write_run,
    write_samples,
)

SYSTEMS = list(IMPLEMENTATIONS)
ROUNDS = 6


def whole(outputs: Path, change: Change = unchanged, systems: list[str] = SYSTEMS) -> tuple[list[Path], Path]:
    """Folders of a comparison in which every run is done; `change` is applied to the samples."""
    runs = [write_run(outputs, system, seed) for system in systems for seed in (0, 1)]
    return runs, write_samples(outputs, systems, change, rounds=ROUNDS)


@lru_cache(maxsize=1)
def rows_of(comparison: Comparison) -> pd.DataFrame:
    """The summary by (system, metric); one `run` row at most."""
    return summarise(comparison).set_index(["system", "metric"])


def cell(comparison: Comparison, system: str, metric: str) -> pd.Series:
    """One row of the summary."""
    return rows_of(comparison).loc[(system, metric)]


def values_of(table: pd.DataFrame, metric: str, part: str = "") -> pd.Series:
    """Values of one metric and part, straight from the rows that were written."""
    return table.loc[(table["metric"] == metric) & (table["part"] == part), "value"]


def assert_no_number(row: pd.Series, status: str) -> None:
    """A row that says why it has no number."""
    assert row[["value", "low", "high"]].isna().all()
    assert status in row["status"]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, Path]:
    """What `write` returned, and the folder that it wrote."""
    outputs = tmp_path_factory.mktemp("outputs")
    runs, samples = whole(outputs)
    return write(outputs / "compare", runs, samples), outputs / "compare"


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_number_is_reproduced_from_the_inputs(good: tuple[pd.DataFrame, Path], system: str) -> None:
    csv = pd.read_csv(good[1] / "summary.csv").query("system == @system").set_index("metric")
    runs = [pd.DataFrame(run_rows(system, seed)) for seed in (0, 1)]
    everything = pd.DataFrame(sample_rows(SYSTEMS, rounds=ROUNDS))
    samples = everything[everything["system"] == system]

    def trained(metric: str) -> list[pd.Series]:
        return [values_of(run, metric) for run in runs]

    def timed(metric: str, part: str = "") -> np.ndarray:
        return values_of(samples, metric, part).to_numpy()

    expected = {
        "train_loss": np.mean([losses.iloc[-10:].mean() for losses in trained("loss")]),
        "val_loss": np.mean([losses.iloc[-1] for losses in trained("val_loss")]),
        "tokens_per_s": np.median(4096 / timed("step_time")),
        "peak_memory": timed("peak_memory").max(),
        "dropped_copies": np.mean([counts.mean() for counts in trained("dropped_copies")]),
        "dropped_copies/timed": timed("dropped_copies").max(),
    }
    base = values_of(everything[everything["system"] == "flat"], "step_time")
    expected["tokens_per_s_ratio"] = expected["tokens_per_s"] / np.median(4096 / base)
    for level in ("node", "network"):
        for kind in ("alltoall", "reduction"):
            part = f"{level}/{kind}"
            expected[f"bytes/{part}"] = np.mean([values_of(run, "bytes", part).sum() / 60 for run in runs])
    for stage in STAGES:
        for direction in ("forward", "backward"):
            expected[f"stage_time/{direction}/{stage}"] = np.median(timed("stage_time", f"{direction}/{stage}"))
    expected |= {f"relative_error/{part}": timed("relative_error", part).max() for part in ERROR_PARTS}

    assert set(csv.index) == set(expected)
    for metric, value in expected.items():
        row = csv.loc[metric]
        assert row["value"] == pytest.approx(value, rel=1e-12, abs=1e-300), metric
        assert row["low"] <= row["value"] <= row["high"], metric
        assert row["status"] == "ok"
        assert row["implementation"] == IMPLEMENTATIONS[system]


def test_the_csv_holds_what_was_returned(good: tuple[pd.DataFrame, Path]) -> None:
    csv = pd.read_csv(good[1] / "summary.csv")
    assert list(csv.columns) == COLUMNS
    pd.testing.assert_frame_equal(csv, good[0].astype(csv.dtypes.to_dict()), rtol=1e-15)


@pytest.mark.parametrize("name", ["loss", "throughput", "bytes", "stages"])
def test_figures_are_written_and_not_blank(good: tuple[pd.DataFrame, Path], name: str) -> None:
    picture = image.imread(good[1] / f"{name}.png")
    assert picture.shape[1] == round(COLUMN_INCHES * DPI)
    assert picture[..., :3].var() > 1e-3
    coloured = np.ptp(picture[..., :3], axis=2) > 0.2
    assert coloured.mean() > 2e-3, "nothing but grey"
    document = (good[1] / f"{name}.pdf").read_bytes()
    assert document.startswith(b"%PDF-")
    assert b"/FontFile2" in document, "text must stay text: TrueType fonts, fonttype 42"
    assert b"/Type3" not in document
    assert b"/Subtype /Image" not in document, "a vector figure holds no picture"


def test_units(good: tuple[pd.DataFrame, Path]) -> None:
    units = good[0].drop_duplicates("metric").set_index("metric")["unit"]
    assert units["train_loss"] == "nats/token"
    assert units["tokens_per_s_ratio"] == "x flat"
    assert units["bytes/network/alltoall"] == "B/step"
    assert units["stage_time/forward/gate"] == "s"
    assert units["peak_memory"] == "B"


def test_the_tables_for_people(good: tuple[pd.DataFrame, Path]) -> None:
    summary, folder = good
    text, page = format_table(summary), (folder / "summary.md").read_text()
    ratio = summary.set_index(["system", "metric"]).loc[("deepspeed", "tokens_per_s_ratio")]
    shown = f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
    for system, implementation in IMPLEMENTATIONS.items():
        assert f"{system} ({implementation})" in text
        assert f"| {system} ({implementation}) | ok |" in page
    assert shown in text
    assert shown in page
    assert "4 gloo ranks on one machine, plain loopback, declared levels" in page
    assert "sent over network per step" in page
    assert max(map(len, text.splitlines())) < 170
    assert len(people_table(summary)) == len(SYSTEMS)


def test_regenerating_gives_the_same_bytes(good: tuple[pd.DataFrame, Path], capsys: pytest.CaptureFixture) -> None:
    folder = good[1]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main([str(folder)]) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert "deepspeed (upstream)" in capsys.readouterr().out
    index = json.loads((folder / "compare.json").read_text())
    assert index["baseline"] == "flat"
    assert all((folder / name / "status.json").exists() for name in index["runs"])
    assert (folder / index["samples"] / "samples.parquet").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file. Fix: run `python -m experiments.compare` first"),
        ("{", "must be a JSON object with runs"),
        ('{"runs": [], "samples": null}', "KeyError: 'baseline'"),
        ('{"runs": [], "samples": null, "baseline": "flat"}', "nothing to compare"),
    ],
)
def test_a_bad_index_is_one_sentence(tmp_path: Path, capsys, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "compare.json").write_text(content)
    assert main([str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_known_ratio_comes_out(tmp_path: Path) -> None:
    def twice_as_slow(table: pd.DataFrame) -> pd.DataFrame:
        times = table[table["metric"] == "step_time"].set_index(["system", "seed", "round"])["value"]
        noise = np.random.default_rng(8).normal(1, 0.01, len(times["flat"]))
        slow = (table["system"] == "deepspeed") & (table["metric"] == "step_time")
        table.loc[slow, "value"] = 2 * times["flat"].to_numpy() * noise
        return table

    runs, samples = whole(tmp_path, twice_as_slow, ["flat", "deepspeed"])
    row = cell(compare(runs, samples), "deepspeed", "tokens_per_s_ratio")
    assert row["low"] <= 0.5 <= row["high"]
    assert row["high"] - row["low"] < 0.03
    turned = cell(compare(runs, samples, baseline="deepspeed"), "flat", "tokens_per_s_ratio")
    assert turned["value"] == pytest.approx(1 / row["value"], rel=1e-12)
    assert turned["unit"] == "x deepspeed"


@pytest.mark.parametrize("status", ["failed", "oom", "timeout", "interrupted", "running"])
def test_a_failed_seed_is_told_and_not_averaged(tmp_path: Path, status: str) -> None:
    runs = [write_run(tmp_path, "flat", 0), write_run(tmp_path, "flat", 1, status, "rank 2 died")]
    comparison = compare(runs, None)
    row = cell(comparison, "flat", "val_loss")
    assert row["value"] == pytest.approx(cell(compare(runs[:1], None), "flat", "val_loss")["value"])
    assert row["status"] == "1 of 2 seeds"
    told = summarise(comparison).query("metric == 'run'")["status"].tolist()
    assert f"{status} (seed 1): rank 2 died" in told
    assert_no_number(cell(comparison, "flat", "tokens_per_s"), "missing: nothing was timed")


def test_a_refused_system_is_a_row_with_its_reason(tmp_path: Path) -> None:
    runs, _ = whole(tmp_path, systems=["flat"])
    runs += [write_run(tmp_path, "fairscale", seed, "refused", "needs top_k=2 | 1") for seed in (0, 1)]
    refused = pd.DataFrame(status_row("fairscale", 0, "refused: no") + status_row("fairscale", 1, "refused: no"))
    samples = write_samples(tmp_path / "again", ["flat"], lambda table: pd.concat([table, refused]))
    comparison = compare(runs, samples)
    for metric in ("train_loss", "val_loss", "bytes/network/alltoall"):
        assert_no_number(cell(comparison, "fairscale", metric), "refused: needs top_k=2 | 1")
    for metric in ("tokens_per_s", "tokens_per_s_ratio", "stage_time/forward/gate", "relative_error/output"):
        assert_no_number(cell(comparison, "fairscale", metric), "refused: no")
    summary = summarise(comparison)
    assert len(summary.query("system == 'fairscale' and metric == 'run'")) == 4
    assert "fairscale (upstream): refused (seed 0; seed 1): needs top_k=2 | 1" in format_table(summary)
    assert people_table(summary).set_index("system").loc["fairscale (upstream)", "status"] == "refused"


def test_a_missing_seed_is_a_row(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "flat", 0), write_run(tmp_path, "flat", 1), write_run(tmp_path, "deepspeed", 0)]
    samples = write_samples(
        tmp_path, change=lambda t: t[(t["system"] != "reference") | (t["seed"] == 0)], rounds=ROUNDS
    )
    comparison = compare(runs, samples)
    assert cell(comparison, "deepspeed", "train_loss")["status"] == "1 of 2 seeds"
    assert cell(comparison, "reference", "tokens_per_s")["status"] == "1 of 2 seeds"
    assert cell(comparison, "reference", "tokens_per_s_ratio")["status"] == "1 of 2 seeds"
    told = summarise(comparison).query("metric == 'run'")
    assert "missing (seed 1): there is no run of this seed" in told.query("system == 'deepspeed'")["status"].tolist()
    assert "missing (seed 1, timed rounds): no sample of it" in told.query("system == 'reference'")["status"].tolist()


def test_a_run_folder_that_is_gone_is_a_row(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "flat", 0), tmp_path / "deepspeed-tiny-s0-00000000ff"]
    assert_no_number(cell(compare(runs, None), "deepspeed", "train_loss"), "missing: there is no such run folder")


@pytest.mark.parametrize("metric", ["loss", "val_loss"])
def test_nan_in_a_loss_is_told(tmp_path: Path, metric: str) -> None:
    def diverge(table: pd.DataFrame) -> pd.DataFrame:
        table.loc[(table["metric"] == metric) & (table["step"] >= 29), "value"] = np.nan
        return table

    runs = [write_run(tmp_path, "flat", 0), write_run(tmp_path, "deepspeed", 0, change=diverge)]
    comparison = compare(runs, None)
    assert_no_number(cell(comparison, "deepspeed", {"loss": "train_loss"}.get(metric, metric)), "nan:")
    told = summarise(comparison).query("metric == 'run' and system == 'deepspeed'")["status"]
    assert f"nan (seed 0): {metric} is not a number from step 29" in told.tolist()


def test_a_run_that_ends_early_is_no_comparison(tmp_path: Path) -> None:
    short = write_run(tmp_path, "deepspeed", 0, change=lambda table: table[table["step"] < 40])
    comparison = compare([write_run(tmp_path, "flat", 0), short], None)
    assert_no_number(cell(comparison, "deepspeed", "train_loss"), "incomplete: its loss ends at step 39, others' at 59")


@pytest.mark.parametrize(
    ("value", "status"), [(np.nan, "nan: step_time of round 3"), (0.0, "corrupt: step_time"), (-1.0, "corrupt")]
)
def test_a_bad_time_spoils_the_seed_not_the_median(tmp_path: Path, value: float, status: str) -> None:
    def spoil(table: pd.DataFrame) -> pd.DataFrame:
        table.loc[
            (table["system"] == "deepspeed") & (table["round"] == 3) & (table["metric"] == "step_time"), "value"
        ] = value
        return table

    runs, samples = whole(tmp_path, spoil, ["flat", "deepspeed"])
    comparison = compare(runs, samples)
    for metric in ("tokens_per_s", "tokens_per_s_ratio", "stage_time/backward/combine"):
        assert_no_number(cell(comparison, "deepspeed", metric), status)


def test_a_spoiled_baseline_leaves_no_ratio(tmp_path: Path) -> None:
    def spoil(table: pd.DataFrame) -> pd.DataFrame:
        table.loc[(table["system"] == "flat") & (table["metric"] == "step_time"), "value"] = np.inf
        return table

    runs, samples = whole(tmp_path, spoil, ["flat", "deepspeed"])
    comparison = compare(runs, samples)
    assert_no_number(cell(comparison, "deepspeed", "tokens_per_s_ratio"), "no round with flat (nan: step_time")
    assert np.isfinite(cell(comparison, "deepspeed", "tokens_per_s")["value"])


@pytest.mark.parametrize(
    ("metric", "part", "row"),
    [
        ("relative_error", "gate_grad", "relative_error/gate_grad"),
        ("stage_time", "forward/experts", "stage_time/forward/experts"),
        ("peak_memory", "", "peak_memory"),
    ],
)
def test_nan_in_one_metric_marks_that_row_alone(tmp_path: Path, metric: str, part: str, row: str) -> None:
    def spoil(table: pd.DataFrame) -> pd.DataFrame:
        wanted = (table["system"] == "deepspeed") & (table["metric"] == metric) & (table["part"] == part)
        table.loc[table[wanted].index[-1], "value"] = np.nan
        return table

    runs, samples = whole(tmp_path, spoil, ["flat", "deepspeed"])
    comparison = compare(runs, samples)
    assert_no_number(cell(comparison, "deepspeed", row), "nan: not finite in round")
    assert np.isfinite(cell(comparison, "deepspeed", "tokens_per_s_ratio")["value"])
    assert f"{row}: nan" in format_table(summarise(comparison))
    if metric == "relative_error":
        assert people_table(summarise(comparison)).set_index("system").loc["deepspeed (upstream)", "rel. error"] == "-"


def test_nan_in_bytes_marks_the_row(tmp_path: Path) -> None:
    def spoil(table: pd.DataFrame) -> pd.DataFrame:
        table.loc[table["part"] == "network/alltoall", "value"] = np.nan
        return table

    comparison = compare([write_run(tmp_path, "flat", 0, change=spoil)], None)
    assert_no_number(cell(comparison, "flat", "bytes/network/alltoall"), "nan: not a byte count")
    assert cell(comparison, "flat", "bytes/network/reduction")["value"] == 2.9e6


def test_bytes_without_a_row_are_zero_where_the_step_was_metered(tmp_path: Path) -> None:
    comparison = compare([write_run(tmp_path, system, 0) for system in ("flat", "reference")], None)
    assert cell(comparison, "reference", "bytes/network/alltoall")["value"] == 0
    unmetered = write_run(tmp_path, "deepspeed", 0, change=lambda table: table[table["metric"] != "bytes"])
    comparison = compare([write_run(tmp_path, "flat", 1).rename(tmp_path / "one"), unmetered], None)
    assert_no_number(cell(comparison, "deepspeed", "bytes/network/alltoall"), "missing: not recorded")


def test_unpaired_rounds_are_told(tmp_path: Path) -> None:
    def drop_a_round(table: pd.DataFrame) -> pd.DataFrame:
        return table[(table["system"] != "flat") | (table["round"] != 5) | (table["seed"] != 1)]

    runs, samples = whole(tmp_path, drop_a_round, ["flat", "deepspeed"])
    assert cell(compare(runs, samples), "deepspeed", "tokens_per_s_ratio")["status"] == "11 of 12 rounds paired"


def test_missing_samples_leave_the_training_numbers(tmp_path: Path) -> None:
    runs, _ = whole(tmp_path, systems=["flat", "deepspeed"])
    comparison = compare(runs, tmp_path / "nowhere")
    assert cell(comparison, "flat", "train_loss")["status"] == "ok"
    assert_no_number(cell(comparison, "flat", "tokens_per_s"), "missing: there is no samples.parquet")


def test_samples_of_nothing_but_failures_leave_the_training_numbers(tmp_path: Path) -> None:
    runs, _ = whole(tmp_path, systems=["flat"])
    failed = pd.DataFrame(status_row("flat", 0, "failed: no run") + status_row("flat", 1, "failed: no run"))
    comparison = compare(runs, write_samples(tmp_path / "again", ["flat"], lambda _table: failed))
    assert cell(comparison, "flat", "train_loss")["status"] == "ok"
    assert_no_number(cell(comparison, "flat", "tokens_per_s"), "failed")


def test_samples_alone_are_a_comparison(tmp_path: Path) -> None:
    _, samples = whole(tmp_path)
    comparison = compare([], samples)
    assert cell(comparison, "deepspeed", "tokens_per_s_ratio")["status"] == "ok"
    assert_no_number(cell(comparison, "flat", "train_loss"), "missing")


def test_systems_that_were_only_timed_lack_nothing(tmp_path: Path) -> None:
    summary = summarise(compare([], write_samples(tmp_path)))
    assert set(people_table(summary)["status"]) == {"ok"}
    assert not {"train loss", "val loss"} & set(people_table(summary).columns)
    assert "without numbers" not in format_table(summary)


def test_errors_that_no_table_may_hide(tmp_path: Path) -> None:
    runs, samples = whole(tmp_path, systems=["flat", "deepspeed"])
    copy = write_run(tmp_path / "copy", "flat", 0)
    with pytest.raises(ResultsError, match="system=flat seed=0 stands in the comparison twice"):
        compare([*runs, copy], samples)
    with pytest.raises(ResultsError, match=r"baseline=fats: no run .* name one of flat, deepspeed"):
        compare(runs, samples, baseline="fats")
    with pytest.raises(ResultsError, match="nothing to compare"):
        compare([], None)


def test_swapped_implementations_are_an_error(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "flat", 0)]
    samples = write_samples(tmp_path, change=lambda table: table.replace({"implementation": {"native": "upstream"}}))
    with pytest.raises(ResultsError, match="system=flat is labelled native and upstream"):
        compare(runs, samples)


@pytest.mark.parametrize("key", ["kind", "cluster", "emulation"])
def test_mixed_measurements_are_an_error(tmp_path: Path, key: str) -> None:
    runs = [write_run(tmp_path, "flat", 0), write_run(tmp_path, "flat", 1, labels={key: "simulated"})]
    with pytest.raises(ResultsError, match=f"mixes different values of {key}"):
        compare(runs, None)


@pytest.mark.parametrize("column", ["shape", "workload"])
def test_samples_of_two_shapes_are_an_error(tmp_path: Path, column: str) -> None:
    def second(table: pd.DataFrame) -> pd.DataFrame:
        return pd.concat([table, table.assign(**{column: "other"})])

    with pytest.raises(ResultsError, match=f"several values of {column}"):
        compare([], write_samples(tmp_path, ["flat"], second))


def test_mixed_units_are_an_error(tmp_path: Path) -> None:
    def in_ms(table: pd.DataFrame) -> pd.DataFrame:
        table.loc[(table["metric"] == "step_time") & (table["system"] == "flat"), "unit"] = "ms"
        return table

    with pytest.raises(ResultsError, match="step_time comes in several units: ms, s"):
        compare([], write_samples(tmp_path, change=in_ms))
    with pytest.raises(ResultsError, match="step_time is in ms, not in s"):
        compare([], write_samples(tmp_path / "only", ["flat"], in_ms))


def test_unlike_runs_are_told(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, "flat", 0), write_run(tmp_path, "deepspeed", 0, config={"model": {"top_k": 1}})]
    comparison = compare(runs, None)
    note = "The runs differ in model.top_k: 2, 1."
    assert comparison.notes == ["The runs differ in model.name: tiny, unset.", note]
    assert f"- {note}" in to_markdown(summarise(comparison), "", comparison.notes, {})


def test_a_full_disk_leaves_the_old_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "compare"
    folder.mkdir()
    (folder / "summary.csv").write_text("old")
    runs = [write_run(tmp_path, "flat", 0)]

    def full(path: Path, text: str, **options: str) -> int:
        with path.open("w") as file:
            file.write(text[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ResultsError, match=r"could not be written \(No space left on device\).* Fix: free disk space"):
        write(folder, runs, None)
    assert (folder / "summary.csv").read_text() == "old"
    assert [path.name for path in folder.iterdir()] == ["summary.csv"]


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(0.61549, 3, "0.615"), (81631.3, 3, "81600"), (3.6e-7, 2, "3.6e-07"), (0.0, 3, "0"), (12.0, 4, "12.00")],
)
def test_numbers_for_people(value: float, digits: int, text: str) -> None:
    assert significant(value, digits) == text
    assert significant(float("nan")) == "-"


def test_bytes_for_people() -> None:
    assert binary_bytes(512) == "512.0 B"
    assert binary_bytes(1.5 * 2**20, 3) == "1.50 MiB"
    assert binary_bytes(float("nan")) == "-"
