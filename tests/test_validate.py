"""experiments.validate: predictions from other shapes' modules against a formula, and the path from a real run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from analysis.errors import ResultsError
from analysis.load import load_samples
from analysis.validation import mean_absolute_error, ordered_share, read_validation
from experiments import bench_run, layer, validate
from experiments.bench_run import BenchRun
from experiments.cli import compose
from experiments.config import LayerRunConfig, load_layer
from experiments.samples import SampleWriter
from moe.costs import AlphaBeta
from moe.workload import Workload, expert_ids
from tests.tiny import ONE_RANK, run_ranks_here

SHAPES = {"small": (40, 16, 24), "middle": (60, 32, 24), "large": (80, 32, 48)}
"""Tokens of a rank, M, H; two choices of eight experts, four ranks."""
COSTS = {
    "all_to_all": AlphaBeta(2e-4, 1e-9),
    "all_reduce": AlphaBeta(1e-4, 2e-9),
    "gemm": AlphaBeta(1e-4, 3e-11),
    "gemm_backward": AlphaBeta(2e-4, 2e-11),
    "outside": AlphaBeta(3e-4, 5e-9),
    "outside_backward": AlphaBeta(1e-4, 6e-9),
}
"""Of all shapes, so that a fit to others predicts exactly."""
CALLS = {"gemm": 2, "gemm_backward": 4}


def config(folder: Path, *overrides: str) -> LayerRunConfig:
    """Of a layer benchmark with these shapes and two systems."""
    shapes = [
        f"{{name: {name}, tokens_per_rank: {tokens}, model_dim: {model_dim}, hidden_dim: {hidden_dim}, "
        "num_experts: 8, top_k: 2}"
        for name, (tokens, model_dim, hidden_dim) in SHAPES.items()
    ]
    systems = "systems=[flat,{name: fsmoe, label: whole, degree: 1, backward_degree: 1}]"
    return load_layer(
        compose("layer", [systems, f"shapes=[{','.join(shapes)}]", f"output_dir={folder}", "rounds=3", *overrides])
    )


def expected_s(name: str) -> float:
    """A layer in sequence, by the busiest rank of this shape."""
    tokens, model_dim, hidden_dim = SHAPES[name]
    received: Counter[int] = Counter()
    for rank in range(4):
        ids_TK = expert_ids(Workload(), tokens, 8, 2, 0, rank)
        received.update(expert // 2 for expert in ids_TK.flatten().tolist())
    rows = max(received.values())
    copies_bytes, weights = 4 * model_dim * 2 * tokens, 2 * model_dim * hidden_dim
    outside_s = COSTS["outside"].predict(copies_bytes) + COSTS["outside_backward"].predict(copies_bytes)
    exchange_s = COSTS["all_to_all"].predict(4 * model_dim * max(rows, 2 * tokens))
    gemm, backward = COSTS["gemm"], COSTS["gemm_backward"]
    experts_s = 2 * gemm.alpha_s + rows * weights * gemm.beta_s_per_byte
    return outside_s + 4 * exchange_s + experts_s + 4 * backward.alpha_s + 2 * rows * weights * backward.beta_s_per_byte


def write_run(folder: Path, times_s: dict[tuple[str, str], float]) -> Path:
    """A benchmark's folder in which every module took exactly what COSTS say, and these step times were measured."""
    run = BenchRun(config(folder), [])
    run.dir.create(run.config.model_dump(mode="json"), [])
    writers = []
    for (system, shape), seconds in times_s.items():
        writer = SampleWriter(system, "native", shape, "uniform", 0)
        writer.add("step_time", [0.9 * seconds, seconds, 1.3 * seconds], "s")
        if system == "whole":
            own = 1 + list(SHAPES).index(shape)  # other sizes than the other shapes'
            for name, cost in COSTS.items():
                latency = CALLS.get(name, 1) * cost.alpha_s
                for size in (1000 * own, 50000 * own):
                    writer.add("module_time", [latency + size * cost.beta_s_per_byte], "s", f"{name} {size:.0f}")
        writers.append(writer)
    run.write_samples([row for writer in writers for row in writer.rows])
    return run.dir.path


def test_steps_are_predicted_from_the_modules_of_other_shapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factors = {"small": 1.0, "middle": 2.0, "large": 0.8}
    times_s = {
        (system, shape): expected_s(shape) * (factor if system == "flat" else 1.0)
        for shape, factor in factors.items()
        for system in ("flat", "whole")
    }
    folder = write_run(tmp_path, times_s)
    assert validate.main([str(folder), "--out", str(tmp_path / "out")]) == 0
    rows = read_validation(tmp_path / "out")
    assert list(rows["system"] + " " + rows["shape"]) == [f"{s} {shape}" for shape in SHAPES for s in ("flat", "whole")]
    for row in rows.itertuples():
        assert row.simulated_s == pytest.approx(expected_s(str(row.shape)))
        wanted = 1 / (factors[str(row.shape)] if row.system == "flat" else 1.0) - 1
        assert row.relative_error == pytest.approx(wanted, abs=1e-6)
    assert mean_absolute_error(rows) == pytest.approx((0.5 + 0.25) / 6, abs=1e-6)
    # Only at `middle` do the quartiles, 0.95 to 1.15, tell the two systems apart, and there equal times are simulated.
    assert ordered_share(rows) == 0.0
    said = capsys.readouterr().out
    assert "6 pairs of a system and a shape: mean absolute relative error 12.5 %, worst -50.0 % (flat, middle)" in said
    assert (tmp_path / "out" / "validation.png").stat().st_size > 0
    assert "| large | flat (native) |" in (tmp_path / "out" / "validation.md").read_text()


def test_order_of_systems() -> None:
    quartiles = {"measured_low_s": [1.0, 2.0, 3.0], "measured_high_s": [1.5, 2.5, 3.5], "simulated_s": [1.0, 3.0, 2.0]}
    rows = pd.DataFrame({"run": "a", "shape": "b", **quartiles})
    assert ordered_share(rows) == pytest.approx(2 / 3)
    assert ordered_share(rows.assign(measured_high_s=9.0)) == 1.0


def test_what_lacks_is_told(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="config.yaml is of no layer benchmark"):
        list(validate.validation_rows(tmp_path))
    folder = write_run(tmp_path, {("flat", shape): 1.0 for shape in SHAPES})
    with pytest.raises(ResultsError, match=r"shape small has no module_time of all_to_all, gemm.*such as fsmoe"):
        list(validate.validation_rows(folder))


def test_a_real_benchmark_can_be_validated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank, two systems on two tiny shapes; what was measured there no test can know, but that all is there."""
    monkeypatch.setattr(bench_run, "run_ranks", run_ranks_here)
    shapes = [
        f"{{name: {n}, tokens_per_rank: {t}, model_dim: 16, hidden_dim: 8, num_experts: 4, top_k: 2}}"
        for n, t in (("a", 16), ("b", 64))
    ]
    systems = "systems=[flat,fsmoe,{name: fsmoe, label: sigmoid, gate: sigmoid}]"
    arguments = [systems, f"shapes=[{','.join(shapes)}]", "rounds=2", "warmup=0", ONE_RANK]
    monkeypatch.setattr("sys.argv", ["layer", *arguments, f"output_dir={tmp_path}"])
    layer.main()
    (folder,) = tmp_path.glob("layer-*")
    table = load_samples(folder).table
    assert set(validate.NEEDED) <= {str(part).split()[0] for part in table.query("metric == 'module_time'")["part"]}
    compared = set(table.query("metric == 'relative_error'")["system"])
    assert compared == {"flat", "fsmoe"}, "another gate is another function than the oracle's"
    rows = pd.DataFrame(list(validate.validation_rows(folder)))
    assert [(*pair,) for pair in zip(rows["system"], rows["shape"], strict=True)] == [
        (system, shape) for shape in "ab" for system in ("flat", "fsmoe", "sigmoid")
    ]
    assert (rows[["measured_s", "simulated_s"]] > 0).all(axis=None)
