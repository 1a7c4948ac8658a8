"""What goes between a GPU and the host's memory when SwiftMoE's optimizer is offloaded (SYMI, arXiv 2504.19925, section
3.3): gradients of shards there, new weights back, beside what the GPU does meanwhile. Without a GPU the same copies are
made in place of those, at once.

Dimensions: E experts, F numbers of a shard.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all layers of a GPU, so that its copies go in the order of layers."""
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]


class HostBuffers:
    """A layer's messages in the host's memory, pinned where there is a GPU.

    Args:
        shape: E, F.
        dtype: of the weights that go back.
        device: where the layer computes.

    Attributes:
        place: arguments of torch's factories for more such memory.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        self.place: dict[str, Any] = {"device": "cpu", "pin_memory": self.on_gpu}
        self._grad_EF = torch.empty(shape, dtype=torch.float32, **self.place)
        self._weights_EF = torch.empty(shape, dtype=dtype, **self.place)
        self._grad_came: torch.cuda.Event | None = None
        self._weights_went: torch.cuda.Event | None = None

    def take_gradient(self, grad_EF: Tensor) -> None:
        """Start to bring a gradient [E, F] float32 to the host."""
        if not self.on_gpu:
            self._grad_EF.copy_(grad_EF)
            return
        stream = _copy_stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._grad_EF.copy_(grad_EF, non_blocking=True)
            self._grad_came = stream.record_event()
        grad_EF.record_stream(stream)

    def gradient(self) -> Tensor:
        """The last gradient taken, [E, F] float32, once it is there: the host's optimizer has to wait for it. Valid
        until the next one."""
        if self._grad_came is not None:
            self._grad_came.synchronize()
        return self._grad_EF

    def weights(self, master_EF: Tensor) -> Tensor:
        """Master weights [E, F] of the host on the device, in the dtype of the arithmetic; what is queued next there
        waits for them."""
        if self._weights_went is not None:
            self._weights_went.synchronize()  # long ago, unless slots are filled twice in a row
        self._weights_EF.copy_(master_EF)
        if not self.on_gpu:
            return self._weights_EF
        stream, here = _copy_stream(self.device), torch.cuda.current_stream(self.device)
        with torch.cuda.stream(stream):
            weights_EF = self._weights_EF.to(self.device, non_blocking=True)
            self._weights_went = stream.record_event()
        here.wait_stream(stream)
        weights_EF.record_stream(here)
        return weights_EF
