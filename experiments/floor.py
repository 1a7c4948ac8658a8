"""What a layer of expert parallelism takes without anything around it: its experts' matrix products and four bare
all-to-alls of every routed copy.

A system can be faster: one that computes while it communicates, that sends a token once to a rank that it chose several
experts of, or that needs no messages.

Dimensions: R rows of this rank's L experts, S copies this rank sends, P ranks, M model, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moe import ops
from moe.experts import outer_per_expert, per_expert
from moe.mesh import Mesh
from moe.system import LayerSpec


def floor_step(spec: LayerSpec, expert_ids_TK: Tensor, mesh: Mesh) -> Callable[[], None]:
    """A step of exactly that work, forward and backward, on the rows and bytes of a routing. Collective.

    Args:
        spec: of the layer.
        expert_ids_TK: [T, K] int64, what this rank's tokens choose.
        mesh: of the run.

    Returns:
        does the products of one forward (rows by the inner and the outer matrices) and of one backward (twice as many),
        and the all-to-alls of dispatch, combine and their gradients. Its operands are random, allocated here.
    """
    counts_E = torch.bincount(expert_ids_TK.flatten(), minlength=spec.num_experts).to(mesh.device)
    if spec.capacity_factor is not None:
        counts_E = counts_E.clamp_max(spec.capacity(len(expert_ids_TK)))
    arriving_E = counts_E.clone()
    if mesh.ep_size > 1:
        dist.all_to_all_single(arriving_E, counts_E, group=mesh.ep_group)
    send_rows, receive_rows = (counts.view(mesh.ep_size, -1).sum(1).tolist() for counts in (counts_E, arriving_E))
    expert_rows = arriving_E.view(mesh.ep_size, -1).sum(0).tolist()
    num_local, num_rows, model_dim = len(expert_rows), sum(expert_rows), spec.model_dim

    def drawn(*shape: int) -> Tensor:  # products of zeros would be faster
        return torch.randn(shape, device=mesh.device, dtype=spec.dtype)

    width = spec.hidden_dim * (2 if spec.activation == "swiglu" else 1)
    w_in, w_out = drawn(num_local, width, model_dim), drawn(num_local, model_dim, spec.hidden_dim)
    copies, rows = drawn(sum(send_rows), model_dim), drawn(num_rows, model_dim)
    hidden, activation = drawn(num_rows, width), drawn(num_rows, spec.hidden_dim)
    ends = torch.tensor(expert_rows, device=mesh.device).cumsum(0, dtype=torch.int32)
    grouped = ops.is_fast(rows) and spec.dtype == torch.bfloat16 and num_rows > 0

    def multiply(left: Tensor, weight: Tensor) -> Tensor:
        if grouped:
            return F.grouped_mm(left, weight.mT, offs=ends)
        return per_expert(left, weight, expert_rows)

    def outer(left: Tensor, right: Tensor) -> Tensor:
        return F.grouped_mm(left.t(), right, offs=ends) if grouped else outer_per_expert(left, right, expert_rows)

    def exchange(received: Tensor, sent: Tensor, receive: list[int], send: list[int]) -> None:
        if mesh.ep_size > 1:
            dist.all_to_all_single(received, sent, receive, send, group=mesh.ep_group)

    def step() -> None:
        exchange(rows, copies, receive_rows, send_rows)
        multiply(rows, w_in)
        multiply(activation, w_out)
        exchange(copies, rows, send_rows, receive_rows)
        exchange(rows, copies, receive_rows, send_rows)
        multiply(rows, w_out.mT)
        outer(rows, activation)
        multiply(hidden, w_in.mT)
        outer(hidden, rows)
        exchange(copies, rows, send_rows, receive_rows)

    return step
