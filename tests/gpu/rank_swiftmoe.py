"""What the ranks of all GPUs do for the tests of SwiftMoE there: facts are recorded, the tests judge them."""

from __future__ import annotations

import dataclasses
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from experiments.checkpoint import load_checkpoint, save_checkpoint
from experiments.model import build_gpt
from experiments.optimizer import build_optimizer
from experiments.ranks import RankInfo
from experiments.registry import create
from methods.swiftmoe import SwiftMoELayer, place
from methods.swiftmoe_scheduler import SlotTable
from moe.mesh import Mesh, create_mesh
from moe.peer_dispatch import PeerDispatcher
from moe.point_to_point import Exchange
from moe.stages import StageClock
from moe.system import LayerSpec
from moe.topology import cluster_of
from moe.weights import load_layer
from tests.comparing import relative_error
from tests.rank_models import MODELS, TRAINER, batch
from tests.rank_swiftmoe import Trainee, replicas_agree, swift_layer

NUM_EXPERTS, NUM_STEPS, LEARNING_RATE = 8, 8, 5e-3
SPEC = LayerSpec(64, 128, NUM_EXPERTS, 2, "swiglu", dtype=torch.bfloat16)
LARGE = LayerSpec(256, 1024, 16, 1)
"""16 experts of 2 MiB."""

MODEL_SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "flat": ("flat", {}),
    "swiftmoe": ("swiftmoe", {"slots_per_rank": 16}),  # replicas to move on one GPU, too
    "swiftmoe offloaded": ("swiftmoe", {"slots_per_rank": 16, "offload": True}),
    "flexmoe": ("flexmoe", {"slots_per_rank": 16, "interval": 2, "balanced": 1.0}),
    "deepspeed_static": ("deepspeed_static", {}),
}


def tables(num_ranks: int) -> tuple[int, list[SlotTable]]:
    """Slots of a rank, and placements of which each spreads another expert over ranks."""
    slots = max(4, 16 // num_ranks)
    spare = slots * num_ranks - NUM_EXPERTS
    counts = [[1 + spare * (expert == popular) for expert in range(NUM_EXPERTS)] for popular in (7, 0, 3)]
    counts.append([1 + spare // 2 * (expert in (2, 3)) for expert in range(NUM_EXPERTS)])
    return slots, [SlotTable(tuple(each), slots) for each in counts]


def measure(payload: dict[str, Any], info: RankInfo) -> list[dict[str, Any]]:
    """Facts by rank; checkpoints are written below `payload["folder"]`."""
    mesh = create_mesh(cluster_of([info.world_size]), info.device)
    facts: dict[str, Any] = {
        "exchanges": [exchange(shift, mesh) for shift in range(3)],
        "placements": placements(mesh),
        "idle experts": idle_experts(mesh),
        "spare rows": spare_rows(mesh),
        "models": {name: model(name, Path(payload["folder"]), mesh) for name in MODEL_SYSTEMS},
        "whole experts": whole_experts(mesh),
    }
    gathered: list[dict[str, Any]] = [{} for _ in range(info.world_size)]
    dist.all_gather_object(gathered, facts)
    return gathered


def exchange(shift: int, mesh: Mesh) -> bool:
    """Whether rows that say where they come from and go to arrive there, some pairs having none."""
    peers = range(mesh.world_size)

    def rows(source: int, target: int) -> int:
        return (source + 2 * target + shift) % 3

    def marked(pairs: list[tuple[int, int]]) -> torch.Tensor:
        marks = [(100.0 * source + target, 1.0) for source, target in pairs for _ in range(rows(source, target))]
        return mesh.tensor(marks, torch.float32).view(-1, 2)

    send, receive = ([rows(*pair) for pair in pairs] for pairs in _pairs(mesh.rank, peers))
    sent, expected = (marked(pairs) for pairs in _pairs(mesh.rank, peers))
    return torch.equal(Exchange(sent, send, receive, mesh.rank).received(), expected)


def _pairs(rank: int, peers: range) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Sources and targets of what a rank sends, and of what it receives."""
    return [(rank, peer) for peer in peers], [(peer, rank) for peer in peers]


def placements(mesh: Mesh) -> dict[str, Any]:
    """Layers in bfloat16, with another placement after each step: distance to flat's outputs, replicas' bits."""
    slots, after_steps = tables(mesh.world_size)
    plain_system = create("flat")
    plain = plain_system.build_layer(SPEC, mesh)
    load_layer(plain)
    system, layer = swift_layer(SPEC, mesh, slots_per_rank=slots)
    trainees = [Trainee(plain_system, plain), Trainee(system, layer)]
    errors, replicas = [], []
    for index, table in enumerate(after_steps):
        expected, found = (trainee.step(index) for trainee in trainees)
        names = ("output", "input", "gate", "norm")
        errors.append({name: relative_error(found[name], expected[name]) for name in names})
        place([layer], [table])
        replicas.append(replicas_agree(layer))
        with torch.no_grad():  # rounding would part the gates, and send a token elsewhere in one of the systems
            layer.gate_weight.copy_(plain.gate_weight)
    return {"errors": errors, "replicas": replicas, "path": layer.path}


def idle_experts(mesh: Mesh) -> dict[str, Any]:
    """Of experts that no token chose and of those that all chose: the largest gradients in this rank's shards."""
    system, layer = swift_layer(SPEC, mesh, slots_per_rank=tables(mesh.world_size)[0])
    with torch.no_grad():
        layer.gate_weight.zero_()
        layer.gate_weight[3:5, 0] = torch.tensor([20.0, 10.0])
    x_TM = torch.ones(32, SPEC.model_dim, device=mesh.device, dtype=SPEC.dtype)
    layer(x_TM).y_TM.float().square().sum().backward()
    system.gradient_sync(layer, mesh).reduce()
    grad_EF = layer.shards.master_EF.grad
    assert grad_EF is not None
    largest = grad_EF.abs().amax(1).tolist()
    return {"idle": [largest[expert] for expert in (0, 1, 2, 5, 6, 7)], "chosen": [largest[3], largest[4]]}


def spare_rows(mesh: Mesh) -> dict[str, float]:
    """A layer with a capacity, whose rows are laid out by their bound, against one whose rows the host counts: relative
    errors, where what nobody wrote is not a number. Two experts get no token."""
    spec = dataclasses.replace(SPEC, capacity_factor=1.0)
    generator = torch.Generator().manual_seed(mesh.rank)
    x_TM, grad_TM = torch.randn(2, 96, spec.model_dim, generator=generator).to(mesh.device, spec.dtype)
    x_TM[:, 0] = 1.0
    found: list[dict[str, torch.Tensor]] = []
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills what nobody wrote with NaN
    try:
        assert torch.empty(1, device=mesh.device).isnan()
        for dispatcher in ("all_to_all", "peer"):
            layer = create("flat", {"dispatcher": dispatcher}).build_layer(spec, mesh)
            load_layer(layer)
            with torch.no_grad():
                layer.gate_weight[6:, 0] = -50.0
            tokens = x_TM.clone().requires_grad_()
            with mock.patch.object(PeerDispatcher, "pull", autospec=True, side_effect=PeerDispatcher.pull) as pull:
                output = layer(tokens)
            counted = [call.args[2].expert_rows is not None for call in pull.call_args_list]
            assert counted == ([False] if dispatcher == "peer" else []), "rows are not laid out by their bound"
            output.y_TM.backward(grad_TM)
            assert tokens.grad is not None and layer.gate_weight.grad is not None and int(output.num_dropped) > 0
            facts = {"output": output.y_TM.detach(), "input": tokens.grad, "gate": layer.gate_weight.grad}
            for view in layer.expert_views():
                assert view.parameter.grad is not None
                facts[f"{view.expert} {view.name}"] = view.view(view.parameter.grad)
            found.append(facts)
    finally:
        torch.use_deterministic_algorithms(False)
    return {name: relative_error(value, found[0][name]) for name, value in found[1].items()}


def model(name: str, folder: Path, mesh: Mesh) -> dict[str, Any]:
    """A model in the suite's loop in bfloat16: losses, placements, host waits, and losses after a checkpoint."""
    trained = Model(name, mesh)
    losses = [trained.step(index) for index in range(NUM_STEPS)]
    facts: dict[str, Any] = {"losses": losses, "tables": trained.tables}
    waits: list[str] = []
    with recorded_waits(waits):
        trained.work(NUM_STEPS)
    facts["waits"] = waits
    clock = StageClock(trained.gpt.moe_layers)
    with clock.timed():
        trained.work(NUM_STEPS + 1)
    facts["parts"] = clock.part_times_s()
    layers = [layer for layer in trained.gpt.moe_layers if isinstance(layer, SwiftMoELayer)]
    facts["replicas"] = [replicas_agree(layer) for layer in layers]
    facts["pinned"] = [layer.shards.master_EF.is_pinned() for layer in layers]
    facts["devices"] = sorted({parameter.device.type for parameter in trained.gpt.parameters()})
    path = folder / name.replace(" ", "_") / f"step_{NUM_STEPS + 2}"
    save_checkpoint(path, trained.gpt, trained.optimizer, {})
    facts["went on"] = [trained.step(index) for index in range(NUM_STEPS + 2, NUM_STEPS + 4)]
    loaded = Model(name, mesh, seed=1)
    loaded.step(0)
    load_checkpoint(path, loaded.gpt, loaded.optimizer)
    facts["resumed"] = [loaded.step(index) for index in range(NUM_STEPS + 2, NUM_STEPS + 4)]
    return facts


class Model:
    """A model that trains in the suite's loop, on two batches in turn, which it soon knows by heart."""

    def __init__(self, name: str, mesh: Mesh, seed: int = 5) -> None:
        system, options = MODEL_SYSTEMS[name]
        self.mesh, self.system = mesh, create(system, options)
        self.gpt = build_gpt(MODELS["plain"], self.system, mesh, seed, torch.bfloat16)
        trainer = TRAINER.model_copy(update={"lr": LEARNING_RATE})
        self.sync, self.optimizer = self.system.gradient_sync(self.gpt, mesh), build_optimizer(self.gpt, trainer)
        self.tables: list[list[list[int] | None]] = []
        self._loss = torch.zeros((), device=mesh.device)

    def step(self, index: int) -> float:
        """One training step; the loss over all ranks before it."""
        self.work(index)
        dist.all_reduce(self._loss)
        self.tables.append([layer.replicas_E for layer in self.gpt.moe_layers])
        return float(self._loss) / self.mesh.world_size

    def work(self, index: int) -> None:
        """The step itself."""
        tokens_BS = batch(index % 2, self.mesh).pin_memory().to(self.mesh.device, non_blocking=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            losses = self.gpt(tokens_BS[:, :-1], tokens_BS[:, 1:])
        (losses.cross_entropy + 0.01 * losses.aux_loss).backward()
        self.sync.reduce()
        self.sync.clip(1.0)
        self.optimizer.step()
        self.system.after_step(self.gpt, self.optimizer, index + 1)
        self.optimizer.zero_grad(set_to_none=True)
        self._loss = losses.cross_entropy.detach()


@contextmanager
def recorded_waits(waits: list[str]) -> Iterator[None]:
    """Note where the host waits for the GPU: torch's own waits, and those for events."""
    wait_for_event = torch.cuda.Event.synchronize

    def waiting(event: torch.cuda.Event) -> None:
        waits.append(Path(traceback.extract_stack(limit=2)[0].filename).name)
        wait_for_event(event)

    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as told, mock.patch.object(torch.cuda.Event, "synchronize", waiting):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    hidden = [warning for warning in told if "called a synchronizing" in str(warning.message)]
    waits += [f"hidden: {Path(warning.filename).name}:{warning.lineno}" for warning in hidden]


def whole_experts(mesh: Mesh) -> dict[str, Any]:
    """Memory of the GPU that whole experts take for a checkpoint, in bytes, beside what they are large."""
    system, layer = swift_layer(LARGE, mesh, slots_per_rank=-(-16 // mesh.world_size))
    trainee = Trainee(system, layer)
    trainee.step(0)
    place([layer], [layer.table])
    trainee.optimizer.zero_grad()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with layer.whole_experts(trainee.optimizer, loading=False):
        sizes = [view.parameter.nbytes for view in layer.expert_views()]
        devices = sorted({view.parameter.device.type for view in layer.expert_views()})
        peak_bytes = torch.cuda.max_memory_allocated() - before
    expert_bytes = 4 * 2 * LARGE.model_dim * LARGE.hidden_dim
    return {"peak": peak_bytes, "expert": expert_bytes, "devices": devices, "here": len(sizes) // 2}
