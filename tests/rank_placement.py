"""What four ranks do for the tests of experts that change places: training with and without, and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from experiments.checkpoint import MOMENTS, canonical_entries, load_checkpoint, save_checkpoint
from experiments.model import GPT, build_gpt
from experiments.ranks import RankInfo
from experiments.registry import create
from methods.hiermoe import HierarchicalMoE
from moe.layer import NativeMoE
from moe.mesh import Mesh, create_mesh
from moe.metering import LinkMeter
from moe.migration import migrate, movable_layers
from moe.system import LayerSpec, MoELayer, System
from moe.topology import Cluster, Level
from tests.comparing import relative_error
from tests.rank_ta_moe import CLUSTER, MODEL

STEPS = 6
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "shuffled": ("shuffled", {}),
    "smartmoe": ("smartmoe", {"every": 2}),
    "swap": ("hiermoe", {}),
    "swap of several pairs on one level": ("hiermoe", {"levels": 1, "swap_pairs": 3, "peak": "max"}),
    "swap of copies": ("hiermoe", {"dedup": False, "levels": "all", "peak": "log_sum_exp"}),
    "smart hierarchy": ("hiermoe", {"placement": "smartmoe", "levels": 2, "move_every": 2}),
}
FAST_NETWORK = Cluster("even", (Level("self", 1), Level("node", 2, 1e-3, 1e-9), Level("network", 2, 0.0, 1e-9)))
"""A second exchange costs more than it saves."""


class Shuffled(System):
    """Experts change places at random after every step."""

    name, implementation, summary = "shuffled", "native", "for tests"

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        return NativeMoE(spec, mesh, moves_experts=True)

    def after_step(self, model: nn.Module, optimizer: Optimizer, steps_done: int) -> None:
        generator = torch.Generator().manual_seed(steps_done)
        layers = movable_layers(model)
        sent = migrate(
            [(layer, torch.randperm(MODEL.num_experts, generator=generator).tolist()) for layer, _ in layers], optimizer
        )
        assert sent % (3 * 4 * 2 * MODEL.model_dim * MODEL.hidden_dim) == 0, "weights and two moments, whole experts"


def system_of(name: str, options: dict[str, Any]) -> System:
    """As the registry makes it."""
    return Shuffled() if name == "shuffled" else create(name, options)


def measure(payload: dict[str, Any], info: RankInfo) -> list[dict[str, Any]]:
    """Facts by rank."""
    torch.set_num_threads(1)
    mesh = create_mesh(CLUSTER, info.device)
    twice = create_mesh(CLUSTER, info.device, ep_size=2)
    plain, plain_twice = train(create("flat"), mesh), train(create("flat"), twice)
    facts: dict[str, Any] = {
        "errors": {name: differences(train(system_of(*of), mesh), plain) for name, of in SYSTEMS.items()},
        "replicated": {
            name: differences(train(system_of(*SYSTEMS[name]), twice), plain_twice) for name in ("shuffled", "swap")
        },
        "checkpoint": checkpoint(Path(payload["folder"]), mesh),
        "levels": levels(info),
        "swaps": swaps(mesh),
    }
    gathered: list[dict[str, Any]] = [{} for _ in range(info.world_size)]
    dist.all_gather_object(gathered, facts)
    return gathered


class Trained(BaseModel):
    """A model after some steps: losses, places of experts after each step, canonical tensors by name."""

    model_config = {"arbitrary_types_allowed": True}
    losses: list[float]
    places: list[list[list[int] | None]]
    tensors: dict[str, Tensor]


def train(system: System, mesh: Mesh, gpt: GPT | None = None) -> Trained:
    """Steps on random text of which each rank has its own, skewed towards few tokens and so few experts."""
    gpt = gpt or build_gpt(MODEL, system, mesh, 0, torch.float32)
    optimizer = AdamW(gpt.parameters(), lr=1e-3)
    sync = system.gradient_sync(gpt, mesh)
    losses, places = [], []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(100 * step + mesh.rank)
        tokens = (torch.rand(4, MODEL.seq_len + 1, generator=generator) ** 4 * MODEL.vocab_size).long()
        total = gpt(tokens[:, :-1], tokens[:, 1:])
        loss = total.cross_entropy + MODEL.aux_loss_weight * total.aux_loss
        loss.backward()
        sync.reduce()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        system.after_step(gpt, optimizer, step + 1)
        places.append([layer.expert_of_slot for layer in gpt.moe_layers])
    tensors = {}
    for entry in canonical_entries(gpt):
        state = optimizer.state[entry.parameter]
        for name, tensor in {"": entry.parameter.data, **{key: state[key] for key in MOMENTS}}.items():
            tensors[f"{entry.key} {name}"] = entry.view(tensor).clone()
    return Trained(losses=losses, places=places, tensors=tensors)


def differences(got: Trained, plain: Trained) -> dict[str, Any]:
    """Of losses and of this rank's tensors from those of training without moves, which other ranks may hold."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, plain.tensors)
    expected = {key: tensor for tensors in gathered for key, tensor in tensors.items()}
    return {
        "loss": max(abs(a - b) for a, b in zip(got.losses, plain.losses, strict=True)),
        "tensors": max(relative_error(tensor, expected[key]) for key, tensor in got.tensors.items()),
        "moves": sum(before != after for before, after in zip(got.places, got.places[1:], strict=False)),
        "places": got.places[-1],
    }


def checkpoint(folder: Path, mesh: Mesh) -> dict[str, Any]:
    """Saved with experts away from home; loaded by a system of the same kind and by one whose experts stay."""

    def trainee(name: str) -> tuple[GPT, Optimizer]:
        gpt = build_gpt(MODEL, system_of(name, {}), mesh, 0, torch.float32)
        return gpt, AdamW(gpt.parameters(), lr=1e-3)

    gpt, optimizer = trainee("smartmoe")
    places = [3, 0, 7, 1, 2, 6, 5, 4]
    migrate([(layer, places) for layer, _ in movable_layers(gpt)], optimizer)
    with torch.no_grad():
        for entry in canonical_entries(gpt):
            if "/experts/" in entry.key:
                entry.view(entry.parameter).fill_(float(entry.key.split("/")[3]))
    save_checkpoint(folder / "step_1", gpt, optimizer, {})
    facts: dict[str, Any] = {}
    for name in ("smartmoe", "flat"):
        again, fresh = trainee(name)
        load_checkpoint(folder / "step_1", again, fresh)
        layer = again.moe_layers[0]
        facts[name] = {
            "places": layer.expert_of_slot,
            "experts": {view.expert: float(view.view(view.parameter.data).mean()) for view in layer.expert_views()},
        }
    again, fresh = trainee("flat")
    save_checkpoint(folder / "step_2", again, fresh, {})
    load_checkpoint(folder / "step_2", gpt, optimizer)
    facts["home"] = gpt.moe_layers[0].expert_of_slot
    return facts


def levels(info: RankInfo) -> dict[str, Any]:
    """How many levels the performance model chooses, and what it expects, on clusters with slow and fast networks."""
    spec = LayerSpec(model_dim=16, hidden_dim=16, num_experts=8, top_k=4)
    facts: dict[str, Any] = {}
    for cluster in (CLUSTER, FAST_NETWORK):
        mesh = create_mesh(cluster, info.device)
        layer = create("hiermoe").build_layer(spec, mesh)
        assert isinstance(layer, HierarchicalMoE)
        nn.init.normal_(layer.gate_weight)
        before = layer.modelled_dispatch_s
        dist.broadcast(layer.gate_weight.data, 0)
        layer(torch.randn(64, 16))
        facts[cluster.name] = (before, layer.modelled_dispatch_s, layer.dispatcher.num_levels, layer.path)
    near = torch.zeros(64, 16)
    near[:, 0] = 1.0
    with torch.no_grad():  # now all tokens choose experts of the first node: one exchange is as good as two
        layer.gate_weight.zero_()
        layer.gate_weight[:4, 0] = 5.0
    system, optimizer = create("hiermoe", {"choose_every": 3, "placement": "fixed"}), AdamW(layer.parameters())
    first = layer.modelled_dispatch_s
    system.after_step(layer, optimizer, 2)
    layer(near)
    kept = layer.modelled_dispatch_s == first
    system.after_step(layer, optimizer, 3)
    asked_again = layer.modelled_dispatch_s == {}
    layer(near)
    facts["later"] = (kept, asked_again, layer.modelled_dispatch_s != first)
    return facts


def swaps(mesh: Mesh) -> dict[str, Any]:
    """Bytes over the network of one dispatch of skewed tokens, before swaps and after several."""
    spec = LayerSpec(model_dim=64, hidden_dim=16, num_experts=8, top_k=2)
    system = create("hiermoe", {"levels": 2})
    layer = system.build_layer(spec, mesh)
    assert isinstance(layer, HierarchicalMoE)
    with torch.no_grad():  # tokens of kind j choose experts j and j + 4, which are on different nodes
        layer.gate_weight.zero_()
        for expert in range(8):
            layer.gate_weight[expert, expert % 4] = 1.0
    x_TM = torch.zeros(64, 64)
    x_TM[torch.arange(64), torch.arange(64) % 4] = 4.0
    x_TM[:, 4:] = torch.randn(64, 60, generator=torch.Generator().manual_seed(mesh.rank)) / 10
    optimizer = AdamW(layer.parameters(), lr=0.0)
    sent, modelled = [], []
    for step in range(5):
        meter = LinkMeter(mesh.cluster, mesh.rank)
        with meter.installed():
            layer(x_TM)
        total = meter.as_tensor().sum(1)
        dist.all_reduce(total)
        sent.append(int(total[-1]))
        layer.dispatcher.model(*_routed(layer))
        modelled.append(layer.modelled_dispatch_s["2"])
        system.after_step(layer, optimizer, step + 1)
    return {"sent": sent, "modelled": modelled}


def _routed(layer: HierarchicalMoE) -> tuple[Tensor, Tensor | None]:
    assert layer.placement is not None and layer.placement.slots_TK is not None
    return layer.placement.slots_TK, layer.placement.kept_TK
