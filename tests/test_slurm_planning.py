"""slurm.planning and slurm.sweep: from a command line to cells, before anything is submitted."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.allocation import Shape
from experiments.cells import run_dir_of
from experiments.config import load_run
from experiments.results import RunDir
from moe.errors import ConfigError
from slurm.planning import PlannedCell, plan, write_refusals
from slurm.records import SweepFolder
from tests.tiny import ONE_RANK, tiny

TWO_NODES = Shape(2, 2, "cpu")
ODD = 'data.cache_dir="it\'s $(touch evil) `touch evil` * ;&|\n two"'


@pytest.fixture
def base(tmp_path: Path, text: Path) -> list[str]:
    """Overrides of a small run on cluster=auto."""
    return tiny(tmp_path / "out", text, "cluster=auto")


def labels(cells: list[PlannedCell]) -> list[str]:
    """What a table calls them."""
    return [cell.cell.label for cell in cells]


def test_a_sweep_is_a_cell_for_every_combination(base: list[str]) -> None:
    cells = plan([*base, "system=flat,deepspeed", "seed=0,1", "model.top_k=1"], TWO_NODES)
    assert labels(cells) == [f"system={system} seed={seed}" for system in ("flat", "deepspeed") for seed in (0, 1)]
    assert [cell.to_run for cell in cells] == [True] * 4
    folders = [cell.cell.folders for cell in cells]
    assert [len(paths) for paths in folders] == [1] * 4
    assert [Path(paths[0]).name.split("-")[0] for paths in folders] == ["flat", "flat", "deepspeed", "deepspeed"]
    assert len({paths[0] for paths in folders}) == 4


def test_a_comparison_is_its_training_runs(base: list[str]) -> None:
    experiment = [*base, "experiment=ta_moe_speedup", "model.num_experts=8", f"output_dir={Path('o').absolute()}"]
    cells = plan([*experiment, "system=flat,deepspeed,ta_moe,hiermoe", "seed=0,1"], TWO_NODES)
    names = ["flat", "deepspeed", "ta_moe deepspeed mode", "hiermoe"]
    assert labels(cells) == [f"system={name} seed={seed}" for seed in (0, 1) for name in names]
    assert {cell.cell.kind for cell in cells} == {"train"}
    chosen = cells[2].cell.config["system"]
    assert (chosen["name"], chosen["mode"]) == ("ta_moe", "deepspeed"), "as the experiment has it"
    assert cells[3].cell.config["system"] == {"name": "hiermoe"}, "not in it: defaults"


def test_cells_of_a_comparison_can_share_an_allocation(base: list[str]) -> None:
    experiment = [*base, "experiment=ta_moe_speedup", "model.num_experts=8,16"]
    shared = plan([*experiment, "system=flat,ta_moe", "seed=0,1"], TWO_NODES, share=True)
    apart = plan([*experiment, "system=flat,ta_moe", "seed=0,1"], TWO_NODES)
    assert labels(shared) == [f"model.num_experts={size} system=flat,ta_moe seed=0,1" for size in (8, 16)]
    runs = [folder for cell in shared for folder in cell.cell.folders[:-1]]
    assert sorted(runs) == sorted(cell.cell.folders[0] for cell in apart), "the same runs"
    assert [Path(cell.cell.folders[-1]).name.split("-")[0] for cell in shared] == ["compare", "compare"]
    assert labels(apart)[0] == "model.num_experts=8 system=flat seed=0"


def test_a_systems_own_run_has_no_comparison_to_share(base: list[str]) -> None:
    with pytest.raises(ConfigError, match="only a comparison has cells that can share .*experiments.train"):
        plan(base, TWO_NODES, kind="train", share=True)


def test_every_mistake_of_every_cell_is_told_before_anything_is_written(base: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        plan([*base, "model.num_experts=4,6", "seed=-1", "system=flat,nope"], TWO_NODES)
    told = "\n".join(map(str, caught.value.problems))
    assert len(caught.value.problems) == 3
    for start in (
        "model.num_experts=6: must be divisible by the 4 ranks",
        "seed=-1: ",
        "system=nope: there is no conf",
    ):
        assert start in told
    assert not (tmp_path / "out").exists()


def test_two_jobs_never_write_into_one_folder(base: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"cell=1 \(system=flat seed=0\): is the run flat-tiny-s0-\w+ of cell 0 \("):
        plan([*base, "experiment=ta_moe_speedup", "system=flat,flat", "seed=0", "model.num_experts=8"], TWO_NODES)


def test_namespaces_are_no_cluster_of_slurm(base: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.launch=netns: .* srun starts the ranks of a job\. Fix: use cl"):
        plan([*base, "cluster=netns_2x2"], TWO_NODES)


def test_what_is_complete_is_left_out_unless_forced(base: list[str]) -> None:
    one = Shape(1, 1, "cpu")
    (cell,) = plan([*base, ONE_RANK], one)
    run = RunDir(cell.cell.folders[0])
    assert run.path == run_dir_of(load_run(cell.cell.config)).path.absolute()
    run.create({}, [])
    run.set_status("done")
    run.write_metrics([], dict.fromkeys(("run_id", "system", "implementation", "seed", "kind", "cluster", "emulation")))
    assert [cell.complete for cell in plan([*base, ONE_RANK, "seed=0,1"], one)] == [True, False]
    (forced,) = plan([*base, ONE_RANK, "force=true"], one)
    assert forced.to_run
    assert forced.cell.force
    assert forced.cell.config["force"] is False, "the job removes the folder once, not at every requeue"
    assert forced.cell.folders == cell.cell.folders


def test_a_refusal_is_a_result_and_no_job(base: list[str]) -> None:
    cells = plan([*base, "system=megatron,flat"], TWO_NODES)
    refused = [cell for cell in cells if cell.refusals]
    assert labels(refused) == ["system=megatron"]
    assert not refused[0].to_run
    write_refusals(cells, TWO_NODES)
    status = RunDir(refused[0].cell.folders[0]).status()
    assert status is not None
    assert (status.status, status.reason) == ("refused", " ".join(refused[0].refusals))
    assert not Path(cells[1].cell.folders[0]).exists()


def test_overrides_are_kept_as_typed(base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (planned,) = plan([*base, ODD], Shape(1, 1, "cpu"))
    folder = SweepFolder(tmp_path / "sweep")
    folder.create([planned.cell], {})
    (cell,) = folder.cells()
    assert cell == planned.cell
    assert ODD in cell.overrides
    assert cell.config["data"]["cache_dir"] == ODD.partition("=")[2].strip('"')
    assert not (tmp_path / "evil").exists()
