"""Which kernels a step runs, how often and how long, as sample rows; `analysis.kernels` makes the table of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd import DeviceType

from experiments.samples import SampleWriter
from experiments.timing import Step, synchronise
from moe.mesh import Mesh

WARMUP_STEPS, PROFILED_STEPS = 2, 5
NAME_LENGTH = 60


class Kernels(NamedTuple):
    """What a device did.

    Attributes:
        time_us, calls: by short name, the longest first.
        busy_us: while at least one kernel ran, less than the sum of times when streams overlap; None on a CPU.
    """

    time_us: dict[str, float]
    calls: dict[str, int]
    busy_us: float | None


def add_kernels(writer: SampleWriter, step: Step, mesh: Mesh) -> None:
    """Profile PROFILED_STEPS steps on rank 0 and add what they ran; the other ranks take as many. Collective.

    Adds kernel_time (seconds a step) and kernel_calls (a step) with parts such as `cuda/ncclDevKernel_SendRecv`, and on
    a GPU busy_time of part `cuda`. A kernel that communicates counts its wait for other ranks. On a CPU the operators'
    self time stands in, with parts such as `cpu/aten::mm`.

    Args:
        writer: of the system.
        step: one forward and backward.
        mesh: of the run.
    """
    kind, box = mesh.device.type, [_profiled(step, mesh)]
    dist.broadcast_object_list(box, src=0, device=mesh.device)
    kernels = box[0]
    assert kernels is not None and kernels.calls, "rank 0 profiles, and a step runs kernels"
    for name, time_us in kernels.time_us.items():
        writer.add("kernel_time", [time_us / 1e6 / PROFILED_STEPS], "s/step", f"{kind}/{name}")
        writer.add("kernel_calls", [kernels.calls[name] / PROFILED_STEPS], "calls/step", f"{kind}/{name}")
    if kernels.busy_us is not None:
        writer.add("busy_time", [kernels.busy_us / 1e6 / PROFILED_STEPS], "s/step", kind)


def _profiled(step: Step, mesh: Mesh) -> Kernels | None:
    """What all steps ran; None but on rank 0."""
    on_cuda = mesh.device.type == "cuda"
    # On a GPU without the operators: to record them would hold up a host that may be late with its launches anyway.
    activity = torch.profiler.ProfilerActivity.CUDA if on_cuda else torch.profiler.ProfilerActivity.CPU
    for _ in range(WARMUP_STEPS):
        step()
    synchronise(mesh.device)
    with torch.profiler.profile(activities=[activity], acc_events=True) if mesh.rank == 0 else nullcontext() as profile:
        for _ in range(PROFILED_STEPS):
            step()
            synchronise(mesh.device)
    if profile is None:
        return None
    return cuda_kernels(profile.events()) if on_cuda else cpu_operators(profile.events())


def cuda_kernels(events: Sequence[Any]) -> Kernels:
    """Kernels, copies and fills of a GPU.

    Args:
        events: of torch's profiler (`torch.autograd.profiler_util.FunctionEvent`).
    """
    # Annotations stand among a device's events too, and span kernels that are there themselves.
    ran = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    spans = [(event.time_range.start, event.time_range.end) for event in ran]
    times = [(short_name(event.name), end - start) for event, (start, end) in zip(ran, spans, strict=True)]
    return _summed(times, _union(spans))


def cpu_operators(events: Sequence[Any]) -> Kernels:
    """Torch's operators, each without the operators that it called.

    Args:
        events: of torch's profiler.
    """
    return _summed([(_cut(event.name), event.self_cpu_time_total) for event in events], None)


def _summed(times: list[tuple[str, float]], busy_us: float | None) -> Kernels:
    time_us: dict[str, float] = {}
    for name, duration_us in times:
        time_us[name] = time_us.get(name, 0.0) + duration_us
    longest_first = sorted(time_us, key=lambda name: -time_us[name])
    return Kernels({name: time_us[name] for name in longest_first}, Counter(name for name, _ in times), busy_us)


def _union(spans: Iterable[tuple[float, float]]) -> float:
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def short_name(name: str) -> str:
    """A kernel's name without return type, template arguments and parameters, at most NAME_LENGTH characters.

    What is no C++ signature, such as Triton's names and `Memcpy DtoD (Device -> Device)`, stays as it is.
    """
    if not name.endswith(")") or name.startswith(("Memcpy", "Memset")):
        return _cut(name)
    signature, inner = name.replace("(anonymous namespace)::", ""), ""
    while signature != inner:  # from the innermost brackets outwards
        signature, inner = re.sub(r"<[^<>]*>", "", signature), signature
    words = signature.partition("(")[0].split()
    return _cut(words[-1] if words else name)


def _cut(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 3]}..."
