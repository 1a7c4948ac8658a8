"""What ranks do for the tests of SwiftMoE's checkpoints: models that train, save and go on, judged by the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from experiments.checkpoint import load_checkpoint, save_checkpoint
from experiments.model import GPT
from experiments.ranks import RankInfo
from experiments.registry import create
from moe.mesh import Mesh, create_mesh
from moe.sync import GradientSync
from moe.system import System
from moe.topology import cluster_of
from tests.rank_models import SEED, batch, trainee

NAMES = ("flat", "swiftmoe")
STEPS_BEFORE, STEPS_AFTER = 3, 2
OPTIONS: dict[str, dict[str, Any]] = {"flat": {}, "swiftmoe": {"slots_per_rank": 3}}


class Trainee:
    """A model that trains in the suite's loop, on batches by their number."""

    def __init__(self, name: str, mesh: Mesh, seed: int = SEED) -> None:
        self.mesh = mesh
        self.system: System = create(name, OPTIONS[name] if mesh.world_size == 4 else {})
        parts: tuple[GPT, Optimizer, GradientSync] = trainee(self.system, mesh, seed)
        self.gpt, self.optimizer, self.sync = parts

    def losses(self, first: int, steps: int) -> list[float]:
        """Mean losses over all ranks, of `steps` steps from batch `first` on."""
        told = []
        for index in range(first, first + steps):
            tokens_BS = batch(index, self.mesh)
            found = self.gpt(tokens_BS[:, :-1], tokens_BS[:, 1:])
            (found.cross_entropy + 0.01 * found.aux_loss).backward()
            self.sync.reduce()
            self.sync.clip(1.0)
            self.optimizer.step()
            self.system.after_step(self.gpt, self.optimizer, index + 1)
            self.optimizer.zero_grad(set_to_none=True)
            mean = found.cross_entropy.detach().clone()
            dist.all_reduce(mean)
            told.append(float(mean) / self.mesh.world_size)
        return told


def save(payload: dict[str, Any], info: RankInfo) -> dict[str, Any]:
    """Losses before and after a checkpoint below `payload["folder"]`, saved by each system, and of a new model that
    each system loads from each."""
    torch.set_num_threads(1)
    mesh = create_mesh(cluster_of([2, 2]), info.device)
    facts: dict[str, Any] = {"went on": {}}
    for name in NAMES:
        model = Trainee(name, mesh)
        model.losses(0, STEPS_BEFORE)
        save_checkpoint(folder(payload, name), model.gpt, model.optimizer, {"told": name})
        facts["went on"][name] = model.losses(STEPS_BEFORE, STEPS_AFTER)
        facts[f"{name} keeps state of"] = len(model.optimizer.state) - len(list(model.gpt.parameters()))
    return facts | load(payload, mesh)


def reload(payload: dict[str, Any], info: RankInfo) -> dict[str, Any]:
    """Losses of new models on the ranks that are here."""
    torch.set_num_threads(1)
    return load(payload, create_mesh(cluster_of([1, info.world_size]), info.device))


def load(payload: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Losses after loading, by who saved and who loads; a model that has trained already loads as well."""
    facts = {}
    for source in NAMES:
        for name in NAMES:
            model = Trainee(name, mesh, seed=SEED + 1)
            if source == name:
                model.losses(9, 1)
            load_checkpoint(folder(payload, source), model.gpt, model.optimizer)
            facts[f"{source} to {name}"] = model.losses(STEPS_BEFORE, STEPS_AFTER)
    return facts


def folder(payload: dict[str, Any], name: str) -> Path:
    """Of a system's checkpoint."""
    return Path(payload["folder"]) / name / f"step_{STEPS_BEFORE}"
