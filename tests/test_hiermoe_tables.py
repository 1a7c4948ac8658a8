"""experiments.hiermoe: tables.csv, its rows of the model and of recorded routing."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments import hiermoe
from methods.hiermoe_paper import FIGURE_9, TABLE_II, TABLE_IV

SMALL = ["--tokens", "16", "--seeds", "1", "--swaps", "1", "--iterations", "2"]


def write_routing(folder: Path, ids_LTK: np.ndarray, num_experts: int) -> Path:
    """A run's routing.npz."""
    folder.mkdir(parents=True)
    counts = np.zeros((1, len(ids_LTK), 4, num_experts), np.int32)
    np.savez(folder / "routing.npz", sample_expert_ids=ids_LTK.astype(np.int16), dispatch_counts=counts)
    return folder / "routing.npz"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """tables.csv of few tokens, with the routing of one run: of 3 tokens, two keep to one group of four."""
    folder = tmp_path_factory.mktemp("hiermoe")
    routing = write_routing(folder / "flat-tiny-s0", np.array([[[0, 1], [6, 7], [1, 2]]]), 8)
    assert hiermoe.main(["--out", str(folder / "out"), "--routing", str(routing), *SMALL]) == 0
    return pd.read_csv(folder / "out" / "tables.csv")


def test_every_table_has_its_rows(table: pd.DataFrame) -> None:
    assert list(table.columns) == hiermoe.COLUMNS
    assert list(dict.fromkeys(table["table"])) == ["II", "reference", "IV", "peak", "period", "figure 9"]
    sizes = table["table"].value_counts()
    assert sizes["II"] == sum(map(len, TABLE_II.values())) + 2
    assert sizes["IV"] == sum(len(part) for part in TABLE_IV["HD2"].values()) * (2 + 3)
    assert sizes["figure 9"] == 2 * (2 * FIGURE_9.depth - 1)
    assert (sizes["peak"], sizes["period"]) == (3, 4)
    assert not table["source"].isna().any()


def test_kinds_are_told_apart(table: pd.DataFrame) -> None:
    kinds = table.groupby("kind")["table"].unique().map(set)
    assert kinds["measured routing"] == {"II"}
    assert kinds["paper"] == {"figure 9"}
    assert kinds["modelled"] == {"II", "reference", "IV", "peak", "period"}
    assert table[table["kind"] == "paper"]["ours"].isna().all()
    assert not table[table["kind"] != "paper"]["ours"].isna().any()


def test_recorded_choices_are_counted(table: pd.DataFrame) -> None:
    """8 experts in 4 groups of two: 2 of 6 copies need not travel; in 8 groups all must."""
    routed = table[table["kind"] == "measured routing"].set_index("quantity")
    assert routed.loc["duplication, 4 groups, K=2, flat-tiny-s0", "ours"] == pytest.approx(100 / 3)
    assert routed.loc["duplication, 8 groups, K=2, flat-tiny-s0", "ours"] == 0
    assert routed.loc["duplication, 4 groups, K=2, flat-tiny-s0", "paper"] == 12


def test_the_paper_s_fits_are_in_milliseconds(table: pd.DataFrame) -> None:
    fits = table[table["table"] == "figure 9"].set_index("quantity")["paper"]
    assert fits["alpha of standard"] == pytest.approx(0.722)
    assert fits["beta of Intra-3"] == pytest.approx(1.64e-8)


@pytest.mark.parametrize(
    ("ids", "num_experts", "message"),
    [
        (np.array([[[0, 9]]]), 8, "of experts 0 to 7"),
        (np.zeros((2, 0, 2)), 8, r"and is \[2, 0, 2\]"),
        (np.array([[[0, 1]]]), 6, "its 6 experts can't be cut"),
    ],
)
def test_wrong_routing_is_told_first(
    tmp_path: Path, ids: np.ndarray, num_experts: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_routing(tmp_path / "run", ids, num_experts)
    assert hiermoe.main(["--out", str(tmp_path / "out"), "--routing", str(path)]) == 2
    told = capsys.readouterr().err
    assert re.search(message, told), told
    assert not (tmp_path / "out").exists()


def test_a_file_without_routing_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "routing.npz").write_text("text")
    for name in ("routing.npz", "nowhere.npz"):
        assert hiermoe.main(["--out", str(tmp_path / "out"), "--routing", str(tmp_path / name)]) == 2
        assert "holds no readable routing" in capsys.readouterr().err


def test_sizes_below_one_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        hiermoe.main(["--tokens", "0"])
    assert "--tokens: 0 is below 1" in capsys.readouterr().err
