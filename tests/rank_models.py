"""What ranks do for the tests of experiments.model and experiments.checkpoint: plain facts, judged by the tests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from experiments import registry
from experiments.checkpoint import MOMENTS, canonical_entries, load_checkpoint, save_checkpoint
from experiments.config import ModelConfig, TrainerConfig
from experiments.model import GPT, build_gpt, layer_spec
from experiments.optimizer import build_optimizer
from experiments.ranks import RankInfo
from moe.mesh import Mesh, create_mesh
from moe.sync import GradientSync
from moe.system import System
from moe.topology import cluster_of

Facts = dict[str, Any]

_SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "seq_len": 16,
    "num_layers": 4,
    "num_heads": 4,
    "model_dim": 32,
    "dense_hidden_dim": 64,
    "hidden_dim": 24,
    "num_experts": 8,
    "top_k": 2,
    "moe_every": 2,
    "norm": "rms",
    "activation": "gelu",
    "aux_loss_weight": 0.01,
    "tie_embeddings": True,
}
MODELS = {
    "plain": ModelConfig(name="plain", **_SHAPE),
    "other": ModelConfig(  # whatever `plain` does not have
        name="other",
        **{**_SHAPE, "num_layers": 3, "moe_every": 1, "norm": "layer", "activation": "swiglu", "tie_embeddings": False},
        num_kv_heads=2,
        head_dim=12,
    ),
}
TRAINER = TrainerConfig(
    max_steps=10,
    global_batch_size=8,
    lr=1e-3,
    min_lr_ratio=0.1,
    warmup_steps=0,
    weight_decay=0.1,
    betas=[0.9, 0.95],
    grad_clip=1.0,
    log_every=1,
    val_every=1,
    val_batches=1,
    checkpoint_every=1,
    deterministic=True,
    timeout_s=60,
)
SEED = 5
SAVED = ("flat", "deepspeed", "reference")
"""Systems whose checkpoints are tried: one native, one from upstream, one that does not shard its experts."""


def measure(payload: dict[str, Any], info: RankInfo) -> dict[str, Any]:
    """`models`: facts of every system's models; `saved`: of checkpoints written below `payload["folder"]`."""
    mesh = create_mesh(cluster_of([2, info.world_size // 2]), info.device)
    saved = {}
    for name in filter(runs, SAVED):
        gpt, optimizer, sync = trainee(registry.create(name), mesh)
        losses = [step(gpt, optimizer, sync, index, mesh) for index in range(2)]
        save_checkpoint(Path(payload["folder"]) / name / "step_2", gpt, optimizer, {"told": name})
        saved[name] = {"losses": losses, "digests": gathered(gpt, optimizer)}
    return {"models": {name: models(registry.create(name), mesh) for name in runnable()}, "saved": saved}


def reload(payload: dict[str, Any], info: RankInfo) -> dict[str, Facts]:
    """Facts of each `payload["pairs"]`, [saved by, loaded by]: before and after one more step; flat's is saved anew."""
    mesh = create_mesh(cluster_of([1, info.world_size]), info.device)
    return {
        f"{source} to {name}": load(Path(payload["folder"]), source, name, mesh) for source, name in payload["pairs"]
    }


def load(folder: Path, source: str, name: str, mesh: Mesh) -> Facts:
    """Facts of a checkpoint that `source` saved and `name` loads. Collective."""
    gpt, optimizer, sync = trainee(registry.create(name), mesh, seed=SEED + 1)
    state = load_checkpoint(folder / source / "step_2", gpt, optimizer)
    facts: Facts = {"state": state, "digests": gathered(gpt, optimizer)}
    facts["loss"] = step(gpt, optimizer, sync, 2, mesh)
    if source == name == "flat":
        save_checkpoint(folder / f"again_{mesh.world_size}" / "step_3", gpt, optimizer, {"told": "again"})
        facts["later"] = gathered(gpt, optimizer)
    return facts


def runs(name: str) -> bool:
    """Whether a system can train these models here."""
    return not registry.create(name).refusals(layer_spec(MODELS["plain"], 1, SEED, torch.float32), cluster_of([2, 2]))


def runnable() -> list[str]:
    """Every system that can train here; those that never can are the contract's to judge."""
    return [name for name in registry.discover() if runs(name)]


def models(system: System, mesh: Mesh) -> dict[str, Facts]:
    """Of each model: parameters and losses of every rank, and its canonical tensors."""
    facts = {}
    for name, model in MODELS.items():
        gpt = build_gpt(model, system, mesh, SEED, torch.float32)
        tokens_BS = batch(0, mesh)
        losses = gpt(tokens_BS[:, :-1], tokens_BS[:, 1:])
        sharded = sum(p.numel() for layer in gpt.moe_layers for p in layer.sharded_parameters())
        mine = {
            "parameters": sum(p.numel() for p in gpt.parameters()),
            "sharded": sharded,
            "losses": [losses.cross_entropy.item(), losses.aux_loss.item()],
        }
        ranks: list[Facts] = [{} for _ in range(mesh.world_size)]
        dist.all_gather_object(ranks, mine)
        facts[name] = {"ranks": ranks, "digests": gathered(gpt, None)}
    return facts


def trainee(
    system: System, mesh: Mesh, seed: int = SEED, model: ModelConfig = MODELS["plain"]
) -> tuple[GPT, Optimizer, GradientSync]:
    """A model, ready to train."""
    gpt = build_gpt(model, system, mesh, seed, torch.float32)
    return gpt, build_optimizer(gpt, TRAINER), system.gradient_sync(gpt, mesh)


def step(gpt: GPT, optimizer: Optimizer, sync: GradientSync, index: int, mesh: Mesh) -> float:
    """One training step; the loss over all ranks before it."""
    tokens_BS = batch(index, mesh)
    losses = gpt(tokens_BS[:, :-1], tokens_BS[:, 1:])
    optimizer.zero_grad(set_to_none=True)
    (losses.cross_entropy + 0.01 * losses.aux_loss).backward()
    sync.reduce()
    sync.clip(1.0)
    optimizer.step()
    loss = losses.cross_entropy.detach()
    dist.all_reduce(loss)
    return float(loss) / mesh.world_size


def batch(index: int, mesh: Mesh) -> Tensor:
    """This rank's rows of a batch that depends on `index` only, [8 / W, S + 1]."""
    whole = torch.randint(300, (8, 17), generator=torch.Generator().manual_seed(index))
    return whole.chunk(mesh.world_size)[mesh.rank]


def gathered(gpt: GPT, optimizer: Optimizer | None) -> dict[str, str]:
    """Digest of every canonical tensor, and of its optimizer state, by key; asserts that ranks do not disagree."""
    with ExitStack() as stack:
        for layer in gpt.moe_layers:
            stack.enter_context(layer.whole_experts(optimizer or build_optimizer(gpt, TRAINER), loading=False))
        mine = dict(digests(gpt, optimizer))
    ranks: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(ranks, mine)
    union: dict[str, str] = {}
    for told in ranks:
        for key, digest in told.items():
            assert union.setdefault(key, digest) == digest, f"{key} differs between ranks"
    return union


def digests(gpt: GPT, optimizer: Optimizer | None) -> Iterator[tuple[str, str]]:
    """(key, digest) of this rank's tensors."""
    for entry in canonical_entries(gpt):
        yield entry.key, digest(entry.view(entry.parameter.detach()))
        if optimizer is not None:
            state = optimizer.state[entry.parameter]
            yield f"{entry.key}/step", str(float(state["step"]))
            for name in MOMENTS:
                yield f"{entry.key}/{name}", digest(entry.view(state[name]))


def digest(tensor: Tensor) -> str:
    """Of the shape and every bit."""
    return f"{tuple(tensor.shape)} {hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]}"
