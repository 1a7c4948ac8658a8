"""The ranks' part of a training run: from a validated config to a run folder, by a Lightning trainer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from experiments import registry
from experiments.callbacks import Checkpointer, Recorder, Validator
from experiments.checkpoint import checkpoint_step, latest_checkpoint, named_checkpoint
from experiments.config import RunConfig, cluster_from, load_run, run_id
from experiments.data import BatchStream, ValBatches, prepare
from experiments.model import DTYPES, build_gpt
from experiments.module import LanguageModel
from experiments.ranks import RankInfo
from experiments.results import RunDir
from experiments.samples import footer_of
from experiments.strategy import ExpertParallelStrategy
from moe.mesh import Mesh, create_mesh
from moe.metering import LinkMeter

LIGHTNING_PRECISION: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed"}


def run_rank(payload: dict[str, Any], info: RankInfo) -> str | None:
    """Train the runs of `payload["runs"]` one after the other, in this rank.

    Args:
        payload: `runs`: list of {config, run_dir}; all of one cluster.
        info: of this rank.

    Returns:
        `done`, or None when a stop was asked for; then the last run's status says so.
    """
    mesh: Mesh | None = None
    for run in payload["runs"]:
        config = load_run(run["config"])
        mesh = mesh or create_mesh(cluster_from(config.cluster), info.device)
        if not train_one(config, RunDir(run["run_dir"]), mesh, info):
            return None
    return "done"


def train_one(config: RunConfig, run_dir: RunDir, mesh: Mesh, info: RankInfo) -> bool:
    """Train one run to its end, from its newest checkpoint if there is one. Collective.

    Args:
        config: of the run.
        run_dir: made already; rank 0 writes into it.
        mesh, info: of this rank.

    Returns:
        False when it was stopped before its end; its checkpoint and its status are written then.
    """
    if mesh.rank == 0:
        run_dir.stamp("started")
    _be_deterministic(config, mesh)
    tokens = prepare(config.data, config.model.vocab_size)
    system = registry.create(config.system.name, config.system.options)
    gpt = build_gpt(config.model, system, mesh, config.seed, DTYPES[config.trainer.precision])
    sync = system.gradient_sync(gpt, mesh)
    resume_from = _checkpoint_to_resume(config, run_dir)
    start_step = checkpoint_step(resume_from) if resume_from else 0
    where: dict[str, Any] = {
        "seq_len": config.model.seq_len,
        "global_batch_size": config.trainer.global_batch_size,
        "rank": mesh.rank,
        "world_size": mesh.world_size,
    }
    stream = BatchStream(
        tokens, **where, seed=config.seed, start_step=start_step, num_steps=config.trainer.max_steps - start_step
    )
    meter = LinkMeter(mesh.cluster, mesh.rank)
    footer = footer_of(
        "measured",
        mesh.cluster,
        run_id=run_id(config),
        system=system.name,
        label=config.system.label,
        implementation=system.implementation,
        seed=config.seed,
    )
    recorder = Recorder(config, mesh, info, meter, run_dir, footer, start_step)
    val_batches = ValBatches(tokens, **where, num_batches=config.trainer.val_batches)
    _quiet()
    trainer = L.Trainer(
        strategy=ExpertParallelStrategy(mesh, info, sync),
        accelerator="gpu" if mesh.device.type == "cuda" else "cpu",
        devices=1,  # as Lightning sees it: the strategy knows the ranks, and a scheduler may show each one GPU only
        num_nodes=info.world_size,
        precision=LIGHTNING_PRECISION[config.trainer.precision],
        max_steps=config.trainer.max_steps,
        max_epochs=-1,
        callbacks=[
            recorder,
            Validator(config, mesh, recorder, val_batches),
            Checkpointer(config, recorder),
        ],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = LanguageModel(gpt, system, sync, config.trainer, config.model.aux_loss_weight)
    with meter.installed():
        trainer.fit(module, _Batches(stream.__iter__), ckpt_path=resume_from)
    done = trainer.global_step == config.trainer.max_steps
    if mesh.rank == 0:
        run_dir.stamp("ended")
        reason = "" if done else "stopped on request; the same command goes on from the last checkpoint"
        run_dir.set_status("done" if done else "interrupted", reason, trainer.global_step)
    dist.barrier()  # joined ranks read that status to decide what comes next
    return done


class _Batches:
    """Batches without a length: Lightning would take a length for an epoch's, which a resumed stream does not have."""

    def __init__(self, start: Callable[[], Iterator[Tensor]]) -> None:
        self.start = start

    def __iter__(self) -> Iterator[Tensor]:
        return self.start()


def _checkpoint_to_resume(config: RunConfig, run_dir: RunDir) -> Path | None:
    """This run's newest checkpoint, else the one that `trainer.resume_from` names, which must be there then."""
    newest, named = latest_checkpoint(run_dir.checkpoints), config.trainer.resume_from
    if newest is not None or named is None:
        return newest
    return named_checkpoint(named, config.trainer.max_steps)


def _be_deterministic(config: RunConfig, mesh: Mesh) -> None:
    torch.manual_seed(config.seed * 1_000_003 + mesh.rank)
    # Some CUDA kernels have no deterministic form: there it is a warning in the log, on a CPU an error.
    torch.use_deterministic_algorithms(config.trainer.deterministic, warn_only=mesh.device.type == "cuda")
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010  # no stub knows it


def _quiet() -> None:
    """Lightning's advice about loggers, workers and sizes is not for this harness."""
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
