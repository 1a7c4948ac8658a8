"""Jobs of a real Slurm: what runs, what fails, what is driven out, and what is left of each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from analysis.load import load_run as load_results
from experiments.config import load_run
from experiments.results import RunDir
from slurm.records import SweepFolder
from tests.slurm.cluster import Slurm
from tests.slurm.story import STEPS, World, compared, launched, preempted, swept, unplugged
from tests.tiny import repeatable

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="session")
def world(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory, text: Path) -> World:
    """Everything that happens on the cluster."""
    return World(slurm, tmp_path_factory.mktemp("results"), text)


@pytest.fixture(scope="session")
def jobs_of_two_nodes(world: World) -> World:
    """See `preempted`."""
    preempted(world)
    return world


@pytest.fixture(scope="session")
def sweep(world: World) -> World:
    """See `swept`."""
    swept(world)
    return world


def state_of(run: RunDir) -> tuple[str, int]:
    """Status and steps."""
    status = run.status()
    assert status is not None
    return status.status, status.step


def test_one_experiment_over_two_nodes(jobs_of_two_nodes: World) -> None:
    world = jobs_of_two_nodes
    assert world.notes["straight"] == ["COMPLETED"]
    run = world.run("straight")
    assert state_of(run) == ("done", STEPS)
    config = load_run(run.config())
    levels = config.cluster.levels
    assert levels is not None
    assert [(level.name, level.fanout) for level in levels] == [("node", 2), ("network", 2)]
    assert all(level.alpha_s is not None and level.beta_s_per_byte for level in levels), "cluster=auto is profiled"
    assert config.cluster.collectives is not None
    assert load_results(run.path).ranks == "4 gloo ranks", "and not on one machine"


def test_overrides_arrive_as_typed_and_reach_no_shell(jobs_of_two_nodes: World) -> None:
    world = jobs_of_two_nodes
    run = world.run("straight")
    typed = [text for text in yaml.safe_load((run.path / "overrides.yaml").read_text()) if "odd" in text]
    assert len(typed) == 1
    for piece in (f"$(touch {world.folder}/evil)", "`touch", "'it' * ;&|\n two"):
        assert piece in typed[0]
        assert piece in run.config()["data"]["cache_dir"]
    assert not (world.folder / "evil").exists()


def test_a_run_that_was_driven_out_ends_like_one_that_was_not(jobs_of_two_nodes: World) -> None:
    world = jobs_of_two_nodes
    assert world.notes["preempted"] == ["COMPLETED"]
    straight, run = world.run("straight"), world.run("preempted")
    assert state_of(run) == ("done", STEPS)
    assert repeatable(run) == repeatable(straight)
    assert [(event.event, event.restarts) for event in world.notes["events"]] == [
        ("started", 0),
        ("requeued", 0),
        ("started", 1),
        ("ended", 1),
    ]
    assert 0 < world.notes["events"][1].done_steps < STEPS
    assert re.search(rf"^0 .* done, requeued once +{STEPS}/{STEPS}", world.notes["preempted table"], re.MULTILINE)


def test_ranks_of_several_nodes_talk_over_the_interface_between_them(jobs_of_two_nodes: World) -> None:
    logs = [path.read_text() for path in jobs_of_two_nodes.sweeps.glob("job-*/cells/0/rank0.log")]
    assert any("interface: eth0\n" in log for log in logs)


def test_a_node_that_goes_away_ends_the_job_with_a_reason(world: World) -> None:
    unplugged(world)  # here, because Slurm needs a minute to clean up behind it, in which it may do other work
    assert re.search(r"no step for \d+ s \(watchdog\): rank 1 on n1 did not answer", world.notes["unplugged table"])
    assert state_of(world.run("unplugged"))[0] == "timeout"


def test_a_sweep_is_shown_before_it_is_submitted(sweep: World) -> None:
    assert "7 of 7 cells to run, each on 1 node x 2 CPU ranks" in sweep.notes["dry run"]
    assert "at most 3.5 node hours" in sweep.notes["dry run"]
    assert "python -m slurm.status swept" in sweep.notes["submitted"]
    assert re.search(r"^5 .* running +\d+/16 .* seed=5$", sweep.notes["at work"], re.MULTILINE)
    assert re.search(r"^6 .* (pending|running) .* seed=6$", sweep.notes["at work"], re.MULTILINE)


def test_results_are_read_while_jobs_run(sweep: World) -> None:
    read = {name: (run.status, len(run.metrics)) for name, run in sweep.notes["read meanwhile"].items()}
    by_seed = {name.split("-")[2]: found for name, found in read.items()}
    assert by_seed["s0"][0] == "done"
    assert by_seed["s0"][1] > STEPS
    assert by_seed["s5"] == ("running", 0)
    assert by_seed["s2"][0] == "oom"


@pytest.mark.parametrize(
    ("cell", "status", "reason"),
    [
        (0, "done", ""),
        (1, "failed", r"ValueError: on purpose\n +rank 1 failed: ValueError: on purpose \(tests/slurm/acting_task"),
        (2, "oom", r"Slurm ended the ranks for want of memory: .*exceeded memory limit"),
        (3, "failed", r"task 1 on n\d was killed by signal 9"),
        (4, "timeout", r"no step for \d+ s \(watchdog\): .*rank 1 in _do \(slurm/acting_task.py:\d+\)"),
        (5, "done, requeued once", ""),
        (6, "interrupted", r"the job was cancelled \(SIGTERM\)"),
    ],
)
def test_every_cell_says_how_it_ended(sweep: World, cell: int, status: str, reason: str) -> None:
    table = sweep.notes["table"]
    found = re.search(rf"^{cell} +\S+ +{status} .*\n((?: .*\n)*)", table, re.MULTILINE)
    assert found, table
    assert re.search(reason, found[1]), table
    assert reason or not found[1], table


def test_slurm_sees_which_jobs_failed(sweep: World) -> None:
    assert sweep.notes["states"] == ["COMPLETED", *["FAILED"] * 4, "COMPLETED", "CANCELLED"]
    assert "2 done, 2 failed, 1 oom, 1 timeout, 1 interrupted" in sweep.notes["table"]


def test_what_was_not_done_is_done_when_submitted_again(sweep: World) -> None:
    assert re.search(r"^resubmitted: cell 2 as \d+_0, cell 3 as ", sweep.notes["resubmitted"], re.MULTILINE)
    assert sweep.notes["states again"] == ["COMPLETED", "FAILED", *["COMPLETED"] * 5], "but for cell 1, see below"
    assert "7 done\n" in sweep.notes["table again"]
    assert sweep.run("swept", 0).read_manifest() == sweep.notes["done first"], "what was done did not run again"
    assert "0 of 7 cells to run" in sweep.notes["nothing left"]
    assert "nothing to submit" in sweep.notes["nothing left"]


def test_a_run_that_another_sweep_has_is_left_to_it(sweep: World) -> None:
    told = sweep.notes["resubmitted"]
    assert re.search(r"^1 .* failed .*\n(?: .*\n)* +its run is in job \d+ of sweep other\n", told, re.MULTILINE), told
    assert re.search(r"^not resubmitted: cell 1, whose run is in job \d+ of sweep other$", told, re.MULTILINE), told
    assert re.search(r"^ +1  seed=1 .* in job \d+ of sweep other already$", sweep.notes["meanwhile"], re.MULTILINE)
    assert "nothing to submit" in sweep.notes["meanwhile"]
    assert sweep.notes["other state"] == ["COMPLETED"]


def test_jobs_run_with_the_python_that_the_site_wants(jobs_of_two_nodes: World, sweep: World) -> None:
    started = sweep.started.read_text()
    assert re.search(r"^-m slurm\.batch ", started, re.MULTILINE), "of train.sbatch"
    assert re.search(r"^-u -m submitit\.core\._submit .*/swept/submitit$", started, re.MULTILINE), "of a sweep"


def test_a_job_told_of_its_limit_goes_on_where_it_stopped(sweep: World) -> None:
    losses = {row.step: row.value for row in sweep.run("swept", 5).read_metrics() if row.metric == "loss"}
    assert sorted(losses) == list(range(STEPS))


def test_no_file_of_a_sweep_has_two_writers(sweep: World) -> None:
    folder = SweepFolder(sweep.sweeps / "swept")
    assert sorted(path.name for path in (folder.path / "submissions").iterdir()) == ["0.json", "1.json"]
    for cell in folder.cells():
        files = {path.name for path in folder.cell_folder(cell.number).iterdir()}
        assert {"cell.json", "events.jsonl", "rank0.log", "rank1.log", "srun.log"} <= files


def test_a_comparison_shares_an_allocation_and_survives_a_system_that_fails(world: World) -> None:
    compared(world)
    assert world.notes["compared"] == ["FAILED"]
    assert "MinMemoryNode=2500M" in world.notes["compared job"], "and not what the allocation around the sweep had"
    assert re.search(r"1 of 2 runs failed: flat-\S+: rank 1 failed: ValueError", world.notes["compared table"])
    assert state_of(world.run("compared", system="ta_moe")) == ("done", STEPS)
    summary = (world.folder / "compared" / "compare" / "summary.csv").read_text()
    assert re.search(r"^flat,native,tokens_per_s,,,.*failed", summary, re.MULTILINE), summary
    assert re.search(r"^ta_moe,native,tokens_per_s,\d+", summary, re.MULTILINE), summary


def test_hydras_own_launcher_is_a_shortcut(world: World) -> None:
    launched(world)
    assert state_of(world.run("launched")) == ("done", STEPS)
