"""Tokens to copies and back by products with matrices of zeros and ones, as GShard writes them (einsum), in place of
`moe.dispatch.expand` and `weighted_sum`, which move rows. The same numbers, for S T M multiply-adds each.

Dimensions: T tokens, K choices, M model, S copies that are kept.
"""

from __future__ import annotations

from torch import Tensor


def dense_expand(x_TM: Tensor, order: Tensor, inverse_TK: Tensor) -> Tensor:
    """Tokens [T, M] to their kept copies [S, M], differentiable; arguments as of `moe.dispatch.expand`."""
    mask_ST = x_TM.new_zeros(len(order), len(x_TM))
    mask_ST.scatter_(1, (order // inverse_TK.shape[1]).unsqueeze(1), 1)
    return mask_ST @ x_TM


def dense_weighted_sum(copies_SM: Tensor, weights_TK: Tensor, order: Tensor, inverse_TK: Tensor) -> Tensor:
    """Copies [S, M] to tokens [T, M], weighted, differentiable; arguments as of `moe.dispatch.weighted_sum`."""
    num_copies = len(order)  # a dropped copy's weight goes into a column behind the others
    weights_TS = weights_TK.new_zeros(len(inverse_TK), num_copies + 1).scatter(1, inverse_TK, weights_TK)
    return weights_TS[:, :num_copies].to(copies_SM.dtype) @ copies_SM
