"""The top-k gate of GShard (Lepikhin et al. 2021) and Switch (Fedus et al. 2022), and their balance loss.

Dimensions: T tokens, M model, E experts, K choices.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe import ops
from moe.system import LayerSpec


class Routing(NamedTuple):
    """Which experts compute which tokens.

    Attributes:
        expert_ids_TK: [T, K] int64, best choice first.
        weights_TK: [T, K] float32, differentiable; of the combination. 0 where the copy is dropped.
        kept_TK: [T, K] bool, False where the copy is dropped; None when nothing is.
        probs_TE: [T, E] float32, softmax of the logits.
        counts_E: [E] int64, copies each expert was chosen for, before drops.
        aux_loss: scalar float32.
    """

    expert_ids_TK: Tensor
    weights_TK: Tensor
    kept_TK: Tensor | None
    probs_TE: Tensor
    counts_E: Tensor
    aux_loss: Tensor

    @property
    def num_dropped(self) -> Tensor:
        """Copies that are dropped, scalar int64."""
        return _none_dropped(self.counts_E.device) if self.kept_TK is None else (~self.kept_TK).sum()


@cache
def _none_dropped(device: torch.device) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=device)


def balance_loss(probs_TE: Tensor, expert_ids_TK: Tensor, penalty_E: Tensor | None = None) -> Tensor:
    """E * sum_e f_e * p_e, with p_e the mean probability of e and f_e the share of choices that e got.

    The choices counted are the first ones for K <= 2 (GShard, algorithm 1; Switch, equation 4) and all of them, divided
    by K, above: what DeepSpeed computes. It is 1 when all is uniform. No gradient goes through f.

    Args:
        probs_TE: [T, E] float32.
        expert_ids_TK: [T, K] int64.
        penalty_E: [E], a further factor in the sum; None for ones.
    """
    num_experts = probs_TE.shape[1]
    counted = expert_ids_TK[:, :1] if expert_ids_TK.shape[1] <= 2 else expert_ids_TK
    shares_E = ops.count_choices(counted, num_experts).to(probs_TE.dtype) / counted.numel()
    if penalty_E is not None:
        shares_E = shares_E * penalty_E
    return num_experts * (shares_E * probs_TE.mean(0)).sum()


def combine_weights(probs_TE: Tensor, expert_ids_TK: Tensor, kept_TK: Tensor | None = None) -> Tensor:
    """Weights of the K outputs: the probability itself for K = 1 (Switch), normalised over the kept choices above.

    Returns:
        [T, K] float32.
    """
    chosen_TK = probs_TE.gather(1, expert_ids_TK)
    if kept_TK is not None:
        chosen_TK = chosen_TK * kept_TK
    if expert_ids_TK.shape[1] == 1:
        return chosen_TK
    return chosen_TK / chosen_TK.sum(1, keepdim=True).clamp_min(torch.finfo(chosen_TK.dtype).eps)


def queue_positions(expert_ids_TK: Tensor, num_experts: int) -> Tensor:
    """Position of every copy in its expert's queue: all first choices before any second one, tokens in order (GShard,
    algorithm 1). The suite's drop rule keeps the copies whose position is below the capacity.

    Returns:
        [T, K] int64, from 0 for each expert.
    """
    by_choice = expert_ids_TK.t().flatten()  # [K * T], first choices first
    order = torch.argsort(by_choice, stable=True)
    counts_E = ops.count_choices(by_choice, num_experts)
    starts_E = counts_E.cumsum(0) - counts_E
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order), device=order.device) - starts_E[by_choice[order]]
    return position.view(expert_ids_TK.shape[1], -1).t()


class _Route(torch.autograd.Function):
    """What `kernels.route` computes from tokens, the gate's matrix, its bias and penalty: probabilities [T, E], ids
    [T, K], weights [T, K], counts [E] and the balance loss."""

    @staticmethod
    def forward(
        ctx: Any, x_TM: Tensor, weight_EM: Tensor, bias_E: Tensor | None, penalty_E: Tensor | None, top_k: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        x_TM, weight_EM = x_TM.contiguous(), weight_EM.contiguous()
        probs_TE, ids_TK, weights_TK, counts_E, aux_loss, shares_E = ops.kernels().route(
            x_TM, weight_EM, top_k, bias_E, penalty_E
        )
        ctx.save_for_backward(x_TM, weight_EM, probs_TE, ids_TK, shares_E)
        ctx.has_bias = bias_E is not None
        ctx.mark_non_differentiable(ids_TK, counts_E)
        ctx.set_materialize_grads(False)
        return probs_TE, ids_TK, weights_TK, counts_E, aux_loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        x_TM, weight_EM, probs_TE, ids_TK, shares_E = ctx.saved_tensors
        grad_probs, _, grad_weights, _, grad_aux = grads
        if grad_weights is None:
            grad_weights = torch.zeros(ids_TK.shape, device=probs_TE.device)
        grad_logits = ops.kernels().route_backward(
            probs_TE, ids_TK, shares_E, grad_weights, grad_probs, grad_aux, x_TM.dtype
        )
        num_experts = probs_TE.shape[1]
        grad_weight = _product(grad_logits.t(), x_TM).view(-1, num_experts, x_TM.shape[1]).sum(0)
        grad_bias = grad_logits.sum(0, dtype=torch.float32).view(-1, num_experts).sum(0) if ctx.has_bias else None
        return grad_logits[:, :num_experts] @ weight_EM.to(x_TM.dtype), grad_weight, grad_bias, None, None


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Of two matrices of one dtype, in float32."""
    if left.is_cuda and left.dtype == torch.bfloat16:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


class TopKGate(nn.Module):
    """Softmax, then the K largest. Computes in float32 whatever the dtype of the tokens; only the gradient of bfloat16
    tokens is a bfloat16 product on a GPU.

    Args:
        spec: of the layer.
        device: of the weight, [E, M] float32.
        penalty_E: [E] float32, factors of the balance loss, see `balance_loss`; None for ones.
    """

    def __init__(self, spec: LayerSpec, device: torch.device, penalty_E: Tensor | None = None) -> None:
        super().__init__()
        self.spec, self.penalty_E = spec, penalty_E
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.model_dim, device=device))

    def forward(self, x_TM: Tensor) -> Routing:
        """Route tokens [T, M]."""
        spec = self.spec
        if self.in_kernel and ops.is_fast(x_TM) and len(x_TM) and spec.num_experts <= ops.MOST_EXPERTS:
            probs_TE, expert_ids_TK, weights_TK, counts_E, aux_loss = _Route.apply(
                x_TM, self.weight.float(), self.bias(), self.penalty_E, spec.top_k
            )
        else:
            probs_TE = self.logits(x_TM).softmax(1)
            expert_ids_TK = self.choose(probs_TE)
            weights_TK = combine_weights(probs_TE, expert_ids_TK)
            counts_E = ops.count_choices(expert_ids_TK, spec.num_experts)
            aux_loss = self.aux_loss(probs_TE, expert_ids_TK)
        kept_TK = self.keep(expert_ids_TK)
        if kept_TK is not None:  # one choice has nothing to be normalised with
            one = spec.top_k == 1
            weights_TK = weights_TK * kept_TK if one else combine_weights(probs_TE, expert_ids_TK, kept_TK)
        return Routing(expert_ids_TK, weights_TK, kept_TK, probs_TE, counts_E, aux_loss)

    @property
    def in_kernel(self) -> bool:
        """Whether the kernel that does `logits`, `choose` and `aux_loss` at once stands for them; a subclass that
        replaces one of them says False."""
        return True

    def logits(self, x_TM: Tensor) -> Tensor:
        """Of tokens [T, M] for all experts: [T, E] float32."""
        logits_TE, bias_E = x_TM.float() @ self.weight.float().t(), self.bias()
        return logits_TE if bias_E is None else logits_TE + bias_E

    def bias(self) -> Tensor | None:
        """[E] float32, added to every token's logits; None for none."""
        return None

    def choose(self, probs_TE: Tensor) -> Tensor:
        """The K experts of each token, [T, K] int64, best first."""
        return probs_TE.topk(self.spec.top_k, dim=1).indices

    def aux_loss(self, probs_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """Scalar float32, see `balance_loss`."""
        return balance_loss(probs_TE, expert_ids_TK, self.penalty_E)

    def load(self, gate_EM: Tensor) -> None:
        """Take the suite's matrix, [E, M]."""
        self.weight.copy_(gate_EM)

    def most_copies(self, num_tokens: int) -> int:
        """Copies that a rank sends of so many tokens, at most."""
        spec = self.spec
        copies = spec.top_k * num_tokens
        return copies if spec.capacity_factor is None else min(copies, spec.num_experts * spec.capacity(num_tokens))

    def keep(self, expert_ids_TK: Tensor) -> Tensor | None:
        """Which copies are not dropped, [T, K] bool; None when nothing is."""
        spec = self.spec
        if spec.capacity_factor is None:
            return None
        return queue_positions(expert_ids_TK, spec.num_experts) < spec.capacity(len(expert_ids_TK))
