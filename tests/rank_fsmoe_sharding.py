"""What four ranks, two nodes of two, do for the tests of experts that are cut over the ranks of a node."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from experiments.checkpoint import MOMENTS, load_checkpoint, save_checkpoint
from experiments.model import GPT
from experiments.ranks import RankInfo
from experiments.registry import create
from moe.mesh import Mesh, create_mesh
from moe.metering import LinkMeter
from moe.pipelined_layer import PipelinedMoE
from moe.system import LayerSpec, MoELayer, System
from moe.weights import load_layer
from tests.comparing import relative_error
from tests.rank_fsmoe import record, told
from tests.rank_models import MODELS, SEED, step, trainee

NUM_TOKENS = 30
SPEC = LayerSpec(16, 24, 2, 2, seed=3)
"""As many experts as nodes, fewer than ranks."""
DEGREES = {"degree": 2, "backward_degree": 3}
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "fsmoe": ("fsmoe", DEGREES),
    "fsmoe_no_iio": ("fsmoe", {"schedule": "fsmoe_no_iio", **DEGREES}),
    "by measured costs": ("fsmoe", {}),
    "tutel_overlap": ("pipelined", DEGREES),
    "schemoe": ("pipelined", {"schedule": "schemoe", **DEGREES}),
    "sequential": ("pipelined", {"schedule": "sequential"}),
    "soft": ("fsmoe", {"gate": "soft", **DEGREES}),
}
Facts = dict[str, Any]


def sharded(name: str, **more: Any) -> System:
    """One of SYSTEMS with cut experts."""
    system, options = SYSTEMS[name]
    return create(system, {**options, "expert_sharding": True, **more})


def measure(payload: dict[str, Any], info: RankInfo) -> dict[str, list[Facts]]:
    """Facts of PARTS, see `tests.rank_fsmoe.record`."""
    return record(PARTS, payload, info)


def layers(mesh: Mesh, _folder: Path) -> Facts:
    """Errors of outputs and gradients of each system against those of uncut experts."""
    return {name: _errors(sharded(name), _whole(name), mesh) for name in SYSTEMS}


def _whole(name: str) -> System:
    """The same function with whole experts on every rank; where the oracle has another gate, of the same layer."""
    return create("fsmoe", {"gate": "soft", "degree": 1}) if name == "soft" else create("reference")


def _errors(system: System, whole: System, mesh: Mesh) -> Facts:
    # Whole experts of a system that spreads them need as many as ranks: one rank by itself has all of them.
    alone = create_mesh(mesh.cluster, mesh.device, ep_size=1)
    (layer, grad_TM), (expected, wanted_TM) = _run(system, mesh), _run(whole, alone)
    grads = {(view.expert, view.name): view.view(_grad(view.parameter)) for view in expected.expert_views()}
    errors = {
        "input gradient": relative_error(grad_TM, wanted_TM),
        "gate gradient": relative_error(_grad(layer.gate_weight), _grad(expected.gate_weight)),
    }
    for view in layer.expert_views():
        found, part = view.view(_grad(view.parameter)), view.part(grads[view.expert, view.name])
        errors[f"expert {view.expert} {view.name}"] = relative_error(found, part)
    return {"errors": errors, "path": layer.path, "sizes": [list(p.shape) for p in layer.sharded_parameters()]}


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _run(system: System, mesh: Mesh) -> tuple[MoELayer, Tensor]:
    """A layer with reduced gradients, and the gradient of the tokens."""
    layer = system.build_layer(SPEC, mesh)
    load_layer(layer)
    x_TM = torch.randn(NUM_TOKENS, SPEC.model_dim, generator=torch.Generator().manual_seed(mesh.rank)).requires_grad_()
    output = layer(x_TM)
    (output.y_TM.square().sum() + output.aux_loss).backward()
    system.gradient_sync(layer, mesh).reduce()
    return layer, _grad(x_TM)


def timeline(mesh: Mesh, folder: Path) -> Facts:
    """Tasks in the order in which they were issued and complete, what was sent, and what was measured."""
    layer = sharded("fsmoe", trace=str(folder / "trace")).build_layer(SPEC, mesh)
    assert isinstance(layer, PipelinedMoE)
    load_layer(layer)
    meter = LinkMeter(mesh.cluster, mesh.rank)
    x_TM = torch.randn(NUM_TOKENS, SPEC.model_dim, generator=torch.Generator().manual_seed(mesh.rank)).requires_grad_()
    with meter.installed():
        layer(x_TM).y_TM.sum().backward()
    recorder = layer.runner.recorder
    assert recorder is not None
    return {
        "events": [(event, told(task)) for event, task in recorder.events],
        "resources": {told(span.task): span.task.resource for span in recorder.spans()},
        "sent": {f"{level} {kind}": size for (level, kind), size in meter.sent.items()},
        "points": {name: [p.size for p in points] for name, points in layer.measured(NUM_TOKENS).items()},
        "work": vars(layer.work(NUM_TOKENS)),
    }


def checkpoints(mesh: Mesh, folder: Path) -> Facts:
    """Training with cut experts beside flat's, and weights and moments after they went through checkpoints."""
    facts: Facts = {}
    for model in ("plain", "other"):
        gpt, optimizer, sync = trainee(sharded("fsmoe"), mesh, model=MODELS[model])
        flat, flat_optimizer, flat_sync = trainee(create("flat"), mesh, model=MODELS[model])
        losses = [step(gpt, optimizer, sync, index, mesh) for index in range(2)]
        expected = [step(flat, flat_optimizer, flat_sync, index, mesh) for index in range(2)]
        save_checkpoint(folder / model / "step_2", gpt, optimizer, {})
        # Cut to whole: the oracle has every expert on every rank.
        whole, whole_optimizer, _ = trainee(create("reference"), mesh, SEED + 1, MODELS[model])
        load_checkpoint(folder / model / "step_2", whole, whole_optimizer)
        # Whole to cut.
        save_checkpoint(folder / f"{model} whole" / "step_2", whole, whole_optimizer, {})
        again, again_optimizer, again_sync = trainee(sharded("fsmoe"), mesh, SEED + 1, MODELS[model])
        load_checkpoint(folder / f"{model} whole" / "step_2", again, again_optimizer)
        facts[model] = {
            "losses": losses,
            "expected": expected,
            "unlike whole": unlike(gpt, optimizer, whole, whole_optimizer),
            "unlike again": unlike(again, again_optimizer, whole, whole_optimizer),
            "steps": [float(again_optimizer.state[p]["step"]) for p in again.moe_layers[0].sharded_parameters()],
            "later": [step(gpt, optimizer, sync, 2, mesh), step(again, again_optimizer, again_sync, 2, mesh)],
            "left": len(optimizer.state) - len(list(gpt.parameters())),
        }
    return facts


def unlike(gpt: GPT, optimizer: Optimizer, whole: GPT, whole_optimizer: Optimizer) -> list[str]:
    """Parts of experts, weights and moments, that are not those of the whole ones."""
    found = []
    for layer, other in zip(gpt.moe_layers, whole.moe_layers, strict=True):
        wholes = {(view.expert, view.name): view for view in other.expert_views()}
        for view in layer.expert_views():
            match = wholes[view.expert, view.name]
            pairs = {"weight": (view.parameter.data, match.parameter.data)}
            for name in MOMENTS:
                pairs[name] = optimizer.state[view.parameter][name], whole_optimizer.state[match.parameter][name]
            for name, (mine, theirs) in pairs.items():
                if not torch.equal(view.view(mine), view.part(match.view(theirs))):
                    found.append(f"{view.expert} {view.name} {name}")
    return found


PARTS: dict[str, Callable[[Mesh, Path], Facts]] = {
    "layers": layers,
    "timeline": timeline,
    "checkpoints": checkpoints,
}
