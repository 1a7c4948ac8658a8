"""What watches a training run: metrics of every logged step, validation, checkpoints, the progress line."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from experiments.checkpoint import remove_old_checkpoints
from experiments.config import RunConfig
from experiments.module import LanguageModel
from experiments.progress_log import Phase, ProgressLog
from experiments.ranks import RankInfo
from experiments.results import MetricRow, RunDir
from experiments.schemas import TrainerConfig
from experiments.timing import synchronise
from moe.mesh import Mesh
from moe.metering import CLASSES, LinkMeter
from moe.system import MoELayer, MoEOutput

MAX_COUNTS_BYTES = 1 << 28
"""Of the counts of copies by rank and expert; where there are more, every second logged step is kept."""

GATHER_STEPS = 10
GATHER_S = 2.0
"""The ranks' numbers are gathered after so many logged steps, or after so many seconds if steps are slow."""


class Recorder(L.Callback):
    """Collects what each logged step did, over all ranks, several steps in one gather; rank 0 keeps the rows.

    Args:
        config: of the run.
        mesh: of the run.
        info: of this rank; its stop request is agreed on here.
        meter: installed around the run.
        run_dir: where rank 0 writes.
        footer: metadata of the metrics file.
        start_step: steps done before this start; later rows of an earlier start are forgotten.

    Attributes:
        stopped: all ranks agreed to stop.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        info: RankInfo,
        meter: LinkMeter,
        run_dir: RunDir,
        footer: dict[str, Any],
        start_step: int,
    ) -> None:
        self.config, self.mesh, self.info, self.meter = config, mesh, info, meter
        self.run_dir, self.footer = run_dir, footer
        self.stopped = False
        self.progress = Progress(config, start_step) if info.rank == 0 else None
        self.progress_log = ProgressLog(run_dir.path) if info.rank == 0 else None
        self.rows: list[MetricRow] = []
        self.counts: list[np.ndarray] = []
        self.replicas: list[np.ndarray | None] = []  # beside each of the counts
        self.places: list[np.ndarray | None] = []  # likewise
        self.counted_steps: list[int] = []
        self.sample: tuple[int, np.ndarray] | None = None
        self.observed: dict[str, np.ndarray] = {}
        self._cpu_start = 0.0
        ranks, ep_size = range(mesh.world_size), mesh.ep_size
        self._level_WP = torch.tensor(
            [[mesh.cluster.level_of(rank, rank - rank % ep_size + place) for place in range(ep_size)] for rank in ranks]
        )
        self._whereabouts = Whereabouts(None, None)  # of the step under way
        self._pending: list[tuple[int, Tensor, Whereabouts]] = []
        self._gather_after = 1
        self._interval_start, self._interval_step = 0.0, start_step
        self._watching: list[RemovableHandle] = []
        self._choices: list[Tensor] = []
        self._sigterm = signal.getsignal(signal.SIGTERM)
        if info.rank == 0 and start_step:
            self._recall(start_step)

    def _recall(self, start_step: int) -> None:
        rows = self.run_dir.read_metrics()
        # Training steps count from 0; a validation at `start_step` was made with the weights that we start from.
        self.rows = [row for row in rows if row.step < start_step + (row.metric == "val_loss")]
        routing = self.run_dir.read_routing()
        if routing is not None:
            kept = routing["steps"] < start_step
            self.counts = list(routing["dispatch_counts"][kept])
            self.counted_steps = routing["steps"][kept].tolist()
            self.replicas = list(routing.get("replica_counts", np.full(len(kept), None))[kept])
            self.places = list(routing.get("expert_of_slot", np.full(len(kept), None))[kept])

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clock, and take SIGTERM back: Lightning's handler would broadcast amid the model's collectives."""
        if self._sigterm is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._sigterm)
        assert isinstance(module, LanguageModel)
        self.observed = {name: fact.numpy() for name, fact in module.gpt.moe_layers[0].observations().items()}
        if self.progress_log is not None:
            self.progress_log.note(trainer.global_step, "starting")
        self._restart_interval(trainer.global_step)
        self._cpu_start = time.thread_time()

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Count this step's bytes only; note where its experts are; watch the choices of the last one."""
        assert isinstance(module, LanguageModel)
        self.meter.reset()
        self._whereabouts = whereabouts_of(module.gpt.moe_layers)  # now: after the step they are those of the next one
        if trainer.global_step + 1 == self.config.trainer.max_steps:
            self._watch_choices(module)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the step if it is to be logged, and gather what was noted when it is time. Collective."""
        assert isinstance(module, LanguageModel)
        done, trainer_config = trainer.global_step, self.config.trainer
        last = done == trainer_config.max_steps
        if last or done % trainer_config.log_every == 0:
            self._note(module, done)
        full = len(self._pending) >= self._gather_after
        if self._pending and (full or last or is_checkpoint_due(trainer_config, done)):
            started = time.perf_counter()
            self._gather(len(module.losses.moe))
            self._interval_start += (
                time.perf_counter() - started
            )  # no part of a step, but the CPU's part of harness_time
        if last:
            self._gather_choices(done - 1)

    def _note(self, module: LanguageModel, done: int) -> None:
        synchronise(self.mesh.device)
        num_steps = done - self._interval_step
        step_s = (time.perf_counter() - self._interval_start) / num_steps
        harness_s = (time.thread_time() - self._cpu_start - module.work_cpu_s) / num_steps
        module.work_cpu_s, self._cpu_start = 0.0, time.thread_time()
        self._pending.append((done - 1, self._numbers(module, step_s, harness_s), self._whereabouts))
        self._restart_interval(done)

    def _restart_interval(self, step: int) -> None:
        self._interval_start, self._interval_step = time.perf_counter(), step

    @contextmanager
    def paused(self, step: int, phase: Phase) -> Iterator[None]:
        """Stop the clock: what is done inside, after `step` steps, is part of none."""
        synchronise(self.mesh.device)
        started, cpu_started = time.perf_counter(), time.thread_time()
        if self.progress_log is not None:
            self.progress_log.note(step, phase)
        yield
        synchronise(self.mesh.device)
        if self.progress_log is not None:
            self.progress_log.note(step, "training")
        self._interval_start += time.perf_counter() - started
        self._cpu_start += time.thread_time() - cpu_started

    def _numbers(self, module: LanguageModel, step_s: float, harness_s: float) -> Tensor:
        """What this rank says of the step: float64 [n], in the order in which `_record` takes it apart."""
        losses = module.losses
        scalars = [float(self.info.stop_requested()), step_s, harness_s, module.learning_rate]
        tensors = [module.grad_norm, losses.cross_entropy, losses.aux_loss]
        tensors += [output.num_dropped for output in losses.moe] + [output.counts_E for output in losses.moe]
        flat = torch.cat([tensor.detach().double().view(-1) for tensor in tensors]).cpu()
        return torch.cat([torch.tensor(scalars, dtype=torch.float64), flat, self.meter.as_tensor().flatten()])

    def _gather(self, num_layers: int) -> None:
        """Share the pending steps' numbers, agree on stopping, and keep the rows on rank 0. Collective."""
        mine = torch.stack([numbers for _, numbers, _ in self._pending]).to(self.mesh.device)
        parts = [torch.empty_like(mine) for _ in range(self.mesh.world_size)]
        dist.all_gather(parts, mine)
        gathered = torch.stack(parts, dim=1).cpu()  # [steps, W, n]
        self.stopped = bool(gathered[-1, :, 0].any())
        slowest_s = float(gathered[:, :, 1].max())  # the same on all ranks, so they gather together next time, too
        self._gather_after = min(GATHER_STEPS, max(1, int(GATHER_S / slowest_s)))
        if self.info.rank == 0:
            for (step, _, whereabouts), numbers in zip(self._pending, gathered, strict=True):
                self._record(step, numbers, num_layers, whereabouts)
            assert self.progress_log is not None
            last = next(row for row in reversed(self.rows) if row.metric == "loss")
            self.progress_log.note(last.step + 1, "training", last.value)
        self._pending.clear()

    def _record(self, step: int, numbers: Tensor, num_layers: int, whereabouts: Whereabouts) -> None:
        num_experts, num_levels = self.config.model.num_experts, len(self.mesh.cluster.levels)
        sizes = [1] * 7 + [num_layers, num_layers * num_experts, num_levels * len(CLASSES)]
        _, step_s, harness_s, rate, norm, loss, aux_loss, dropped, counts, sent = numbers.split(sizes, dim=1)
        num_tokens = self.config.trainer.global_batch_size * self.config.model.seq_len
        slowest = float(step_s.max())
        self._add(step, "loss", float(loss.mean()), "nats/token")
        self._add(step, "aux_loss", float(aux_loss.mean()), "1")
        self._add(step, "dropped_copies", float(dropped.sum()), "copies/step")
        self._add(step, "grad_norm", float(norm[0]), "1")
        self._add(step, "learning_rate", float(rate[0]), "1")
        self._add(step, "step_time", slowest, "s")
        self._add(step, "tokens_per_s", num_tokens / slowest, "tokens/s")
        self._add(step, "harness_time", float(harness_s.max()), "s")
        for level, row in zip(self.mesh.cluster.level_names, sent.sum(0).view(num_levels, -1), strict=True):
            for kind, value in zip(CLASSES, row, strict=True):
                if value:
                    self._add(step, "bytes", float(value), "B/step", f"{level}/{kind}")
        by_rank = counts.view(-1, num_layers, num_experts)
        replicas_LE, places_LE = whereabouts
        if replicas_LE is None:  # else the counts do not say which replica took a copy, nor how far that is
            by_slot = by_rank
            if places_LE is not None:
                by_slot = by_rank.gather(2, torch.from_numpy(places_LE).long().expand_as(by_rank))
            for level, share in zip(self.mesh.cluster.level_names, self._shares_by_level(by_slot.sum(1)), strict=True):
                self._add(step, "routed_share", share, "1", level)
        self.counts.append(by_rank.transpose(0, 1).to(torch.int32).numpy())
        self.replicas.append(replicas_LE)
        self.places.append(places_LE)
        self.counted_steps.append(step)
        if len(self.counts) * self.counts[-1].nbytes > MAX_COUNTS_BYTES:  # every second, the latest among them
            self.counts, self.counted_steps = self.counts[::-2][::-1], self.counted_steps[::-2][::-1]
            self.replicas, self.places = self.replicas[::-2][::-1], self.places[::-2][::-1]
        assert self.progress is not None
        self.progress.advance(step + 1, float(loss.mean()))

    def _shares_by_level(self, counts_WE: Tensor) -> list[float]:
        """Of all copies, how many have their expert at each level's distance; experts in the order of their slots."""
        copies_WP = counts_WE.view(len(counts_WE), self.mesh.ep_size, -1).sum(2)
        levels = range(len(self.mesh.cluster.levels))
        return [float(copies_WP[self._level_WP == level].sum() / copies_WP.sum()) for level in levels]

    def _add(self, step: int, metric: str, value: float, unit: str, part: str = "") -> None:
        self.rows.append(MetricRow(step, metric, part, value, unit))

    def add_validation(self, steps_done: int, loss: float) -> None:
        """Keep a validation loss, measured after `steps_done` steps."""
        self._add(steps_done, "val_loss", loss, "nats/token")

    def _watch_choices(self, module: LanguageModel) -> None:
        """Note the choices [T, K] of each MoE layer in the step that comes."""

        def note(layer: Any, args: tuple[Tensor], output: MoEOutput) -> None:
            ids_TK = output.expert_ids_TK
            if ids_TK is None:  # an upstream gate that does not tell: the K largest of its logits
                logits_TE = args[0].detach().float() @ layer.gate_weight.detach().float().t()
                ids_TK = logits_TE.topk(layer.spec.top_k, dim=1).indices
            self._choices.append(ids_TK.detach())

        self._watching = [layer.register_forward_hook(note) for layer in module.gpt.moe_layers if layer.chooses_top_k]

    def _gather_choices(self, step: int) -> None:
        """The joint choices of every token of the step: int16 [layers, T of all ranks, K]. Collective."""
        for handle in self._watching:
            handle.remove()
        if not self._choices:  # tokens do not choose, say by expert choice
            return
        mine = torch.stack(self._choices).to(torch.int32).contiguous()
        gathered = [torch.empty_like(mine) for _ in range(self.mesh.world_size)]
        dist.all_gather(gathered, mine)
        self.sample = (step, torch.cat(gathered, dim=1).to(torch.int16).cpu().numpy())

    def flush(self) -> None:
        """Write what was recorded; on rank 0, elsewhere nothing."""
        if self.info.rank:
            return
        self.rows.sort(key=lambda row: (row.step, row.metric != "val_loss"))  # whenever they were gathered
        self.run_dir.write_metrics(self.rows, self.footer)
        if not self.counts:  # a checkpoint before the first logged step
            return
        arrays = {"steps": np.array(self.counted_steps, dtype=np.int64), "dispatch_counts": np.stack(self.counts)}
        for name, by_step in (("replica_counts", self.replicas), ("expert_of_slot", self.places)):
            told = [array for array in by_step if array is not None]
            assert len(told) in (0, len(self.counts)), f"{name} is told of {len(told)} steps of {len(self.counts)}"
            if told:
                arrays[name] = np.stack(told)
        arrays |= self.observed
        if self.sample is not None:
            arrays |= {"sample_step": np.array(self.sample[0]), "sample_expert_ids": self.sample[1]}
        self.run_dir.write_routing(**arrays)


class Whereabouts(NamedTuple):
    """Where a step's experts are; both None where they are in order, one each.

    Attributes:
        replicas_LE: int16 [layers, E], slots of each expert; None where each has one.
        places_LE: int16 [layers, E], which expert is in each slot; None where they stay, or have replicas.
    """

    replicas_LE: np.ndarray | None
    places_LE: np.ndarray | None


def whereabouts_of(layers: Sequence[MoELayer]) -> Whereabouts:
    """Of the experts in the step that comes.

    Args:
        layers: of one system, in order.
    """
    replicas, places = [layer.replicas_E for layer in layers], [layer.expert_of_slot for layer in layers]
    if None not in replicas:
        return Whereabouts(np.array(replicas, dtype=np.int16), None)
    return Whereabouts(None, None if None in places else np.array(places, dtype=np.int16))


class Validator(L.Callback):
    """Validation loss every `val_every` steps and after the last one, over the same held-out batches in every run."""

    def __init__(self, config: RunConfig, mesh: Mesh, recorder: Recorder, batches: Iterable[Tensor]) -> None:
        self.config, self.mesh, self.recorder, self.batches = config, mesh, recorder, batches

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Validate when it is time. Collective."""
        done = trainer.global_step
        if done % self.config.trainer.val_every and done != self.config.trainer.max_steps:
            return
        assert isinstance(module, LanguageModel)
        with self.recorder.paused(done, "validating"):
            self.recorder.add_validation(done, self._loss(trainer, module))

    @torch.no_grad()
    def _loss(self, trainer: L.Trainer, module: LanguageModel) -> float:
        module.eval()
        losses = []
        with trainer.precision_plugin.forward_context():
            for batch_BS in self.batches:
                batch_BS = batch_BS.to(self.mesh.device)
                losses.append(module.gpt(batch_BS[:, :-1], batch_BS[:, 1:]).cross_entropy)
        module.train()
        mean = torch.stack(losses).mean()
        dist.all_reduce(mean)
        return float(mean) / self.mesh.world_size


def is_checkpoint_due(config: TrainerConfig, done: int) -> bool:
    """Every `checkpoint_every` steps and after the last one; with None never."""
    return config.checkpoint_every is not None and (done == config.max_steps or done % config.checkpoint_every == 0)


class Checkpointer(L.Callback):
    """Metrics, then a checkpoint, when one is due and when a stop is asked for; where none is ever due, metrics after
    each validation."""

    def __init__(self, config: RunConfig, recorder: Recorder) -> None:
        self.config, self.recorder = config, recorder

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time. Collective."""
        done, every = trainer.global_step, self.config.trainer.checkpoint_every
        last = done == self.config.trainer.max_steps
        if self.recorder.stopped or is_checkpoint_due(self.config.trainer, done):
            with self.recorder.paused(done, "saving"):
                self._save(trainer, done, keep=1 if last else 2)
        elif last or (every is None and done % self.config.trainer.val_every == 0):
            self.recorder.flush()
            if last and self.recorder.info.rank == 0:  # what an earlier stop saved is not the end of the run
                remove_old_checkpoints(self.recorder.run_dir.checkpoints, keep=0)
        if self.recorder.stopped:
            trainer.should_stop = True

    def _save(self, trainer: L.Trainer, done: int, keep: int) -> None:
        # Metrics first: rows beyond the checkpoint are forgotten by the next start, missing ones could not be made up.
        self.recorder.flush()
        folder = self.recorder.run_dir.checkpoints
        trainer.save_checkpoint(folder / f"step_{done}")
        if self.recorder.info.rank == 0:
            self.recorder.run_dir.set_status("running", step=done)
            remove_old_checkpoints(folder, keep)


class Progress:
    """One bar on a terminal, else a plain line every tenth of the run. Rank 0 only."""

    def __init__(self, config: RunConfig, start_step: int, write: Callable[[str], None] | None = None) -> None:
        style = config.trainer.progress
        if style == "auto":
            style = "bar" if sys.stdout.isatty() else "lines"
        self.style, self.total = style, config.trainer.max_steps
        self.label = f"{config.system.label} seed {config.seed}"
        self.every = max(1, self.total // 10)
        self.write = write or (lambda line: print(line, flush=True))
        self.bar = (
            tqdm(total=self.total, initial=start_step, desc=self.label, unit="step", file=sys.stdout)
            if style == "bar"
            else None
        )

    def advance(self, done: int, loss: float) -> None:
        """`done` steps are done; `loss` was the last one's."""
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self.bar.update(done - self.bar.n)
            if done == self.total:
                self.bar.close()
        elif self.style == "lines" and (done % self.every == 0 or done == self.total):
            self.write(f"{self.label}: step {done}/{self.total}, loss {loss:.4f}")
