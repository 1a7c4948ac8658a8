"""The ranks' part of `experiments.layer`: one MoE layer of every system, in turn, on the same tokens and weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from experiments import registry
from experiments.attempt import attempt, stop_agreed
from experiments.config import LayerRunConfig, LayerShape, WorkloadConfig, cluster_from, load
from experiments.floor import floor_step
from experiments.kernel_profile import add_kernels
from experiments.model import DTYPES
from experiments.progress_log import Phase, phases_of
from experiments.ranks import RankInfo
from experiments.results import RunDir
from experiments.samples import SampleRow, SampleWriter, append_samples, read_samples
from experiments.timing import (
    Observed,
    interleave,
    over_ranks,
    peak_memory_bytes,
    stage_rounds,
    synchronise,
)
from moe.mesh import Mesh, create_mesh
from moe.metering import LinkMeter
from moe.system import LayerSpec, MoELayer, System
from moe.weights import load_layer
from moe.workload import Workload, expert_ids, gate_for, tokens_for

FLOOR = ""  # takes turns with the systems, whose labels are never empty
STAGE_ROUNDS = 5
TIMES, KERNELS = "times", "kernels"  # of a shape, each a record of the journal
CHECKED_TOKENS = 1024
"""Tokens a rank at which systems are compared with the oracle, which computes all experts on all of them."""


@dataclass(frozen=True)
class Case:
    """One shape under one workload.

    Args:
        shape, workload: names for the results.
        spec: of the layer.
        ids_TK: the experts that this rank's tokens choose, on the CPU.
        x_TM: this rank's tokens.
        grad_TM: gradient of their outputs.
        gate_EM: the gate's matrix, which with `x_TM` makes the workload's routing.
        seed: of all.
    """

    shape: str
    workload: str
    spec: LayerSpec
    ids_TK: Tensor
    x_TM: Tensor
    grad_TM: Tensor
    gate_EM: Tensor
    seed: int


@dataclass
class Candidate:
    """One system's layer, ready to be stepped."""

    layer: MoELayer
    step: Callable[[], None]
    writer: SampleWriter


def measure(payload: dict[str, Any], info: RankInfo) -> list[list[Any]] | None:
    """Measure every shape that the journal lacks, in this rank; rank 0 adds each to the journal as soon as it is there.

    Args:
        payload: `config`: of the run; `folder`: rank 0's, with its journal.
        info: of this rank.

    Returns:
        Sample rows, the same on every rank; None when a stop was asked for before all shapes were measured.
    """
    config = load("layer", payload["config"])
    assert isinstance(config, LayerRunConfig)
    mesh = create_mesh(cluster_from(config.cluster), info.device)
    systems = {s.label: registry.create(s.name, s.options) for s in config.systems}
    journal = RunDir(payload["folder"]).journal
    told = [read_samples(journal) if info.rank == 0 else {}]
    dist.broadcast_object_list(told, src=0, device=info.device)
    measured, tell = told[0], phases_of(journal.parent, info.rank)
    # Kernels after all timed rounds: a CUDA profiler that once was on may slow every launch of its process.
    for what in (TIMES, KERNELS) if config.profile else (TIMES,):
        for shape in config.shapes:
            key = (what, shape.name)
            if key in measured:
                continue
            if stop_agreed(info):
                return None
            case = build_case(config, shape, mesh)
            if what == TIMES:
                rows = measure_case(case, systems, mesh, config, tell)
            else:
                rows = profile_case(case, systems, mesh)
            measured[key] = [list(row) for row in rows]
            if info.rank == 0:
                append_samples(journal, key, rows)
                if what == TIMES:
                    print(f"layer {shape.name}: measured {', '.join(systems)}", flush=True)
    return [row for rows in measured.values() for row in rows]


def build_case(config: LayerRunConfig, shape: LayerShape, mesh: Mesh) -> Case:
    """The layer, and tokens of this rank that its gate routes as the workload says."""
    dtype = DTYPES[config.dtype]
    spec = LayerSpec(
        model_dim=shape.model_dim,
        hidden_dim=shape.hidden_dim,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        activation=shape.activation,
        capacity_factor=config.capacity_factor,
        dtype=dtype,
        seed=config.seed,
    )
    drawn = Workload(config.workload.kind, config.workload.exponent, config.workload.path)
    ids_TK = expert_ids(drawn, shape.tokens_per_rank, shape.num_experts, shape.top_k, config.seed, mesh.rank)
    x_TM = tokens_for(ids_TK, shape.model_dim, shape.num_experts, config.seed, mesh.rank, dtype, mesh.device)
    gate_EM = gate_for(shape.num_experts, shape.model_dim, mesh.device)
    grad_TM = torch.randn(x_TM.shape, generator=torch.Generator().manual_seed(config.seed + mesh.rank))
    grad_TM = grad_TM.to(mesh.device, dtype)
    return Case(shape.name, workload_name(config.workload), spec, ids_TK, x_TM, grad_TM, gate_EM, config.seed)


def workload_name(workload: WorkloadConfig) -> str:
    """What results call it: `uniform`, `zipf 1.0`, `replay`."""
    return f"zipf {workload.exponent}" if workload.kind == "zipf" else workload.kind


def measure_case(
    case: Case,
    systems: dict[str, System],
    mesh: Mesh,
    config: LayerRunConfig,
    tell: Callable[[Phase], None] = lambda _phase: None,
) -> list[SampleRow]:
    """Measure every system on one case. Collective.

    Args:
        case: what to compute.
        systems: by the name that results carry.
        mesh: of the run.
        config: says the rounds of the interleaved timing, and whether each is compared with the dense oracle.
        tell: notes what is done, see `experiments.progress_log.phases_of`.

    Returns:
        For every system its step_time, floor_time (of `experiments.floor`, in the same rounds), stage_time, bytes,
        dropped_copies, tokens, peak_memory and, if asked for, relative_error, and module_time of a layer that measured
        its modules; or a status row for a system that refused or failed. The same on every rank.
    """
    expected, failure = attempt(lambda: _expected(case, mesh)) if config.check else (None, None)
    if failure is not None and mesh.rank == 0:
        print(f"layer {case.shape}: nothing is compared with the reference, which {': '.join(failure)}", flush=True)
    candidates: list[Candidate] = []
    rows: list[SampleRow] = []
    for name, system in systems.items():
        writer = SampleWriter(name, system.implementation, case.shape, case.workload, case.seed)
        candidate, failure = _prepare(case, system, mesh, writer, expected)
        if candidate is not None:
            candidates.append(candidate)
        elif failure is not None:
            writer.add_status(*failure)
            rows += writer.rows
    steps = {candidate.writer.key[0]: candidate.step for candidate in candidates}
    steps[FLOOR] = floor_step(case.spec, case.ids_TK, mesh)
    turns = (config.rounds, config.warmup, mesh.device, config.steps_per_round)
    times = interleave(steps, *turns, after_round=lambda: tell("training"))
    tell("starting")
    for candidate in candidates:
        candidate.writer.add("floor_time", times[FLOOR], "s")
        candidate.writer.add("step_time", times[candidate.writer.key[0]], "s")
        _observe(candidate, case, mesh)
        rows += candidate.writer.rows
    return rows


def profile_case(case: Case, systems: dict[str, System], mesh: Mesh) -> list[SampleRow]:
    """Which kernels a step of every system runs on one case (see `experiments.kernel_profile`). Collective.

    Args:
        case: what to compute.
        systems: by the name that results carry; one that can't run is left out, `measure_case` has said why.
        mesh: of the run.

    Returns:
        Sample rows, the same on every rank.
    """
    rows: list[SampleRow] = []
    for name, system in systems.items():
        writer = SampleWriter(name, system.implementation, case.shape, case.workload, case.seed)
        candidate, _ = _prepare(case, system, mesh, writer, expected=None)
        if candidate is not None:
            add_kernels(writer, candidate.step, mesh)
            rows += writer.rows
    return rows


def _prepare(
    case: Case, system: System, mesh: Mesh, writer: SampleWriter, expected: Observed | None
) -> tuple[Candidate | None, tuple[str, str] | None]:
    """A candidate that has taken one step, its errors already written; or (status, reason). Collective."""
    if reasons := system.refusals(case.spec, mesh.cluster):
        return None, ("refused", " ".join(reasons))
    layer, failure = attempt(lambda: _build(case, system, mesh))
    if layer is None:
        return None, failure
    x_TM = case.x_TM.detach().requires_grad_()

    def step() -> None:
        output = layer(x_TM)
        losses = [output.aux_loss] if output.aux_loss.requires_grad else []  # a gate may have none to learn from
        torch.autograd.backward([output.y_TM, *losses], [case.grad_TM, *[None] * len(losses)])
        x_TM.grad = None  # at the end, so that a step frees what it allocated: see `peak_memory_bytes`
        layer.drop_gradients()

    def try_out() -> dict[str, float]:  # what can't run fails here, not amid the timing
        step()
        synchronise(mesh.device)
        return {} if expected is None else _errors(case, system, mesh, expected)

    errors, failure = attempt(try_out)
    if errors is None:
        return None, failure
    worst = over_ranks(torch.tensor(list(errors.values()), dtype=torch.float64), dist.ReduceOp.MAX, mesh.device)
    for part, error in zip(errors, worst.tolist(), strict=True):
        writer.add("relative_error", [error], "1", part)
    return Candidate(layer, step, writer), None


def _build(case: Case, system: System, mesh: Mesh) -> MoELayer:
    layer = system.build_layer(case.spec, mesh)
    load_layer(layer)
    with torch.no_grad():
        layer.set_gate(case.gate_EM)
        for parameter in layer.parameters():
            if parameter is not layer.gate_weight:  # weights in the dtype of the arithmetic, as in a tuned run
                parameter.data = parameter.data.to(case.spec.dtype)
    return layer


def _observe(candidate: Candidate, case: Case, mesh: Mesh) -> None:
    """What is exact or slow to read: bytes, drops, memory, stages."""
    writer, device = candidate.writer, mesh.device
    if candidate.layer.path:
        writer.add("path", [1], "1", candidate.layer.path)
    for part, modelled_s in candidate.layer.modelled_dispatch_s.items():
        writer.add("modelled_dispatch", [modelled_s], "s", part)
    for operation, points in candidate.layer.module_times.items():
        for size, took_s in points:
            writer.add("module_time", [took_s], "s", f"{operation} {size:.0f}")
    meter = LinkMeter(mesh.cluster, mesh.rank)
    dropped: list[Tensor] = []
    handle = candidate.layer.register_forward_hook(lambda _m, _a, output: dropped.append(output.num_dropped))
    with meter.installed():
        candidate.step()
    handle.remove()
    writer.add_bytes(over_ranks(meter.as_tensor(), dist.ReduceOp.SUM, device), mesh.cluster)
    total = over_ranks(dropped[0].double().view(1), dist.ReduceOp.SUM, device)
    writer.add("dropped_copies", total.tolist(), "copies/step")
    writer.add("tokens", [len(case.x_TM) * mesh.world_size], "tokens/step")
    peak = torch.tensor([float(peak_memory_bytes(candidate.step, device, [candidate.layer]))], dtype=torch.float64)
    writer.add("peak_memory", over_ranks(peak, dist.ReduceOp.MAX, device).tolist(), "B")
    for part, seconds in stage_rounds(candidate.step, [candidate.layer], STAGE_ROUNDS, device).stages.items():
        writer.add("stage_time", seconds, "s", part)


def _expected(case: Case, mesh: Mesh) -> Observed:
    reference = registry.create("reference")
    spec = replace(case.spec, dtype=torch.float32)
    x_TM, grad_TM = _checked_tokens(case, mesh)
    return Observed(reference, spec, mesh, x_TM.float(), grad_TM, case.gate_EM)


def _checked_tokens(case: Case, mesh: Mesh) -> tuple[Tensor, Tensor]:
    x_TM = case.x_TM[:CHECKED_TOKENS]
    generator = torch.Generator().manual_seed(case.seed + 1000 + mesh.rank)
    return x_TM, torch.randn(x_TM.shape, generator=generator).to(mesh.device)


def _errors(case: Case, system: System, mesh: Mesh, expected: Observed) -> dict[str, float]:
    x_TM, grad_TM = _checked_tokens(case, mesh)
    return Observed(system, case.spec, mesh, x_TM, grad_TM, case.gate_EM).errors(expected)
