"""What four ranks do for the tests of TA-MoE: each part records plain facts, the tests judge them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from experiments.checkpoint import load_checkpoint, save_checkpoint
from experiments.config import ModelConfig
from experiments.model import build_gpt
from experiments.ranks import RankInfo
from experiments.registry import create
from methods.ta_moe import TAMoE, TopologyAwareMoE
from moe.dispatch import AllToAllDispatcher
from moe.layer import NativeMoE
from moe.mesh import Mesh, create_mesh
from moe.static_dispatch import StaticDispatcher
from moe.system import Activation, LayerSpec, MoELayer, System
from moe.topology import Cluster, Level, cluster_of
from moe.weights import load_layer
from tests.comparing import relative_error

CLUSTER = Cluster("uneven", (Level("self", 1), Level("node", 2, 0.0, 1e-9), Level("network", 2, 0.0, 9e-9)))
"""Links between nodes cost nine times those inside: the target share of the other node is 2 / (2 * 9 + 2) = 0.1."""
TARGET_FAR_SHARE = 0.1
TRAINED: dict[str, dict[str, Any]] = {
    "bias": {"gate": "bias"},
    "local": {"gate": "local"},
    "averaged": {"gate": "local", "average_every": 10},
    "synchronised": {"gate": "synchronised"},
    "softmax": {"gate": "bias", "norm": "softmax"},
}
GATES = ("bias", "local", "synchronised")
GATE_STEPS = 40
MODEL = ModelConfig(
    name="two blocks",
    vocab_size=300,
    seq_len=8,
    num_layers=2,
    num_heads=2,
    model_dim=16,
    dense_hidden_dim=16,
    hidden_dim=16,
    num_experts=8,
    top_k=2,
    moe_every=2,
    norm="rms",
    activation="gelu",
    aux_loss_weight=0.1,
    tie_embeddings=True,
)


def measure(payload: dict[str, Any], info: RankInfo) -> list[dict[str, Any]]:
    """Facts by rank."""
    torch.set_num_threads(1)
    mesh = create_mesh(CLUSTER, info.device)
    facts: dict[str, Any] = {
        "far_shares": {name: far_shares(options, mesh) for name, options in TRAINED.items()},
        "static": static_against_all_to_all(mesh),
        "capacities": capacities(mesh),
        "one level": one_level(mesh),
        "local gradient": local_gradient(mesh),
        "checkpoint": checkpoint(Path(payload["folder"]), mesh),
    }
    gathered: list[dict[str, Any]] = [{} for _ in range(info.world_size)]
    dist.all_gather_object(gathered, facts)
    return gathered


def far_shares(options: dict[str, Any], mesh: Mesh) -> list[float]:
    """Share of this rank's first choices that leave the node, after each step of training nothing but the balance loss
    on random tokens, the same kind on every rank."""
    system = TAMoE(options)
    spec = LayerSpec(model_dim=16, hidden_dim=16, num_experts=8, top_k=1)
    layer = system.build_layer(spec, mesh)
    load_layer(layer)
    sync = system.gradient_sync(layer, mesh)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(mesh.rank)
    shares = []
    for steps_done in range(1, GATE_STEPS + 1):
        x_TM = torch.randn(512, spec.model_dim, generator=generator)
        x_TM[:, 0] = 3.0  # what a gate's matrix alone can learn a bias from
        output = layer(x_TM)
        output.aux_loss.backward()
        sync.reduce()
        optimizer.step()
        system.after_step(layer, optimizer, steps_done)
        optimizer.zero_grad()
        near = mesh.rank // 2 * 4
        shares.append(1 - float(output.counts_E[near : near + 4].sum() / output.counts_E.sum()))
    return shares


def one_level(mesh: Mesh) -> dict[str, float]:
    """Largest difference of anything to flat's after two steps on a cluster of one level, by kind of gate."""
    flat_mesh = dataclasses.replace(mesh, cluster=cluster_of([4]))
    trained = {
        name: _two_steps(system, flat_mesh)
        for name, system in {"flat": create("flat"), **{gate: TAMoE({"gate": gate}) for gate in GATES}}.items()
    }
    return {
        gate: max(float((a - b).abs().max()) for a, b in zip(trained[gate], trained["flat"], strict=True))
        for gate in GATES
    }


def _two_steps(system: System, mesh: Mesh) -> list[Tensor]:
    layer = system.build_layer(LayerSpec(16, 16, 8, 2), mesh)
    load_layer(layer)
    sync, optimizer = system.gradient_sync(layer, mesh), torch.optim.SGD(layer.parameters(), lr=0.1)
    for steps_done in (1, 2):
        x_TM = torch.randn(20, 16, generator=torch.Generator().manual_seed(10 * steps_done + mesh.rank))
        output = layer(x_TM)
        (output.y_TM.square().sum() + output.aux_loss).backward()
        sync.reduce()
        optimizer.step()
        system.after_step(layer, optimizer, steps_done)
        optimizer.zero_grad()
    return [parameter.detach() for parameter in layer.parameters()]


def local_gradient(mesh: Mesh) -> dict[str, Any]:
    """A rank's bias' gradient before and after reduction, and the norm that clipping sees, with all that it is of."""
    system = TAMoE()
    layer = system.build_layer(LayerSpec(16, 16, 8, 2), mesh)
    load_layer(layer)
    sync = system.gradient_sync(layer, mesh)
    layer(torch.randn(20, 16, generator=torch.Generator().manual_seed(mesh.rank))).aux_loss.backward()
    (bias_E,) = layer.local_parameters().values()
    assert bias_E.grad is not None
    before = bias_E.grad.clone()
    sync.reduce()
    after, gate_grad = bias_E.grad.clone(), layer.gate_weight.grad
    assert gate_grad is not None
    return {
        "before": before.tolist(),
        "after": after.tolist(),
        "square": float(after.square().sum()),
        "gate_square": float(gate_grad.square().sum()),
        "norm": float(sync.clip(1e-4)),
        "clipped": float(bias_E.grad.norm()),
    }


def _step(layer: MoELayer, x_TM: Tensor, system: System) -> dict[str, Tensor]:
    x_TM = x_TM.clone().requires_grad_()
    output = layer(x_TM)
    (output.y_TM * torch.linspace(-1, 1, x_TM.shape[1])).sum().backward()
    system.gradient_sync(layer, layer.mesh).reduce()
    assert x_TM.grad is not None and layer.gate_weight.grad is not None
    gradients = {
        f"{view.expert} {view.name}": view.view(view.parameter.grad)
        for view in layer.expert_views()
        if view.parameter.grad is not None
    }
    return {"output": output.y_TM, "input": x_TM.grad, "gate": layer.gate_weight.grad, **gradients}


def static_against_all_to_all(mesh: Mesh) -> dict[str, float]:
    """Relative errors of slots with room for all copies, uneven ones, against exactly the rows."""
    errors: dict[str, float] = {}
    room_PE = 40 + torch.arange(32).view(4, 8)
    activations: tuple[Activation, ...] = ("gelu", "swiglu")
    for activation in activations:
        spec = LayerSpec(16, 24, 8, 2, activation)
        layers = [
            NativeMoE(spec, mesh, dispatcher=StaticDispatcher(mesh, 8, lambda _num_tokens: room_PE)),
            NativeMoE(spec, mesh, dispatcher=AllToAllDispatcher(mesh, 8)),
        ]
        x_TM = torch.randn(20, 16, generator=torch.Generator().manual_seed(mesh.rank))
        results = []
        for layer in layers:
            load_layer(layer)
            results.append(_step(layer, x_TM, create("flat")))
        for name, value in results[0].items():
            errors[f"{activation} {name}"] = relative_error(value, results[1][name])
    return errors


def capacities(mesh: Mesh) -> dict[str, Any]:
    """One call in DeepSpeed mode: kept copies and slots of this rank for every expert."""
    spec = LayerSpec(16, 24, 8, 2, capacity_factor=1.0)
    layer = TAMoE({"mode": "deepspeed"}).build_layer(spec, mesh)
    load_layer(layer)
    assert isinstance(layer, TopologyAwareMoE) and layer.gate.capacities is not None
    x_TM = torch.randn(50, 16, generator=torch.Generator().manual_seed(mesh.rank))
    routing = layer.gate(x_TM)
    assert routing.kept_TK is not None
    kept_E = torch.bincount(routing.expert_ids_TK[routing.kept_TK], minlength=8)
    output = layer(x_TM)
    return {
        "kept": kept_E.tolist(),
        "chosen": routing.counts_E.tolist(),
        "slots": layer.gate.capacities(50).tolist(),
        "dropped": int(output.num_dropped),
        "zero_tokens": int((output.y_TM == 0).all(1).sum()),
        "tokens_without_copy": int((~routing.kept_TK).all(1).sum()),
    }


def checkpoint(folder: Path, mesh: Mesh) -> dict[str, Any]:
    """Each rank's bias after saving and loading: by itself, from a system without one, and the other way round."""

    def trainee(name: str, options: dict[str, Any] | None = None) -> tuple[Any, torch.optim.Optimizer]:
        gpt = build_gpt(MODEL, create(name, options), mesh, 0, torch.float32)
        return gpt, torch.optim.AdamW(gpt.parameters(), lr=1e-3)

    def bias_of(gpt: Any) -> Tensor:
        return gpt.moe_layers[0].gate.bias_E

    gpt, optimizer = trainee("ta_moe")
    with torch.no_grad():
        bias_of(gpt).fill_(mesh.rank + 1.0)
    save_checkpoint(folder / "step_1", gpt, optimizer, {})
    again, fresh_optimizer = trainee("ta_moe")
    load_checkpoint(folder / "step_1", again, fresh_optimizer)
    flat, flat_optimizer = trainee("flat")
    load_checkpoint(folder / "step_1", flat, flat_optimizer)
    save_checkpoint(folder / "step_2", flat, flat_optimizer, {})
    with torch.no_grad():
        bias_of(again).fill_(7.0)
    own = float(bias_of(gpt).mean())
    reloaded, reload_optimizer = trainee("ta_moe")
    load_checkpoint(folder / "step_1", reloaded, reload_optimizer)
    load_checkpoint(folder / "step_2", again, fresh_optimizer)
    other_shape = Cluster("other", (CLUSTER.levels[0], CLUSTER.levels[1], Level("rack", 1), CLUSTER.levels[2]))
    elsewhere = build_gpt(MODEL, create("ta_moe"), dataclasses.replace(mesh, cluster=other_shape), 0, torch.float32)
    load_checkpoint(folder / "step_1", elsewhere, torch.optim.AdamW(elsewhere.parameters(), lr=1e-3))

    gates, gates_optimizer = trainee("ta_moe", {"gate": "local"})
    with torch.no_grad():
        gates.moe_layers[0].gate_weight.fill_(mesh.rank + 1.0)
    save_checkpoint(folder / "step_3", gates, gates_optimizer, {})
    load_checkpoint(folder / "step_3", flat, flat_optimizer)
    with torch.no_grad():
        gates.moe_layers[0].gate_weight.fill_(7.0)
    load_checkpoint(folder / "step_3", gates, gates_optimizer)
    return {
        "saved": own,
        "loaded": bias_of(reloaded).tolist(),
        "from_flat": bias_of(again).tolist(),
        "other_shape": bias_of(elsewhere).tolist(),
        "local_gate": float(gates.moe_layers[0].gate_weight.mean()),
        "local_gate_in_flat": float(flat.moe_layers[0].gate_weight.mean()),
    }
