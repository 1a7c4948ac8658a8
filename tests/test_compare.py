"""experiments.compare from the command line to its table and figures: two systems, a few steps.

Once with two real ranks; otherwise the only rank is this process (`tests.tiny.run_ranks_here`).
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import analysis.compare
from analysis.summary import STEP_PARTS
from experiments import bench_run, cells, compare, compare_bench, registry
from experiments.failures import RankFailure
from experiments.launch import run_ranks
from experiments.results import RunDir
from experiments.samples import SampleRow
from moe.layer import NativeMoE
from moe.mesh import Mesh
from moe.system import LayerSpec, MoELayer, System
from tests.tiny import ONE_RANK, TWO_RANKS, by_step, run_ranks_here, tiny, tiny_config, train

COLUMNS = ["system", "implementation", "metric", "value", "low", "high", "unit", "status"]
FIGURES = [f"{name}.{kind}" for name in ("loss", "throughput", "bytes", "stages") for kind in ("png", "pdf")]
FEW_STEPS = ["trainer.max_steps=3", "trainer.warmup_steps=1", "seeds=[0]", "timing.rounds=2", "timing.warmup=1"]
TIMING = "experiments.compare_bench:time_training"
STOPPING = "tests.rank_compare:stop_amid_rounds"


class Fragile(System):
    """Flat's layer, until it breaks."""

    name = "fragile"
    implementation = "native"
    summary = "may fail"
    broken = True

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """Fail, or not."""
        if self.broken:
            raise ValueError("no such kernel")
        return NativeMoE(spec, mesh)


Command = Callable[..., tuple[int, pd.DataFrame]]


@pytest.fixture
def command(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `experiments.compare` with overrides; gives its exit code and summary.csv."""
    systems = {**registry.discover(), "fragile": Fragile}
    monkeypatch.setattr(registry, "discover", lambda: systems)

    def run(*overrides: str) -> tuple[int, pd.DataFrame]:
        monkeypatch.setattr(sys, "argv", ["compare", *tiny(tmp_path, text, *FEW_STEPS, *overrides)])
        code: Any = 0
        try:
            compare.main()
        except SystemExit as stop:
            code = stop.code
        summary = tmp_path / "compare" / "summary.csv"
        return code, pd.read_csv(summary) if summary.exists() else pd.DataFrame(columns=COLUMNS)

    return run


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Draws no figures, which takes long; the names of those that would be there."""
    names: list[str] = []
    for name in ("loss_figure", "throughput_figure", "bytes_figure", "stages_figure"):
        monkeypatch.setattr(analysis.compare, name, lambda *_arguments: None)
    monkeypatch.setattr(analysis.compare, "save", lambda _figure, path: names.append(path.name))
    return names


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, drawn: list[str]) -> list[str]:
    """Lets this process be the only rank, and draws no figures; the targets of all launches."""
    seen: list[str] = []

    def launch(target: str, payload: dict[str, Any], **more: Any) -> Any:
        seen.append(target)
        return run_ranks_here(target, payload, **more)

    for module in (cells, bench_run):
        monkeypatch.setattr(module, "run_ranks", launch)
    return seen


def status(summary: pd.DataFrame, system: str, metric: str) -> str:
    """The status of one row."""
    (found,) = summary.loc[(summary["system"] == system) & (summary["metric"] == metric), "status"]
    return str(found)


def has_number(summary: pd.DataFrame, system: str, metric: str) -> bool:
    """Whether that row has a value inside its interval, and status ok."""
    (row,) = summary[(summary["system"] == system) & (summary["metric"] == metric)].itertuples()
    return row.status == "ok" and row.low <= row.value <= row.high


def test_two_ranks_from_the_command_line_to_the_figures(
    command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, summary = command("systems=[flat,reference]", TWO_RANKS)
    assert code == 0
    assert list(summary.columns) == COLUMNS
    assert set(summary["status"]) == {"ok"}
    assert set(summary["system"]) == {"flat", "reference"}
    wanted = {"train_loss", "val_loss", "tokens_per_s", "tokens_per_s_ratio", "bytes/network/alltoall", "peak_memory"}
    assert wanted <= set(summary.loc[summary["system"] == "flat", "metric"])
    for metric in wanted:
        assert has_number(summary, "flat", metric), metric
    stages = summary.loc[summary["metric"].str.startswith("stage_time/") & (summary["system"] == "flat"), "metric"]
    assert len(stages) == 8
    parts = summary[summary["metric"].str.startswith("part_time/") & (summary["system"] == "flat")]
    done = set(parts.loc[parts["value"] > 0, "metric"])
    assert len(parts) == len(STEP_PARTS) and done == {
        f"part_time/{part}" for part in ("optimizer", "dense_gradients", "expert_gradients")
    }
    errors = summary.loc[summary["metric"].str.startswith("relative_error/") & (summary["system"] == "flat"), "value"]
    assert len(errors) == 4
    assert errors.max() <= 1e-5
    folder = tmp_path / "compare"
    for name in [*FIGURES, "summary.md", "compare.json"]:
        assert (folder / name).stat().st_size > 0, name
    printed = capfd.readouterr().out
    assert f"written: {folder}/summary.csv, summary.md and " in printed
    assert "tokens" in printed and "flat" in printed

    logs = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.rglob("rank*.log")}
    assert len(logs) == 4  # two ranks that trained, two that timed
    written = (folder / "summary.csv").read_bytes()
    assert command("systems=[flat,reference]", TWO_RANKS)[0] == 0
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.rglob("rank*.log")} == logs
    assert (folder / "summary.csv").read_bytes() == written
    assert capfd.readouterr().out.count("is complete (force=true runs it again)") == 3


def test_force_runs_all_again(command: Command, launched: list[str]) -> None:
    command("systems=[flat,reference]", ONE_RANK)
    first = list(launched)
    command("systems=[flat,reference]", ONE_RANK)
    assert launched == first == ["experiments.training:run_rank", TIMING]
    assert command("systems=[flat,reference]", ONE_RANK, "force=true")[0] == 0
    assert launched == first * 2


def test_a_system_that_fails_is_a_row_until_it_is_mended(
    command: Command, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is trained again each time; the others are not. Once it trains, all are timed anew, together."""
    code, summary = command("systems=[flat,fragile,reference]", ONE_RANK)
    assert code == 1
    assert status(summary, "fragile", "train_loss").startswith("failed: rank 0 failed: ValueError: no such kernel")
    assert "not timed, because it failed to train" in status(summary, "fragile", "tokens_per_s")
    assert has_number(summary, "flat", "tokens_per_s")
    assert has_number(summary, "reference", "train_loss")
    first = list(launched)
    assert first == ["experiments.training:run_rank"] * 2 + [TIMING]

    assert command("systems=[flat,fragile,reference]", ONE_RANK)[0] == 1
    assert launched == [*first, "experiments.training:run_rank"]

    monkeypatch.setattr(Fragile, "broken", False)
    code, summary = command("systems=[flat,fragile,reference]", ONE_RANK)
    assert code == 0
    assert set(summary["status"]) == {"ok"}
    assert launched == [*first, "experiments.training:run_rank", "experiments.training:run_rank", TIMING]
    losses = summary[summary["metric"] == "train_loss"].set_index("system")["value"]
    assert losses["fragile"] == losses["flat"] == pytest.approx(losses["reference"], rel=1e-5)


def trained_steps(folder: Path, rounds: int) -> dict[str, tuple[float, str]]:
    """By system the steps behind the weights that it was timed with, and what samples.parquet calls them."""
    for path in folder.glob("compare-*"):
        table = pd.read_parquet(path / "samples.parquet")
        if (table["metric"] == "step_time").sum() == rounds * table.loc[
            table["metric"] == "tokens", "system"
        ].nunique():
            rows = table[table["metric"] == "trained_steps"]
            return {row.system: (row.value, row.part) for row in rows.itertuples()}
    raise AssertionError(f"no timing of {rounds} rounds")


def test_systems_are_timed_with_what_they_have_learned(
    command: Command, launched: list[str], tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first timed step is the one that training would have taken next; without a checkpoint there is none."""
    losses: list[float] = []
    build = compare_bench.build_gpt

    def build_and_listen(*arguments: Any) -> Any:
        gpt = build(*arguments)
        gpt.register_forward_hook(lambda _m, _a, output: losses.append(output.cross_entropy.item()))
        return gpt

    monkeypatch.setattr(compare_bench, "build_gpt", build_and_listen)
    assert command("systems=[flat]", ONE_RANK)[0] == 0
    assert trained_steps(tmp_path, rounds=2) == {"flat": (3.0, "trained")}
    (flat,) = tmp_path.glob("flat-*")
    first = losses[0]
    resumed = [f"trainer.resume_from={flat}", "trainer.max_steps=4", "trainer.warmup_steps=1", "seed=0"]
    assert first == by_step(train(tiny_config(tmp_path, text, ONE_RANK, *resumed)), "loss")[3]

    losses.clear()
    assert command("systems=[flat]", ONE_RANK, "timing.weights=initial", "timing.rounds=1")[0] == 0
    assert trained_steps(tmp_path, rounds=1) == {"flat": (0.0, "initial")}
    assert losses[0] == by_step(RunDir(flat), "loss")[0]

    (damaged,) = flat.glob("checkpoints/step_3/*.distcp")
    damaged.write_bytes(b"")
    _, summary = command("systems=[flat,reference]", ONE_RANK)
    told = "corrupt (the checksum differs). Fix: force=true trains again, timing.weights=initial needs none"
    assert told in status(summary, "flat", "tokens_per_s")
    assert has_number(summary, "reference", "tokens_per_s")
    shutil.rmtree(flat / "checkpoints")
    _, summary = command("systems=[flat,reference]", ONE_RANK)
    told = f"failed: not timed: {flat / 'checkpoints'} holds no checkpoint. Fix: force=true trains again"
    assert status(summary, "flat", "tokens_per_s").startswith(told)
    assert has_number(summary, "flat", "train_loss") and has_number(summary, "reference", "tokens_per_s")


def test_variants_of_one_system_stand_side_by_side_under_their_labels(
    command: Command, launched: list[str], tmp_path: Path
) -> None:
    """Each trains in a folder of its own, and one that fails costs the others nothing."""
    variants = "systems=[flat,{name: flat, label: flat again},{name: fragile, label: fragile b},reference]"
    code, summary = command(variants, ONE_RANK)
    assert code == 1
    assert list(dict.fromkeys(summary["system"])) == ["flat", "flat again", "fragile b", "reference"]
    assert status(summary, "fragile b", "train_loss").startswith("failed: ")
    for system in ("flat", "flat again"):
        assert has_number(summary, system, "train_loss") and has_number(summary, system, "tokens_per_s")
    losses = summary[summary["metric"] == "train_loss"].set_index("system")["value"]
    assert losses["flat"] == losses["flat again"]
    assert len(list(tmp_path.glob("flat-*"))) == 2


def test_a_system_that_refuses_is_a_row(command: Command, launched: list[str]) -> None:
    code, summary = command("systems=[flat,{name:fairscale,gate:upstream}]", ONE_RANK)
    assert code == 0
    for metric in ("train_loss", "tokens_per_s"):
        assert status(summary, "fairscale", metric).startswith("refused: fairscale's Top2Gate knows only top_k=2")
    assert has_number(summary, "flat", "tokens_per_s")


def test_a_system_that_fails_while_it_is_timed_is_a_row(
    command: Command, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = compare_bench.build_gpt

    def build_or_fail(model: Any, system: System, *more: Any) -> Any:
        if system.name == "flat":
            raise MemoryError("beside the others")
        return build(model, system, *more)

    monkeypatch.setattr(compare_bench, "build_gpt", build_or_fail)
    code, summary = command("systems=[flat,reference]", ONE_RANK)
    assert code == 0
    assert status(summary, "flat", "tokens_per_s").startswith("oom: MemoryError: beside the others")
    assert has_number(summary, "flat", "train_loss")
    assert has_number(summary, "reference", "tokens_per_s")


@pytest.fixture
def timing_ends_with(monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> Callable[[RankFailure], None]:
    """Makes the ranks of the timing fail as a whole."""

    def arrange(error: RankFailure) -> None:
        def fail(*_arguments: Any, **_more: Any) -> None:
            raise error

        monkeypatch.setattr(bench_run, "run_ranks", fail)

    return arrange


def test_a_timing_that_fails_leaves_a_table_without_times(
    command: Command, timing_ends_with: Callable[[RankFailure], None], capsys: pytest.CaptureFixture[str]
) -> None:
    timing_ends_with(RankFailure("failed", 1, "rank 1 was killed by signal 9"))
    code, summary = command("systems=[flat,reference]", ONE_RANK)
    assert code == 1
    assert "the timing failed, so the table has no times: rank 1 was killed by signal 9" in capsys.readouterr().err
    assert has_number(summary, "flat", "train_loss")
    assert not (summary["metric"].str.startswith("tokens_per_s") & (summary["status"] == "ok")).any()


def test_ctrl_c_while_timing(
    command: Command,
    tmp_path: Path,
    timing_ends_with: Callable[[RankFailure], None],
    monkeypatch: pytest.MonkeyPatch,
    launched: list[str],
) -> None:
    """The next start has only the timing left to do."""
    timing_ends_with(RankFailure("interrupted", None, "stopped by SIGINT"))
    code, summary = command("systems=[flat,reference]", ONE_RANK)
    assert (code, len(summary)) == (130, 0)
    (timing,) = tmp_path.glob("compare-*")
    state = RunDir(timing).status()
    assert state is not None
    assert (state.status, state.reason) == ("interrupted", "the run was interrupted: stopped by SIGINT")

    def launch(target: str, payload: dict[str, Any], **more: Any) -> Any:
        launched.append(target)
        return run_ranks_here(target, payload, **more)

    monkeypatch.setattr(bench_run, "run_ranks", launch)
    assert command("systems=[flat,reference]", ONE_RANK)[0] == 0
    assert launched == ["experiments.training:run_rank", TIMING]


def test_a_stop_between_seeds_ends_the_timing(
    command: Command, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_bench, "stop_agreed", lambda info: True)
    seen: list[Any] = []

    def launch(target: str, payload: dict[str, Any], **more: Any) -> Any:
        seen.append(run_ranks_here(target, payload, **more))
        raise RankFailure("interrupted", None, "stopped by SIGINT")  # what a value None becomes

    monkeypatch.setattr(bench_run, "run_ranks", launch)
    assert command("systems=[flat]", ONE_RANK)[0] == 130
    assert seen == [None]


def timing_in(outputs: Path) -> tuple[str, str, dict[str, list[int]]]:
    """Status and reason of the only timing, and by system the rounds that its samples hold, of all seeds."""
    (folder,) = outputs.glob("compare-*")
    state, samples = RunDir(folder).status(), folder / "samples.parquet"
    assert state is not None
    if not samples.exists():
        return state.status, state.reason, {}
    times = pd.read_parquet(samples).query("metric == 'step_time'")
    return state.status, state.reason, times.groupby("system")["round"].apply(list).to_dict()


def test_ranks_that_are_stopped_amid_the_rounds_keep_those_that_were_timed(
    command: Command,
    tmp_path: Path,
    drawn: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def launch(target: str, payload: dict[str, Any], **more: Any) -> Any:
        assert target == TIMING
        return run_ranks(STOPPING, {**payload, "parent": os.getpid(), "stop_after": 3}, **more)

    compared = ("systems=[flat,reference]", TWO_RANKS, "timing.rounds=4")
    with monkeypatch.context() as patched:
        patched.setattr(bench_run, "run_ranks", launch)
        code, summary = command(*compared)
    assert code == 130
    told = "2 of 4 rounds were timed"
    reason = f"the run was interrupted: stopped by SIGINT; {told}"
    assert timing_in(tmp_path) == ("interrupted", reason, {"flat": [0, 1], "reference": [0, 1]})
    journal = next(tmp_path.glob("compare-*/samples.jsonl")).read_text().split("\n\n")
    at_once = {SampleRow(*row).metric for row in json.loads(journal[0])["rows"]}
    assert at_once >= {"step_time", "tokens"}, "a second signal may leave no time for more"
    assert set(summary["status"]) == {"ok"}
    for metric in ("train_loss", "tokens_per_s", "tokens_per_s_ratio", "bytes/network/alltoall", "peak_memory"):
        assert has_number(summary, "flat", metric), metric
    assert summary["metric"].str.startswith("stage_time/").any()
    assert drawn == ["loss", "throughput", "bytes", "stages"]
    assert f"The timing was stopped: {told}." in (tmp_path / "compare" / "summary.md").read_text()
    assert f"{told}; the same command times all of them anew\nwritten: " in capfd.readouterr().out

    code, summary = command(*compared)
    assert code == 0
    assert timing_in(tmp_path) == ("done", "", {"flat": [0, 1, 2, 3], "reference": [0, 1, 2, 3]})
    assert set(summary["status"]) == {"ok"}
    printed = capfd.readouterr().out
    assert printed.count("is complete (force=true runs it again)") == 2, "only the timing was left to do"
    assert "rounds were timed" not in printed


def test_a_stop_behind_the_rounds_keeps_them_and_says_what_was_not_read(
    command: Command, tmp_path: Path, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*_: Any) -> None:
        raise ZeroDivisionError

    def launch(target: str, payload: dict[str, Any], **more: Any) -> Any:
        try:
            return run_ranks_here(target, payload, **more)
        except RankFailure:
            raise RankFailure("interrupted", None, "stopped at once by SIGTERM and SIGTERM") from None

    monkeypatch.setattr(compare_bench, "_add_observations", ended)
    monkeypatch.setattr(bench_run, "run_ranks", launch)
    code, summary = command("systems=[flat,reference]", ONE_RANK)
    assert code == 130
    reason = (
        "the run was interrupted: stopped at once by SIGTERM and SIGTERM; 2 of 2 rounds were timed, and not all of "
        "bytes, memory and stages read"
    )
    assert timing_in(tmp_path) == ("interrupted", reason, {"flat": [0, 1], "reference": [0, 1]})
    assert set(summary["status"]) == {"ok"}
    assert has_number(summary, "flat", "tokens_per_s")


def test_a_stop_under_another_seed_keeps_those_that_were_timed(
    command: Command, tmp_path: Path, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two seeds with a round to warm up and two timed ones; without a timed round there is no table."""

    def launch(target: str, payload: dict[str, Any], **more: Any) -> Any:
        value = run_ranks_here(target, payload, **more)
        if value is None:
            raise RankFailure("interrupted", None, "stopped by SIGTERM")
        return value

    def stopped_at(answer: int) -> tuple[int, pd.DataFrame]:
        """It is asked before a seed and behind each of its rounds: 0 to 3 for the first one."""
        asked = itertools.count()
        monkeypatch.setattr(compare_bench, "stop_agreed", lambda _info: next(asked) >= answer)
        return command("systems=[flat,reference]", ONE_RANK, "seeds=[0,1]")

    monkeypatch.setattr(bench_run, "run_ranks", launch)
    interrupted = "the run was interrupted: stopped by SIGTERM"
    code, summary = stopped_at(1)
    assert (code, len(summary)) == (130, 0)
    assert timing_in(tmp_path) == ("interrupted", interrupted, {})

    code, summary = stopped_at(5)
    assert code == 130
    told = "2 of 4 rounds were timed"
    once = {"flat": [0, 1], "reference": [0, 1]}
    assert timing_in(tmp_path) == ("interrupted", f"{interrupted}; {told}", once)
    assert status(summary, "flat", "tokens_per_s") == "1 of 2 seeds"
    missing = f"missing (seed 1, timed rounds): not timed before the stop; {told}"
    assert status(summary, "flat", "run") == status(summary, "reference", "run") == missing

    code, summary = stopped_at(6)
    assert code == 130
    rounds = {"flat": [0, 1, 0], "reference": [0, 1, 0]}
    assert timing_in(tmp_path) == ("interrupted", f"{interrupted}; 3 of 4 rounds were timed", rounds)
    assert set(summary["status"]) == {"ok"}

    code, summary = stopped_at(7)  # behind the last round
    assert code == 0
    assert timing_in(tmp_path) == ("done", "", {"flat": [0, 1] * 2, "reference": [0, 1] * 2})
    assert set(summary["status"]) == {"ok"}
