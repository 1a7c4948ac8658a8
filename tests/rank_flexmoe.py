"""What four ranks do for the tests of FlexMoE and of static replicas: facts are recorded, the tests judge them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from baselines.flexmoe import FlexMoE, FlexMoELayer, replace
from experiments.checkpoint import load_checkpoint, save_checkpoint
from experiments.ranks import RankInfo
from experiments.registry import create
from moe.mesh import Mesh, create_mesh
from moe.metering import LinkMeter
from moe.replica_table import ReplicaTable
from moe.system import LayerSpec, MoELayer, System
from moe.topology import cluster_of
from moe.weights import load_layer
from tests.comparing import relative_error
from tests.rank_models import SEED, batch, trainee
from tests.rank_swiftmoe import Trainee, gathered_gradients, state

WORLD_SIZE, NUM_EXPERTS, SLOTS = 4, 8, 3
LAYERS: dict[str, LayerSpec] = {
    "top1": LayerSpec(16, 12, NUM_EXPERTS, 1),
    "top2 swiglu": LayerSpec(16, 8, NUM_EXPERTS, 2, "swiglu"),
    "odd": LayerSpec(7, 5, NUM_EXPERTS, 2),
}
TABLES = [
    ReplicaTable(experts, SLOTS, NUM_EXPERTS)
    for experts in (
        (0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 7, 7),
        (7, 0, 7, 0, 6, 0, 5, 0, 4, 1, 2, 3),
        (3, 3, 3, 0, 1, 2, 3, 4, 5, 3, 6, 7),
        (3, 2, 3, 2, 1, 0, 7, 3, 5, 4, 6, 3),
        (3, 2, 3, 2, 1, 0, 7, 3, 5, 4, 6, 3),
    )
]
"""Placements after each step: replicas next to one another and apart, several on one rank, and one that stays."""
STEPS_BEFORE, STEPS_AFTER = 3, 2
TAKEN_OVER = [
    ("flexmoe", "flexmoe"),
    ("flexmoe", "flat"),
    ("flat", "flexmoe"),
    ("deepspeed_static", "deepspeed_static"),
    ("deepspeed_static", "flat"),
    ("flat", "deepspeed_static"),
    ("deepspeed_static, whole", "deepspeed_static"),
]
"""Checkpoints by who saved and who loads them."""
STATIC: dict[str, tuple[str, dict[str, Any]]] = {
    f"{name} {replicas}": (name, {"replicas": replicas})
    for name in ("deepspeed_static", "deepspeed")
    for replicas in (1, 2, 4)
} | {
    f"deepspeed_static {replicas}, whole": ("deepspeed_static", {"replicas": replicas, "zero_stage": 0})
    for replicas in (2, 4)
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "flat": ("flat", {}),
    "flexmoe": ("flexmoe", {"slots_per_rank": 3, "interval": 2, "balanced": 1.0}),  # saved amid an interval
    "deepspeed_static": ("deepspeed_static", {"replicas": 2}),
    "deepspeed_static, whole": ("deepspeed_static", {"replicas": 2, "zero_stage": 0}),
}


def measure(payload: dict[str, Any], info: RankInfo) -> list[dict[str, Any]]:
    """Facts by rank; checkpoints are written below `payload["folder"]`."""
    torch.set_num_threads(1)
    mesh = create_mesh(cluster_of([2, 2]), info.device)
    pairs = create_mesh(cluster_of([2, 2]), info.device, ep_size=2)
    facts: dict[str, Any] = {
        "placements": {name: placements(spec, mesh) for name, spec in LAYERS.items()},
        "pairs": placements(LAYERS["top1"], pairs),
        "bytes": [sent(index, mesh) for index in range(len(TABLES))],
        "decisions": {policy: decisions(policy, mesh) for policy in ("popularity", "time")},
        "static": {name: static(system, options, mesh) for name, (system, options) in STATIC.items()},
        "static drops": static_drops(mesh),
        "models": models(Path(payload["folder"]), mesh),
    }
    gathered: list[dict[str, Any]] = [{} for _ in range(info.world_size)]
    dist.all_gather_object(gathered, facts)
    return gathered


def flex_layer(spec: LayerSpec, mesh: Mesh, **options: Any) -> tuple[FlexMoE, FlexMoELayer]:
    """A system and its layer, with initial weights."""
    system = FlexMoE({"slots_per_rank": SLOTS} | options)
    layer = system.build_layer(spec, mesh)
    assert isinstance(layer, FlexMoELayer)
    load_layer(layer)
    return system, layer


def flat_trainee(spec: LayerSpec, mesh: Mesh) -> Trainee:
    """Plain expert parallelism."""
    system = create("flat")
    layer = system.build_layer(spec, mesh)
    load_layer(layer)
    return Trainee(system, layer)


def placements(spec: LayerSpec, mesh: Mesh) -> dict[str, Any]:
    """Errors against flat's layer over steps with another placement after each; how far replicas are apart."""
    plain = flat_trainee(spec, mesh)
    system, layer = flex_layer(spec, mesh)
    flex = Trainee(system, layer)
    facts: dict[str, Any] = {"errors": {}, "replicas": [], "norms": []}
    for index, table in enumerate(TABLES):
        facts["errors"][f"step {index}"], norm = step_errors(plain, flex, index)
        facts["norms"].append(norm)
        replace([layer], [table], flex.optimizer)
        facts["replicas"].append(replicas_part(flex))
        facts["errors"][f"state {index}"] = state_errors(plain, flex)
    return facts


def step_errors(plain: Trainee, other: Trainee, index: int) -> tuple[dict[str, float], float]:
    """Of one step's outputs, gradients and the norm that clipping sees; and that norm."""
    expected, found = plain.step(index), other.step(index)
    all_expected, all_found = gathered_gradients(expected), gathered_gradients(found)
    assert all_expected.keys() == all_found.keys()
    errors = {f"gradient {name}": relative_error(value, all_expected[name]) for name, value in all_found.items()}
    errors |= {name: relative_error(found[name], expected[name]) for name in ("output", "input", "gate", "norm")}
    return errors, float(expected["norm"])


def state_errors(plain: Trainee, other: Trainee) -> dict[str, float]:
    """Of weights and moments, wherever they are."""
    expected, found = of_all_ranks(state(plain)), of_all_ranks(state(other))
    assert expected.keys() == found.keys()
    return {name: relative_error(value, expected[name]) for name, value in found.items()}


def of_all_ranks(mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """The union of what ranks have."""
    ranks: list[dict[str, Tensor]] = [{} for _ in range(WORLD_SIZE)]
    dist.all_gather_object(ranks, mine)
    return {name: value for rank in ranks for name, value in rank.items()}


def replicas_part(trained: Trainee) -> float:
    """The largest relative error of weights and moments among the slots of an expert, over all ranks; 0 where they are
    the same bits."""
    slots: dict[str, list[Tensor]] = {}
    for view in trained.layer.expert_views():
        kept = trained.optimizer.state[view.parameter]
        for name, tensor in [("weight", view.parameter.detach()), *((key, kept[key]) for key in sorted(kept))]:
            if tensor.dim():
                slots.setdefault(f"{view.expert} {view.name} {name}", []).append(view.view(tensor).clone())
    ranks: list[dict[str, list[Tensor]]] = [{} for _ in range(WORLD_SIZE)]
    dist.all_gather_object(ranks, slots)
    everywhere: dict[str, list[Tensor]] = {}
    for rank in ranks:
        for name, tensors in rank.items():
            everywhere.setdefault(name, []).extend(tensors)
    return max(relative_error(tensor, tensors[0]) for tensors in everywhere.values() for tensor in tensors)


def sent(index: int, mesh: Mesh) -> dict[str, Any]:
    """Bytes of this rank in the move to a table from the one before it, and in a reduction under it."""
    spec = LAYERS["top1"]
    system, layer = flex_layer(spec, mesh)
    flex = Trainee(system, layer)
    flex.step(0)
    if index:
        replace([layer], [TABLES[index - 1]], flex.optimizer)
    before = layer.table
    meter = LinkMeter(mesh.cluster, mesh.rank)
    with meter.installed():
        told = replace([layer], [TABLES[index]], flex.optimizer)
    facts: dict[str, Any] = {"told": told, "moved": sum(meter.sent.values()), "before": before.expert_of_slot}
    layer(torch.randn(12, spec.model_dim, generator=torch.Generator().manual_seed(mesh.rank))).y_TM.sum().backward()
    meter.reset()
    with meter.installed():
        flex.sync.reduce()
    reduced = sum(count for (_, kind), count in meter.sent.items() if kind == "alltoall")
    return facts | {"reduced": reduced}


def decisions(policy: str, mesh: Mesh) -> dict[str, Any]:
    """Skewed tokens over six steps with a decision after every second: copies dropped, tables, rows of this rank."""
    capacity = 1.0 if policy == "popularity" else None
    spec = LayerSpec(16, 12, NUM_EXPERTS, 1, capacity_factor=capacity)
    system, layer = flex_layer(spec, mesh, slots_per_rank=4, interval=2, policy=policy, flops_per_s=1e6)
    with torch.no_grad():
        layer.gate_weight.zero_()
        layer.gate_weight[:, :NUM_EXPERTS] = 20 * torch.eye(NUM_EXPERTS)
    wanted_T = torch.tensor([0] * 20 + [1] * 6 + [2] * 2 + [3] * 4)
    x_TM = torch.zeros(len(wanted_T), 16)
    x_TM[torch.arange(len(wanted_T)), wanted_T] = 1.0
    rows: list[int] = []
    layer.experts.register_forward_pre_hook(lambda _module, args: rows.append(sum(args[1])))
    facts: dict[str, Any] = {"dropped": [], "tables": [layer.table.expert_of_slot], "replicas": []}
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.0, weight_decay=0.0)
    sync = system.gradient_sync(layer, mesh)
    for steps_done in range(1, 7):
        output = layer(x_TM.clone().requires_grad_())
        output.y_TM.sum().backward()
        with torch.no_grad():
            layer(x_TM.roll(1, 1))  # an evaluation, whose choices count for nothing
        rows.pop()
        sync.reduce()
        optimizer.step()
        system.after_step(layer, optimizer, steps_done)
        optimizer.zero_grad()
        facts["dropped"].append(int(output.num_dropped))
        facts["tables"].append(layer.expert_of_slot)
        facts["replicas"].append(layer.replicas_E)
    return facts | {"rows": rows}


def static(name: str, options: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Errors of blocks of ranks against flat over two steps, what the layer tells of itself, what is trained here, and
    bytes of a step behind backward."""
    spec = LAYERS["top2 swiglu"]
    plain = flat_trainee(spec, mesh)
    system = create(name, options)
    layer = system.build_layer(spec, mesh)
    load_layer(layer)
    blocks = Trainee(system, layer)
    errors = [step_errors(plain, blocks, index)[0] | state_errors(plain, blocks) for index in range(2)]
    held = sorted({view.expert for view in layer.expert_views()})
    layer(torch.ones(4, spec.model_dim)).y_TM.sum().backward()
    meter = LinkMeter(mesh.cluster, mesh.rank)
    with meter.installed():
        blocks.sync.reduce()
        blocks.optimizer.step()
        system.after_step(layer, blocks.optimizer, 3)
    again = system.build_layer(spec, mesh)
    return {
        "errors": errors,
        "held": held,
        "replicas": layer.replicas_E,
        "same groups": again.mesh.ep_group is layer.mesh.ep_group,
        "trained": sum(parameter.numel() for parameter in layer.sharded_parameters()),
        "sent": sum(meter.sent.values()),
    }


def static_drops(mesh: Mesh) -> dict[str, int]:
    """Copies that are dropped, by system; twice as many tokens of this rank choose the same expert as fit."""
    spec = dataclasses.replace(LAYERS["top1"], capacity_factor=4.0)
    x_TM = torch.ones(16, spec.model_dim)
    found = {}
    for name, system in (("flat", create("flat")), ("static", create("deepspeed_static", {"replicas": 2}))):
        layer = system.build_layer(spec, mesh)
        load_layer(layer)
        found[name] = int(layer(x_TM).num_dropped)
    return found


class Model:
    """A model that trains in the suite's loop, on batches by their number."""

    def __init__(self, name: str, mesh: Mesh, seed: int = SEED) -> None:
        system, options = MODELS[name]
        self.mesh, self.system = mesh, create(system, options)
        assert isinstance(self.system, System)
        self.gpt, self.optimizer, self.sync = trainee(self.system, mesh, seed)

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

    @property
    def layers(self) -> list[MoELayer]:
        """With experts."""
        return list(self.gpt.moe_layers)


def models(folder: Path, mesh: Mesh) -> dict[str, Any]:
    """Losses of each system over the same steps, and after loading each other's checkpoints."""
    facts: dict[str, Any] = {"losses": {}, "went on": {}}
    for name in MODELS:
        model = Model(name, mesh)
        facts["losses"][name] = model.losses(0, STEPS_BEFORE)
        facts[f"{name} tables"] = [layer.expert_of_slot for layer in model.layers]
        save_checkpoint(folder / name / f"step_{STEPS_BEFORE}", model.gpt, model.optimizer, {"told": name})
        facts["went on"][name] = model.losses(STEPS_BEFORE, STEPS_AFTER)
    for source, name in TAKEN_OVER:
        model = Model(name, mesh, seed=SEED + 1)
        if source == name:
            model.losses(9, 2)  # has trained before, and its replicas are elsewhere
        load_checkpoint(folder / source / f"step_{STEPS_BEFORE}", model.gpt, model.optimizer)
        facts[f"{source} to {name} tables"] = [layer.expert_of_slot for layer in model.layers]
        facts[f"{source} to {name}"] = model.losses(STEPS_BEFORE, STEPS_AFTER)
    return facts
