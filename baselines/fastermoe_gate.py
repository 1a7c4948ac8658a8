"""FasterMoE's topology-aware gate (He et al., PPoPP 2022, section 4.3): a bound on the tokens that leave a node.

Dimensions: T tokens of this rank, E experts, K = 2 choices.
"""

from __future__ import annotations

from math import floor

import torch
from torch import Tensor

from moe.errors import Refused
from moe.gate import TopKGate, balance_loss
from moe.mesh import Mesh
from moe.system import LayerSpec
from moe.topology import Cluster

NEEDS_TOP_2 = "FasterMoE's topology gate chooses two experts a token; top_k={top_k} is not defined for it."
NEEDS_COSTS = (
    "FasterMoE's topology gate takes its limit from beta_s_per_byte of the cluster's innermost and outermost levels, "
    "which cluster {cluster} does not tell: give outgoing_fraction or a measured cluster."
)
NEEDS_TWO_EXPERTS = "FasterMoE's topology gate needs two experts in every node, and a node here has {found}."


def outgoing_fraction(cluster: Cluster) -> float | None:
    """L / B = W_net / (M W_local), the share of a rank's tokens that may leave its node; at most 1.

    W_local is a rank's bandwidth inside a node, W_net that of a node's link, which M ranks share. The suite's beta is
    what one rank sees while all send, so W_net is M / beta of the outermost level, and the fraction is
    beta_local / beta_net.

    Returns:
        The fraction; 1 for a cluster of one node; None where a level has no cost.
    """
    if len(cluster.levels) <= 2:
        return 1.0
    local, net = cluster.levels[1].beta_s_per_byte, cluster.levels[-1].beta_s_per_byte
    return min(1.0, local / net) if local and net else None


class TopologyGate(TopKGate):
    """Top-2 of which at most L = fraction * T tokens of a rank leave its node, the innermost level of the cluster.

    Where plain top-2 would send more tokens out, the L tokens whose best expert is remote and which score it highest go
    there and take the best expert of their own node beside it; all others choose both experts in their node. Scores are
    softmax probabilities, equal ones are taken in order of the tokens. FastMoE's gate counts first choices only, so
    that second ones may exceed L, and lets tokens choose shadowed experts freely; here every token that leaves counts,
    and shadows are chosen after the gate.

    Args:
        spec: of the layer.
        mesh: where this rank and the experts stand.
        fraction: of a rank's tokens, 0 to 1.

    Raises:
        Refused: K is not 2, or a node has fewer than two experts.
    """

    remote_E: Tensor

    def __init__(self, spec: LayerSpec, mesh: Mesh, fraction: float) -> None:
        super().__init__(spec, mesh.device)
        if spec.top_k != 2:
            raise Refused(NEEDS_TOP_2.format(top_k=spec.top_k))
        self.fraction = fraction
        first_rank, num_local = mesh.rank - mesh.ep_rank, spec.num_experts // mesh.ep_size
        level = min(1, len(mesh.cluster.levels) - 1)
        node = mesh.cluster.group_of(mesh.rank, level)
        is_remote = [
            mesh.cluster.group_of(first_rank + expert // num_local, level) != node for expert in range(spec.num_experts)
        ]
        if is_remote.count(False) < 2:
            raise Refused(NEEDS_TWO_EXPERTS.format(found=is_remote.count(False)))
        self.register_buffer("remote_E", torch.tensor(is_remote, device=mesh.device), persistent=False)

    @property
    def in_kernel(self) -> bool:
        """Never."""
        return False

    def limit(self, num_tokens: int) -> int:
        """L: of that many tokens, how many may leave the node."""
        return floor(round(self.fraction * num_tokens, 6))

    def choose(self, probs_TE: Tensor) -> Tensor:
        """The two experts of each token, [T, 2] int64, best first."""
        limit = self.limit(len(probs_TE))
        plain_TK = super().choose(probs_TE)
        near_TK = probs_TE.masked_fill(self.remote_E, -1.0).topk(2, dim=1).indices
        best_T = plain_TK[:, 0]
        wants_out_T = self.remote_E[best_T]
        score_T = probs_TE.gather(1, plain_TK[:, :1]).squeeze(1).where(wants_out_T, -1.0)
        first_T = torch.argsort(score_T, descending=True, stable=True)[:limit]
        goes_T = torch.zeros_like(wants_out_T).index_fill(0, first_T, True) & wants_out_T
        limited_TK = torch.stack([best_T, near_TK[:, 0]], dim=1).where(goes_T.unsqueeze(1), near_TK)
        num_leaving = self.remote_E[plain_TK].any(1).sum()
        return plain_TK.where(num_leaving <= limit, limited_TK)

    def aux_loss(self, probs_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """GShard's, of the first choices before the limit."""
        return balance_loss(probs_TE, probs_TE.argmax(1, keepdim=True))
