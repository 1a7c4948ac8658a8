"""The parent's part of training runs: which still have to run, refusals, one launch for all, and a status for each."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from experiments import provenance, registry
from experiments.checkpoint import latest_checkpoint, named_checkpoint
from experiments.config import RunConfig, cluster_from, run_id
from experiments.data import TokenSet, batch_problems, prepare
from experiments.join import ranks_here
from experiments.launch import RankFailure, is_main_process, run_ranks
from experiments.model import DTYPES, layer_spec
from experiments.model_size import available_bytes, check_fits, describe
from experiments.ranks import GIVEN_UP
from experiments.results import RunDir, RunStatus, now
from moe.errors import ConfigError, Problem, Refused, SuiteError


def run_dir_of(config: RunConfig) -> RunDir:
    """The folder of a run."""
    return RunDir(Path(config.output_dir) / run_id(config))


class CellFailure(NamedTuple):
    """A run that went wrong, and how."""

    config: RunConfig
    error: RankFailure


def announce_and_check(configs: Sequence[RunConfig]) -> None:
    """Print the size of the model, and refuse what can't run before anything is allocated.

    Raises:
        ConfigError: what no rank can hold, with the estimate; too little text; a `trainer.resume_from` that is not
            there.
    """
    if is_main_process():
        first = configs[0]
        print(describe(first.model, first.trainer, first.cluster, *_expert_copies(first)), flush=True)
    problems: list[Problem] = []
    for config in configs:
        if is_current(config) and not config.force:
            continue
        available = available_bytes(config.cluster)
        try:
            check_fits(config.model, config.trainer, config.cluster, available, *_expert_copies(config))
        except ConfigError as error:
            problems += [replace(p, rule=f"under system {config.system.label} {p.rule}") for p in error.problems]
        try:
            _check_start(config)
        except ConfigError as error:
            problems += error.problems
        world_size, trainer = config.cluster.world_size, config.trainer
        problems += batch_problems(_tokens(config), config.model.seq_len, trainer.global_batch_size, world_size)
    if problems:
        raise ConfigError(*{str(problem): problem for problem in problems}.values())


def is_current(config: RunConfig) -> bool:
    """Whether the run is done, and on the text that is there now, so that it need not run again."""
    # In this order: a rank that comes late, when rank 0 has made the folder anew, must find it incomplete.
    return not _text_has_changed(config, _tokens(config)) and run_dir_of(config).is_complete


def _tokens(config: RunConfig) -> TokenSet:
    return prepare(config.data, config.model.vocab_size)


def _text_has_changed(config: RunConfig, tokens: TokenSet) -> bool:
    """Whether the run's folder was made with other tokens; the run id knows only where the text lies."""
    return run_dir_of(config).read_manifest().get("text_sha256", tokens.fingerprint) != tokens.fingerprint


def _expert_copies(config: RunConfig) -> tuple[float, float]:
    """Ranks that the experts are spread over, and copies in slots, as `estimate_memory` takes them."""
    num_ranks, num_experts = config.cluster.world_size, config.model.num_experts
    system = registry.create(config.system.name, config.system.options)
    trained = system.expert_copies(num_experts, num_ranks)
    return num_ranks / trained if trained else math.inf, system.slot_copies(num_experts, num_ranks)


def _check_start(config: RunConfig) -> None:
    named, run_dir = config.trainer.resume_from, run_dir_of(config)
    if named is not None and (config.force or latest_checkpoint(run_dir.checkpoints) is None):
        named_checkpoint(named, config.trainer.max_steps)


def run_cells(configs: Sequence[RunConfig], overrides: Sequence[str]) -> list[CellFailure]:
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
    waiting: list[RunConfig] = []
    failures: list[CellFailure] = []
    given_up = os.environ.get(GIVEN_UP, "").split(",")
    try:
        for config in configs:
            if run_id(config) in given_up:
                failures.append(CellFailure(config, _earlier_failure(config)))
            elif _must_run(config, overrides):
                waiting.append(config)
        while waiting:
            try:
                _launch(waiting)
                break
            except (RankFailure, Refused) as error:
                if ranks_here(os.environ) is not None:
                    raise  # joined: the process group is beyond repair, so the launcher must end this process
                if isinstance(error, RankFailure) and error.kind == "interrupted":
                    raise
                stopped = _where_it_stopped(waiting)
                _close(waiting[stopped], error)
                if isinstance(error, RankFailure):
                    failures.append(CellFailure(waiting[stopped], error))
                waiting = waiting[stopped + 1 :]
    except (SuiteError, KeyboardInterrupt) as error:
        _close_all(waiting, error)
        raise
    return failures


def refusals_of(config: RunConfig) -> list[str]:
    """Why the system can't train this model on this cluster; empty when it can."""
    system = registry.create(config.system.name, config.system.options)
    spec = layer_spec(config.model, 0, config.seed, DTYPES[config.trainer.precision])
    return system.refusals(spec, cluster_from(config.cluster))


def _must_run(config: RunConfig, overrides: Sequence[str]) -> bool:
    run_dir, main = run_dir_of(config), is_main_process()
    # In every process: `is_current` builds the tokens, so that none waits in a collective for one that builds them.
    if is_current(config) and not config.force:
        if main:
            print(f"{run_dir.path} is complete (force=true runs it again)", flush=True)
        return False
    reasons = refusals_of(config)
    if main:
        tokens = _tokens(config)
        changed = _text_has_changed(config, tokens)
        if changed:
            print(f"{run_dir.path} was made with other text: it starts anew", flush=True)
        if config.force or changed:
            shutil.rmtree(run_dir.path, ignore_errors=True)
        earlier = run_dir.read_manifest()
        run_dir.create(config.model_dump(mode="json"), overrides)
        told = provenance.manifest(run_id(config), config.seed, config.cluster.model_dump(mode="json"), started=now())
        system = registry.get(config.system.name)
        labels = {"system": system.name, "label": config.system.label, "implementation": system.implementation}
        more = {"text_sha256": tokens.fingerprint, "earlier_starts": _starts(earlier)}
        run_dir.write_manifest({**told, **labels, **more})
        if reasons:
            run_dir.set_status("refused", " ".join(reasons))
            print(f"{config.system.label} refuses: {' '.join(reasons)}", flush=True)
    return not reasons


def _starts(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """When, and from which code, a run was started before, the latest last: it may go on from what those left."""
    if not manifest:
        return []
    return [*manifest.get("earlier_starts", []), {key: manifest.get(key) for key in ("started", "git")}]


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
        env=first.cluster.variables,
    )


def _earlier_failure(config: RunConfig) -> RankFailure:
    """How a run failed that its job has given up."""
    status = run_dir_of(config).status()
    if status is not None and (status.status == "oom" or status.status == "timeout"):
        return RankFailure(status.status, None, status.reason)
    return RankFailure("failed", None, "unknown" if status is None else status.reason)


def _where_it_stopped(configs: Sequence[RunConfig]) -> int:
    """Index of the first run that is not done: runs are trained in order."""
    for index, config in enumerate(configs):
        status = run_dir_of(config).status()
        if status is None or status.status != "done":
            return index
    return len(configs) - 1


def _close(config: RunConfig, error: BaseException) -> None:
    """Write how a run ended that could not write it itself."""
    if not is_main_process():
        return
    run_dir = run_dir_of(config)
    status = run_dir.status()
    if status is not None and status.status == "interrupted":  # by its ranks, which saved it first
        return
    kinds: dict[type[BaseException], RunStatus] = {Refused: "refused", KeyboardInterrupt: "interrupted"}
    kind = error.kind if isinstance(error, RankFailure) else kinds.get(type(error), "failed")
    run_dir.set_status(kind, str(error) or "stopped by Ctrl-C")
    run_dir.stamp("ended")


def _close_all(configs: Sequence[RunConfig], error: BaseException) -> None:
    """The runs end here: the one that was under way, and those behind it, which were not even started."""
    if not configs:
        return
    stopped = _where_it_stopped(configs)
    _close(configs[stopped], error)
    for config in configs[stopped + 1 :] if is_main_process() else []:
        run_dir_of(config).set_status("interrupted", f"not started: {run_id(configs[stopped])} ended all runs")
