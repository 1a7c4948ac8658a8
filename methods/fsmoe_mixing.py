"""Gates of FSMoE in which a token does not choose its experts: expert choice, and SoftMoE's mixtures.

Both look at all tokens of a rank at once, so that in a language model a token's output depends on later ones: fine for
comparing systems' times (as FSMoE's table 6 does), not for generating text. Both need no balance loss, which is 0.

Dimensions: T tokens of a rank, M model, E experts, K choices, Q tokens that an expert takes, N slots of all experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe.gate import Routing, TopKGate
from moe.pipelined_layer import PipelinedMoE
from moe.pipelined_parts import Travel
from moe.system import LayerSpec, MoEOutput
from moe.weights import seeded_normal


def tokens_taken(spec: LayerSpec, num_tokens: int) -> int:
    """Q, of a rank's T tokens."""
    even = -(-spec.top_k * num_tokens // spec.num_experts)
    return min(num_tokens, even if spec.capacity_factor is None else spec.capacity(num_tokens))


class ExpertChoiceGate(TopKGate):
    """Every expert takes the Q tokens of its largest logits, softmax(KeepTopK((X W)^T, Q)) (arXiv 2501.10714, section
    2.1; Zhou et al. 2022). Over which axis that softmax is, the paper does not say: here over the experts that took a
    token (ours, as of the other gates); a token that none took gets 0.

    The batch that an expert takes from is a rank's own, so that no scores travel and all messages are equally long: it
    takes Q = ceil(c K T / E) tokens of every rank, c being the capacity factor, 1 where there is none.
    """

    in_kernel = False

    def forward(self, x_TM: Tensor) -> Routing:
        """Route tokens [T, M]: choices [T, E], all experts in order, those kept that took the token."""
        num_tokens, num_experts = len(x_TM), self.spec.num_experts
        taken = tokens_taken(self.spec, num_tokens)
        logits_TE = self.logits(x_TM)
        kept_TE = torch.zeros_like(logits_TE, dtype=torch.bool)
        kept_TE.scatter_(0, logits_TE.topk(taken, dim=0).indices, True)
        left_out_TE = ~kept_TE & kept_TE.any(1, keepdim=True)  # rows of nothing but -inf would be nan
        weights_TE = logits_TE.masked_fill(left_out_TE, -torch.inf).softmax(1) * kept_TE
        ids_TE = torch.arange(num_experts, device=x_TM.device).expand(num_tokens, num_experts).contiguous()
        counts_E = torch.full((num_experts,), taken, device=x_TM.device)
        return Routing(ids_TE, weights_TE, kept_TE, logits_TE.softmax(1), counts_E, logits_TE.new_zeros(()))

    def most_copies(self, num_tokens: int) -> int:
        """E Q, exactly."""
        return self.spec.num_experts * tokens_taken(self.spec, num_tokens)


class ExpertChoiceMoE(PipelinedMoE):
    """The pipelined layer behind an `ExpertChoiceGate`. A token that no expert took is counted as K dropped copies, so
    that the share of copies that are not dropped is that of tokens that some expert computed."""

    chooses_top_k = False

    def output(self, y_TM: Tensor, routing: Routing) -> MoEOutput:
        """As `PipelinedMoE.output`."""
        assert routing.kept_TK is not None
        dropped = self.spec.top_k * (~routing.kept_TK.any(1)).sum()
        return MoEOutput(y_TM, routing.aux_loss, routing.counts_E, dropped, None)


class Mixture(NamedTuple):
    """What is in which slot. Slots of one expert stand side by side.

    Attributes:
        dispatch_TN: [T, N] float32, columns sum to 1: a slot is a mean of all tokens.
        combine_TN: [T, N] float32, rows sum to 1: an output is a mean of all slots' outputs.
        slots: their routing, as if they were tokens that go to one expert each.
    """

    dispatch_TN: Tensor
    combine_TN: Tensor
    slots: Routing


class SoftGate(nn.Module):
    """SoftMoE (Puigcerver et al. 2023, equations 1 to 3): logits X W^T of every token and slot, softmax over the tokens
    for the way there, over all slots for the way back. FSMoE's paper names it and gives no equations.

    Args:
        spec: of the layer.
        device: of the weights: `weight` [E, M], of every expert's first slot, and `others` [E, S - 1, M].
        slots: S, of an expert for each rank's tokens.
    """

    def __init__(self, spec: LayerSpec, device: torch.device, slots: int) -> None:
        super().__init__()
        self.num_experts, self.slots = spec.num_experts, slots
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.model_dim, device=device))
        key = (spec.seed, "layer", spec.layer_index, "gate slots")
        shape = (spec.num_experts, slots - 1, spec.model_dim)
        self.others = nn.Parameter(seeded_normal(key, shape, spec.model_dim**-0.5, device))

    def forward(self, x_TM: Tensor) -> Mixture:
        """Of tokens [T, M]."""
        weight_NM = torch.cat([self.weight.float().unsqueeze(1), self.others.float()], dim=1).flatten(0, 1)
        logits_TN = x_TM.float() @ weight_NM.t()
        expert_N = torch.arange(self.num_experts, device=x_TM.device).repeat_interleave(self.slots)
        counts_E = torch.full((self.num_experts,), self.slots, device=x_TM.device)
        ones_N1 = torch.ones(len(expert_N), 1, device=x_TM.device)
        slots = Routing(expert_N.unsqueeze(1), ones_N1, None, logits_TN, counts_E, logits_TN.new_zeros(()))
        return Mixture(logits_TN.softmax(0), logits_TN.softmax(1), slots)

    def most_copies(self, num_tokens: int) -> int:
        """N, however many tokens."""
        return self.num_experts * self.slots

    def load(self, gate_EM: Tensor) -> None:
        """Of the first slots."""
        self.weight.copy_(gate_EM)


class SoftMoE(PipelinedMoE):
    """The pipelined layer between the two mixtures of a `SoftGate`: slots travel, not tokens. Nothing is dropped."""

    chooses_top_k = False

    def routed(self, x_TM: Tensor, degree: int, travel: Travel) -> MoEOutput:
        """Mix, compute, mix. Collective."""
        mixture: Mixture = self.gate(x_TM)
        slots_NM = mixture.dispatch_TN.t().to(x_TM.dtype) @ x_TM
        y_NM = self.around(slots_NM, mixture.slots, degree, travel)
        y_TM = mixture.combine_TN.to(x_TM.dtype) @ y_NM
        slots = mixture.slots
        return MoEOutput(y_TM, slots.aux_loss, slots.counts_E, slots.num_dropped, None)
