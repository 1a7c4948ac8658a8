"""How popular experts are, summed over ranks (SYMI, arXiv 2504.19925, section 3.2).

Dimensions: Z layers, E experts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from moe.mesh import Mesh


class Popularity:
    """Copies that chose each expert in a step's forward pass, over all ranks and before drops, of all layers in one
    message (ours; SYMI sums each layer's amid its forward pass), and on a GPU on their way to the host. Collective.

    Args:
        counts_ZE: [Z, E] int64 of this rank; overwritten.
        mesh: of the run.
    """

    def __init__(self, counts_ZE: Tensor, mesh: Mesh) -> None:
        if mesh.world_size > 1:
            dist.all_reduce(counts_ZE)
        self._counts_ZE, self._arrived = counts_ZE, None
        self._known: list[list[int]] | None = None
        if counts_ZE.is_cuda:
            self._counts_ZE = torch.empty(counts_ZE.shape, dtype=counts_ZE.dtype, pin_memory=True)
            self._counts_ZE.copy_(counts_ZE, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def counts(self, layer: int) -> list[int]:
        """[E] of a layer. The host waits for them when asked first, and for nothing that was queued later."""
        if self._known is None:
            if self._arrived is not None:
                self._arrived.synchronize()
            self._known = self._counts_ZE.tolist()
        return self._known[layer]
