"""Padded experts: what they compute, and which slots they are spared."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from moe.experts import GroupedExperts
from moe.metering import LinkMeter
from moe.slots import BatchedExperts, Slots
from moe.system import Activation, LayerSpec
from moe.topology import cluster_of
from moe.weights import expert_matrix

SPEC = LayerSpec(model_dim=16, hidden_dim=24, num_experts=4, top_k=2)


class Two:
    """Stands for a process group of two ranks."""

    def size(self) -> int:
        """Its ranks."""
        return 2


@pytest.mark.parametrize("capacity", [0, 3, 4, 5, 8, math.inf])
@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_slots_above_the_capacity_stay_out(capacity: float, num_parts: int) -> None:
    """Eight slots of each of two ranks for each of two experts, in one call or in parts."""
    experts = _experts(BatchedExperts, SPEC)
    slots = Slots(cast(BatchedExperts, experts), cast(Any, Two()), meter=False)
    slots.capacity = capacity
    x_LRCM = torch.randn(2, 2, 8, 16, generator=torch.Generator().manual_seed(0))
    seen: list[int] = []
    experts.register_forward_pre_hook(lambda _module, args: seen.append(len(args[0])))
    parts = [slots(part.flatten(1, 2), None).unflatten(1, (2, -1)) for part in x_LRCM.chunk(num_parts, dim=2)]
    y_LRCM = torch.cat(parts, dim=2)
    kept = int(min(capacity, 8))
    expected = experts(x_LRCM.flatten(0, 2), [16, 16]).view_as(x_LRCM)
    torch.testing.assert_close(y_LRCM[:, :, :kept], expected[:, :, :kept])
    assert not y_LRCM[:, :, kept:].any()
    assert sum(seen[:-1]) == 2 * 2 * kept
    assert list(slots.parameters()) == [], "or upstream casts the tokens to their dtype"


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_batched_experts_are_the_grouped_ones(activation: Activation) -> None:
    spec = LayerSpec(16, 24, 4, 2, activation)
    rows_RM = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))
    outputs = [_experts(kind, spec)(rows_RM, [5, 5]) for kind in (BatchedExperts, GroupedExperts)]
    torch.testing.assert_close(*outputs)


def _experts(kind: type[GroupedExperts], spec: LayerSpec) -> GroupedExperts:
    experts = kind(spec, range(2), torch.device("cpu"))
    for view in experts.views():
        view.view(view.parameter.data).copy_(expert_matrix(spec, view.expert, view.name, "cpu"))
    return experts


def test_slots_tell_what_travelled_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the experts and back, in forward and in backward: four times, also the slots that nothing computes."""
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [0, 1])
    slots = Slots(cast(BatchedExperts, _experts(BatchedExperts, SPEC)), cast(Any, Two()), meter=True)
    slots.capacity = 3
    x_LSM = torch.randn(2, 2 * 8, 16, requires_grad=True)
    meter = LinkMeter(cluster_of([2]), rank=0)
    with meter.installed():
        slots(x_LSM, None).sum().backward()
    assert meter.sent == {(level, "alltoall"): 4 * 2 * 8 * 16 * 4 for level in (0, 1)}
