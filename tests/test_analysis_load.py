"""A run that is not whole is a row with its reason; mixed-up labels are an error."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml

from analysis.errors import ResultsError
from analysis.load import load_run, load_samples
from tests.analysis_results import EMULATION, LABELS, run_rows, status_row, write_parquet, write_run, write_samples


def test_a_whole_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "deepspeed", 3)
    run = load_run(folder)
    assert (run.system, run.implementation, run.seed, run.status, run.reason) == (
        "deepspeed",
        "upstream",
        3,
        "done",
        "",
    )
    assert run.is_done
    assert run.metadata["emulation"] == EMULATION
    assert run.config["model"]["top_k"] == 2
    assert run.level_names == ["node", "network"]
    expected = pd.DataFrame(run_rows("deepspeed", 3))
    pd.testing.assert_frame_equal(run.metrics.astype(expected.dtypes.to_dict()), expected)


def test_a_variant_goes_by_its_label(tmp_path: Path) -> None:
    config = {"system": {"name": "deepspeed", "label": "deepspeed rts", "use_rts": True}}
    run = load_run(write_run(tmp_path, "deepspeed", 3, config=config, labels={"label": "deepspeed rts"}))
    assert (run.system, run.implementation, run.status) == ("deepspeed rts", "upstream", "done")
    swapped = write_run(tmp_path / "swapped", "deepspeed", 3, config=config, labels={"label": "deepspeed"})
    with pytest.raises(ResultsError, match="its files disagree on label"):
        load_run(swapped)


def test_only_some_metrics(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path, "flat", 0), metrics=["loss"])
    assert set(run.metrics["metric"]) == {"loss"}
    assert len(run.metrics) == 60


@pytest.mark.parametrize("status", ["failed", "oom", "refused", "timeout", "interrupted"])
def test_a_run_that_did_not_finish_keeps_its_reason_and_gives_no_number(tmp_path: Path, status: str) -> None:
    folder = write_run(tmp_path, "deepspeed", 1, status, "RuntimeError:\n  rank 3 died")
    labels = {"run_id": folder.name, "system": "deepspeed", "seed": 1, "implementation": "upstream"}
    write_parquet(folder / "metrics.parquet", pd.DataFrame(run_rows("deepspeed", 1, steps=7)), labels | LABELS)
    run = load_run(folder)
    assert (run.system, run.seed, run.status, run.reason) == ("deepspeed", 1, status, "RuntimeError: rank 3 died")
    assert not run.is_done
    assert run.metrics.empty


def test_a_run_still_going_says_where_it_is(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path, "flat", 0, "running"))
    assert (run.status, run.reason) == ("running", "not finished, at step 41")


def test_no_folder_and_no_status(tmp_path: Path) -> None:
    gone = load_run(tmp_path / "fairscale-tiny-s4-0123456789")
    assert (gone.system, gone.seed, gone.status) == ("fairscale", 4, "missing")
    folder = write_run(tmp_path, "flat", 0)
    (folder / "status.json").unlink()
    assert load_run(folder).status == "missing"


def corrupt_parquet(folder: Path) -> None:
    content = (folder / "metrics.parquet").read_bytes()
    (folder / "metrics.parquet").write_bytes(content[: len(content) // 2])


def no_footer(folder: Path) -> None:
    write_parquet(folder / "metrics.parquet", pd.DataFrame(run_rows("flat", 0)), None)


def other_schema(folder: Path) -> None:
    write_parquet(folder / "metrics.parquet", pd.DataFrame(run_rows("flat", 0)), LABELS | {"schema_version": 2})


def text_values(folder: Path) -> None:
    table = pd.DataFrame(run_rows("flat", 0))
    write_parquet(folder / "metrics.parquet", table.assign(value=table["value"].astype(str)), LABELS)


def no_column(folder: Path) -> None:
    write_parquet(folder / "metrics.parquet", pd.DataFrame(run_rows("flat", 0)).drop(columns="unit"), LABELS)


def twice(folder: Path) -> None:
    table = pd.DataFrame(run_rows("flat", 0))
    write_parquet(folder / "metrics.parquet", pd.concat([table, table.iloc[[3]]]), LABELS)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (corrupt_parquet, "metrics.parquet can't be read"),
        (lambda folder: (folder / "metrics.parquet").write_text(""), "metrics.parquet can't be read"),
        (lambda folder: (folder / "metrics.parquet").unlink(), "there is no metrics.parquet"),
        (no_footer, "no moe_suite footer"),
        (other_schema, "schema_version 2, this analysis reads 1"),
        (text_values, "in the column value"),
        (no_column, "lacks the column unit"),
        (twice, "holds bytes of step 0 twice"),
        (lambda folder: (folder / "status.json").write_text('{"status": "do'), "status.json can't be read"),
        (lambda folder: (folder / "status.json").write_text('{"status": "fine"}'), "says fine, which is no status"),
        (lambda folder: (folder / "config.yaml").write_text("system: [flat"), "config.yaml can't be read"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json holds no mapping"),
    ],
)
def test_a_corrupt_run_says_which_file(tmp_path: Path, damage, reason: str) -> None:
    folder = write_run(tmp_path, "flat", 0)
    damage(folder)
    run = load_run(folder)
    assert run.status == "corrupt"
    assert reason in run.reason
    assert run.metrics.empty
    assert (run.system, run.seed) == ("flat", 0)


def test_swapped_labels_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        ResultsError, match=r"disagree on system: metrics.parquet says deepspeed, config.yaml says flat"
    ):
        load_run(write_run(tmp_path, "flat", 0, labels={"system": "deepspeed"}))
    with pytest.raises(ResultsError, match=r"disagree on seed: .*config.yaml says 7"):
        load_run(write_run(tmp_path, "deepspeed", 0, config={"seed": 7}))


def test_swapped_files_are_an_error(tmp_path: Path) -> None:
    first, second = write_run(tmp_path, "flat", 0), write_run(tmp_path, "flat", 1)
    content = (first / "metrics.parquet").read_bytes()
    (first / "metrics.parquet").write_bytes((second / "metrics.parquet").read_bytes())
    (second / "metrics.parquet").write_bytes(content)
    with pytest.raises(ResultsError, match="disagree on seed"):
        load_run(first)


def test_a_renamed_folder_is_no_error(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "flat", 0).rename(tmp_path / "published")
    assert load_run(folder).is_done


def test_levels_come_from_the_manifest_first(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "flat", 0)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"cluster": {"levels": None}}))
    levels = [{"name": name} for name in ("self", "socket", "rack")]
    (folder / "manifest.json").write_text(json.dumps({"cluster": {"levels": levels}}))
    assert load_run(folder).level_names == ["socket", "rack"]


def test_samples_and_their_refusals(tmp_path: Path) -> None:
    refused = pd.DataFrame(status_row("fairscale", 0, "refused: top_k must be 2") + status_row("fairscale", 1, "oom"))
    samples = load_samples(write_samples(tmp_path, ["flat"], lambda table: pd.concat([table, refused])))
    assert samples.status == "done"
    assert set(samples.table["system"]) == {"flat"}
    told = samples.problems[["system", "implementation", "seed", "status", "reason"]].to_numpy().tolist()
    assert told == [
        ["fairscale", "upstream", 0, "refused", "top_k must be 2"],
        ["fairscale", "upstream", 1, "oom", "no reason was recorded"],
    ]


def test_missing_and_corrupt_samples(tmp_path: Path) -> None:
    assert load_samples(tmp_path / "nothing").status == "missing"
    (tmp_path / "status.json").write_text(json.dumps({"status": "oom", "reason": "rank 1:\nkilled"}))
    assert (load_samples(tmp_path).status, load_samples(tmp_path).reason) == ("oom", "rank 1: killed")
    folder = write_samples(tmp_path)
    (folder / "samples.parquet").write_bytes(b"PAR1")
    assert load_samples(folder).status == "corrupt"


def test_a_sample_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    folder = write_samples(tmp_path, change=lambda table: pd.concat([table, table.iloc[[5]]]))
    with pytest.raises(ResultsError, match=r"system=flat, .*round=0, .* stands there twice"):
        load_samples(folder)


def test_samples_of_two_implementations_are_an_error(tmp_path: Path) -> None:
    def swap(table: pd.DataFrame) -> pd.DataFrame:
        table.loc[(table["system"] == "flat") & (table["seed"] == 1), "implementation"] = "upstream"
        return table

    with pytest.raises(ResultsError, match="flat is labelled both"):
        load_samples(write_samples(tmp_path, change=swap))


@pytest.mark.parametrize(
    ("cluster", "ranks"),
    [
        ({"device": "cpu", "launch": "netns"}, "4 gloo ranks on one machine"),
        ({"device": "cuda", "launch": "join"}, "4 NCCL ranks"),
        ({"levels": None}, ""),
    ],
)
def test_ranks_in_words(tmp_path: Path, cluster: dict[str, object], ranks: str) -> None:
    folder = write_run(tmp_path, "flat", 0)
    (folder / "manifest.json").unlink()
    declared = {"levels": [{"name": "node", "fanout": 2}, {"name": "network", "fanout": 2}]} | cluster
    (folder / "config.yaml").write_text(yaml.safe_dump({"cluster": declared}))
    assert load_run(folder).ranks == ranks


def test_no_metric_at_all_can_be_asked_for(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path, "flat", 0), metrics=())
    assert (run.status, run.implementation, len(run.metrics)) == ("done", "native", 0)
