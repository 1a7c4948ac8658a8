"""The optimizer and the learning rate, the same for every system."""

from __future__ import annotations

import math

import torch
from torch.optim import Optimizer

from experiments.config import TrainerConfig
from experiments.model import GPT


def build_optimizer(gpt: GPT, trainer: TrainerConfig) -> Optimizer:
    """AdamW over all parameters of this rank; weight decay on matrices only."""
    matrices = [p for p in gpt.parameters() if p.dim() > 1]
    vectors = [p for p in gpt.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": trainer.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    first, second = trainer.betas
    return torch.optim.AdamW(groups, lr=trainer.lr, betas=(first, second), fused=True)


def lr_factor(step: int, trainer: TrainerConfig) -> float:
    """Factor on the learning rate at `step`: up linearly over the warm-up, then down a cosine to `min_lr_ratio`."""
    if step < trainer.warmup_steps:
        return (step + 1) / trainer.warmup_steps
    progress = (step - trainer.warmup_steps) / max(1, trainer.max_steps - trainer.warmup_steps)
    return trainer.min_lr_ratio + (1 - trainer.min_lr_ratio) * (1 + math.cos(math.pi * min(1.0, progress))) / 2
