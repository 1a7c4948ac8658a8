"""How popular experts are, summed over ranks beside the forward pass (SYMI, arXiv 2504.19925, section 3.2).

Dimensions: E experts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from moe.mesh import Mesh


class Popularity:
    """Copies that chose each expert in one forward pass, over all ranks and before drops (SYMI, section 3.2, step 1):
    summed, and on a GPU brought to the host, while the layer goes on. Collective.

    Args:
        counts_E: [E] int64 of this rank.
        mesh: of the run.
    """

    def __init__(self, counts_E: Tensor, mesh: Mesh) -> None:
        self._counts_E = counts_E.clone()
        self._work = dist.all_reduce(self._counts_E, async_op=True) if mesh.world_size > 1 else None
        self._arrived: torch.cuda.Event | None = None
        if counts_E.is_cuda:
            stream = copy_stream(mesh.device)
            stream.wait_stream(torch.cuda.current_stream(mesh.device))
            with torch.cuda.stream(stream):
                if self._work is not None:
                    self._work.wait()  # this stream does, not the host
                on_host_E = torch.empty(counts_E.shape, dtype=counts_E.dtype, pin_memory=True)
                on_host_E.copy_(self._counts_E, non_blocking=True)
                self._arrived = torch.cuda.Event()
                self._arrived.record()
            self._counts_E.record_stream(stream)
            self._counts_E = on_host_E

    def counts(self) -> list[int]:
        """[E]; waits for them on the host, and for nothing that was queued later."""
        if self._arrived is not None:
            self._arrived.synchronize()
        elif self._work is not None:
            self._work.wait()
        return self._counts_E.tolist()


_COPY_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU on which SwiftMoE copies to and from the host beside its other work."""
    if device not in _COPY_STREAMS:
        _COPY_STREAMS[device] = torch.cuda.Stream(device)
    return _COPY_STREAMS[device]
