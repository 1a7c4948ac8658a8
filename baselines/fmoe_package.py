"""The package behind `fastmoe` and `fastermoe_upstream`: its import, its switches, and what byte meters see of it.

Upstream keeps FasterMoE behind environment variables and reads each once a process: the schedule at the import, the
size of groups and shadowing at the first forward pass. So one process can run one set of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe import metering
from moe.errors import Refused

PACKAGE = "fmoe"
MISSING = "The package fmoe (FastMoE) is not installed; see https://github.com/laekov/fastmoe."
NEEDS_CUDA = "FastMoE runs on CUDA and sends over NCCL only; these ranks are on a CPU."
OTHER_GROUP = "FastMoE keeps the first process group it sent over, and this process has used another."


@dataclass(frozen=True)
class Switches:
    """What upstream reads from the environment once a process.

    Args:
        schedule: FasterMoE's smart schedule.
        shadowing: FasterMoE's dynamic shadowing; works with the schedule only.
        group_size: ranks of a group of the schedule.
    """

    schedule: bool = False
    shadowing: bool = False
    group_size: int = 4

    @property
    def environment(self) -> dict[str, str]:
        """Upstream's variables; all are set, so that none of the user's own decides what a system is."""
        return {
            "FMOE_FASTER_SCHEDULE_ENABLE": str(int(self.schedule)),
            "FMOE_FASTER_SHADOW_ENABLE": str(int(self.shadowing)),
            "FMOE_FASTER_GROUP_SIZE": str(self.group_size),
        }

    def __str__(self) -> str:
        if not self.schedule:
            return "no smart schedule"
        return f"the smart schedule in groups of {self.group_size}, {'' if self.shadowing else 'no '}shadowing"


PLAIN = Switches()
"""FastMoE without FasterMoE."""

_imported_with: Switches | None = None


def require_cuda(device: torch.device) -> None:
    """Raises Refused where upstream's kernels can't run."""
    if device.type != "cuda":
        raise Refused(NEEDS_CUDA)


def other_switches(wanted: Switches) -> list[str]:
    """Why this process can't run upstream with these switches; empty when it can."""
    if PACKAGE not in sys.modules or _imported_with == wanted:
        return []
    found = _imported_with
    if found is None and not wanted.schedule and not sys.modules[f"{PACKAGE}.layers"].fmoe_faster_schedule:
        return []  # imported by somebody else, with the schedule off: then the others don't count
    return [
        f"FastMoE reads its switches once a process, and this one has imported it with {found or 'unknown switches'}, "
        f"not with {wanted}: give each a run of its own."
    ]


def import_upstream(switches: Switches) -> Any:
    """The module `fmoe` with these switches.

    Raises:
        Refused: this process has imported it with others.
    """
    global _imported_with
    if reasons := other_switches(switches):
        raise Refused(*reasons)
    os.environ.update(switches.environment)
    import fmoe
    import fmoe.functions
    import fmoe.layers

    _imported_with = switches
    return fmoe


def send_over(group: dist.ProcessGroup, functions: Any) -> None:
    """Get ready to send over a group, which upstream does by a communicator of its own.

    Args:
        group: expert-parallel group of several ranks.
        functions: the module `fmoe.functions`.

    Raises:
        Refused: this process has sent over another.
    """
    if functions.get_moe_group() not in (None, group):
        raise Refused(OTHER_GROUP)
    _let_meters_count(group)


@cache
def _let_meters_count(group: dist.ProcessGroup) -> None:
    """Tell byte meters what upstream's kernels send, from here on."""
    import fmoe_cuda

    for name, counting in COUNTERS.items():
        setattr(fmoe_cuda, name, counting(getattr(fmoe_cuda, name), group))


def _tell_rows(group: dist.ProcessGroup, row_bytes: int, rows_E: Tensor) -> None:
    """This rank sends so many rows to each expert of the group, or, by their places in it, to each expert's rank."""
    for meter in metering.INSTALLED:
        meter.count_rows(rows_E.view(group.size(), -1).sum(1), row_bytes, group)


def _tell_next(group: dist.ProcessGroup, num_bytes: int, kind: str, silent: int) -> None:
    """As `moe.metering` counts a ring: each rank sends to the next one of the group, all but the `silent` one."""
    if group.rank() == silent:
        return
    for meter in metering.INSTALLED:
        meter.count_to_next(num_bytes, group, kind)


Kernel = Callable[..., Any]


def _count_scatter(kernel: Kernel, group: dist.ProcessGroup) -> Kernel:
    """Rows go to the experts that they were routed to."""

    def counted(rows: Tensor, routed_E: Tensor, arriving_E: Tensor, *sizes: Any) -> Any:
        _tell_rows(group, _row_bytes(rows), routed_E)
        return kernel(rows, routed_E, arriving_E, *sizes)

    return counted


def _count_gather(kernel: Kernel, group: dist.ProcessGroup) -> Kernel:
    """Rows go back to where they came from."""

    def counted(rows: Tensor, routed_E: Tensor, arriving_E: Tensor, *sizes: Any) -> Any:
        _tell_rows(group, _row_bytes(rows), arriving_E)
        return kernel(rows, routed_E, arriving_E, *sizes)

    return counted


def _count_exchange(kernel: Kernel, group: dist.ProcessGroup) -> Kernel:
    """Every rank learns how many rows come to its experts."""

    def counted(counts_E: Tensor, *sizes: Any) -> Any:
        _tell_rows(group, counts_E.element_size(), torch.ones_like(counts_E))
        return kernel(counts_E, *sizes)

    return counted


def _tell_schedule(
    group: dist.ProcessGroup, rows: Tensor, routed_E: Tensor, arriving_E: Tensor, shadowed_E: Tensor
) -> None:
    """The rows of a schedule's both exchanges, there and back; those of shadowed experts stay where they are."""
    own_L = shadowed_E.view(group.size(), -1)[group.rank()]
    back_E = arriving_E.view(group.size(), -1) * ~own_L
    _tell_rows(group, _row_bytes(rows), routed_E * ~shadowed_E + back_E.view(-1))


def _count_smart_forward(kernel: Kernel, group: dist.ProcessGroup) -> Kernel:
    """Both exchanges, and a shadowed expert's parameters from its rank to all others, in the dtype of the rows."""

    def counted(
        rows: Tensor,
        routed_E: Tensor,
        arriving_E: Tensor,
        shadowed_E: Tensor,
        num_arriving: int,
        expert_numel: int,
        *rest: Any,
    ) -> Any:
        _tell_schedule(group, rows, routed_E, arriving_E, shadowed_E)
        num_local = len(shadowed_E) // group.size()
        for expert in shadowed_E.nonzero().flatten().tolist():
            before_root = (expert // num_local - 1) % group.size()
            _tell_next(group, expert_numel * rows.element_size(), "other", silent=before_root)
        return kernel(rows, routed_E, arriving_E, shadowed_E, num_arriving, expert_numel, *rest)

    return counted


def _count_smart_backward(kernel: Kernel, group: dist.ProcessGroup) -> Kernel:
    """Both exchanges; the reduction of shadows' gradients is a call of its own."""

    def counted(rows: Tensor, routed_E: Tensor, arriving_E: Tensor, shadowed_E: Tensor, *rest: Any) -> Any:
        _tell_schedule(group, rows, routed_E, arriving_E, shadowed_E)
        return kernel(rows, routed_E, arriving_E, shadowed_E, *rest)

    return counted


def _count_reduce(kernel: Kernel, group: dist.ProcessGroup) -> Kernel:
    """The gradient of a shadowed expert goes to its rank."""

    def counted(grad: Tensor, root: int, expert_numel: int) -> Any:
        _tell_next(group, expert_numel * grad.element_size(), "reduction", silent=root)
        return kernel(grad, root, expert_numel)

    return counted


def _row_bytes(rows: Tensor) -> int:
    return rows.shape[1] * rows.element_size()


COUNTERS: dict[str, Callable[[Kernel, dist.ProcessGroup], Kernel]] = {
    "global_scatter": _count_scatter,
    "global_gather": _count_gather,
    "expert_exchange": _count_exchange,
    "smart_sch_forward": _count_smart_forward,
    "smart_sch_backward": _count_smart_backward,
    "reduce_grad": _count_reduce,
}
"""What wraps each function of `fmoe_cuda` that sends."""
