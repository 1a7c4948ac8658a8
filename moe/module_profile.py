"""Costs of a layer's modules, measured on this machine before the layer is first used: what a schedule plans by.

Every collective and the experts are timed at a few sizes around those of the layer, and a line is fitted through each
(`moe.costs`). A profile belongs to the hardware and the shapes that it was measured with. Profiles are kept for the
life of the process and, where a file is named, in it; a file of other hardware is refused.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe import ops
from moe.collectives import gather_into, scatter_sums
from moe.contention import PAIRS, RESOURCES, Point, Points, beside
from moe.costs import AlphaBeta, fit_alpha_beta
from moe.errors import ConfigError, Problem
from moe.expert_passes import ExpertRows, experts_backward, experts_forward
from moe.experts import GroupedExperts
from moe.mesh import Mesh
from moe.simulator import MEASURED, Task
from moe.streams import TaskRunner
from moe.system import Activation

FRACTIONS = (0.125, 0.25, 0.5, 1.0)
"""Sizes that are measured, as shares of the layer's."""

WARMUP, REPEATS = 1, 5

IN_A_ROW = 4
"""Calls of one timing on a GPU, where the host is ahead of them as it is in a pipeline."""


@dataclass(frozen=True)
class Shapes:
    """What is measured.

    Args:
        tokens: of a rank.
        rows: copies that it sends each way.
        model_dim, hidden_dim, num_local: M, H (of a shard where experts are sharded), and experts of a rank.
        activation, dtype: of the experts.
        ranks, shards: of an all-to-all, and that share an expert.
        gate: of the layer.
    """

    tokens: int
    rows: int
    model_dim: int
    hidden_dim: int
    num_local: int
    activation: str
    dtype: str
    ranks: int
    shards: int = 1
    gate: str = ""

    @property
    def key(self) -> str:
        """In a file of profiles."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())


Timed = list[tuple[str, float, Callable[[], Any]]]
"""(operation, size, what to time)."""


@dataclass(frozen=True)
class Measuring:
    """What is measured of a layer, and where.

    Args:
        mesh: of the run.
        shapes: of the layer, the same on all ranks.
        groups: of its all-to-all and, where experts are sharded, of the ranks that share them.
        experts: of the layer.
        more: what it has beside, for a share of its tokens.
    """

    mesh: Mesh
    shapes: Shapes
    groups: Sequence[dist.ProcessGroup]
    experts: GroupedExperts
    more: Callable[[float], Timed]


def hardware(mesh: Mesh) -> dict[str, str]:
    """What a profile depends on beside its shapes, by name; alike on all ranks of alike machines."""
    on_cuda = mesh.device.type == "cuda"
    processor = torch.cuda.get_device_name(mesh.device) if on_cuda else _cpu()
    levels = " x ".join(f"{level.fanout} {level.name}" for level in mesh.cluster.levels[1:])
    return {
        "processor": processor,
        "cluster": f"{mesh.cluster.name}: {levels}",
        "backend": dist.get_backend(),
        "torch": torch.__version__,
    }


def _cpu() -> str:
    cores = os.cpu_count()
    return f"{platform.processor() or platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {cores} cores"


def costs_of(points: Points) -> dict[str, AlphaBeta]:
    """Lines through the points, by operation; a matrix product's latency is that of one of the two in an expert, of
    four backward."""
    costs = {}
    for operation, measured in points.items():
        fit = fit_alpha_beta([point.size for point in measured], [point.seconds for point in measured])
        calls = {"gemm": 2, "gemm_backward": 4}.get(operation, 1)
        costs[operation] = AlphaBeta(fit.alpha_s / calls, fit.beta_s_per_byte, fit.r2)
    return costs


_MEASURED: dict[tuple[str, str], Points] = {}
"""Of this process, by hardware and shapes."""


def profile(measuring: Measuring, file: Path | None) -> Points:
    """The measurements of these shapes on this hardware: known ones, else new ones. Collective over all ranks.

    Args:
        measuring: what.
        file: where profiles are kept, on a file system that all ranks read; None keeps them in this process only.

    Raises:
        ConfigError: the file is of other hardware, or can't be read.
    """
    mesh, shapes = measuring.mesh, measuring.shapes
    here = hardware(mesh)
    known = (json.dumps(here), shapes.key)
    box: list[Any] = [None]
    if file is not None:
        if mesh.rank == 0:
            box[0] = _attempt(lambda: read_profiles(file, here).get(shapes.key))
        dist.broadcast_object_list(box, src=0, device=mesh.device)
    if isinstance(box[0], ConfigError):
        raise box[0]
    if known not in _MEASURED:
        _MEASURED[known] = box[0] or measure(measuring)
    if box[0] is None and file is not None and mesh.rank == 0:
        write_profiles(file, here, read_profiles(file, here) | {shapes.key: _MEASURED[known]})
    return _MEASURED[known]


def _attempt(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except ConfigError as error:
        return error


def read_profiles(file: Path, here: dict[str, str]) -> dict[str, Points]:
    """Points by key of shapes; nothing where there is no such file yet.

    Raises:
        ConfigError: it is of other hardware, or can't be read.
    """
    if not file.exists():
        return {}
    fix = "name another file, which will be measured and written, or remove this one"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        there = dict(content["hardware"])
        profiles = {
            key: {operation: [Point(*point) for point in points] for operation, points in by_operation.items()}
            for key, by_operation in content["profiles"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        rule = f"it can't be read as profiles ({type(error).__name__}: {error})"
        raise ConfigError(Problem("system.profile", file, rule, fix)) from error
    if there != here:
        differing = [
            f"{name} {there.get(name)!r}, here {here.get(name)!r}"
            for name in sorted(there.keys() | here.keys())
            if there.get(name) != here.get(name)
        ]
        rule = f"it was measured on other hardware: {'; '.join(differing)}"
        raise ConfigError(Problem("system.profile", file, rule, fix))
    return profiles


def write_profiles(file: Path, here: dict[str, str], profiles: dict[str, Points]) -> None:
    """Write what `read_profiles` reads; the fits stand beside, for people."""
    file.parent.mkdir(parents=True, exist_ok=True)
    told = {
        key: {operation: [[point.size, point.seconds] for point in points] for operation, points in measured.items()}
        for key, measured in profiles.items()
    }
    fits = {
        key: {operation: asdict(cost) for operation, cost in costs_of(measured).items()}
        for key, measured in profiles.items()
    }
    new = file.with_suffix(f"{file.suffix}.new")
    new.write_text(json.dumps({"hardware": here, "profiles": told, "fits": fits}, indent=1), encoding="utf-8")
    new.replace(file)


@torch.no_grad()
def measure(measuring: Measuring) -> Points:
    """Time every module at FRACTIONS of the layer's size. Collective over all ranks."""
    mesh, shapes, experts = measuring.mesh, measuring.shapes, measuring.experts
    dtype = getattr(torch, shapes.dtype)
    weights = experts.w_in.to(dtype), experts.w_out.to(dtype)
    steps: dict[str, list[tuple[float, Callable[[], Any]]]] = {}
    for fraction in FRACTIONS:
        # Whole rows for every rank and every expert, so that all messages are alike.
        unit = shapes.ranks * shapes.num_local
        rows = max(1, round(fraction * shapes.rows / unit)) * unit
        timed = _steps(mesh, shapes, rows, measuring.groups, weights, experts.activation)
        for operation, size, step in timed + measuring.more(fraction):
            steps.setdefault(operation, []).append((size, step))
    names = [(operation, index) for operation, found in steps.items() for index in range(len(found))]
    seconds = torch.zeros(REPEATS, len(names), dtype=torch.float64)
    for turn in range(-WARMUP, REPEATS):
        # In another order each time, the same on all ranks: a shaped link remembers what went before.
        for place in Random(turn).sample(range(len(names)), len(names)):
            operation, index = names[place]
            elapsed = _timed(steps[operation][index][1], mesh.device)
            if turn >= 0:
                seconds[turn, place] = elapsed
    seconds = seconds.to(mesh.device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    found: Points = {operation: [] for operation in steps}
    for (operation, index), values in zip(names, seconds.t().tolist(), strict=True):
        found[operation].append(Point(steps[operation][index][0], median(values)))
    # Small layers round several fractions to one size.
    return {operation: _distinct(points) for operation, points in found.items()}


def _distinct(points: list[Point]) -> list[Point]:
    """One point a size, the fastest; where all were one size, a second one at no size at half the time, so that a
    line can be drawn at all."""
    best: dict[float, float] = {}
    for point in points:
        best[point.size] = min(point.seconds, best.get(point.size, point.seconds))
    if len(best) == 1:
        best[0.0] = min(best.values()) / 2
    return [Point(size, seconds) for size, seconds in sorted(best.items())]


def _steps(
    mesh: Mesh,
    shapes: Shapes,
    rows: int,
    groups: Sequence[dist.ProcessGroup],
    weights: tuple[Tensor, Tensor],
    activation: Activation,
) -> Timed:
    """For a layer of so many rows."""
    w_in, w_out = weights
    sent = torch.randn(rows, shapes.model_dim, device=mesh.device, dtype=w_in.dtype)
    received, size_bytes = torch.empty_like(sent), float(sent.numel() * sent.element_size())
    made: Timed = [("all_reduce", size_bytes, lambda: dist.all_reduce(received))]

    def exchange(later: bool) -> dist.Work | None:
        return dist.all_to_all_single(received, sent, group=groups[0], async_op=later)

    once: dict[str, tuple[float, Callable[[bool], dist.Work | None]]] = {"all_to_all": (size_bytes, exchange)}
    if shapes.shards > 1:
        whole, part = sent.new_empty(rows * shapes.shards, shapes.model_dim), torch.empty_like(sent)
        whole_bytes = shapes.shards * size_bytes
        once["all_gather"] = whole_bytes, lambda later: gather_into(whole, sent, groups[1], later)
        made.append(("reduce_scatter", whole_bytes, lambda: scatter_sums(part, whole, groups[1])))
    total = rows * shapes.shards
    per_expert = [total // shapes.num_local] * shapes.num_local
    ends_L = torch.arange(1, shapes.num_local + 1, device=mesh.device, dtype=torch.int32) * per_expert[0]
    rows_RM = sent.repeat(shapes.shards, 1)
    expert_rows = ExpertRows(per_expert, ends_L)
    work = float(total * (w_in[0].numel() + w_out[0].numel()))
    hidden = experts_forward(rows_RM, w_in, w_out, expert_rows, activation)[1]
    runner = TaskRunner(mesh.device)

    def forward(_later: bool = False) -> None:
        experts_forward(rows_RM, w_in, w_out, expert_rows, activation)

    most = IN_A_ROW if runner.on_cuda else 2
    calls = count()

    def backward() -> None:  # `hidden` is overwritten time and again, by numbers of its own size
        found = experts_backward(rows_RM, rows_RM, hidden, w_in, w_out, expert_rows, activation)
        # What a chunk more takes; one alone has nothing to add. On a GPU one pass adds those of a timing.
        if next(calls) % (most if runner.on_cuda else 1) == 0:
            for grad in (found.w_in, found.w_out):
                if grad is not None:
                    ops.sum_terms([grad] * most, grad.dtype)

    once["gemm"] = work, forward

    def issue(name: str, _chunk: int) -> dist.Work | None:
        return once[name][1](runner.asynchronous)

    def at_once(first: str, second: str) -> None:  # the second, which is none of the host's, is issued first
        tasks = [Task(name, RESOURCES[name], MEASURED, 0.0) for name in (second, first)]
        with runner.room():
            runner.run(tasks, {name: partial(issue, name) for name in (first, second)}, (0, 1))

    made += [(name, size, partial(step, False)) for name, (size, step) in once.items()]
    made += [(beside(a, b), once[a][0], partial(at_once, a, b)) for a, b in PAIRS if a in once and b in once]
    return [*made, ("gemm_backward", 2 * work, backward)]


def _timed(step: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()
    calls = IN_A_ROW if device.type == "cuda" else 1
    start = time.perf_counter()
    for _ in range(calls):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / calls
