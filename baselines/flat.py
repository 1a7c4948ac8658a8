"""Plain expert parallelism, dropless, from the suite's own parts; the system that the others are compared with.

Between nodes and on CPUs: one all-to-all-v over all ranks each way, what Megatron-LM's `alltoall` dispatcher does.
Among the GPUs of one node: the same through memory that they share (`moe.peer_dispatch`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from moe import ops
from moe.dispatch import AllToAllDispatcher
from moe.errors import Refused
from moe.layer import NativeMoE
from moe.mesh import Mesh
from moe.peer_dispatch import PeerDispatcher
from moe.peers import peers_reach_each_other
from moe.system import LayerSpec, MoELayer, System


class Options(BaseModel):
    """Options of conf/system/flat.yaml.

    Args:
        dispatcher: `all_to_all`, `peer` (shared memory; GPUs of one node) or `auto`: the latter where it can run.
    """

    model_config = ConfigDict(extra="forbid")
    dispatcher: Literal["auto", "all_to_all", "peer"] = "auto"


class Flat(System):
    """Native expert parallelism with one flat exchange each way."""

    name = "flat"
    implementation = "native"
    summary = "plain expert parallelism, all-to-all-v"
    Options = Options

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """The native layer with its default parts, or the dispatcher that was asked for."""
        kind = self.options.dispatcher
        if kind == "all_to_all":
            return NativeMoE(spec, mesh, dispatcher=AllToAllDispatcher(mesh, spec.num_experts))
        if kind == "peer":
            if not (ops.HAS_TRITON and peers_reach_each_other(mesh)):
                raise Refused(
                    "flat's dispatcher=peer needs Triton and GPUs of one node that reach each other's memory."
                )
            return NativeMoE(spec, mesh, dispatcher=PeerDispatcher(mesh, spec))
        return NativeMoE(spec, mesh)
