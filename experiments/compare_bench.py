"""The ranks' part of the timing of `experiments.compare`: whole training steps of all systems, in turn."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from experiments import registry
from experiments.attempt import attempt, stop_agreed
from experiments.checkpoint import checkpoint_step, latest_checkpoint, load_checkpoint
from experiments.config import CompareConfig, RunConfig, cluster_from, load_compare
from experiments.data import BatchStream, prepare
from experiments.layer_bench import STAGE_ROUNDS
from experiments.model import DTYPES, GPT, build_gpt, layer_spec
from experiments.optimizer import build_optimizer, lr_factor
from experiments.progress_log import Phase, phases_of
from experiments.ranks import RankInfo
from experiments.results import RunDir
from experiments.samples import SampleWriter, append_samples
from experiments.timing import Observed, interleave, over_ranks, peak_memory_bytes, stage_rounds
from moe.errors import ConfigError
from moe.mesh import Mesh, create_mesh
from moe.metering import LinkMeter
from moe.step_parts import step_part
from moe.system import LayerSpec

ENDLESS = 1_000_000  # batches: more than any timing takes
WITHOUT_CHECKPOINT = "Fix: force=true trains again, timing.weights=initial needs none"


@dataclass
class Trainee:
    """One system's model, ready to take training steps; `trained_steps` are behind its weights, 0 for initial ones."""

    gpt: GPT
    optimizer: torch.optim.Optimizer
    trained_steps: int
    step: Callable[[], None]
    writer: SampleWriter


def time_training(payload: dict[str, Any], info: RankInfo) -> list[list[Any]] | None:
    """Time every system under every seed, in this rank; rank 0 adds each seed to the journal as soon as it is there.

    Args:
        payload: `config`: of the comparison; `folder`: rank 0's, with its journal; `failed`: systems that failed to
            train, by label, and how: not timed, because what fails may take the ranks down with it; `run_dirs`: folders
            of the training runs, in the order of `config.runs()`, whose newest checkpoints are timed under
            `timing.weights=trained`.
        info: of this rank.

    Returns:
        Sample rows, the same on every rank; None when a stop was asked for before all rounds were timed: those that
        were, of the seed in hand too, are in the journal. The metric `trained_steps` says which weights a system was
        timed with, `part` being `timing.weights`.
    """
    config = load_compare(payload["config"])
    mesh = create_mesh(cluster_from(config.cluster), info.device)
    rows: list[list[Any]] = []
    run_dirs = [RunDir(path) for path in payload["run_dirs"]]
    journal = RunDir(payload["folder"]).journal
    tell = phases_of(journal.parent, info.rank)
    for seed in config.seeds:
        if stop_agreed(info):
            return None
        cells = [(run, where) for run, where in zip(config.runs(), run_dirs, strict=True) if run.seed == seed]

        def keep(rows: list[list[Any]], seed: int = seed) -> None:
            if info.rank == 0:
                append_samples(journal, ["times", str(seed)], rows)

        told, num_rounds = _time_seed(cells, config, mesh, payload["failed"], tell, lambda: stop_agreed(info), keep)
        if num_rounds < config.timing.rounds:
            return None
        rows += told
        if info.rank == 0:
            labels = ", ".join(run.system.label for run, _ in cells)
            print(f"timed in turn, seed {seed}, {config.timing.weights} weights: {labels}", flush=True)
    return rows


def _time_seed(
    cells: list[tuple[RunConfig, RunDir]],
    config: CompareConfig,
    mesh: Mesh,
    failed: dict[str, str],
    tell: Callable[[Phase], None],
    stop: Callable[[], bool],
    keep: Callable[[list[list[Any]]], None],
) -> tuple[list[list[Any]], int]:
    """Sample rows of one seed, and how many rounds were timed: after a stop fewer than asked for. `keep` is told of
    them as soon as steps are timed, and again of all."""
    writers, trainees = [], []
    expected: Observed | None = None
    trained = config.timing.weights == "trained"
    # The oracle first: the others need it.
    for run, run_dir in sorted(cells, key=lambda cell: cell[0].system.label != "reference"):
        system, label = registry.create(run.system.name, run.system.options), run.system.label
        spec = layer_spec(run.model, 0, run.seed, DTYPES[run.trainer.precision])
        writer = SampleWriter(label, system.implementation, run.model.name, "training", run.seed)
        reasons = system.refusals(spec, mesh.cluster)
        observed = trainee = None
        checkpoint = latest_checkpoint(run_dir.checkpoints) if trained else None
        start = 0 if checkpoint is None else checkpoint_step(checkpoint)
        if reasons:
            failure: tuple[str, str] | None = ("refused", " ".join(reasons))
        elif label in failed:
            failure = ("failed", f"not timed, because it failed to train: {failed[label]}")
        elif trained and checkpoint is None:
            failure = ("failed", f"not timed: {run_dir.checkpoints} holds no checkpoint. {WITHOUT_CHECKPOINT}")
        else:
            observed, failure = attempt(functools.partial(_observe_layer, run, spec, mesh))
            if failure is None:
                trainee, failure = attempt(functools.partial(_trainee, run, start, mesh, writer))
            if trainee is not None and checkpoint is not None:
                _, failure = attempt(functools.partial(_load, checkpoint, trainee))
            if trainee is not None and failure is None:  # what can't run fails here, not amid the timing
                _, failure = attempt(trainee.step)
        if failure is not None:
            writer.add_status(*failure)
        elif trainee is not None and observed is not None:
            trainees.append(trainee)
            if label == "reference":
                expected = observed
            elif expected is not None:
                _add_errors(writer, observed, expected, mesh)
        writers.append(writer)
    timing, steps = config.timing, {trainee.writer.key[0]: trainee.step for trainee in trainees}
    turns = (timing.rounds, timing.warmup, mesh.device, timing.steps_per_round)
    times = interleave(steps, *turns, after_round=lambda: tell("training"), stop=stop)
    tell("starting")
    num_rounds = min((len(seconds) for seconds in times.values()), default=timing.rounds)
    if not num_rounds:
        return [], 0

    def rows() -> list[list[Any]]:
        return [list(row) for writer in writers for row in writer.rows]

    for trainee in trainees:
        trainee.writer.add("step_time", times[trainee.writer.key[0]], "s")
        trainee.writer.add("tokens", [config.trainer.global_batch_size * config.model.seq_len], "tokens/step")
        trainee.writer.add("trained_steps", [trainee.trained_steps], "steps", config.timing.weights)
    keep(rows())
    for trainee in trainees:  # little time is left after a stop
        _add_observations(trainee, mesh, STAGE_ROUNDS if num_rounds == timing.rounds else 1)
    keep(rows())
    return rows(), num_rounds


def _trainee(run: RunConfig, trained_steps: int, mesh: Mesh, writer: SampleWriter) -> Trainee:
    """The model of a run with its initial weights, about to take the step that follows `trained_steps`."""
    system = registry.create(run.system.name, run.system.options)
    gpt = build_gpt(run.model, system, mesh, run.seed, DTYPES[run.trainer.precision])
    sync, optimizer = system.gradient_sync(gpt, mesh), build_optimizer(gpt, run.trainer)
    stream = BatchStream(
        prepare(run.data, run.model.vocab_size),
        seq_len=run.model.seq_len,
        global_batch_size=run.trainer.global_batch_size,
        rank=mesh.rank,
        world_size=mesh.world_size,
        seed=run.seed,
        num_steps=ENDLESS,
        start_step=trained_steps,
    )
    batches, steps = iter(stream), itertools.count(trained_steps)

    def step() -> None:
        index = next(steps)
        batch_BS = next(batches).to(mesh.device)
        with torch.autocast(mesh.device.type, dtype=torch.bfloat16, enabled=run.trainer.precision == "bf16"):
            losses = gpt(batch_BS[:, :-1], batch_BS[:, 1:])
        (losses.cross_entropy + run.model.aux_loss_weight * losses.aux_loss).backward()
        sync.reduce()
        sync.clip(run.trainer.grad_clip or 0.0)
        for group in optimizer.param_groups:
            group["lr"] = run.trainer.lr * lr_factor(index, run.trainer)
        with step_part("optimizer"):
            optimizer.step()
        system.after_step(gpt, optimizer, index + 1)
        optimizer.zero_grad(set_to_none=True)  # at the end, so that a step frees what it allocated

    return Trainee(gpt, optimizer, trained_steps, step, writer)


def _load(checkpoint: Path, trainee: Trainee) -> None:
    """Fill model and optimizer. Collective.

    Raises:
        RuntimeError: the checkpoint is damaged or does not fit, on all ranks. No ConfigError: that would end the timing
            of the other systems, too.
    """
    try:
        load_checkpoint(checkpoint, trainee.gpt, trainee.optimizer)
    except ConfigError as error:
        reason = "; ".join(problem.rule for problem in error.problems)
        raise RuntimeError(f"{checkpoint}: {reason}. {WITHOUT_CHECKPOINT}") from None


def _add_observations(trainee: Trainee, mesh: Mesh, num_stage_rounds: int) -> None:
    """What is exact or slow to read: bytes, drops, memory, stages; of the steps after the timed ones."""
    writer, device = trainee.writer, mesh.device
    meter = LinkMeter(mesh.cluster, mesh.rank)
    dropped: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _a, output: dropped.append(output.num_dropped))
        for layer in trainee.gpt.moe_layers
    ]
    with meter.installed():
        trainee.step()
    for hook in hooks:
        hook.remove()
    writer.add_bytes(over_ranks(meter.as_tensor(), dist.ReduceOp.SUM, device), mesh.cluster)
    total = over_ranks(torch.stack(dropped).sum().double().view(1), dist.ReduceOp.SUM, device)
    writer.add("dropped_copies", total.tolist(), "copies/step")
    peak = torch.tensor([float(peak_memory_bytes(trainee.step, device, trainee.gpt.moe_layers))], dtype=torch.float64)
    writer.add("peak_memory", over_ranks(peak, dist.ReduceOp.MAX, device).tolist(), "B")
    rounds = stage_rounds(trainee.step, trainee.gpt.moe_layers, num_stage_rounds, device)
    for metric, times in (("stage_time", rounds.stages), ("part_time", rounds.parts)):
        for part, seconds in times.items():
            writer.add(metric, seconds, "s", part)


def _observe_layer(run: RunConfig, spec: LayerSpec, mesh: Mesh) -> Observed:
    """Output and gradients of one MoE layer like the model's, on random tokens, as many as a rank has in a step."""
    system = registry.create(run.system.name, run.system.options)
    num_tokens = run.trainer.global_batch_size * run.model.seq_len // mesh.world_size
    generator = torch.Generator().manual_seed(run.seed * 1_000_003 + mesh.rank)
    x_TM, grad_TM = torch.randn(2, num_tokens, run.model.model_dim, generator=generator).to(mesh.device)
    return Observed(system, spec, mesh, x_TM, grad_TM)


def _add_errors(writer: SampleWriter, observed: Observed, expected: Observed, mesh: Mesh) -> None:
    errors = observed.errors(expected)
    worst = over_ranks(torch.tensor(list(errors.values()), dtype=torch.float64), dist.ReduceOp.MAX, mesh.device)
    for part, error in zip(errors, worst.tolist(), strict=True):
        writer.add("relative_error", [error], "1", part)
