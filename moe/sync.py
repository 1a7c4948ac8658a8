"""Reduction of gradients once backward has ended. A system may bring its own (a method that slices or overlaps it)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe.step_parts import step_part

if TYPE_CHECKING:
    from moe.mesh import Mesh


class GradientSync:
    """Averages gradients so that every system optimises the mean loss over all ranks' tokens.

    Dense gradients: all-reduce, divided by the world size. Gradients of sharded experts already hold the sum over the
    tokens of their expert-parallel group; they are reduced over the replicas of the expert and divided alike. Gradients
    of local parameters are divided only.

    Args:
        model: all its parameters with a gradient are reduced.
        sharded: those parameters of `model` that live on some ranks only.
        mesh: groups of the run.
        local: those that every rank trains for itself.
        owned: those that a subclass reduces, each number of them on one rank only (unless the subclass counts their
            squares otherwise).
    """

    def __init__(
        self,
        model: nn.Module,
        sharded: Sequence[nn.Parameter],
        mesh: Mesh,
        local: Sequence[nn.Parameter] = (),
        owned: Sequence[nn.Parameter] = (),
    ) -> None:
        ids = {id(parameter) for parameter in [*sharded, *local, *owned]}
        self.mesh = mesh
        self.sharded, self.local, self.owned = list(sharded), list(local), list(owned)
        self.dense = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]

    def reduce(self) -> None:
        """Reduce every gradient in place. Collective."""
        with step_part("dense_gradients"):
            self.reduce_dense()
        with step_part("expert_gradients"):
            _reduce_bucket(self.sharded, self.mesh.edp_group, self.mesh.edp_size, self.mesh.world_size)
        _reduce_bucket(self.local, None, 1, self.mesh.world_size)

    def reduce_dense(self) -> None:
        """The dense ones of them. Collective."""
        _reduce_bucket(self.dense, dist.group.WORLD, self.mesh.world_size, self.mesh.world_size)

    def clip(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their global norm is at most `max_norm` (0: leave them). Collective.

        Returns:
            The norm before scaling, over each parameter of the whole model once; scalar float32, equal on all ranks.
        """
        device = self.mesh.device
        not_dense = self.squares_not_dense()
        dist.all_reduce(not_dense)
        norm = (sum_of_squares(self.dense, device) + not_dense).sqrt()
        if max_norm > 0:
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            by_device: dict[torch.device, list[Tensor]] = {}  # an optimizer may be in the host's memory
            for grad in _gradients(self.dense + self.sharded + self.local + self.owned):
                by_device.setdefault(grad.device, []).append(grad)
            for place, grads in by_device.items():
                torch._foreach_mul_(grads, scale.to(place))
        return norm

    def squares_not_dense(self) -> Tensor:
        """Sum of squares of all gradients but the dense ones, this rank's part, scalar float32: the parts of all ranks
        together hold each parameter of the whole model once."""
        device = self.mesh.device
        alone = sum_of_squares(self.local, device) + sum_of_squares(self.owned, device)  # perhaps on the host
        return sum_of_squares(self.sharded, device) / self.mesh.edp_size + alone


def _gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def sum_of_squares(parameters: Sequence[nn.Parameter], device: torch.device) -> Tensor:
    """Of the gradients that there are, scalar float32 on `device`."""
    grads = _gradients(parameters)
    if not grads:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(grads, dtype=torch.float32)).square().sum().to(device)


def _reduce_bucket(
    parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None, group_size: int, divisor: int
) -> None:
    for parameter in parameters:  # a parameter unused this step on this rank still takes part in the collective
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads = _gradients(parameters)
    if not grads:
        return
    if group_size == 1:
        torch._foreach_div_(grads, divisor)
        return
    bucket = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(bucket, group=group)
    bucket /= divisor
    parts = bucket.split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])
