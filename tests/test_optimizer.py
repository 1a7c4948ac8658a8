"""experiments.optimizer and experiments.module: a run takes the steps that plain torch takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from baselines.reference import Reference
from experiments import cells
from experiments.cells import run_cells, run_dir_of
from experiments.checkpoint import canonical_entries, load_checkpoint
from experiments.data import BatchStream, prepare
from experiments.model import GPT, build_gpt
from experiments.optimizer import build_optimizer, lr_factor
from moe.mesh import create_mesh
from moe.topology import cluster_of
from tests.lone import lone_mesh
from tests.rank_models import TRAINER
from tests.tiny import ONE_RANK, by_step, rank_here, run_ranks_here, tiny_config, write_text


def test_the_learning_rate_rises_in_a_line_and_falls_in_a_cosine() -> None:
    trainer = TRAINER.model_copy(update={"warmup_steps": 4, "max_steps": 14, "min_lr_ratio": 0.2})
    factors = [lr_factor(step, trainer) for step in range(15)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[9] == pytest.approx(0.6)  # half way down to 0.2
    assert factors[14] == pytest.approx(0.2)
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert lr_factor(99, trainer) == pytest.approx(0.2)
    assert lr_factor(0, trainer.model_copy(update={"warmup_steps": 0})) == 1.0


def test_a_run_takes_the_steps_of_plain_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW, decay on matrices only, clipping, the balance loss and the learning rate: each of them large enough."""
    text = write_text(tmp_path)
    large = ["trainer.lr=0.01", "trainer.weight_decay=2.0", "trainer.grad_clip=0.2", "model.aux_loss_weight=3.0"]
    config = tiny_config(tmp_path / "out", text, ONE_RANK, "system=reference", *large)
    monkeypatch.setattr(cells, "run_ranks", run_ranks_here)
    assert run_cells([config], []) == []

    gpt = build_gpt(config.model, Reference(), lone_mesh(), config.seed, torch.float32)
    matrices = [parameter for parameter in gpt.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in gpt.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 2.0}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    stream = BatchStream(
        prepare(config.data, 300), seq_len=16, global_batch_size=4, rank=0, world_size=1, seed=0, num_steps=6
    )
    losses, norms = {}, {}
    for step, batch_BS in enumerate(stream):
        output = gpt(batch_BS[:, :-1], batch_BS[:, 1:])
        optimizer.zero_grad()
        (output.cross_entropy + 3.0 * output.aux_loss).backward()
        losses[step] = output.cross_entropy.item()
        norms[step] = torch.nn.utils.clip_grad_norm_(gpt.parameters(), 0.2).item()
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * lr_factor(step, config.trainer)
        optimizer.step()
    run_dir = run_dir_of(config)
    assert by_step(run_dir, "loss") == pytest.approx(losses, rel=1e-5)
    assert by_step(run_dir, "grad_norm") == pytest.approx(norms, rel=1e-3)
    assert min(norms.values()) > 0.2, "nothing was clipped"

    with rank_here(tmp_path) as info:
        mesh = create_mesh(cluster_of([1]), info.device)
        trained = build_gpt(config.model, Reference(), mesh, 99, torch.float32)
        load_checkpoint(run_dir.checkpoints / "step_6", trained, build_optimizer(trained, config.trainer))
    expected = tensors(gpt)
    for key, tensor in tensors(trained).items():
        assert torch.allclose(tensor, expected[key], rtol=1e-3, atol=1e-5), key


def tensors(gpt: GPT) -> dict[str, torch.Tensor]:
    """Canonical tensors by key."""
    return {entry.key: entry.view(entry.parameter.detach()) for entry in canonical_entries(gpt)}
