"""What four ranks do for the tests of pipelined layers: each part records plain facts, the tests judge them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from experiments.model import GPT, build_gpt
from experiments.ranks import RankInfo
from experiments.registry import create
from methods.fsmoe import FSMoE
from moe.costs import AlphaBeta
from moe.errors import ConfigError
from moe.mesh import Mesh, create_mesh
from moe.metering import LinkMeter
from moe.module_profile import costs_of
from moe.pipelined_layer import PipelinedMoE
from moe.pipelined_parts import Schedule
from moe.schedules import LayerPlan, LayerWork, StepPlan, fsmoe_pipeline
from moe.simulator import Costs, Task
from moe.sliced_sync import PLANNED_AFTER, SlicedSync
from moe.step_planning import Dense
from moe.sync import GradientSync
from moe.system import LayerSpec
from moe.topology import cluster_of
from moe.weights import load_layer
from tests.comparing import relative_error
from tests.rank_models import MODELS, SEED, batch

SPEC = LayerSpec(32, 48, 8, 2, seed=3)
NUM_TOKENS = 40
TRACED: dict[str, tuple[str, dict[str, Any]]] = {
    "fsmoe": ("fsmoe", {"degree": 3, "backward_degree": 2}),
    "pipemoe": ("pipelined", {"schedule": "pipemoe", "degree": 2, "backward_degree": 2}),
    "schemoe": ("pipelined", {"schedule": "schemoe", "degree": 2, "backward_degree": 2}),
    "sequential": ("pipelined", {"schedule": "sequential"}),
}
Facts = dict[str, Any]


def measure(payload: dict[str, Any], info: RankInfo) -> dict[str, list[Facts]]:
    """Facts of PARTS, see `record`."""
    return record(PARTS, payload, info)


def record(
    parts: Mapping[str, Callable[[Mesh, Path], Facts]], payload: dict[str, Any], info: RankInfo
) -> dict[str, list[Facts]]:
    """Facts by part and rank.

    Args:
        parts: what makes them.
        payload: `folder`: for files.
        info: of this rank.
    """
    torch.set_num_threads(1)
    mesh = create_mesh(cluster_of([2, 2]), info.device)
    facts: dict[str, list[Facts]] = {}
    for name, part in parts.items():
        gathered: list[Facts] = [{} for _ in range(info.world_size)]
        dist.all_gather_object(gathered, part(mesh, Path(payload["folder"])))
        facts[name] = gathered
    return facts


def measure_on_gpus(_payload: dict[str, Any], info: RankInfo) -> list[Facts]:
    """Gradients in slices on GPUs, by rank."""
    mesh = create_mesh(cluster_of([info.world_size]), info.device)
    gathered: list[Facts] = [{} for _ in range(info.world_size)]
    dist.all_gather_object(gathered, slices(mesh, Path()))
    return gathered


# Timelines


def traces(mesh: Mesh, folder: Path) -> Facts:
    """Tasks in the order in which they were issued and complete, and the spans of one step, by system."""
    facts: Facts = {}
    for name, (system, options) in TRACED.items():
        layer = create(system, {**options, "trace": str(folder / name)}).build_layer(SPEC, mesh)
        assert isinstance(layer, PipelinedMoE)
        load_layer(layer)
        for _ in range(2):  # the second step's timeline replaces the first's
            step(layer, mesh)
        recorder = layer.runner.recorder
        assert recorder is not None
        facts[name] = {
            "events": [(event, told(task)) for event, task in recorder.events],
            "spans": [(told(span.task), span.start_s, span.end_s) for span in recorder.spans()],
            "path": layer.path,
        }
    return facts


def told(task: Task) -> str:
    """Such as `backward dispatch 0`."""
    return f"{'backward' if task.backward else 'forward'} {task.kind} {task.chunk}"


def step(layer: PipelinedMoE, mesh: Mesh) -> Tensor:
    """One forward and backward; the tokens' gradient."""
    x_TM = torch.randn(NUM_TOKENS, SPEC.model_dim, generator=torch.Generator().manual_seed(mesh.rank)).requires_grad_()
    output = layer(x_TM)
    (output.y_TM.square().sum() + output.aux_loss).backward()
    assert x_TM.grad is not None
    return x_TM.grad


# Gradients in slices


class Sliced(FSMoE):
    """Sends of every layer's existing gradient so many bytes beside the experts, and beside the dense part.

    Args:
        moe_bytes, dense_bytes: of each layer.
        filler_bytes: pieces in place of these.
    """

    def __init__(self, moe_bytes: float = 0.0, dense_bytes: float = 0.0, filler_bytes: float | None = None) -> None:
        super().__init__({"degree": 2, "backward_degree": 3})
        self.sizes, self.filler_bytes = (moe_bytes, dense_bytes), filler_bytes

    @property
    def schedule(self) -> Schedule:
        return Schedule("sliced", self.planner, partial(fsmoe_pipeline), slices=True)

    def planner(self, layers: Any, costs: Costs, carried_bytes: float = 0.0) -> StepPlan:
        """The same for every layer."""
        moe_bytes, dense_bytes = self.sizes if carried_bytes else (0.0, 0.0)
        plans = tuple(LayerPlan(moe_bytes=moe_bytes, dense_bytes=dense_bytes) for _ in layers)
        return StepPlan(plans, filler_bytes=self.filler_bytes)


class Planned(FSMoE):
    """FSMoE's own plan of costs that are always the same: which slices measured ones lead to, and whether to any,
    depends on the machine."""

    @property
    def schedule(self) -> Schedule:
        """With FSMoE's planner, given constants."""
        own = super().schedule

        def plan(works: Sequence[LayerWork], costs: Costs, carried_bytes: float) -> StepPlan:
            constant = dict.fromkeys(costs, AlphaBeta(1e-5, 1e-9))
            timed = [replace(work, dense_backward_s=1e-3) for work in works]
            return own.planner(timed, constant, carried_bytes)

        return replace(own, planner=plan)


SYSTEMS: dict[str, Callable[[], FSMoE]] = {
    "beside experts": lambda: Sliced(moe_bytes=10_001),
    "beside dense parts": lambda: Sliced(dense_bytes=20_000),
    "both": lambda: Sliced(moe_bytes=3_000, dense_bytes=5_000),
    "all that there is": lambda: Sliced(moe_bytes=1e9, dense_bytes=1e9),
    "pieces": lambda: Sliced(filler_bytes=8_000),
    "fsmoe": lambda: Planned({}),
}


def slices(mesh: Mesh, _folder: Path) -> Facts:
    """Every gradient of sliced reduction against that of the suite's own, and what was sent when."""
    facts: Facts = {}
    for model_name, model in MODELS.items():
        plain = FSMoE({"slices": False, "degree": 2, "backward_degree": 3})
        expected = gradients(build_gpt(model, plain, mesh, SEED, torch.float32), plain, mesh, num_steps=1)
        for name, build in SYSTEMS.items():
            system = build()
            gpt = build_gpt(model, system, mesh, SEED, torch.float32)
            sync = system.gradient_sync(gpt, mesh)
            assert isinstance(sync, SlicedSync)
            found = gradients(gpt, sync, mesh, num_steps=PLANNED_AFTER + 1)
            assert sync.slices is not None and sync.planning.plan is not None
            facts[f"{model_name}, {name}"] = {
                "errors": {key: relative_error(grad, expected[key]) for key, grad in found.items()},
                "unlike": sorted(expected.keys() ^ found.keys()),
                "slices": [[list(cut.moe), list(cut.dense)] for cut in sync.slices],
                "existing": sync.row.existing,
                "numbers": sync.row.parts[-1][1],
                "dense": sum(parameter.numel() for parameter in sync.dense),
                "planned": [plan.moe_bytes for plan in sync.planning.plan.layers],
                "sent": sent(gpt, sync, mesh),
            }
    return facts


def gradients(gpt: GPT, reduces: FSMoE | GradientSync, mesh: Mesh, num_steps: int) -> dict[str, Tensor]:
    """All gradients after so many steps that change no weight."""
    sync = reduces.gradient_sync(gpt, mesh) if isinstance(reduces, FSMoE) else reduces
    for _ in range(num_steps):
        backward(gpt, mesh)
        sync.reduce()
    return {name: parameter.grad.clone() for name, parameter in gpt.named_parameters() if parameter.grad is not None}


def backward(gpt: GPT, mesh: Mesh) -> None:
    """Of one batch, into fresh gradients."""
    gpt.zero_grad(set_to_none=True)
    tokens_BS = batch(0, mesh).to(mesh.device)
    losses = gpt(tokens_BS[:, :-1], tokens_BS[:, 1:])
    (losses.cross_entropy + 0.01 * losses.aux_loss).backward()


def sent(gpt: GPT, sync: GradientSync, mesh: Mesh) -> dict[str, float]:
    """Bytes of reductions that a step sends before backward has ended, and in all."""
    meter = LinkMeter(mesh.cluster, mesh.rank)

    def reduced() -> float:
        return float(sum(num for (_, kind), num in meter.sent.items() if kind == "reduction"))

    with meter.installed():
        backward(gpt, mesh)
        early = reduced()
        sync.reduce()
    return {"early": early, "all": reduced()}


def misuse(mesh: Mesh, _folder: Path) -> Facts:
    """What is said of a second backward before the first one's gradients are reduced, and of a gradient that comes
    after it was sent."""
    system = Sliced(moe_bytes=3_000)
    gpt = build_gpt(MODELS["plain"], system, mesh, SEED, torch.float32)
    sync = system.gradient_sync(gpt, mesh)
    gradients(gpt, sync, mesh, PLANNED_AFTER)
    backward(gpt, mesh)
    late = Late(system, mesh)
    late_sync = system.gradient_sync(late, mesh)
    for _ in range(PLANNED_AFTER):
        late.backward()
        late_sync.reduce()
    facts: Facts = {}
    runs: dict[str, Callable[[], None]] = {"twice": partial(backward, gpt, mesh), "late": late.backward}
    for name, run in runs.items():
        try:
            run()
        except AssertionError as error:
            facts[name] = str(error)
    return facts


class Late(nn.Module):
    """Uses a parameter that stands behind its MoE layer before it, too."""

    def __init__(self, system: FSMoE, mesh: Mesh) -> None:
        super().__init__()
        self.moe = system.build_layer(SPEC, mesh)
        self.head = nn.Linear(SPEC.model_dim, SPEC.model_dim)
        load_layer(self.moe)

    def backward(self) -> None:
        """Of some tokens, into fresh gradients."""
        self.zero_grad(set_to_none=True)
        self.head(self.moe(self.head(torch.ones(NUM_TOKENS, SPEC.model_dim))).y_TM).sum().backward()


# Profiles


def profiles(mesh: Mesh, folder: Path) -> Facts:
    """What is measured, written, read again and refused."""
    path = folder / "profiles" / "here.json"
    options = {"profile": str(path)}
    layer = FSMoE(options).build_layer(SPEC, mesh)
    assert isinstance(layer, PipelinedMoE)
    load_layer(layer)
    step(layer, mesh)
    points = layer.measured(NUM_TOKENS)
    facts: Facts = {}
    facts["points"] = {name: [[p.size, p.seconds] for p in found] for name, found in points.items()}
    facts["costs"] = {name: [c.alpha_s, c.beta_s_per_byte, c.r2] for name, c in costs_of(points).items()}
    facts["work"] = [layer.work(NUM_TOKENS).all_to_all_bytes, layer.work(NUM_TOKENS).expert_work]
    facts["plan"] = [layer.plan is not None and layer.plan.degree, layer.path]
    dist.barrier()
    facts["written"] = path.read_text()
    other = folder / "profiles" / "other.json"
    if mesh.rank == 0:
        other.write_text(facts["written"].replace('"backend": "gloo"', '"backend": "nccl"'))
    dist.barrier()
    for name, file, wanted in [("other", other, 48), ("broken", folder, 56)]:
        spec = LayerSpec(32, wanted, 8, 2, seed=3)
        refused = FSMoE({"profile": str(file)}).build_layer(spec, mesh)
        load_layer(refused)
        try:
            refused(torch.zeros(NUM_TOKENS, 32))
        except ConfigError as error:
            facts[name] = str(error)
    facts["sent"] = sent_by_step(LayerSpec(32, 40, 8, 2, seed=3), mesh)
    return facts


def sent_by_step(spec: LayerSpec, mesh: Mesh) -> list[list[Any]]:
    """Bytes by level and class of two steps, the costs of the layer's modules being measured in the first, and of
    planning again with gradients to slice."""
    layer = FSMoE().build_layer(spec, mesh)
    assert isinstance(layer, PipelinedMoE)
    load_layer(layer)
    sent = []
    for _ in range(2):
        meter = LinkMeter(mesh.cluster, mesh.rank)
        with meter.installed():
            step(layer, mesh)
        sent.append(sorted([level, kind, count] for (level, kind), count in meter.sent.items()))
    meter = LinkMeter(mesh.cluster, mesh.rank)
    with meter.installed():
        layer.planning.plan_slices(Dense((0.0,), (1024.0,), 0.0))
    return [*sent, [list(key) for key in meter.sent]]


PARTS: dict[str, Callable[[Mesh, Path], Facts]] = {
    "traces": traces,
    "slices": slices,
    "misuse": misuse,
    "profiles": profiles,
}
