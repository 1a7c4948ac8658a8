"""Plain expert parallelism: one all-to-all-v over all ranks each way, dropless. What Megatron-LM's `alltoall`
dispatcher does, from the suite's own parts; the system that the others are compared with."""

from __future__ import annotations

from moe.layer import NativeMoE
from moe.mesh import Mesh
from moe.system import LayerSpec, MoELayer, System


class Flat(System):
    """Native expert parallelism with one flat all-to-all-v."""

    name = "flat"
    implementation = "native"
    summary = "plain expert parallelism, all-to-all-v"

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """The native layer with its default parts."""
        return NativeMoE(spec, mesh)
