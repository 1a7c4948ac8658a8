"""Every system of the registry keeps the contract on four ranks; every wrong one is caught by the same rules.

A new system is tested by existing: `discover()` finds it. All systems share one start of the ranks, because importing
the upstream packages is what takes time.
"""

from __future__ import annotations

import pytest

from experiments.launch import run_ranks
from experiments.registry import create
from tests.contract import CASES, CLUSTER, VARIANTS, WORLD_SIZE, Case, Record, system_names, violations
from tests.wrong_systems import WRONG, Wrong

SYSTEMS = system_names()
BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[Record]]]:
    """What the ranks recorded: {system: {case: [record of each rank]}}."""
    return run_ranks(
        "tests.contract:measure",
        {"systems": SYSTEMS, "variants": list(VARIANTS)},
        num_ranks=WORLD_SIZE,
        ranks_per_node=2,
        log_dir=tmp_path_factory.mktemp("contract"),
        timeout_s=60,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("system", [*SYSTEMS, *VARIANTS])
def test_system_keeps_the_contract(system: str, case: Case, records: dict[str, dict[str, list[Record]]]) -> None:
    assert violations(case, records[system][case.name]) == []


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.name)
def test_wrong_system_is_caught(wrong: type[Wrong], records: dict[str, dict[str, list[Record]]]) -> None:
    assert wrong.caught_by in "; ".join(violations(BY_NAME[wrong.case], records[wrong.name][wrong.case]))


@pytest.mark.parametrize("system", SYSTEMS)
def test_system_runs_or_names_the_package_that_is_missing(system: str) -> None:
    """A system can't keep the contract by refusing it: the plainest case must run where its package is installed."""
    refusals = create(system).refusals(BY_NAME["top2-gelu"].spec, CLUSTER)
    assert all("not installed" in reason and "https://" in reason for reason in refusals), refusals


def test_cases_cover_what_they_claim(records: dict[str, dict[str, list[Record]]]) -> None:
    """The oracle's own records show that the cases are not vacuous."""
    oracle = records["reference"]
    counts = {name: [record["counts"] for record in cases] for name, cases in oracle.items()}
    assert all(rank == [0, 0, 0, 0, 0, 24, 0, 0] for rank in counts["all-to-one-expert"])
    assert all(0 in rank for rank in counts["idle-experts"])
    assert len({tuple(rank) for rank in counts["wanted-routing"]}) == WORLD_SIZE, "ranks route differently"
    for name in ("top1-drops", "top2-drops", "top3-drops"):
        assert all(record["num_dropped"] > 0 for record in oracle[name]), name
