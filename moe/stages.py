"""Stage times of an MoE layer of any system, from hooks on its gate and experts modules.

Forward: gate until the gate module returns, dispatch until the experts are called, experts until they return, combine
until the layer returns. Backward, in the order in which gradients arrive: combine from the layer's output to the
experts' output, experts to the experts' input, dispatch until autograd enters the gate (which it does last, since the
gate ran first), gate to the layer's input.

What a training step does outside of its layers is told by who does it (`moe.step_parts`), and timed by the same clock.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe.step_parts import HOST_PARTS, PARTS, RUNNING
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
        self._parts: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

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

    def part_times_s(self) -> dict[str, float]:
        """Seconds of all of `moe.step_parts.PARTS` in the last `timed` block, 0 for those that were not done. On a GPU
        of its queue, but for HOST_PARTS."""
        if self.on_cuda:
            torch.cuda.synchronize()
        return {
            name: sum((_seconds(first, last, self._on_queue(name)) for first, last in self._parts[name]), 0.0)
            for name in PARTS
        }

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """As `moe.step_parts.PartClock.part`."""
        first = _now(self._on_queue(name))
        yield
        self._parts[name].append((first, _now(self._on_queue(name))))

    def _on_queue(self, name: str) -> bool:
        return self.on_cuda and name not in HOST_PARTS

    def _span(self, layer: int, direction: str, start: str, end: str) -> float:
        first, last = self._marks.get((layer, direction, start)), self._marks.get((layer, direction, end))
        if first is None or last is None:  # no backward was run, or the gate has no gradient
            return 0.0
        # Experts that read the layer's own input (the oracle's) have no dispatch before them.
        return max(0.0, _seconds(first, last, self.on_cuda))

    @contextmanager
    def timed(self) -> Iterator[StageClock]:
        """Hook the layers for one forward and backward, and hear of the step's parts. Remove the hooks afterwards."""
        self._marks.clear()
        self._parts.clear()
        handles = [handle for index, layer in enumerate(self.layers) for handle in self._hook(index, layer)]
        RUNNING.append(self)
        try:
            yield self
        finally:
            RUNNING.remove(self)
            for handle in handles:
                handle.remove()

    def _mark(self, layer: int, direction: str, name: str) -> None:
        self._marks[layer, direction, name] = _now(self.on_cuda)

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

        handles = [
            layer.register_forward_pre_hook(layer_starts),
            gate.register_forward_hook(gate_ends),
            layer.register_forward_hook(layer_ends),
        ]
        if layer.stage_listeners is not None:
            return [*handles, _Told(layer.stage_listeners, partial(self._mark, index))]
        return [
            *handles,
            experts[0].register_forward_pre_hook(experts_start),
            experts[-1].register_forward_hook(experts_end),
        ]


class _Told:
    """A place among a layer's listeners, as a handle of a hook."""

    def __init__(self, listeners: list[Any], listener: Any) -> None:
        self.listeners, self.listener = listeners, listener
        listeners.append(listener)

    def remove(self) -> None:
        self.listeners.remove(self.listener)


def _now(on_queue: bool) -> Any:
    """A moment of the GPU's queue, else the host's seconds."""
    if not on_queue:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(first: Any, last: Any, on_queue: bool) -> float:
    return float(first.elapsed_time(last) / 1e3 if on_queue else last - first)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
