"""Launches of Triton kernels with the look-up cut short: small layers are bound by what launches cost the host.

Triton finds the compiled kernel anew at every launch, from the type, the alignment and the divisibility of each
argument; that takes longer than the launch itself. Kernels here declare their numbers `do_not_specialize`, so that what
is left, constants, types and alignment, makes a key.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

_COMPILED: dict[tuple[Any, ...], Any] = {}
LARGEST = 2**31 - 1


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Tensor, ...],
    numbers: tuple[int | float, ...] = (),
    constants: tuple[int | bool, ...] = (),
    num_warps: int = 4,
) -> None:
    """Run a kernel whose parameters are, in this order, tensors, numbers and constants.

    Args:
        kernel: of `triton.jit`, with `do_not_specialize` of the numbers.
        grid: one to three numbers of programs, all above 0.
        tensors: on one device, the current one.
        numbers: that may change from call to call.
        constants: for each of whose values there is a kernel of its own.
        num_warps: of a program.
    """
    kinds = [(tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors]
    wide = [number > LARGEST for number in numbers]
    key = (kernel, tensors[0].device, constants, num_warps, *kinds, *wide)
    compiled = _COMPILED.get(key)
    if compiled is None:
        compiled = kernel[grid](*tensors, *numbers, *constants, num_warps=num_warps)
        if compiled is not None:  # the interpreter compiles nothing
            _COMPILED[key] = compiled
        return
    compiled[(*grid, 1, 1)[:3]](*tensors, *numbers, *constants)
