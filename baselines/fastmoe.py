"""FastMoE, the upstream package's layer (`fmoe.FMoE`), with the suite's expert network and weights.

Upstream's layer takes its gate as an argument. Its own gates weigh by a softmax over the chosen logits, so the suite's
gate stands in unless one of them is asked for; a copy that a gate drops has the id -1, which upstream neither sends nor
computes. The local experts run one by one, as upstream's own do. Upstream places copies with atomics: sums over tokens
differ in their last bits between runs.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from baselines.fastmoe_gates import Options, SuiteGate, UpstreamGate
from baselines.fmoe_package import (
    MISSING,
    NEEDS_CUDA,
    PACKAGE,
    PLAIN,
    Switches,
    import_upstream,
    other_switches,
    require_cuda,
    send_over,
)
from moe.experts import ExpertFFN
from moe.mesh import Mesh, ranks_are_on_cuda
from moe.system import ExpertView, LayerSpec, MoELayer, MoEOutput, System
from moe.topology import Cluster


class CountedFFN(ExpertFFN):
    """One expert, called as upstream calls it: with the number of its rows."""

    def forward(self, x: Tensor, _count: Tensor | None = None) -> Tensor:
        """x [R, M] -> [R, M]."""
        return super().forward(x)


class FastMoELayer(MoELayer):
    """Upstream's layer behind the suite's contract.

    Args:
        spec: what to compute.
        mesh: where.
        options: say which gate routes.
        switches: of upstream's process.

    Raises:
        Refused: on a CPU, and where this process has used upstream in another way.
    """

    def __init__(self, spec: LayerSpec, mesh: Mesh, options: Options, switches: Switches = PLAIN) -> None:
        super().__init__(spec, mesh)
        require_cuda(mesh.device)
        fmoe = import_upstream(switches)
        if mesh.ep_size > 1:
            send_over(mesh.ep_group, fmoe.functions)

        class Gate(nn.Module):
            """Upstream wants a class, and calls it with sizes."""

            def __new__(cls, *_sizes: int) -> Any:
                return SuiteGate(spec, mesh.device) if options.gate == "suite" else UpstreamGate(spec, mesh, options)

        self.options = options
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
        return self.upstream.gate.tell(y_TM)

    @property
    def gate_weight(self) -> nn.Parameter:
        """[E, M]."""
        return self.upstream.gate.weight

    @property
    def path(self) -> str:
        """Which of upstream's gates routes; empty for the suite's."""
        return "" if self.options.gate == "suite" else f"upstream's gate {self.options.gate}"

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
    Options = Options

    def refusals(self, spec: LayerSpec, cluster: Cluster) -> list[str]:
        """Missing package, no CUDA, a gate that can't, or a process that has FasterMoE's switches on."""
        if find_spec(PACKAGE) is None:
            return [MISSING]
        reasons = [] if ranks_are_on_cuda() else [NEEDS_CUDA]
        return [*reasons, *self.options.refusals(spec), *other_switches(PLAIN)]

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """Upstream's layer."""
        return FastMoELayer(spec, mesh, self.options)
