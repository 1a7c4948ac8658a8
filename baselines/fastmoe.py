"""FastMoE, the upstream package's layer (`fmoe.FMoE`), with the suite's expert network and weights.

Upstream's layer takes its gate as an argument. Its own gates weigh by a softmax over the chosen logits, so the suite's
gate stands in; a copy it drops has the id -1, which upstream neither sends nor computes. The local experts run one by
one, as upstream's own do. Upstream places copies with atomics: sums over tokens differ in their last bits between runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe import metering
from moe.errors import Refused
from moe.experts import ExpertFFN
from moe.gate import Routing, TopKGate
from moe.mesh import Mesh, ranks_are_on_cuda
from moe.system import ExpertView, LayerSpec, MoELayer, MoEOutput, System
from moe.topology import Cluster

NEEDS_CUDA = "FastMoE runs on CUDA and sends over NCCL only; these ranks are on a CPU."


class SuiteGate(nn.Module):
    """The suite's routing in the form that the upstream layer takes: expert ids and weights."""

    def __init__(self, spec: LayerSpec, device: torch.device) -> None:
        super().__init__()
        self.gate = TopKGate(spec, device)
        self.routing: Routing | None = None

    def forward(self, x_TM: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ids [T, K], -1 where the copy is dropped, and weights [T, K] in the dtype of the tokens."""
        self.routing = routing = self.gate(x_TM)
        ids_TK = routing.expert_ids_TK
        kept_ids_TK = ids_TK if routing.kept_TK is None else ids_TK.where(routing.kept_TK, -1)
        return kept_ids_TK, routing.weights_TK.to(x_TM.dtype)


class CountedFFN(ExpertFFN):
    """One expert, called as upstream calls it: with the number of its rows."""

    def forward(self, x: Tensor, _count: Tensor | None = None) -> Tensor:
        """x [R, M] -> [R, M]."""
        return super().forward(x)


class FastMoELayer(MoELayer):
    """Upstream's layer behind the suite's contract."""

    def __init__(self, spec: LayerSpec, mesh: Mesh) -> None:
        super().__init__(spec, mesh)
        if mesh.device.type != "cuda":
            raise Refused(NEEDS_CUDA)
        import fmoe
        import fmoe.functions

        if mesh.ep_size > 1:
            if fmoe.functions.get_moe_group() not in (None, mesh.ep_group):
                raise Refused("FastMoE keeps the first process group it sent over, and this process has used another.")
            _let_meters_count(mesh.ep_group)

        class Gate(SuiteGate):
            """Upstream wants a class, and calls it with sizes."""

            def __init__(self, *_sizes: int) -> None:
                super().__init__(spec, mesh.device)

        self.upstream = fmoe.FMoE(
            num_expert=len(mesh.local_experts(spec.num_experts)),
            d_model=spec.model_dim,
            world_size=mesh.ep_size,
            moe_group=mesh.ep_group,
            top_k=spec.top_k,
            gate=Gate,
            expert=lambda _model_dim: CountedFFN(spec, mesh.device),
        )

    def forward(self, x_TM: Tensor) -> MoEOutput:
        """Route this rank's tokens [T, M]."""
        y_TM = self.upstream(x_TM)
        routing, self.upstream.gate.routing = self.upstream.gate.routing, None
        dropped = torch.zeros_like(routing.counts_E[0]) if routing.kept_TK is None else (~routing.kept_TK).sum()
        return MoEOutput(y_TM, routing.aux_loss, routing.counts_E, dropped, routing.expert_ids_TK)

    @property
    def gate_weight(self) -> nn.Parameter:
        """[E, M]."""
        return self.upstream.gate.gate.weight

    def expert_views(self) -> list[ExpertView]:
        """Upstream's list of local experts, in global order."""
        ids = self.mesh.local_experts(self.spec.num_experts)
        experts = zip(ids, self.upstream.experts, strict=True)
        return [view for expert, module in experts for view in module.views(expert)]

    def stage_modules(self) -> tuple[nn.Module, ...]:
        """The gate and each expert."""
        return self.upstream.gate, *self.upstream.experts


class FastMoE(System):
    """FastMoE as its authors ship it."""

    name = "fastmoe"
    implementation = "upstream"
    summary = "FastMoE: exactly the routed rows, one exchange for each local expert"

    def refusals(self, spec: LayerSpec, cluster: Cluster) -> list[str]:
        """Missing package, or no CUDA."""
        if find_spec("fmoe") is None:
            return ["The package fmoe (FastMoE) is not installed; see https://github.com/laekov/fastmoe."]
        return [] if ranks_are_on_cuda() else [NEEDS_CUDA]

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """Upstream's layer."""
        return FastMoELayer(spec, mesh)


@cache
def _let_meters_count(group: dist.ProcessGroup) -> None:
    """Tell byte meters what upstream's kernels send: they have a communicator of their own."""
    import fmoe_cuda

    def tell(row_bytes: int, rows_E: Tensor) -> None:
        for meter in metering.INSTALLED:
            meter.count_all_to_all((rows_E.view(group.size(), -1).sum(1) * row_bytes).tolist(), group)

    def counting(exchange: Callable[..., Tensor], sends_arrivals: bool) -> Callable[..., Tensor]:
        def counted(rows: Tensor, routed_E: Tensor, arriving_E: Tensor, *sizes: Any) -> Tensor:
            tell(rows.shape[1] * rows.element_size(), arriving_E if sends_arrivals else routed_E)
            return exchange(rows, routed_E, arriving_E, *sizes)

        return counted

    def exchange_counts(
        counts_E: Tensor, *sizes: Any, exchange: Callable[..., Tensor] = fmoe_cuda.expert_exchange
    ) -> Tensor:
        tell(counts_E.element_size(), torch.ones_like(counts_E))
        return exchange(counts_E, *sizes)

    fmoe_cuda.global_scatter = counting(fmoe_cuda.global_scatter, sends_arrivals=False)
    fmoe_cuda.global_gather = counting(fmoe_cuda.global_gather, sends_arrivals=True)
    fmoe_cuda.expert_exchange = exchange_counts
