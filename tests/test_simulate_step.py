"""experiments.simulate_step: clusters by their constants, drawn and recorded routings, and steps by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import simulate_step
from experiments.cli import compose
from experiments.config import ModelConfig
from experiments.simulate_step import Setting, default_systems, routed_ids, step_rows
from experiments.simulated_cluster import SimulatedCluster, cluster_names, load_simulated
from methods.fsmoe_paper import TESTBEDS
from methods.hiermoe_paper import FIGURE_9
from moe.errors import ConfigError

SIZES = {
    "a100_32": 32,
    "fsmoe_testbed_a": 48,
    "fsmoe_testbed_b": 32,
    "h100_64": 64,
    "h100_512": 512,
    "h100_4096": 4096,
    "hiermoe_a6000": 32,
    "symi_a100_16": 16,
    "v100_64": 64,
}


def small_model(**changes: object) -> ModelConfig:
    """Two blocks, the second with 16 experts."""
    model = ModelConfig.model_validate(compose("train", ["model=tiny"])["model"])
    sizes = {"num_layers": 2, "moe_every": 2, "num_experts": 16, "top_k": 2, "capacity_factor": None, **changes}
    return model.model_copy(update=sizes)


def test_every_cluster_can_be_read() -> None:
    assert {name: load_simulated(name).cluster.world_size for name in cluster_names()} == SIZES


@pytest.mark.parametrize("name", ["A", "B"])
def test_fsmoe_s_testbeds_are_its_fits(name: str) -> None:
    """An all-to-all among nodes and an all-gather in one, by the share of their bytes that leaves a rank."""
    testbed, declared = TESTBEDS[name], load_simulated(f"fsmoe_testbed_{name.lower()}")
    node, network = declared.levels
    assert (node.fanout, network.fanout) == (testbed.node_size, testbed.num_nodes)
    for level, operation in ((node, "all_gather"), (network, "all_to_all")):
        fit, share = testbed.costs[operation], 1 - 1 / level.fanout
        assert level.alpha_s == pytest.approx(fit.alpha_s)
        assert level.beta_s_per_byte == pytest.approx(fit.beta_s_per_byte / share, rel=5e-3)
    assert declared.gemm.alpha_s == pytest.approx(testbed.costs["gemm"].alpha_s)
    assert declared.gemm.beta_s_per_multiply_add == pytest.approx(testbed.costs["gemm"].beta_s_per_byte)


def test_hiermoe_s_testbed_is_its_fits() -> None:
    """Innermost Intra-3, then Inter-3 to Inter-1."""
    levels = load_simulated("hiermoe_a6000").levels
    assert [level.fanout for level in levels] == [2, 2, 2, 4]
    for level, fit in zip(levels, (FIGURE_9.intra[-1], *FIGURE_9.inter[::-1]), strict=True):
        share = 1 - 1 / level.fanout
        assert level.alpha_s == pytest.approx(fit.alpha_s)
        assert level.beta_s_per_byte == pytest.approx(fit.beta_s_per_byte / share, rel=5e-3)


def test_a_cluster_without_costs_is_refused() -> None:
    content = load_simulated("h100_64").model_dump(mode="json")
    content["levels"][1]["beta_s_per_byte"] = None
    with pytest.raises(ValueError, match="the level network needs alpha_s and beta_s_per_byte"):
        SimulatedCluster.model_validate(content)
    with pytest.raises(ConfigError, match="cluster=h100_65: there is no conf/simulated/h100_65.yaml"):
        load_simulated("h100_65")


def test_drawn_choices_are_distinct_and_as_popular_as_told() -> None:
    ids = routed_ids("zipf 1.0", 2, 4000, 6, 3)
    assert ids.shape == (2, 4000, 3)
    assert all(len(set(row)) == 3 for row in ids.reshape(-1, 3).tolist())
    shares = np.sort(np.bincount(ids[:, :, 0].ravel(), minlength=6) / 8000)[::-1]
    np.testing.assert_allclose(shares, np.array([1 / i for i in range(1, 7)]) / 2.45, atol=0.02)
    uniform = np.bincount(routed_ids("uniform", 2, 4000, 6, 1).ravel(), minlength=6) / 8000
    np.testing.assert_allclose(uniform, 1 / 6, atol=0.02)
    assert not (routed_ids("uniform", 2, 40, 6, 1)[0] == routed_ids("uniform", 2, 40, 6, 1)[1]).all()


def test_a_recorded_routing_is_repeated(tmp_path: Path) -> None:
    recorded = np.array([[[0, 3], [1, 2], [2, 0]]], dtype=np.int16)
    np.savez(tmp_path / "routing.npz", sample_expert_ids=recorded)
    ids = routed_ids(str(tmp_path / "routing.npz"), 2, 4, 4, 2)
    assert ids.reshape(-1, 2).tolist() == [recorded[0, index % 3].tolist() for index in range(8)]
    with pytest.raises(ConfigError, match="its experts are 0 to 3, the layer has 0 to 1"):
        routed_ids(str(tmp_path / "routing.npz"), 2, 4, 2, 2)
    with pytest.raises(ConfigError, match="routing=even: must be `uniform`"):
        routed_ids("even", 2, 4, 2, 2)


def test_a_step_of_flat_by_hand() -> None:
    """One MoE layer: nothing overlaps, so that all parts add up."""
    cluster, model = load_simulated("symi_a100_16"), small_model()
    setting = Setting(cluster, model, num_tokens=100)
    layer, costs = setting.layer(), cluster.costs
    rows = int(layer.counts_PE.sum(0).max())  # of the one expert of a rank
    width, copies_bytes = model.model_dim, 100 * 2 * model.model_dim * 2
    sent = max(
        200 - int(layer.counts_PE.diagonal().min()), int((layer.counts_PE.sum(0) - layer.counts_PE.diagonal()).max())
    )
    network = cluster.levels[1]
    assert network.alpha_s is not None and network.beta_s_per_byte is not None
    matrices = 3 if model.activation == "swiglu" else 2
    gemm, products = costs["gemm"], rows * matrices * width * model.hidden_dim
    head_dim = model.head_dim or width // model.num_heads
    attention = 2 * 2 * width * head_dim * (model.num_heads + (model.num_kv_heads or model.num_heads))
    dense = attention + matrices * width * model.dense_hidden_dim + 16 * width
    scores = 2 * model.seq_len * head_dim * model.num_heads
    products_dense = 100 * (dense + scores + model.vocab_size * width)
    step_s = costs["outside"].predict(copies_bytes) + costs["outside_backward"].predict(copies_bytes)
    step_s += 4 * (network.alpha_s + sent * 2 * width * network.beta_s_per_byte)
    step_s += 3 * (2 * gemm.alpha_s + products * gemm.beta_s_per_byte)
    step_s += 3 * (12 * gemm.alpha_s + products_dense * gemm.beta_s_per_byte)
    step_s += costs["all_reduce"].predict(4 * (dense + 5 * width))
    step_s += costs["all_reduce"].predict(4 * model.vocab_size * width * (1 if model.tie_embeddings else 2))
    (row,) = step_rows(setting, [{"name": "flat"}])
    assert row["step_s"] == pytest.approx(step_s, rel=1e-6)
    assert row["tokens_per_s"] == pytest.approx(16 * 100 / step_s)
    assert row["kind"] == "simulated" and "nominal" in row["costs"]


def test_fewer_experts_than_ranks_are_replicated() -> None:
    setting = Setting(load_simulated("h100_64"), small_model(num_experts=8), num_tokens=50)
    layer = setting.layer()
    assert layer.num_ranks == 8 and [level.fanout for level in layer.cluster.levels] == [1, 8, 1]
    assert [extra.kind for extra in setting.extras(layer)] == ["embedding_gradients", "expert_gradients"]
    with pytest.raises(ConfigError, match="experts=48: neither a multiple nor a divisor of the 64 ranks of h100_64"):
        Setting(load_simulated("h100_64"), small_model(num_experts=48), 50).layer()


@pytest.mark.parametrize("capacity_factor", [None, 1.25])
def test_every_default_system_has_a_row(capacity_factor: float | None) -> None:
    model = small_model(capacity_factor=capacity_factor, num_experts=64)
    rows = list(step_rows(Setting(load_simulated("h100_64"), model, 64), default_systems(model)))
    assert [row["status"] for row in rows] == ["ok"] * len(rows)
    assert all(row["exposed_s"] > 0 for row in rows)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--cluster",
        "h100_64",
        "--model",
        "tiny",
        "--experts",
        "64",
        "--tokens",
        "32",
        "--folder",
        str(tmp_path),
    ]
    systems = ["flat", "{name: fsmoe, label: cut, expert_sharding: true}", "{name: hiermoe, levels: 7}"]
    assert simulate_step.main([*arguments, "--systems", *systems]) == 0
    rows = pd.read_csv(tmp_path / "step_h100_64.csv")
    assert list(rows["system"]) == ["flat", "cut", "hiermoe"]
    assert list(rows["status"].str.split(":").str[0]) == ["ok", "ok", "refused"]
    said = capsys.readouterr().out
    assert "simulated on h100_64 (nominal peaks of data sheets), nothing ran there" in said
    assert simulate_step.main(["--cluster", "h100"]) == 2
    assert "there is no conf/simulated/h100.yaml" in capsys.readouterr().err
