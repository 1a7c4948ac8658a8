"""Megatron-Core's MoE layer (`megatron.core.transformer.moe.moe_layer.MoELayer`, version 0.16): its `alltoall` token
dispatcher, its router and its experts, with the suite's weights.

Upstream's softmax before top-k stands for one choice, whose weight is its probability, and its softmax over the chosen
logits for several, which is their normalised probabilities: the suite's weights. The balance loss is the suite's,
because upstream's counts all choices for K = 2, too. Where a capacity factor is set, upstream drops the least probable
copies of an expert and does not normalise over the kept ones.

The experts are upstream's: grouped products where Transformer Engine is installed, else one expert after the other.
Their parameters are float32 and cast at every call, as those of the other systems are. Upstream sums a token's copies
by atomics: outputs differ in their last bits between runs.
"""

from __future__ import annotations

import warnings
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.func import functional_call

from baselines.replacing import replaced
from moe import ops
from moe.errors import Refused
from moe.experts import canonical_views
from moe.gate import balance_loss
from moe.mesh import Mesh, block_group, ranks_are_on_cuda
from moe.system import ExpertView, LayerSpec, MoELayer, MoEOutput, System
from moe.topology import Cluster

KNOWN = "0.16."
"""Versions whose layer the adapter builds; later ones build theirs in another way."""
MISSING = "The package megatron-core is not installed; see https://github.com/NVIDIA/Megatron-LM."
NEEDS_CUDA = "Megatron-Core's MoE layer runs on CUDA only; these ranks are on a CPU."
NEEDS_ENGINE = "Megatron-Core's moe_grouped_gemm needs the package transformer_engine; leave it null or install that."


class Options(BaseModel):
    """Options of conf/system/megatron.yaml; upstream's names.

    Args:
        moe_grouped_gemm: all experts of a rank in one product, by Transformer Engine; null: where that is installed.
        moe_token_drop_policy: with a capacity factor, keep the most probable copies, or some (`position`).
    """

    model_config = ConfigDict(extra="forbid")
    moe_grouped_gemm: bool | None = None
    moe_token_drop_policy: Literal["probs", "position"] = "probs"


class Told(NamedTuple):
    """What upstream's router keeps to itself, of one call.

    Attributes:
        expert_ids_TK: [T, K] int64, best choice first.
        aux_loss: scalar float32.
        num_kept: copies behind the drops, scalar int64.
    """

    expert_ids_TK: Tensor
    aux_loss: Tensor
    num_kept: Tensor


class CastExperts(nn.Module):
    """Upstream's experts, computing in the dtype of their rows whatever that of their parameters.

    Args:
        upstream: called with rows [R, M] sorted by local expert, the number of each expert's rows and [R] weights.
    """

    def __init__(self, upstream: nn.Module) -> None:
        super().__init__()
        self.upstream = upstream

    def forward(self, rows_RM: Tensor, num_rows_L: Tensor, weights_R: Tensor) -> tuple[Tensor, None]:
        """As upstream's: weighted outputs [R, M], and no bias."""
        parameters = {name: weight.to(rows_RM.dtype) for name, weight in self.upstream.named_parameters()}
        return functional_call(self.upstream, parameters, (rows_RM, num_rows_L, weights_R))


class MegatronLayer(MoELayer):
    """Upstream's layer behind the suite's contract.

    Args:
        spec: what to compute.
        mesh: where. Collective over all ranks of the run: it makes process groups.
        options: of the system.

    Raises:
        Refused: on a CPU.
    """

    def __init__(self, spec: LayerSpec, mesh: Mesh, options: Options) -> None:
        super().__init__(spec, mesh)
        require_cuda(mesh.device)
        with warnings.catch_warnings():  # of each optional package that is missing
            warnings.simplefilter("ignore")
            from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
            from megatron.core.process_groups_config import ProcessGroupCollection
            from megatron.core.tensor_parallel import mappings
            from megatron.core.transformer.moe.moe_layer import MoELayer as UpstreamLayer

            self.mappings = mappings
            self.grouped = grouped_gemm(options)
            kind = {"use_te": self.grouped, "moe_grouped_gemm": self.grouped}
            submodules = get_moe_module_spec(num_experts=spec.num_experts, **kind).submodules
            submodules.router = _router_class(spec)
            alone = block_group(mesh, 1, 1)
            groups = ProcessGroupCollection(
                ep=mesh.ep_group,
                tp_ep=mesh.ep_group,
                expt_dp=mesh.edp_group,
                tp=alone,
                cp=alone,
                tp_cp=alone,
                expt_tp=alone,
                tp_dp_cp=dist.group.WORLD,
            )
            config = _upstream_config(spec, mesh.ep_size, options, self.grouped)
            self.upstream = UpstreamLayer(config, submodules, pg_collection=groups).to(mesh.device)
        self.upstream.experts = CastExperts(self.upstream.experts)

    def forward(self, x_TM: Tensor) -> MoEOutput:
        """Route this rank's tokens [T, M]."""
        # Upstream took its gather from torch when it was imported; byte meters stand where torch keeps it.
        with replaced(self.mappings, "dist_all_gather_func", dist.all_gather_into_tensor):
            y_T1M, _ = self.upstream(x_TM.unsqueeze(1))
        told, self.upstream.router.told = self.upstream.router.told, None
        counts_E = ops.count_choices(told.expert_ids_TK, self.spec.num_experts)
        dropped = told.expert_ids_TK.numel() - told.num_kept
        return MoEOutput(y_T1M.squeeze(1), told.aux_loss, counts_E, dropped, told.expert_ids_TK)

    @property
    def gate_weight(self) -> nn.Parameter:
        """[E, M]."""
        return self.upstream.router.weight

    @property
    def path(self) -> str:
        """Which of upstream's experts compute."""
        return "grouped GEMM of Transformer Engine" if self.grouped else "SequentialMLP, expert by expert"

    def expert_views(self) -> list[ExpertView]:
        """Upstream's linear maps, [H, M] (SwiGLU: [2 H, M]) and [M, H], of each local expert in global order."""
        experts = self.upstream.experts.upstream
        found = []
        for slot, expert in enumerate(self.mesh.local_experts(self.spec.num_experts)):
            if self.grouped:
                weights = [getattr(linear, f"weight{slot}") for linear in (experts.linear_fc1, experts.linear_fc2)]
            else:
                network = experts.local_experts[slot]
                weights = [network.linear_fc1.weight, network.linear_fc2.weight]
            found += canonical_views(expert, None, *weights)
        return found

    def stage_modules(self) -> tuple[nn.Module, ...]:
        """Upstream's router and experts."""
        return self.upstream.router, self.upstream.experts


class Megatron(System):
    """Megatron-Core's MoE layer as its authors ship it."""

    name = "megatron"
    implementation = "upstream"
    summary = "Megatron-Core: all-to-all-v token dispatcher, grouped GEMM of Transformer Engine where it is installed"
    Options = Options

    def refusals(self, spec: LayerSpec, cluster: Cluster) -> list[str]:
        """Missing package, one of another version, no CUDA, or grouped products without their package."""
        if find_spec("megatron") is None or find_spec("megatron.core") is None:
            return [MISSING]
        reasons = []
        if not (found := version("megatron-core")).startswith(KNOWN):
            reasons.append(f"The adapter knows megatron-core {KNOWN}x, and {found} is installed: install 0.16.1.")
        if not ranks_are_on_cuda():
            reasons.append(NEEDS_CUDA)
        if self.options.moe_grouped_gemm and not grouped_gemm(Options()):
            reasons.append(NEEDS_ENGINE)
        return reasons

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """Upstream's layer. Collective over all ranks of the run."""
        return MegatronLayer(spec, mesh, self.options)


def require_cuda(device: torch.device) -> None:
    """Raises Refused where upstream's dispatcher can't run: it copies its counts on a CUDA stream of its own."""
    if device.type != "cuda":
        raise Refused(NEEDS_CUDA)


def grouped_gemm(options: Options) -> bool:
    """Whether the experts of a rank are one product: as asked for, else where Transformer Engine is installed."""
    wanted: bool | None = options.moe_grouped_gemm
    return find_spec("transformer_engine") is not None if wanted is None else wanted


def _upstream_config(spec: LayerSpec, ep_size: int, options: Options, grouped: bool) -> Any:
    """Upstream's configuration of one layer; its parameters are float32 and left uninitialised."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    gated = spec.activation == "swiglu"
    return TransformerConfig(
        num_layers=1,
        num_attention_heads=1,
        hidden_size=spec.model_dim,
        ffn_hidden_size=spec.hidden_dim,
        moe_ffn_hidden_size=spec.hidden_dim,
        num_moe_experts=spec.num_experts,
        expert_model_parallel_size=ep_size,
        moe_router_topk=spec.top_k,
        moe_router_pre_softmax=spec.top_k == 1,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        moe_expert_capacity_factor=spec.capacity_factor,
        moe_token_drop_policy=options.moe_token_drop_policy,
        moe_grouped_gemm=grouped,
        moe_permute_fusion=grouped,  # Transformer Engine's, too
        add_bias_linear=False,
        gated_linear_unit=gated,
        activation_func=F.silu if gated else F.gelu,
        bias_activation_fusion=gated,  # what upstream's training does unless told otherwise; it has none for this gelu
        params_dtype=torch.float32,
        perform_initialization=False,
    )


def _router_class(spec: LayerSpec) -> type[nn.Module]:
    """Upstream's router, which also tells what it chose and the suite's balance loss."""
    from megatron.core.transformer.moe.router import TopKRouter

    class Router(TopKRouter):
        told: Told | None = None

        def gating(self, x: Tensor) -> Tensor:
            """x [T, 1, M] -> logits [T, 1, E] in float32; upstream's, with Transformer Engine, multiplies in TF32."""
            return F.linear(x.float(), self.weight)

        def routing(self, logits: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
            """As upstream's: weights [T, E], 0 where not chosen, and where they are, [T, E] bool."""
            weights_TE, chosen_TE = super().routing(logits, **kwargs)
            logits_TE = logits.flatten(0, 1)
            ids_TK = logits_TE.detach().topk(spec.top_k, dim=1).indices
            self.told = Told(ids_TK, balance_loss(logits_TE.softmax(1), ids_TK), chosen_TE.sum())
            return weights_TE, chosen_TE

    return Router
