"""experiments.layer: what four ranks measure of one layer, and what the command line makes of it."""

from __future__ import annotations

import sys
from collections import Counter
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from torch.utils.flop_counter import FlopCounterMode

import analysis.layer
from analysis.load import load_samples
from experiments import bench_run, layer, layer_bench
from experiments.bench_run import BenchRun
from experiments.cli import compose
from experiments.config import load_layer
from experiments.floor import floor_step
from experiments.launch import run_ranks
from experiments.samples import SampleRow, SampleWriter
from moe import experts
from moe.stages import STAGES
from moe.system import Activation, LayerSpec
from moe.topology import cluster_of
from moe.workload import Workload, expert_ids
from tests.lone import lone_mesh
from tests.rank_layer import WORKSPACE_BYTES
from tests.rank_models import runnable
from tests.tiny import ONE_RANK, run_ranks_here

NUM_TOKENS, MODEL_DIM, NUM_EXPERTS, TOP_K, ROUNDS, WORLD_SIZE = 48, 32, 8, 2, 3, 4
CLUSTER = cluster_of([2, 2])
SHAPE = f"{{tokens_per_rank:{NUM_TOKENS},model_dim:{MODEL_DIM},hidden_dim:16,num_experts:{NUM_EXPERTS},top_k:{TOP_K}"
BASE = [f"shapes=[{SHAPE},name:small,activation:gelu}}]", f"rounds={ROUNDS}", "warmup=1"]
SYSTEMS = runnable()
EVERY = f"systems=[{','.join(SYSTEMS)}]"


class Case(NamedTuple):
    """One benchmark: its overrides, the workload it draws, and what results call that."""

    overrides: list[str]
    drawn: Workload
    workload: str


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """All benchmarks; the replayed trace sends every token of the second half to experts 6 and 7."""
    trace = tmp_path_factory.mktemp("trace") / "routing.npz"
    half = WORLD_SIZE * NUM_TOKENS // 2
    choices = np.concatenate([np.tile([0, 3], (half, 1)), np.tile([7, 6], (half, 1))])
    np.savez(trace, sample_expert_ids=choices[None].astype(np.int16))
    replay = Workload("replay", path=str(trace))
    swiglu = f"shapes=[{SHAPE},name:wide,activation:swiglu}},{SHAPE},name:small,activation:gelu}}]".replace(
        "hidden_dim:16", "hidden_dim:64", 1
    )
    return {
        "uniform": Case([EVERY], Workload("uniform"), "uniform"),
        "zipf": Case([EVERY, "workload=zipf", "workload.exponent=1.5"], Workload("zipf", 1.5), "zipf 1.5"),
        "replay": Case(["systems=[flat]", "workload=replay", f"workload.path={trace}"], replay, "replay"),
        "drops": Case(["systems=[flat,reference]", "capacity_factor=0.5"], Workload("uniform"), "uniform"),
        "variants": Case(["systems=[flat,{name: flat, label: flat again}]"], Workload("uniform"), "uniform"),
        "unchecked": Case(["systems=[flat]", "check=false"], Workload("uniform"), "uniform"),
        "two shapes": Case(["systems=[flat]", swiglu], Workload("uniform"), "uniform"),
    }


@pytest.fixture(scope="module")
def measured(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What four ranks return."""
    configs = {
        name: load_layer(compose("layer", [*BASE, *case.overrides])).model_dump(mode="json")
        for name, case in cases.items()
    }
    failing = ["broken", "flat", {"name": "fairscale", "gate": "upstream"}, "hungry", "reference"]
    configs["failing"] = {**configs["uniform"], "systems": failing}
    configs["profiled"] = {**configs["two shapes"], "systems": ["flat", "hungry", "keeping"], "profile": True}
    return run_ranks(
        "tests.rank_layer:measure",
        {"configs": configs},
        num_ranks=WORLD_SIZE,
        ranks_per_node=2,
        log_dir=tmp_path_factory.mktemp("layer"),
        timeout_s=60,
    )


@pytest.fixture(scope="module")
def rows(measured: dict[str, Any]) -> dict[str, list[SampleRow]]:
    """Sample rows by case."""
    return {name: [SampleRow(*row) for row in told] for name, told in measured["rows"].items()}


def of(rows: list[SampleRow], system: str, metric: str) -> dict[str, list[float]]:
    """Values by part, in the order of their rounds."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if (row.system, row.metric) == (system, metric):
            found.setdefault(row.part, []).append(row.value)
            assert row.round == len(found[row.part]) - 1
    return found


@pytest.mark.parametrize("workload", ["uniform", "zipf"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_what_is_measured_of_every_system(
    system: str, workload: str, rows: dict[str, list[SampleRow]], cases: dict[str, Case]
) -> None:
    told = rows[workload]
    assert {(row.shape, row.workload, row.seed) for row in told} == {("small", cases[workload].workload, 0)}
    times = of(told, system, "step_time")
    assert list(times) == [""] and len(times[""]) == ROUNDS
    assert min(times[""]) > 0
    floors = of(told, system, "floor_time")
    assert len(floors[""]) == ROUNDS
    assert min(floors[""]) > 0
    assert floors == of(told, "flat", "floor_time"), "one floor for all, of the same rounds"
    stages = of(told, system, "stage_time")
    assert stages.keys() == {f"{direction}/{stage}" for direction in ("forward", "backward") for stage in STAGES}
    assert {len(values) for values in stages.values()} == {layer_bench.STAGE_ROUNDS}
    assert min(stages["forward/experts"]) > 0 and min(stages["backward/experts"]) > 0
    assert of(told, system, "tokens") == {"": [WORLD_SIZE * NUM_TOKENS]}
    assert of(told, system, "dropped_copies") == {"": [0.0]}
    (peak,) = of(told, system, "peak_memory")[""]
    assert peak > NUM_TOKENS * MODEL_DIM * 4  # at least the output
    paths = of(told, system, "path")
    assert system != "flat" or paths == {"all-to-all-v; expert by expert": [1.0]}
    errors = of(told, system, "relative_error")
    assert errors.keys() == {"output", "input_grad", "gate_grad", "expert_grad"}
    for part, (error,) in errors.items():
        assert error <= 1e-5, part
    assert {row.unit for row in told if row.metric in ("step_time", "stage_time")} == {"s"}


@pytest.mark.parametrize("name", ["uniform", "drops"])
def test_the_floor_sends_the_rows_of_flat_but_no_counts(
    name: str, measured: dict[str, Any], rows: dict[str, list[SampleRow]]
) -> None:
    expected = {part: value for part, (value,) in of(rows[name], "flat", "bytes").items()}
    for rank in range(WORLD_SIZE):
        for peer in range(WORLD_SIZE):
            level = CLUSTER.level_names[CLUSTER.level_of(rank, peer)]
            expected[f"{level}/alltoall"] -= NUM_EXPERTS // WORLD_SIZE * 8
    assert measured["floors"][name] == expected


@pytest.mark.parametrize(("activation", "matrices"), [("gelu", 2), ("swiglu", 3)])
def test_the_floor_multiplies_what_the_experts_do(
    monkeypatch: pytest.MonkeyPatch, activation: Activation, matrices: int
) -> None:
    """Every row by every matrix, and twice as much backward; oneDNN's operator is not known to torch's counter."""
    monkeypatch.setattr(experts, "ONEDNN", False)
    spec = LayerSpec(MODEL_DIM, 16, NUM_EXPERTS, TOP_K, activation)
    ids_TK = expert_ids(Workload("uniform"), NUM_TOKENS, NUM_EXPERTS, TOP_K, seed=0, rank=0)
    step = floor_step(spec, ids_TK, lone_mesh())
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == 3 * matrices * 2 * NUM_TOKENS * TOP_K * MODEL_DIM * 16


@pytest.mark.parametrize("name", ["uniform", "zipf", "replay"])
def test_bytes_of_flat_are_those_of_the_copies_that_travel(
    name: str, rows: dict[str, list[SampleRow]], cases: dict[str, Case]
) -> None:
    """Each copy is sent, its output returns, and both gradients go the other way; the counts of copies go once."""
    per_rank = NUM_EXPERTS // WORLD_SIZE
    travelled: Counter[tuple[int, int]] = Counter()
    for rank in range(WORLD_SIZE):
        chosen = expert_ids(cases[name].drawn, NUM_TOKENS, NUM_EXPERTS, TOP_K, seed=0, rank=rank)
        travelled.update((rank, expert // per_rank) for expert in chosen.flatten().tolist())
    expected: Counter[str] = Counter()
    for rank in range(WORLD_SIZE):
        for peer in range(WORLD_SIZE):
            level = CLUSTER.level_names[CLUSTER.level_of(rank, peer)]
            num_rows = 2 * travelled[rank, peer] + 2 * travelled[peer, rank]
            expected[f"{level}/alltoall"] += num_rows * MODEL_DIM * 4 + per_rank * 8
    counted = {part: value for part, (value,) in of(rows[name], "flat", "bytes").items()}
    assert counted == dict(expected)


def test_the_oracle_sends_nothing(rows: dict[str, list[SampleRow]]) -> None:
    assert of(rows["uniform"], "reference", "bytes") == {}
    assert of(rows["uniform"], "reference", "relative_error")["output"] == [0.0]


def test_a_capacity_drops_as_many_copies_as_the_oracles(rows: dict[str, list[SampleRow]]) -> None:
    (dropped,) = of(rows["drops"], "flat", "dropped_copies")[""]
    assert of(rows["drops"], "reference", "dropped_copies")[""] == [dropped]
    assert 0 < dropped < WORLD_SIZE * NUM_TOKENS * TOP_K
    assert total_bytes(rows["drops"]) < total_bytes(rows["uniform"])
    assert max(of(rows["drops"], "flat", "relative_error")["output"]) <= 1e-5


def total_bytes(told: list[SampleRow]) -> float:
    """What flat sent, over all levels."""
    return sum(value for (value,) in of(told, "flat", "bytes").values())


def test_without_a_check_nothing_is_compared(rows: dict[str, list[SampleRow]]) -> None:
    assert of(rows["unchecked"], "flat", "relative_error") == {}
    assert of(rows["unchecked"], "flat", "bytes") == of(rows["uniform"], "flat", "bytes")


def test_variants_of_one_system_are_measured_under_their_labels(rows: dict[str, list[SampleRow]]) -> None:
    told = rows["variants"]
    assert list(dict.fromkeys(row.system for row in told)) == ["flat", "flat again"]
    assert len(of(told, "flat again", "step_time")[""]) == ROUNDS
    assert of(told, "flat again", "bytes") == of(told, "flat", "bytes")
    assert of(told, "flat again", "floor_time") == of(told, "flat", "floor_time")


def test_every_shape_is_measured(rows: dict[str, list[SampleRow]]) -> None:
    assert list(dict.fromkeys(row.shape for row in rows["two shapes"])) == ["wide", "small"]
    peaks = {row.shape: row.value for row in rows["two shapes"] if row.metric == "peak_memory"}
    assert peaks["wide"] > peaks["small"]  # four times as wide, and three matrices an expert, not two


def test_a_system_that_cannot_be_measured_is_a_row_and_the_others_go_on(rows: dict[str, list[SampleRow]]) -> None:
    told = rows["failing"]
    statuses = {row.system: row for row in told if row.metric == "status"}
    assert statuses.keys() == {"broken", "hungry", "fairscale"}
    assert all(isnan(row.value) for row in statuses.values())
    assert statuses["broken"].part.startswith("failed: ValueError: no such kernel (")
    assert statuses["hungry"].part.startswith("oom: ")
    assert "Tried to allocate 2.00 TiB" in statuses["hungry"].part  # rank 1's words, though rank 0 writes
    assert statuses["fairscale"].part.startswith("refused: fairscale's Top2Gate knows only")
    assert {row.metric for row in told if row.system in statuses} == {"status"}
    for system in ("flat", "reference"):
        assert len(of(told, system, "step_time")[""]) == ROUNDS
        assert max(of(told, system, "relative_error")["expert_grad"]) <= 1e-5


def test_memory_outside_the_allocator_counts(rows: dict[str, list[SampleRow]]) -> None:
    flat, keeping = (of_shape(rows["profiled"], "small", system, "peak_memory")[""] for system in ("flat", "keeping"))
    assert keeping[0] - flat[0] == pytest.approx(WORKSPACE_BYTES, rel=0.01)


def test_kernels_are_profiled_where_that_is_asked_for(rows: dict[str, list[SampleRow]]) -> None:
    for system in ("flat", "keeping"):
        for shape in ("wide", "small"):
            calls = of_shape(rows["profiled"], shape, system, "kernel_calls")
            times = of_shape(rows["profiled"], shape, system, "kernel_time")
            assert times.keys() == calls.keys()
            assert calls["cpu/c10d::alltoall_base_"] == [5.0]  # counts, and rows there and back, twice
            assert 0 < sum(value for (value,) in times.values()) < 10
    assert {row.metric for row in rows["profiled"] if row.system == "hungry"} == {"status"}
    asked = {name for name, told in rows.items() if any(row.metric.startswith("kernel_") for row in told)}
    assert asked == {"profiled"}


def of_shape(rows: list[SampleRow], shape: str, system: str, metric: str) -> dict[str, list[float]]:
    """Values of one shape by part."""
    return of([row for row in rows if row.shape == shape], system, metric)


def test_all_ranks_return_the_same_rows(measured: dict[str, Any]) -> None:
    assert measured["ranks_agree"]


def test_a_round_counts_what_its_slowest_rank_took(measured: dict[str, Any]) -> None:
    assert measured["interleaved"] == {"even": [3.0, 3.0, 3.0], "uneven": [3.0, 10.0, 3.0]}


# The command line; its only rank is this process


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The output folder of `layer.main()`, called with a small shape and two systems."""
    monkeypatch.setattr(bench_run, "run_ranks", run_ranks_here)
    arguments = [*BASE, ONE_RANK, "systems=[flat,reference]", f"output_dir={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["layer", *arguments])
    return tmp_path


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the figure, which takes longer than all the rest."""
    monkeypatch.setattr(analysis.layer, "stages_figure", lambda *_arguments: None)
    monkeypatch.setattr(analysis.layer, "save", lambda *_arguments: None)


def test_the_command_line_writes_samples_and_a_table(command: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer.main()
    (folder,) = command.glob("layer-local_1-*")
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"results: {folder}"
    assert "flat" in printed and "reference" in printed
    samples = pd.read_parquet(folder / "samples.parquet")
    assert list(samples.columns) == list(SampleRow._fields)
    sizes = load_samples(folder).metadata["shapes"]
    assert sizes["small"]["num_experts"] == NUM_EXPERTS and sizes["small"]["activation"] == "gelu"
    summary = pd.read_csv(folder / "summary.csv")
    assert set(summary["system"]) == {"flat", "reference"}
    assert set(summary["status"]) == {"ok"}
    ratio = summary[(summary["metric"] == "step_time_ratio") & (summary["system"] == "flat")]
    assert ratio["value"].tolist() == [1.0]
    for name in ("summary.md", "stages.png", "stages.pdf", "manifest.json", "config.yaml"):
        assert (folder / name).stat().st_size > 0, name


@pytest.mark.usefixtures("undrawn")
def test_profiled_kernels_are_a_table_that_can_be_made_again(command: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer.main()
    (plain,) = command.glob("layer-*")
    assert not (plain / "kernels.csv").exists()
    monkeypatch.setattr("sys.argv", [*sys.argv, "profile=true"])
    layer.main()
    (path,) = command.glob("layer-*/kernels.csv")
    written = path.read_text()
    table = pd.read_csv(path)
    assert set(table["system"]) == {"flat", "reference"}
    assert set(table["device"]) == {"cpu"}
    path.unlink()
    analysis.layer.main([str(path.parent)])
    assert path.read_text() == written


@pytest.mark.usefixtures("undrawn")
def test_a_complete_benchmark_is_not_run_again_unless_forced(
    command: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layer.main()
    (samples,) = command.glob("layer-local_1-*/samples.parquet")
    before = samples.stat().st_mtime_ns
    layer.main()
    assert samples.stat().st_mtime_ns == before
    assert "is complete (force=true runs it again)" in capsys.readouterr().out
    monkeypatch.setattr(
        "sys.argv", ["layer", *BASE, ONE_RANK, "systems=[flat,reference]", f"output_dir={command}", "force=true"]
    )
    layer.main()
    assert samples.stat().st_mtime_ns != before


@pytest.mark.usefixtures("undrawn")
def test_an_oracle_that_fails_only_costs_the_comparison(
    command: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_arguments: Any) -> None:
        raise MemoryError("for all experts")

    monkeypatch.setattr(layer_bench, "_expected", fail)
    layer.main()
    assert (
        "layer small: nothing is compared with the reference, which oom: MemoryError: for all"
        in capsys.readouterr().out
    )
    (path,) = command.glob("layer-local_1-*/samples.parquet")
    samples = pd.read_parquet(path)
    assert "relative_error" not in set(samples["metric"])
    assert set(samples.loc[samples["metric"] == "step_time", "system"]) == {"flat", "reference"}


def test_a_stop_between_shapes_ends_the_benchmark(command: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_bench, "stop_agreed", lambda info: True)
    config = load_layer(compose("layer", [*BASE, ONE_RANK, "systems=[flat]"]))
    arguments = {"config": config.model_dump(mode="json"), "folder": str(command)}
    value = run_ranks_here("experiments.layer_bench:measure", arguments, num_ranks=1, log_dir=command)
    assert value is None


def test_a_benchmark_in_which_a_system_failed_runs_again(tmp_path: Path) -> None:
    bench = BenchRun(load_layer(compose("layer", [*BASE, f"output_dir={tmp_path}"])), [])
    bench.dir.create({}, [])
    for status, again in (("refused", False), ("failed", True), ("oom", True)):
        writer = SampleWriter("deepspeed", "upstream", "small", "uniform", 0)
        writer.add_status(status, "no slots")
        bench.write_samples(writer.rows)
        assert bench.must_run(force=False) is again
    told = bench.dir.status()
    assert told is not None and (told.status, told.reason) == ("done", "deepspeed oom: no slots")
