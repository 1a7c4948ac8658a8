"""experiments.roofline: points of a comparison on FasterMoE's roofline, checked by hand on tests.topology_results."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from baselines.fastermoe_predictor import Link, link_bytes_per_s
from experiments import roofline
from moe.topology import Cluster, Level
from tests.topology_results import LEVELS, NO_COSTS, write_comparison

FLOPS_PER_S = 1e6
EXPERTS = {"hidden_dim": 20, "activation": "gelu"}


def test_points_are_what_the_predictor_says_of_the_counts(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path, model=EXPERTS)
    assert roofline.main([str(folder), "--flops-per-s", str(FLOPS_PER_S)]) == 0
    table = pd.read_csv(folder / "roofline.csv")
    points = table[table["what"] == "point"].set_index(["name", "kind"])
    # flat: 100 copies a rank and layer of 10 numbers; half of a node's 200 leave it, over a link of 2 / 4e-6 bytes/s.
    sent_s = 100 * 40 / (2 / LEVELS[1]["beta_s_per_byte"])
    parameters = 2 * 10 * 20  # two matrices
    computed_s = 2 * parameters * 100 / FLOPS_PER_S
    flat = points.loc[("flat", "modelled")]
    assert flat["ratio"] == pytest.approx(computed_s / sent_s)
    assert flat["flops_per_s"] == pytest.approx(6 * parameters * 100 / (3 * computed_s + 4 * sent_s))
    assert points.loc[("ta_moe", "modelled"), "ratio"] > flat["ratio"], "less crosses the network"
    stages_s = 2 * 0.032 / 2  # forward and backward, of two layers
    assert points.loc[("flat", "measured"), "flops_per_s"] == pytest.approx(6 * parameters * 100 / stages_s)
    assert (folder / "roofline.png").is_file()


def test_without_costs_it_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_comparison(tmp_path, levels=NO_COSTS, model=EXPERTS)
    assert roofline.main([str(folder), "--flops-per-s", "1e6"]) == 2
    assert "has no beta_s_per_byte; measure or declare it" in capsys.readouterr().err


def test_a_level_of_one_group_has_no_link_of_its_own() -> None:
    cluster = Cluster("split", (Level("self", 1), Level("node", 1), Level("network", 2, 0.0, 1e-9)))
    assert link_bytes_per_s(cluster, Link(0, 0, True)) == pytest.approx(1e9)
    assert link_bytes_per_s(cluster, Link(1, 0, True)) == pytest.approx(1e9)
