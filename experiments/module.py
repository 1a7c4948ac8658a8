"""The Lightning module: loss, optimizer, learning rate and clipping, the same for every system."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning as L
from torch import Tensor
from torch.optim import Optimizer

from experiments.config import TrainerConfig
from experiments.model import GPT, Losses
from experiments.optimizer import build_optimizer, lr_factor
from moe.sync import GradientSync
from moe.system import System


class LanguageModel(L.LightningModule):
    """Next-token training of a GPT.

    Args:
        gpt: the model, on its device, with its initial weights.
        system: whose layers it has; told when a step has ended.
        sync: reduces and clips its gradients.
        trainer_config: learning rate, decay, clipping, steps.
        aux_loss_weight: of the mean balance loss of the MoE layers.

    Attributes:
        losses: of the last training step.
        grad_norm: of the last training step before clipping, scalar tensor.
        learning_rate: of the last training step.
        work_cpu_s: CPU seconds of this thread in forward, backward, reduction and optimizer since somebody set it to 0.
    """

    losses: Losses
    grad_norm: Tensor
    learning_rate: float

    def __init__(
        self, gpt: GPT, system: System, sync: GradientSync, trainer_config: TrainerConfig, aux_loss_weight: float
    ) -> None:
        super().__init__()
        self.gpt = gpt
        self.system = system
        self.sync = sync
        self.trainer_config = trainer_config
        self.aux_loss_weight = aux_loss_weight
        self.work_cpu_s = 0.0

    def training_step(self, batch_BS: Tensor, batch_index: int) -> Tensor:
        """Loss of this rank's rows [B, S + 1] of the global batch."""
        self.losses = losses = self.gpt(batch_BS[:, :-1], batch_BS[:, 1:])
        return losses.cross_entropy + self.aux_loss_weight * losses.aux_loss

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Forward, backward and update: the model's own work, timed."""
        started = time.thread_time()
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.system.after_step(self.gpt, optimizer.optimizer, self.trainer.global_step + 1)  # Lightning counts later
        self.work_cpu_s += time.thread_time() - started

    def configure_optimizers(self) -> Any:
        """AdamW, no decay on vectors."""
        return build_optimizer(self.gpt, self.trainer_config)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Set the learning rate: a function of the step alone, so that a resumed run needs no scheduler's state."""
        self.learning_rate = self.trainer_config.lr * lr_factor(self.trainer.global_step, self.trainer_config)
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm over the whole model, experts of other ranks included. Collective."""
        self.grad_norm = self.sync.clip(self.trainer_config.grad_clip or 0.0)
