"""The parent's part of training runs: which still have to run, refusals, one launch for all, and a status for each."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from experiments import provenance, registry
from experiments.config import RunConfig, cluster_from, run_id
from experiments.data import prepare
from experiments.launch import RankFailure, is_main_process, run_ranks
from experiments.model import DTYPES, layer_spec
from experiments.model_size import available_bytes, check_fits, describe
from experiments.results import RunDir, now
from moe.errors import ConfigError, SuiteError


def run_dir_of(config: RunConfig) -> RunDir:
    """The folder of a run."""
    return RunDir(Path(config.output_dir) / run_id(config))


def announce_and_check(configs: Sequence[RunConfig]) -> None:
    """Print the size of the model, and refuse what no rank can hold, before anything is allocated.

    Raises:
        ConfigError: with the estimate.
    """
    expert_ranks = [None if registry.get(c.system.name).shards_experts else 1 for c in configs]
    if is_main_process():
        print(describe(configs[0].model, configs[0].trainer, configs[0].cluster, expert_ranks[0]), flush=True)
    for config, ranks in zip(configs, expert_ranks, strict=True):
        if not run_dir_of(config).is_complete or config.force:
            check_fits(config.model, config.trainer, config.cluster, available_bytes(config.cluster), ranks)


def run_cells(configs: Sequence[RunConfig], overrides: Sequence[str]) -> list[RankFailure]:
    """Train every run that is not complete. What goes wrong with one is written into its status, and the next goes on.

    Args:
        configs: runs of one cluster; the same list in every process that joins.
        overrides: of the command line, for overrides.yaml.

    Returns:
        The failures, in the order in which they came; empty when every run is done or refused.

    Raises:
        RankFailure: the user stopped the runs.
        ConfigError: a rank found the configuration, the data or a checkpoint at fault.
    """
    waiting = [config for config in configs if _must_run(config, overrides)]
    failures: list[RankFailure] = []
    if waiting and is_main_process():
        prepare(waiting[0].data, waiting[0].model.vocab_size)  # once, before the ranks would wait for each other
    while waiting:
        try:
            _launch(waiting)
            break
        except SuiteError as error:
            failed = _where_it_stopped(waiting)
            status = error.kind if isinstance(error, RankFailure) else "failed"
            if is_main_process():
                run_dir_of(failed).set_status(status, str(error))
                _finish_manifest(failed)
            if not isinstance(error, RankFailure) or error.kind == "interrupted":
                raise
            failures.append(error)
            waiting = waiting[waiting.index(failed) + 1 :]
    return failures


def refusals_of(config: RunConfig) -> list[str]:
    """Why the system can't train this model on this cluster; empty when it can."""
    system = registry.create(config.system.name, config.system.options)
    spec = layer_spec(config.model, 0, config.seed, DTYPES[config.trainer.precision])
    return system.refusals(spec, cluster_from(config.cluster))


def _must_run(config: RunConfig, overrides: Sequence[str]) -> bool:
    run_dir, main = run_dir_of(config), is_main_process()
    reasons = refusals_of(config)
    if run_dir.is_complete and not config.force and not reasons:
        if main:
            print(f"{run_dir.path} is complete (force=true runs it again)", flush=True)
        return False
    if main:
        if config.force:
            shutil.rmtree(run_dir.path, ignore_errors=True)
        run_dir.create(config.model_dump(mode="json"), overrides)
        run_dir.write_manifest(_manifest(config))
        if reasons:
            run_dir.set_status("refused", " ".join(reasons))
            print(f"{config.system.name} refuses: {' '.join(reasons)}", flush=True)
    return not reasons


def _launch(configs: Sequence[RunConfig]) -> None:
    first = configs[0]
    assert first.cluster.levels is not None, "load settles the levels"
    run_ranks(
        "experiments.training:run_rank",
        {"runs": [{"config": c.model_dump(mode="json"), "run_dir": str(run_dir_of(c).path)} for c in configs]},
        num_ranks=first.cluster.world_size,
        ranks_per_node=first.cluster.levels[0].fanout,
        launch=first.cluster.launch,
        device="cuda" if first.cluster.device == "cuda" else "cpu",
        rate_mbit=first.cluster.rate_mbit,
        log_dir=run_dir_of(first).logs,
        timeout_s=first.trainer.timeout_s,
    )
    if is_main_process():
        for config in configs:
            _finish_manifest(config)


def _where_it_stopped(configs: Sequence[RunConfig]) -> RunConfig:
    """The first run that is not done: runs are trained in order."""
    for config in configs:
        status = run_dir_of(config).status()
        if status is None or status.status != "done":
            return config
    return configs[-1]


def _manifest(config: RunConfig) -> dict[str, object]:
    return provenance.manifest(run_id(config), config.seed, config.cluster.model_dump(mode="json"), started=now())


def _finish_manifest(config: RunConfig) -> None:
    run_dir = run_dir_of(config)
    run_dir.write_manifest({**run_dir.read_manifest(), "ended": now()})


def exit_code(error: SuiteError) -> int:
    """Of the process: 2 for a wrong configuration, 130 for a stop by the user, else 1."""
    if isinstance(error, ConfigError):
        return 2
    return 130 if isinstance(error, RankFailure) and error.kind == "interrupted" else 1
