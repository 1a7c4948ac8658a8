"""experiments.comm: who talks to whom, what a measurement leaves behind, and that other runs can use it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import comm
from experiments.bench_run import BenchRun
from experiments.cli import compose
from experiments.comm_bench import CommRow, collectives_to_measure, partners
from experiments.comm_fits import collective_fits
from experiments.config import ClusterConfig, cluster_from, find_problems, load_comm, load_run, run_id
from experiments.launch import RankFailure
from experiments.results import RunDir, read_footer
from moe.costs import AlphaBeta
from moe.topology import CollectiveCosts, cluster_of
from tests.test_netns import REFUSAL, possible

PATTERNS = [("copy", "self"), ("exchange", "node"), ("exchange", "network")]
COLLECTIVES = {("all_to_all", ""): 4, ("inter", "network"): 2, ("intra", "node"): 2}
"""Of two nodes of two ranks: how many ranks each joins."""
COLLECTIVE_LINES = {
    ("all_to_all", ""): (2e-4, 2e-7),
    ("inter", "network"): (1e-4, 5e-9),
    ("intra", "node"): (5e-5, 1e-9),
}
"""Seconds, and seconds per byte that a rank sends in all, of `canned`."""
Start = Callable[..., int]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Runs `python -m experiments.comm` in this process and gives its exit code."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["comm.py", f"output_dir={tmp_path / 'outputs'}", *arguments])
        try:
            comm.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return run


def canned(config: Any, slope: float = 1e-9) -> list[list[Any]]:
    """Rows as four ranks would measure them if every level and collective were a line; one repeat of three is far
    off."""
    lines = {"self": (1e-6, slope / 10), "node": (1e-5, slope), "network": (2e-5, 8 * slope)}
    rows: list[list[Any]] = []
    for level, (alpha, beta) in lines.items():
        for size in config["sizes_bytes"]:
            pattern = "copy" if level == "self" else "exchange"
            rows += [[pattern, level, size, turn, (alpha + beta * size) * (9, 1, 1)[turn]] for turn in range(3)]
    for (pattern, level), (alpha, beta) in COLLECTIVE_LINES.items():
        for part in (1000, 3000):
            seconds = alpha + beta * part * COLLECTIVES[pattern, level]
            rows += [[pattern, level, part, turn, seconds * (1, 9, 1)[turn]] for turn in range(3)]
    return rows


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts `canned` in the place of the ranks; lists the ids of the runs that were launched."""
    ids: list[str] = []

    def run_ranks(target: str, payload: dict[str, Any], **_: Any) -> list[list[Any]]:
        ids.append(run_id(load_comm(payload["config"])))
        return canned(payload["config"], slope=1e-9 * len(ids))

    monkeypatch.setattr("experiments.bench_run.run_ranks", run_ranks)
    return ids


@pytest.mark.parametrize("fanouts", [[2, 2], [4], [3, 2], [2, 3, 2], [1, 5], [1]])
def test_partners_meet_at_their_level_and_every_rank_is_busy(fanouts: list[int]) -> None:
    cluster = cluster_of(fanouts)
    ranks = range(cluster.world_size)
    for level, fanout in enumerate(fanouts, 1):
        rounds = [partners(cluster, rank, level) for rank in ranks]
        assert {len(mine) for mine in rounds} == {fanout - 1}
        for turn in range(fanout - 1):
            destinations = [rounds[rank][turn][0] for rank in ranks]
            assert sorted(destinations) == list(ranks)
            for rank, destination in enumerate(destinations):
                assert cluster.level_of(rank, destination) == level
                assert rounds[destination][turn][1] == rank, "who is sent to receives from the sender"
        met = {(rank, turn[0]) for rank in ranks for turn in rounds[rank]}
        assert len(met) == cluster.world_size * (fanout - 1), "another partner in every round"


def test_two_nodes_of_two_exchange() -> None:
    cluster = cluster_of([2, 2])
    assert [partners(cluster, 1, level) for level in (1, 2)] == [[(0, 0)], [(3, 3)]]


def test_four_ranks_measure_and_other_runs_use_it(
    start: Start, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "conf" / "cluster").mkdir(parents=True)
    target = tmp_path / "conf" / "cluster" / "mine.yaml"
    arguments = ["cluster=local_2x2", "sizes_bytes=[8,4096,65536]", "repeats=3", "warmup=1"]
    assert start(*arguments, f"write_to={target}") == 0
    printed = capfd.readouterr().out

    (folder,) = (tmp_path / "outputs").glob("comm-local_2x2-*")
    status = RunDir(folder).status()
    assert status is not None and status.status == "done"
    rows = comm.read_rows(folder / "comm.parquet")
    measured = {(row.pattern, row.level, row.size_bytes) for row in rows}
    assert measured == {
        *((pattern, level, size) for pattern, level in PATTERNS for size in (8, 4096, 65536)),
        *((*key, size // ranks) for key, ranks in COLLECTIVES.items() for size in (8, 4096, 65536)),
    }
    assert len(rows) == 3 * len(measured)
    assert all(row.seconds > 0 for row in rows)
    footer = read_footer(folder / "comm.parquet")
    assert (footer["kind"], footer["cluster"], footer["run_id"]) == ("measured", "local_2x2", folder.name)
    assert footer["emulation"] == "plain loopback, declared levels"

    costs = comm.level_costs(rows)
    assert list(costs) == ["self", "node", "network"]
    for name, ranks in (("self", 1), ("node", 2), ("network", 4)):
        assert re.search(rf"^{name} +{ranks} +[\d.]+ +[\d.e-]+ +[\d.e+]+ +-?[\d.]+$", printed, re.MULTILINE)
    fits = collective_fits(rows, cluster_of([2, 2]))
    assert footer["collectives"] == [fit.told() for fit in fits]
    for name, across, ranks in (("standard", "all", 4), ("Inter-1", "network", 2), ("Intra-1", "node", 2)):
        assert re.search(rf"^{name} +{across} +{ranks} +[\d.]+ +[\d.e-]+ +[\d.e+]+ +-?[\d.]+$", printed, re.MULTILINE)

    cluster = cluster_from(load_run(compose("train", ["cluster=mine"], str(tmp_path / "conf"))).cluster)
    assert (cluster.name, cluster.world_size) == ("mine", 4)
    for level in cluster.levels:
        assert level.alpha_s == pytest.approx(costs[level.name].alpha_s, rel=1e-4)
        assert level.beta_s_per_byte == pytest.approx(costs[level.name].beta_s_per_byte, rel=1e-4)
    made = cluster.collectives
    assert made is not None
    for written, fit in zip((made.standard, *made.inter, *made.intra), fits, strict=True):
        assert written.alpha_s == pytest.approx(fit.cost.alpha_s, rel=1e-4)
        assert written.beta_s_per_byte == pytest.approx(fit.cost.beta_s_per_byte, rel=1e-4)


def test_a_shaped_link_is_found_to_be_slower(start: Start, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Both pairs of the network level share a link of 200 Mbit/s in each direction, so a rank has half of it: beta is
    2 * 8 / 200e6 = 80 ns a byte. It can be more on a busy machine; less only by the shaper's burst of 256 KiB."""
    settings = ["cluster=netns_2x2", "cluster.rate_mbit=200", "sizes_bytes=[65536,1048576]", "repeats=3", "warmup=1"]
    code = start(*settings)
    if not possible():
        assert code == 2
        assert re.search(REFUSAL, capfd.readouterr().err)
        return
    assert code == 0, capfd.readouterr().err
    (table,) = (tmp_path / "outputs").glob("comm-netns_2x2-*/comm.parquet")
    costs = comm.level_costs(comm.read_rows(table))
    assert costs["network"].beta_s_per_byte > 40e-9
    assert costs["network"].beta_s_per_byte > 3 * costs["node"].beta_s_per_byte
    assert "200 Mbit/s" in table.with_name("cluster.yaml").read_text()


def test_the_numbers_are_fits_of_medians(start: Start, launches: list[str], tmp_path: Path, capsys: Any) -> None:
    assert start("cluster=local_2x2") == 0
    (folder,) = (tmp_path / "outputs").iterdir()
    costs = comm.level_costs(comm.read_rows(folder / "comm.parquet"))
    for level, alpha, beta in (("self", 1e-6, 1e-10), ("node", 1e-5, 1e-9), ("network", 2e-5, 8e-9)):
        assert costs[level].alpha_s == pytest.approx(alpha)
        assert costs[level].beta_s_per_byte == pytest.approx(beta)
        assert costs[level].r2 == pytest.approx(1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["node", "2", "10.00", "1", "1", "1.0000"]
    assert lines[3].split() == ["network", "4", "20.00", "8", "0.125", "1.0000"]
    assert lines[6].split() == ["1000", "1000.0", "28.0", "35.71"]  # of the slowest pair, 20 us + 1000 * 8 ns
    told = [line.split() for line in lines[10:13]]
    assert told == [
        ["standard", "all", "4", "200.00", "200", "0.005", "1.0000"],
        ["Inter-1", "network", "2", "100.00", "5", "0.2", "1.0000"],
        ["Intra-1", "node", "2", "50.00", "1", "1", "1.0000"],
    ]


def test_a_fit_that_explains_little_is_pointed_out() -> None:
    good = [CommRow("exchange", "node", size, 0, 1e-9 * size) for size in (1000, 2000, 4000)]
    poor = [CommRow("exchange", "network", size, 0, seconds) for size, seconds in ((1000, 2e-6), (2000, 1e-6))]
    cluster = cluster_of([2, 2])
    assert "badly" not in comm.format_costs(cluster, comm.level_costs(good)).splitlines()[-1]
    *_, row, warning = comm.format_costs(cluster, comm.level_costs([*good, *poor])).splitlines()
    assert row.split()[-1] == "0.0000"
    assert warning.startswith("a line fits badly (r2 below 0.8): network; more repeats")


def test_the_file_is_one_of_conf_cluster(start: Start, launches: list[str], tmp_path: Path) -> None:
    assert start("cluster=netns_2x2", "cluster.rate_mbit=300", "force=true") == 0
    (folder,) = (tmp_path / "outputs").iterdir()
    text = (folder / "cluster.yaml").read_text()
    header, body = text.split("name: ", 1)
    assert "by: python -m experiments.comm cluster=netns_2x2 cluster.rate_mbit=300\n" in header
    assert all(line.startswith("# ") for line in header.splitlines())
    assert str(tmp_path) not in text, "whose machine it was is nobody's business"
    assert body.splitlines() == [
        "netns_2x2",
        "levels:",
        "  - {name: node, fanout: 2, alpha_s: 1.0e-05, beta_s_per_byte: 1.0e-09}  # r2 1.0000",
        "  - {name: network, fanout: 2, alpha_s: 2.0e-05, beta_s_per_byte: 8.0e-09}  # r2 1.0000",
        "local_copy: {alpha_s: 1.0e-06, beta_s_per_byte: 1.0e-10}  # r2 1.0000",
        "collectives:  # even all-to-alls by the bytes that a rank sends in all",
        "  standard: {alpha_s: 0.0002, beta_s_per_byte: 2.0e-07}  # r2 1.0000",
        "  inter:",
        "    - {alpha_s: 0.0001, beta_s_per_byte: 5.0e-09}  # r2 1.0000, level network",
        "  intra:",
        "    - {alpha_s: 5.0e-05, beta_s_per_byte: 1.0e-09}  # r2 1.0000, level node",
        "launch: netns",
        "emulation: two network namespaces on one machine, link held to 300 Mbit/s with tbf",
        "rate_mbit: 300.0",
        "device: cpu",
    ]


def test_a_level_without_pairs_stays_unmeasured(start: Start, launches: list[str], tmp_path: Path) -> None:
    config = load_comm(compose("comm", ["cluster=local_1", f"output_dir={tmp_path}"]))
    run = BenchRun(config, [])
    run.launch("experiments.comm_bench:measure", {}, timeout_s=1)
    rows = [CommRow(*row) for row in canned(config.model_dump()) if row[0] == "copy"]
    costs = comm.level_costs(rows)
    text = comm.cluster_yaml(config.cluster, "mine", costs, run)
    assert "  - {name: node, fanout: 1, alpha_s: null, beta_s_per_byte: null}  # no pairs to measure\n" in text
    assert comm.format_costs(cluster_from(config.cluster), costs).splitlines()[2].split() == ["node", "1", *"----"]
    assert comm.format_check(rows, costs) == ""
    assert comm.format_collectives(cluster_from(config.cluster), collective_fits(rows, cluster_of([1]))) == ""
    assert "collectives" not in text


def test_what_is_complete_is_told_again_and_not_measured_again(
    start: Start, launches: list[str], tmp_path: Path, capsys: Any
) -> None:
    assert start("cluster=local_2x2") == 0
    first = capsys.readouterr().out
    target = tmp_path / "mine.yaml"
    for _ in range(2):
        assert start("cluster=local_2x2", f"write_to={target}") == 0
        note, *told = capsys.readouterr().out.splitlines()
        assert note.endswith("is complete (force=true runs it again)")
        assert told[:-1] == first.splitlines()[:-1]
        assert told[-1].endswith(f", {target}")
    assert len(launches) == 1
    assert "name: mine\n" in target.read_text()
    assert start("cluster=local_2x2", "force=true", f"write_to={target}") == 0
    assert len(launches) == 2
    assert "beta_s_per_byte: 1.6e-08" in target.read_text(), "the second measurement replaced the first"
    (table,) = (tmp_path / "outputs").glob("*/comm.parquet")
    table.unlink()
    assert start("cluster=local_2x2") == 0
    assert len(launches) == 3, "done, but its table is lost"


def test_write_to_is_checked_before_anything_is_measured(
    start: Start, launches: list[str], tmp_path: Path, capsys: Any
) -> None:
    taken = tmp_path / "taken.yaml"
    taken.write_text("name: taken\n")
    for target, message in [
        (taken, r"exists, and is not replaced unasked\. Fix: name a new file, .*, or set force=true"),
        (tmp_path / "none" / "mine.yaml", r"there is no folder .*none\. Fix: make it, or name a new file"),
        (tmp_path / "mine.yml", r"is the file of a cluster, and its name ends in \.yaml\. Fix: name a new file"),
    ]:
        assert start("cluster=local_2x2", f"write_to={target}") == 2
        assert re.search(rf"write_to={re.escape(str(target))}: {message}", capsys.readouterr().err)
    assert launches == []
    assert taken.read_text() == "name: taken\n"
    assert start("cluster=local_2x2") == 0
    assert start("cluster=local_2x2", f"write_to={taken}") == 2, "complete, but that file is not its own"
    assert taken.read_text() == "name: taken\n"


def test_a_failed_measurement_leaves_no_file(
    start: Start, launches: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RankFailure("timeout", 2, "rank 2 waited")

    monkeypatch.setattr("experiments.bench_run.run_ranks", fail)
    target = tmp_path / "mine.yaml"
    assert start("cluster=local_2x2", f"write_to={target}") == 1
    assert "rank 2 waited" in capsys.readouterr().err
    (folder,) = (tmp_path / "outputs").iterdir()
    status = RunDir(folder).status()
    assert status is not None and status.status == "timeout"
    assert not target.exists() and not (folder / "cluster.yaml").exists()


def test_the_local_copy_is_the_level_self() -> None:
    given: dict[str, Any] = {"name": "x", "levels": None}
    assert cluster_from(ClusterConfig.model_validate(given)).levels[0].alpha_s is None
    given["local_copy"] = {"alpha_s": 1e-6, "beta_s_per_byte": 2e-10}
    itself = cluster_from(ClusterConfig.model_validate(given)).levels[0]
    assert (itself.name, itself.fanout, itself.alpha_s, itself.beta_s_per_byte) == ("self", 1, 1e-6, 2e-10)


def test_the_collectives_of_three_levels() -> None:
    """12 ranks: two racks of three nodes of two; a level of one group has none of its own."""
    for fanouts in ([2, 3, 2], [2, 3, 1, 2]):
        cluster = cluster_of(fanouts)
        *_, outermost = cluster.level_names
        assert [tuple(item) for item in collectives_to_measure(cluster)] == [
            ("standard", "all_to_all", "", 12, 1),
            ("Inter-1", "inter", outermost, 12, 6),
            ("Inter-2", "inter", "network", 6, 2),
            ("Intra-1", "intra", "network", 6, 1),
            ("Intra-2", "intra", "node", 2, 1),
        ]
        assert [item.num_ranks for item in collectives_to_measure(cluster)] == [12, 2, 3, 6, 2]
    assert [item.name for item in collectives_to_measure(cluster_of([4]))] == ["standard"]
    assert collectives_to_measure(cluster_of([1, 1])) == []


def test_collectives_that_were_not_measured_are_told() -> None:
    """As in a table of an earlier version, or where all sizes make one byte a pair."""
    rows = [CommRow("all_to_all", "", 1, 0, 1e-3), CommRow("all_to_all", "", 2, 0, 2e-3)]
    cluster = cluster_of([2, 2])
    assert collective_fits(rows, cluster) == []
    assert "not fitted" in comm.format_collectives(cluster, [])
    assert [fit.collective.name for fit in collective_fits(rows, cluster_of([4]))] == ["standard"]
    rows += [CommRow(pattern, level, size, 0, 1e-3 / size) for pattern, level in COLLECTIVES for size in (8, 16)][2:]
    assert "badly (r2 below 0.8): Inter-1, Intra-1" in comm.format_collectives(cluster, collective_fits(rows, cluster))


LEVELS = [
    {"name": "node", "fanout": 2, "alpha_s": None, "beta_s_per_byte": None},
    {"name": "pod", "fanout": 1, "alpha_s": None, "beta_s_per_byte": None},
    {"name": "network", "fanout": 2, "alpha_s": None, "beta_s_per_byte": None},
]
COST = {"alpha_s": 1e-5, "beta_s_per_byte": 1e-9}


def with_collectives(**given: Any) -> dict[str, Any]:
    """A cluster that has them."""
    return {"name": "x", "levels": LEVELS, "collectives": {"standard": COST, "inter": [COST], "intra": [COST]} | given}


def test_collectives_are_the_cluster_s() -> None:
    config = ClusterConfig.model_validate(with_collectives(inter=[COST | {"alpha_s": 2e-5}]))
    cost = AlphaBeta(1e-5, 1e-9)
    assert cluster_from(config).collectives == CollectiveCosts(cost, (AlphaBeta(2e-5, 1e-9),), (cost,))
    assert ClusterConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_cluster_without_collectives_keeps_its_runs_ids() -> None:
    config = ClusterConfig.model_validate({"name": "x", "levels": LEVELS})
    assert "collectives" not in config.model_dump(mode="json")
    assert cluster_from(config).collectives is None


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (
            with_collectives(inter=[]),
            "collectives=.*: 2 levels of more than one group need 1 costs each .*, not 0 and 1",
        ),
        (with_collectives() | {"levels": None}, "collectives=.*: collectives are those of levels that are written out"),
        (with_collectives() | {"levels": LEVELS[1:2]}, "collectives=.*: one rank has no collectives"),
        (with_collectives(standard=None), "collectives.standard=null: must be a group of the keys alpha_s, beta"),
        (
            with_collectives(intra=[COST | {"alpha_s": -1.0}]),
            "collectives.intra.0.alpha_s=-1.0: must be a number of at",
        ),
        (with_collectives(iner=[COST]), "collectives.iner=.*: there is no such key. Fix: did you mean .*inter"),
    ],
)
def test_wrong_collectives_are_a_problem(cluster: dict[str, Any], message: str) -> None:
    config = compose("comm", ["cluster=local_2x2"])
    config["cluster"] |= cluster
    told = "\n".join(map(str, find_problems("comm", config)))
    assert re.search(rf"cluster\.{message}", told), told
