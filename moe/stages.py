"""Stage times of an MoE layer of any system, from hooks on its gate and experts modules.

Forward: gate until the gate module returns, dispatch until the experts are called, experts until they return, combine
until the layer returns. Backward, in the order in which gradients arrive: combine from the layer's output to the
experts' output, experts to the experts' input, dispatch until autograd enters the gate (which it does last, since the
gate ran first), gate to the layer's input.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moe.system import MoELayer

STAGES = ("gate", "dispatch", "experts", "combine")
"""Stages of a layer, in the order of the forward pass."""


class StageClock:
    """Records when each stage of some layers ends.

    Args:
        layers: of one system; a call of `timed` covers them all.
    """

    def __init__(self, layers: list[MoELayer]) -> None:
        self.layers = layers
        self.on_cuda = bool(layers) and layers[0].mesh.device.type == "cuda"
        self._marks: dict[tuple[int, str, str], Any] = {}

    def stage_times_s(self) -> dict[str, float]:
        """Seconds by `forward/<stage>` and `backward/<stage>`, summed over the layers, of the last `timed` block."""
        if self.on_cuda:
            torch.cuda.synchronize()
        totals: dict[str, float] = {}
        for direction, order in (("forward", STAGES), ("backward", STAGES[::-1])):
            for stage, before in zip(order, ("start", *order), strict=False):
                spans = [self._span(index, direction, before, stage) for index in range(len(self.layers))]
                totals[f"{direction}/{stage}"] = sum(spans)
        return totals

    def _span(self, layer: int, direction: str, start: str, end: str) -> float:
        first, last = self._marks.get((layer, direction, start)), self._marks.get((layer, direction, end))
        if first is None or last is None:  # no backward was run, or the gate has no gradient
            return 0.0
        seconds = first.elapsed_time(last) / 1e3 if self.on_cuda else last - first
        return max(0.0, seconds)  # experts that read the layer's own input (the oracle's) have no dispatch before them

    @contextmanager
    def timed(self) -> Iterator[StageClock]:
        """Hook the layers for one forward and backward. Remove the hooks afterwards."""
        self._marks.clear()
        handles = [handle for index, layer in enumerate(self.layers) for handle in self._hook(index, layer)]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _mark(self, layer: int, direction: str, name: str) -> None:
        if self.on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks[layer, direction, name] = event
        else:
            self._marks[layer, direction, name] = time.perf_counter()

    def _mark_once(self, layer: int, direction: str, name: str) -> None:
        if (layer, direction, name) not in self._marks:
            self._mark(layer, direction, name)

    def _hook(self, index: int, layer: MoELayer) -> list[Any]:
        gate, *experts = layer.stage_modules()

        def on_gradient(value: Any, name: str) -> None:
            tensors = [item for item in _tensors(value) if item.requires_grad and item.is_floating_point()]
            if tensors:
                tensors[0].register_hook(lambda _grad: self._mark(index, "backward", name))

        def layer_starts(_module: Any, args: Any) -> None:
            self._mark(index, "forward", "start")
            on_gradient(args, "gate")

        def gate_ends(_module: Any, _args: Any, output: Any) -> None:
            self._mark(index, "forward", "gate")
            for tensor in _tensors(output):
                if tensor.grad_fn is not None:
                    tensor.grad_fn.register_prehook(lambda _grads: self._mark_once(index, "backward", "dispatch"))

        def experts_start(_module: Any, args: Any) -> None:
            self._mark(index, "forward", "dispatch")
            on_gradient(args, "experts")

        def experts_end(_module: Any, _args: Any, output: Any) -> None:
            self._mark(index, "forward", "experts")
            on_gradient(output, "combine")

        def layer_ends(_module: Any, _args: Any, output: Any) -> None:
            self._mark(index, "forward", "combine")
            on_gradient(output, "start")

        return [
            layer.register_forward_pre_hook(layer_starts),
            gate.register_forward_hook(gate_ends),
            experts[0].register_forward_pre_hook(experts_start),
            experts[-1].register_forward_hook(experts_end),
            layer.register_forward_hook(layer_ends),
        ]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
