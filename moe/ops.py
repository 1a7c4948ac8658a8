"""Passes over tokens and copies: in torch, which is the reference and the CPU path, or one Triton kernel each on a GPU.

Dimensions: T tokens, K choices, S copies that are kept, M model, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
MOST_EXPERTS = 1024
"""Of kernels that hold a table of all experts."""
MOST_TERMS = 4
"""Of a sum in one pass."""


def is_fast(tensor: Tensor) -> bool:
    """Whether a tensor lies where `moe.kernels` runs: on a GPU, with Triton installed."""
    return tensor.is_cuda and HAS_TRITON


def kernels() -> ModuleType:
    """`moe.kernels`, imported when first needed: without a GPU there may be no Triton."""
    import moe.kernels

    return moe.kernels


def gather_rows(rows: Tensor, index: Tensor, divisor: int = 1) -> Tensor:
    """rows[index // divisor].

    Args:
        rows: [N, M].
        index: [S] int64.
        divisor: 1, or K where the index counts copies and the rows are tokens.

    Returns:
        [S, M].
    """
    if is_fast(rows):
        return kernels().gather_rows(rows, index, divisor)
    return rows.index_select(0, index if divisor == 1 else index // divisor)


def sum_copies(copies_SM: Tensor, inverse_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """Each token's copies, weighted and summed in choice order.

    Args:
        copies_SM: [S, M].
        inverse_TK: [T, K] int64, row of each copy; S for one that was dropped.
        weights_TK: [T, K], or None for ones.

    Returns:
        [T, M], in the dtype of the copies.
    """
    if is_fast(copies_SM):
        return kernels().sum_copies(copies_SM, inverse_TK, weights_TK)
    if len(copies_SM) < inverse_TK.numel():  # a dropped copy finds a row of zeros behind the others
        copies_SM = torch.cat([copies_SM, copies_SM.new_zeros(1, copies_SM.shape[1])])
    weights = None if weights_TK is None else weights_TK.to(copies_SM.dtype)
    return F.embedding_bag(inverse_TK, copies_SM, per_sample_weights=weights, mode="sum")


def weighted_sum_backward(
    grad_TM: Tensor, copies_SM: Tensor, order: Tensor, inverse_TK: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `sum_copies` with weights.

    Args:
        grad_TM: [T, M], of its result.
        copies_SM, inverse_TK, weights_TK: what it was given.
        order: [S] int64, the inverse of `inverse_TK`.

    Returns:
        of the copies [S, M] and of the weights [T, K], each in its dtype; 0 for dropped copies.
    """
    if is_fast(grad_TM):
        return kernels().weighted_sum_backward(grad_TM, copies_SM, inverse_TK, weights_TK)
    grad_SM = gather_rows(grad_TM, order, weights_TK.shape[1])
    grad_weights_TK = torch.zeros_like(weights_TK)
    grad_weights_TK.view(-1)[order] = torch.linalg.vecdot(grad_SM, copies_SM).to(weights_TK.dtype)
    return grad_SM * weights_TK.flatten()[order].unsqueeze(1).to(copies_SM.dtype), grad_weights_TK


def sum_terms(terms: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The sum of tensors of one shape, in float32, rounded once.

    Args:
        terms: 1 to `MOST_TERMS`, each contiguous.
        dtype: of the result.

    Returns:
        a new tensor, or the only term where it has that dtype.
    """
    total, *rest = terms
    if rest and is_fast(total):
        return kernels().sum_terms(terms, dtype)
    if rest:
        total = total.float() + rest[0]
    for term in rest[1:]:
        total += term
    return total.to(dtype)


def count_choices(expert_ids: Tensor, num_experts: int) -> Tensor:
    """[E] int64, how often each expert stands in an int64 tensor. On a GPU `torch.bincount` would wait for it."""
    if is_fast(expert_ids):
        return kernels().count_choices(expert_ids.flatten().contiguous(), num_experts)
    return torch.bincount(expert_ids.flatten(), minlength=num_experts)


def sort_by_expert(chosen: Tensor, num_experts: int, num_kept: int) -> tuple[Tensor, Tensor]:
    """Stable sort of the copies by expert.

    Args:
        chosen: [T * K] int64 experts; `num_experts` for a dropped copy.
        num_experts: E.
        num_kept: S, how many are not dropped.

    Returns:
        order [S], sorted place -> copy; inverse [T * K], copy -> sorted place, S for a dropped one; int64.
    """
    if is_fast(chosen) and num_experts <= MOST_EXPERTS:
        return kernels().sort_by_expert(chosen, num_experts, num_kept)
    order = torch.argsort(chosen, stable=True)[:num_kept]
    return order, inverse_of(order, len(chosen))


def lay_pieces(
    pieces_4N: NDArray[np.int64], num_here: int, num_there: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Two orders of the same rows, from pieces of them that lie in a row in both.

    Args:
        pieces_4N: where each piece begins here, where there, how many rows it has, and the row that its rows' places
            are counted from. All rows there are in a piece.
        num_here, num_there: rows of each order.
        device: of the results.

    Returns:
        [num_there] int64, each row's place here; [num_here] int64, likewise there, `num_there` for one in no piece.
    """
    pieces_4N = np.ascontiguousarray(pieces_4N[:, pieces_4N[2] > 0])
    here, there, sizes, begins = pieces_4N
    if device.type == "cuda" and HAS_TRITON:
        return kernels().lay_pieces(on_device(pieces_4N, device), int(sizes.max(initial=0)), num_here, num_there)
    rows = np.arange(sizes.sum()) - (sizes.cumsum() - sizes).repeat(sizes)
    here, there, begins = here.repeat(sizes) + rows, there.repeat(sizes) + rows, begins.repeat(sizes)
    here_of, there_of = np.empty(num_there, dtype=np.int64), np.full(num_here, num_there)
    here_of[there], there_of[here] = here - begins, there - begins
    return on_device(here_of, device), on_device(there_of, device)


def on_device(numbers: NDArray[Any], device: torch.device) -> Tensor:
    """An array of the host on a device; of a GPU the host waits for nothing, since it goes from pinned memory."""
    told = torch.from_numpy(numbers)
    return told.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else told


def inverse_of(order: Tensor, length: int) -> Tensor:
    """[length] int64: at order[i] it is i, and len(order) at places that `order` does not hold."""
    inverse = torch.full((length,), len(order), dtype=order.dtype, device=order.device)
    inverse[order] = torch.arange(len(order), dtype=order.dtype, device=order.device)
    return inverse
