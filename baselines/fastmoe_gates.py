"""FastMoE's own gates (`fmoe.gates`) as its layer calls them, with the suite's matrix and what the suite asks to know.

They route by the logits of a matrix without bias, in float32, and weigh by a softmax over the chosen logits (`switch`
over all). Upstream samples by default; here it does so only where an option asks for it, but for `noisy`, which is
sampling. Upstream's capacities are set so that an expert has the room that the suite's rule gives it: `gshard` for the
copies of each rank, `dc` and `switch` for those of all ranks together. Which copies then drop, atomics decide.

Balance losses are upstream's. Those of `gshard` and `dc` are E_local^2 * mean_e(f_e p_e), with E_local experts a rank,
and are multiplied by (E / E_local)^2, which makes them `moe.gate.balance_loss`; `switch` counts kept copies only;
`noisy` has squared coefficients of variation (Shazeer et al. 2017), on a scale of their own; `naive` has none.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from baselines.replacing import replaced
from moe import ops
from moe.gate import Routing, TopKGate
from moe.mesh import Mesh
from moe.system import LayerSpec, MoEOutput
from moe.weights import seeded_generator

ROOM_FOR_ALL = 2**30
"""A capacity that nothing reaches, within the int32 of upstream's kernels."""

TOP_K = {"gshard": 2, "dc": 2, "switch": 1}
"""The only K of gates that know one only; the others know no capacity."""


class Options(BaseModel):
    """Options of conf/system/fastmoe.yaml; upstream's names.

    Args:
        gate: `suite`, or which of upstream's.
        random_routing: `gshard` and `dc` drop a second choice at random, with probability 1 - 2 * its weight; upstream
            does by default.
        switch_eps: half the width of the noise that `switch` adds to its logits in training; upstream's default is 0.1.
    """

    model_config = ConfigDict(extra="forbid")
    gate: Literal["suite", "naive", "noisy", "gshard", "dc", "switch"] = "suite"
    random_routing: bool = False
    switch_eps: float = Field(default=0.0, ge=0, le=1)

    def refusals(self, spec: LayerSpec) -> list[str]:
        """Why the gate can't route this layer; empty when it can."""
        reasons, gate = [], self.gate
        if gate in TOP_K and spec.top_k != TOP_K[gate]:
            reasons.append(f"FastMoE's gate {gate} knows only top_k={TOP_K[gate]}; set that, or gate=naive.")
        if gate in ("naive", "noisy") and spec.capacity_factor is not None:
            reasons.append(f"FastMoE's gate {gate} drops nothing; set capacity_factor=null, or gate=gshard.")
        if self.random_routing and gate not in ("gshard", "dc"):
            reasons.append("random_routing is a choice of FastMoE's gates gshard and dc only; set one of them.")
        if self.switch_eps > 0 and gate != "switch":
            reasons.append("switch_eps is the noise of FastMoE's gate switch only; set gate=switch.")
        return reasons


class SuiteGate(nn.Module):
    """The suite's routing in the form that the upstream layer takes: expert ids and weights."""

    def __init__(self, spec: LayerSpec, device: torch.device) -> None:
        super().__init__()
        self.gate = TopKGate(spec, device)
        self.routing: Routing | None = None

    @property
    def weight(self) -> nn.Parameter:
        """[E, M]."""
        return self.gate.weight

    def forward(self, x_TM: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ids [T, K], -1 where the copy is dropped, and weights [T, K] in the dtype of the tokens."""
        self.routing = routing = self.gate(x_TM)
        ids_TK = routing.expert_ids_TK
        kept_ids_TK = ids_TK if routing.kept_TK is None else ids_TK.where(routing.kept_TK, -1)
        return kept_ids_TK, routing.weights_TK.to(x_TM.dtype)

    def tell(self, y_TM: Tensor) -> MoEOutput:
        """What the last call decided, beside the layer's output [T, M]; it is forgotten here."""
        routing, self.routing = self.routing, None
        assert routing is not None, "no call to tell of"
        return MoEOutput(y_TM, routing.aux_loss, routing.counts_E, routing.num_dropped, routing.expert_ids_TK)


class UpstreamGate(nn.Module):
    """One of upstream's gates; called like `SuiteGate`.

    Args:
        spec: of the layer.
        mesh: of the run.
        options: say which gate.
    """

    def __init__(self, spec: LayerSpec, mesh: Mesh, options: Options) -> None:
        super().__init__()
        self.spec, self.num_ranks, self.kind = spec, mesh.ep_size, options.gate
        self.num_local = len(mesh.local_experts(spec.num_experts))
        sizes = (spec.model_dim, self.num_local, self.num_ranks, spec.top_k)
        self.upstream = _build(options, sizes, ("noise", spec.seed, spec.layer_index)).to(mesh.device)
        self.told: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def weight(self) -> nn.Parameter:
        """[E, M]."""
        return self.upstream.parametrizations.w_gate.original if self.kind == "noisy" else self.upstream.gate.weight

    def forward(self, x_TM: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ids [T, K], -1 where the copy is dropped, and weights [T, K] in the dtype of the tokens."""
        import fmoe_cuda

        rate = self._capacity_rate(len(x_TM))
        self.upstream.capacity = (rate, rate)
        chosen: list[Tensor] = []
        prune = fmoe_cuda.prune_gate_by_capacity

        def noting_choices(ids_TK: Tensor, *limits: Any) -> Tensor:
            chosen.append(ids_TK)
            return prune(ids_TK, *limits)

        with replaced(fmoe_cuda, "prune_gate_by_capacity", noting_choices):
            ids, weights = self.upstream(x_TM.float())
        ids_TK = ids.view(-1, self.spec.top_k)
        loss = self.upstream.get_loss().float().sum()
        if self.kind in ("gshard", "dc"):
            loss = loss * self.num_ranks**2
        self.told = chosen[0] if chosen else ids_TK, ids_TK, loss
        return ids_TK, weights.view_as(ids_TK).to(x_TM.dtype)

    def tell(self, y_TM: Tensor) -> MoEOutput:
        """What the last call decided, beside the layer's output [T, M]; it is forgotten here."""
        assert self.told is not None, "no call to tell of"
        (chosen_TK, kept_TK, loss), self.told = self.told, None
        counts_E = ops.count_choices(chosen_TK, self.spec.num_experts)
        return MoEOutput(y_TM, loss, counts_E, (kept_TK < 0).sum(), chosen_TK)

    def _capacity_rate(self, num_tokens: int) -> float:
        """Upstream's `capacity`, by which it multiplies the tokens of a rank; the half keeps off rounding's edge."""
        spec, room = self.spec, ROOM_FOR_ALL
        if spec.capacity_factor is not None:
            capacity = spec.capacity(num_tokens)
            if self.kind == "gshard":  # makes room for room * K // E
                room = math.ceil(capacity * spec.num_experts / spec.top_k)
            else:
                room = self.num_ranks * capacity
        per_rate = num_tokens / self.num_local if self.kind == "switch" else num_tokens
        return (room - 0.5) / (per_rate or 1)


class _Transposed(nn.Module):
    """The suite's [E, M] in the optimiser's dtype as upstream's [M, E] in float32."""

    def forward(self, weight_EM: Tensor) -> Tensor:
        return weight_EM.float().t()

    def right_inverse(self, weight_ME: Tensor) -> Tensor:
        return weight_ME.t().contiguous()


def _build(options: Options, sizes: tuple[int, int, int, int], key: tuple[object, ...]) -> Any:
    """Upstream's gate of (M, experts a rank, ranks, K)."""
    import fmoe.gates

    if options.gate == "naive":
        return fmoe.gates.NaiveGate(*sizes, gate_bias=False)
    if options.gate == "gshard":
        return fmoe.gates.GShardGate(*sizes, random_routing=options.random_routing, gate_bias=False)
    if options.gate == "dc":
        return fmoe.gates.DCGate(*sizes, random_routing=options.random_routing, gate_bias=False)
    if options.gate == "switch":
        return fmoe.gates.SwitchGate(*sizes, switch_eps=options.switch_eps, gate_bias=False)

    class Noisy(fmoe.gates.NoisyGate):
        """Upstream divides by the noise, which is 0 in evaluation: there an expert is among the K or it is not."""

        def _prob_in_top_k(self, clean_TE: Tensor, noisy_TE: Tensor, std_TE: Any, best: Tensor) -> Tensor:
            if self.training:
                return super()._prob_in_top_k(clean_TE, noisy_TE, std_TE, best)
            return (noisy_TE >= best[:, self.top_k - 1 : self.top_k]).float()

    gate = Noisy(*sizes)
    # As upstream initialises it, but alike on all ranks: the gate is every rank's.
    nn.init.kaiming_uniform_(gate.w_noise, a=math.sqrt(5), generator=seeded_generator(key))
    for name in ("w_gate", "w_noise"):
        parametrize.register_parametrization(gate, name, _Transposed())
    return gate
