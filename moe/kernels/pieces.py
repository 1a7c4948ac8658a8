"""Orders of rows from pieces of them. Dimensions: N pieces."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.launch import launch

_BLOCK = 1024


@triton.jit(do_not_specialize=["num_pieces"])
def _lay_pieces(pieces, here_of, there_of, num_pieces, BLOCK: tl.constexpr):
    piece = pieces + tl.program_id(0)
    here, there = tl.load(piece), tl.load(piece + num_pieces)
    size, begin = tl.load(piece + 2 * num_pieces), tl.load(piece + 3 * num_pieces)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = row < size
    tl.store(here_of + there + row, here + row - begin, mask=inside)
    tl.store(there_of + here + row, there + row - begin, mask=inside)


def lay_pieces(pieces_4N: Tensor, longest: int, num_here: int, num_there: int) -> tuple[Tensor, Tensor]:
    """As `moe.ops.lay_pieces`.

    Args:
        pieces_4N: int64, contiguous.
        longest: rows of a piece at most.
        num_here, num_there: rows of the orders.
    """
    device, num_pieces = pieces_4N.device, pieces_4N.shape[1]
    here_of = torch.empty(num_there, dtype=torch.int64, device=device)
    if num_here == num_there:
        there_of = torch.empty(num_here, dtype=torch.int64, device=device)
    else:
        there_of = torch.full((num_here,), num_there, dtype=torch.int64, device=device)
    if longest:
        grid = (num_pieces, triton.cdiv(longest, _BLOCK))
        launch(_lay_pieces, grid, (pieces_4N, here_of, there_of), (num_pieces,), (_BLOCK,))
    return here_of, there_of
