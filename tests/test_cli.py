"""The command line: mistakes are told before anything runs, all at once, on stderr, with exit code 2, no traceback."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from experiments import registry
from experiments.cli import check_arguments, compose, hydra_main
from experiments.config import Kind
from experiments.launch import RankFailure
from moe.errors import ConfigError, Refused

ROOT = Path(__file__).resolve().parent.parent


class Outcome(NamedTuple):
    """What a command did."""

    exit_code: int
    out: str
    err: str
    runs: list[tuple[Any, list[str]]]
    written: list[str]


Command = Callable[..., Outcome]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs an entry point in this process, in an empty folder; its function only notes its arguments."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def run(kind: Kind, *arguments: str, on_run: Callable[[Any], None] | None = None) -> Outcome:
        runs: list[tuple[Any, list[str]]] = []

        @hydra_main(kind)
        def main(config: Any, overrides: list[str]) -> None:
            runs.append((config, overrides))
            if on_run:
                on_run(config)

        monkeypatch.setattr(sys, "argv", [f"{kind}.py", *arguments])
        exit_code: Any = 0
        try:
            main()
        except SystemExit as stop:
            exit_code = stop.code or 0
        captured = capsys.readouterr()
        written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
        return Outcome(exit_code, captured.out, captured.err, runs, written)

    return run


def refused(outcome: Outcome) -> list[str]:
    """The problems of a command that must not have run, and must have told them as a numbered list."""
    assert outcome.exit_code == 2
    assert (outcome.runs, outcome.written, outcome.out) == ([], [], "")
    title, *lines = outcome.err.splitlines()
    count = len(lines)
    assert title == f"{count} problem{'s' if count > 1 else ''} in the configuration:"
    assert [line.split(".")[0] for line in lines] == [f"  {number}" for number in range(1, count + 1)]
    return [line.split(". ", 1)[1] for line in lines]


def test_a_run_gets_its_config_and_its_overrides_and_hydra_writes_nothing(command: Command) -> None:
    outcome = command("train", "system=deepspeed", "model.num_experts=16", "seed=3")
    ((config, overrides),) = outcome.runs
    assert (config.system.name, config.model.num_experts, config.seed) == ("deepspeed", 16, 3)
    assert overrides == ["system=deepspeed", "model.num_experts=16", "seed=3"]
    assert (outcome.exit_code, outcome.written, outcome.err) == (0, [], "")


MISTAKES = [
    (
        ("system=deepsped",),
        [r"system=deepsped: there is no conf/system/deepsped.yaml. Fix: did you mean deepspeed\? The choices of"],
    ),
    (
        ("model.num_experts=eight",),
        [r"model.num_experts=eight: must be a whole number of at least 1. Fix: for example"],
    ),
    (("model.num_experts=-3",), [r"model.num_experts=-3: must be a whole number of at least 1. Fix: for example"]),
    (
        ("model.num_experts=6",),
        [r"model.num_experts=6: must be divisible by the 4 ranks of cluster local_2x2. Fix: set"],
    ),
    (("model.top_k=9",), [r"model.top_k=9: must be at most model.num_experts, which is 8. Fix: lower it or raise"]),
    (("num_experts=16",), [r"num_experts=16: there is no such key. Fix: did you mean model.num_experts\?"]),
    (("modle.top_k=1",), [r"modle.top_k=1: there is no such key. Fix: did you mean model.top_k\?"]),
    (("+model.deep.er=1",), [r"model.deep.er=1: there is no such key. Fix: "]),
    (
        ("workload=zipf",),
        [r"workload=zipf: experiments.train takes no such group. Fix: the groups are cluster, data, exp"],
    ),
    (
        ("experiment=native_layer", "seed=-1"),
        [
            r"experiment=native_layer: is for another entry point: experiments.train has no systems, shapes, capacity_f"
            r"actor, rounds, steps_per_round. Fix: the experiments of experiments.train are smoke",
            "seed=-1: must be",
        ],
    ),
    (("model=null",), [r"model=null: there is no conf/model/null.yaml. Fix: the choices of model are"]),
    (("~model",), [r"model=\(missing\): is required. Fix: add it"]),
    (
        ("seed=1,2",),
        [r"seed=1,2: is several values, and this is one run. Fix: add -m to run each, or write seed=\[1,2\]"],
    ),
    (
        ("system=flat,reference",),
        [r"system=flat,reference: is several values, and this is one run. Fix: add -m to run each$"],
    ),
    (("-m", "seed=interval(0,1)"), [r"seed=interval\(0,1\): has no list of values to run. Fix: list them"]),
    (("a:=3",), [r"a:=3: can't be read \(.*\). Fix: write key=value"]),
    (("hydra.rnu=3",), [r"overrides=hydra.rnu=3: can't be composed \(.*rnu.*\). Fix: see --cfg job"]),
    (
        ("system=reference", "system.overlap=2"),
        [r"system.overlap=2: the system reference has no such option. Fix: remove it; there are no options"],
    ),
    (
        ("model.num_experts=-3", "model.top_k=99", "trainer.lr=abc"),
        [
            "model.num_experts=-3: must be",
            "model.top_k=99: must be at most",
            "trainer.lr=abc: must be a number above 0",
        ],
    ),
    (
        ("system=deepsped", "model.num_experts=eight", "a:=3", "max_steps=5"),
        [
            "system=deepsped: there is no",
            "a:=3: can't be read",
            "model.num_experts=eight: must",
            "max_steps=5: there is",
        ],
    ),
]


@pytest.mark.parametrize(("arguments", "messages"), MISTAKES)
def test_mistakes_are_told_all_at_once(command: Command, arguments: tuple[str, ...], messages: list[str]) -> None:
    lines = refused(command("train", *arguments))
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages, strict=True):
        assert re.match(message, line)


def test_a_wrong_group_does_not_blame_its_other_keys(command: Command) -> None:
    """These options and this top_k may well be right for what was meant."""
    lines = refused(command("train", "system=deepsped", "system.use_rts=true", "model=qwen", "model.top_k=10"))
    assert [line.split("=")[0] for line in lines] == ["system", "model"]
    lines = refused(command("train", "cluster=local_3x2", "model.num_experts=6", "model.top_k=0"))
    assert [line.split("=")[0] for line in lines] == ["cluster", "model.top_k"]


def test_a_wrong_group_hides_no_other_problem(command: Command) -> None:
    lines = refused(command("train", "system=deepsped", "model.top_k=99", "data.path=/no/such"))
    assert [line.split("=")[0] for line in lines] == ["system", "model.top_k", "data.path"]


def test_a_sweep_runs_every_combination(command: Command) -> None:
    outcome = command("train", "-m", "system=flat,deepspeed", "seed=0,1")
    assert [(config.system.name, config.seed) for config, _ in outcome.runs] == [
        ("flat", 0),
        ("flat", 1),
        ("deepspeed", 0),
        ("deepspeed", 1),
    ]
    assert outcome.runs[3][1] == ["system=deepspeed", "seed=1"]
    assert outcome.out.splitlines()[3] == "run 4 of the sweep: system=deepspeed seed=1"
    assert all(re.fullmatch(r"outputs/sweeps/[^/]+/multirun.yaml", path) for path in outcome.written)


@pytest.mark.parametrize(
    "sweep", ["model.num_experts=8,-3,6", "model.num_experts=choice(8,-3,6)", "++model.num_experts=8,-3,6"]
)
def test_a_bad_cell_of_a_sweep_is_found_before_the_first_cell_runs(command: Command, sweep: str) -> None:
    lines = refused(command("train", "-m", sweep, "seed=range(0,2)"))
    assert [line.split(":")[0] for line in lines] == ["model.num_experts=-3", "model.num_experts=6"]


def test_a_bad_choice_in_a_sweep(command: Command) -> None:
    (line,) = refused(command("train", "--multirun", "system=flat,deepsped,reference"))
    assert line.startswith("system=deepsped: there is no conf/system/deepsped.yaml. Fix: did you mean deepspeed?")


def test_options_that_no_yaml_lists_can_be_given(command: Command) -> None:
    ((config, overrides),) = command("train", "system=deepspeed", "system.use_rts=true").runs
    assert config.system.options["use_rts"] is True
    assert overrides == ["system=deepspeed", "system.use_rts=true"]


def test_the_other_entry_points(command: Command) -> None:
    ((layer, _),) = command("layer", "systems=[flat,{name: deepspeed, use_rts: true}]", "workload=zipf").runs
    assert (layer.systems[1].options["use_rts"], layer.workload.kind) == (True, "zipf")
    assert command("comm", "sizes_bytes=[8,16]").runs[0][0].sizes_bytes == [8, 16]
    assert command("compare", "seeds=[7]").runs[0][0].seeds == [7]
    (line,) = refused(command("compare", "systems=[flat,refrence]"))
    assert line.startswith("systems.1.name=refrence: there is no such system. Fix: did you mean reference?")


def test_a_refusal_is_one_sentence_and_exit_code_one(command: Command) -> None:
    def refuse(config: Any) -> None:
        raise Refused("fairscale can't do this.")

    outcome = command("train", on_run=refuse)
    assert (outcome.exit_code, outcome.err) == (1, "fairscale can't do this.\n")


def test_a_failed_run_does_not_stop_the_sweep(command: Command) -> None:
    def refuse_two(config: Any) -> None:
        if config.repeats == 2:
            raise Refused("two is refused.")

    outcome = command("comm", "-m", "repeats=1,2,3", on_run=refuse_two)
    assert [config.repeats for config, _ in outcome.runs] == [1, 2, 3]
    assert (outcome.exit_code, outcome.err) == (1, "two is refused.\n")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyboardInterrupt(), "interrupted\n"),
        (RankFailure("interrupted", None, "stopped at step 3"), "the run was interrupted: stopped at step 3\n"),
    ],
)
def test_ctrl_c_stops_the_sweep(command: Command, error: BaseException, message: str) -> None:
    def stop(config: Any) -> None:
        raise error

    outcome = command("comm", "-m", "repeats=1,2", on_run=stop)
    assert (outcome.exit_code, outcome.err, len(outcome.runs)) == (130, message, 1)


def test_a_bug_is_not_swallowed(command: Command) -> None:
    def fail(config: Any) -> None:
        raise ZeroDivisionError("a bug")

    outcome = command("train", on_run=fail)
    assert outcome.exit_code == 1
    assert "ZeroDivisionError: a bug" in outcome.err


def test_joined_ranks_tell_a_mistake_once(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    outcome = command("train", "seed=-1")
    assert (outcome.exit_code, outcome.err) == (2, "")
    monkeypatch.setenv("RANK", "0")
    assert "seed=-1" in command("train", "seed=-1").err


def test_help_and_cfg_still_work(command: Command) -> None:
    outcome = command("train", "--help")
    assert outcome.exit_code == 0
    assert f"system: {', '.join(registry.discover())}\n" in outcome.out
    outcome = command("train", "--cfg", "job", "seed=5")
    assert (outcome.exit_code, outcome.runs) == (0, [])
    assert "\nseed: 5\n" in outcome.out
    assert "hydra:" not in outcome.out


def test_more_groups_from_a_folder_of_the_user(command: Command, tmp_path: Path) -> None:
    folder = tmp_path.parent / f"{tmp_path.name}_conf" / "model"
    folder.mkdir(parents=True)
    text = (ROOT / "conf" / "model" / "tiny.yaml").read_text()
    (folder / "mine.yaml").write_text(text.replace("name: tiny", "name: mine"))
    ((config, _),) = command("train", "--config-dir", str(folder.parent), "model=mine").runs
    assert config.model.name == "mine"


def test_checking_returns_what_hydra_gets() -> None:
    arguments = ["-m", "system=flat,reference", "model.top_k=1,2", "~experiment", "hydra.verbose=true"]
    assert check_arguments("train", arguments) == [
        "-m",
        "system=flat,reference",
        "++model.top_k=1,2",
        "~experiment",
        "hydra.verbose=true",
    ]
    with pytest.raises(ConfigError, match="^seed=x: must be a whole number of at least 0"):
        check_arguments("train", ["seed=x"])


def test_composing_needs_no_command_line() -> None:
    assert compose("train", ["system=reference", "seed=4"])["system"] == {"name": "reference"}


def test_a_module_started_by_name_finds_conf(tmp_path: Path) -> None:
    """`python -m package.module` from anywhere: conf/ is the one beside the suite, not one in the working folder."""
    (tmp_path / "entry.py").write_text(
        "from experiments.cli import hydra_main\n\n\n"
        "@hydra_main('comm')\ndef main(config, overrides):\n    print(config.cluster.name, overrides)\n\n\nmain()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "entry", "cluster=local_1"],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "local_1 ['cluster=local_1']\n", "")
