"""Gates that FSMoE ships beside the suite's softmax (Pan et al., ASPLOS 2025, arXiv 2501.10714, section 2.1) in which a
token chooses its K experts. Those in which it does not stand in methods/fsmoe_mixing.py.

Their logits, x being a token, and what multiplies the outputs of the K experts of the largest ones:

    gshard   (x W)_i + N(0, 1) softplus((x W_noise)_i)   softmax over the K
    sigmoid  (x W)_i                                     sigma of each
    xmoe     cos(P x, w_i) / temperature                 softmax over the K

With K = 1 the softmax over the chosen ones would be 1 whatever the gate says; it is then over all experts, as in
`moe.gate`. Ours, where the paper is silent: all three learn by the suite's balance loss, of a softmax over all logits.

Dimensions: T tokens, M model, E experts, K choices, D of X-MoE's projection.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe import ops
from moe.gate import Routing, TopKGate
from moe.system import LayerSpec
from moe.weights import seeded_normal


class GShardGate(TopKGate):
    """Noisy top-k: the noise is drawn in training only, from torch's own generator (of each rank, and in its
    checkpoints). `noise_weight` [E, M] begins at zero, as where this gate is from (Shazeer et al. 2017)."""

    in_kernel = False

    def __init__(self, spec: LayerSpec, device: torch.device) -> None:
        super().__init__(spec, device)
        self.noise_weight = nn.Parameter(torch.zeros(spec.num_experts, spec.model_dim, device=device))

    def logits(self, x_TM: Tensor) -> Tensor:
        """[T, E] float32."""
        clean_TE = super().logits(x_TM)
        if not self.training:
            return clean_TE
        width_TE = F.softplus(x_TM.float() @ self.noise_weight.float().t())
        return clean_TE + torch.randn_like(clean_TE) * width_TE


class SigmoidGate(TopKGate):
    """Each output is scaled by sigma of its own logit, whatever the others'."""

    in_kernel = False

    def forward(self, x_TM: Tensor) -> Routing:
        """Route tokens [T, M]."""
        logits_TE = self.logits(x_TM)
        probs_TE, ids_TK = logits_TE.softmax(1), self.choose(logits_TE)
        kept_TK = self.keep(ids_TK)
        weights_TK = logits_TE.gather(1, ids_TK).sigmoid()
        if kept_TK is not None:
            weights_TK = weights_TK * kept_TK
        counts_E = ops.count_choices(ids_TK, self.spec.num_experts)
        return Routing(ids_TK, weights_TK, kept_TK, probs_TE, counts_E, self.aux_loss(probs_TE, ids_TK))


class XMoEGate(TopKGate):
    """Cosines of a token, projected to D numbers, with the experts' embeddings: `projection` [D, M], `weight` [E, D].

    Args:
        spec: of the layer.
        device: of the weights.
        dim: D.
        temperature: that cosines are divided by, which the paper does not name; fixed (ours).
    """

    in_kernel = False

    def __init__(self, spec: LayerSpec, device: torch.device, dim: int, temperature: float) -> None:
        super().__init__(spec, device)
        self.temperature = temperature
        key = (spec.seed, "layer", spec.layer_index, "gate projection")
        self.projection = nn.Parameter(seeded_normal(key, (dim, spec.model_dim), spec.model_dim**-0.5, device))
        self.weight = nn.Parameter(torch.empty(spec.num_experts, dim, device=device))

    def logits(self, x_TM: Tensor) -> Tensor:
        """[T, E] float32."""
        projected_TD = F.normalize(x_TM.float() @ self.projection.float().t())
        return projected_TD @ F.normalize(self.weight.float()).t() / self.temperature

    def load(self, gate_EM: Tensor) -> None:
        """Begin with the projections of a gate's rows as embeddings, so that a token which is near a row is near its
        expert (ours)."""
        self.weight.copy_(gate_EM @ self.projection.float().t())
