"""FasterMoE's dynamic shadowing (He et al., PPoPP 2022, section 4.1): which experts are copied to every rank.

A shadowed expert's weights go to all ranks, each rank computes its own tokens of it, and the gradients are summed on
the owner. The policies are functions of the counts of all ranks alone, in float64, so that every rank decides alike.

Dimensions: P ranks, E experts, E / P consecutive ones a rank. The paper has one expert a worker; here experts are moved
one by one and loads are summed over a rank's experts (ours).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class ShadowCosts:
    """What a token and a copy of an expert cost.

    Args:
        model_dim: M (H in the paper).
        expert_parameters: of one expert: 2 M H in two matrices (2 alpha H^2 in the paper), 3 M H with SwiGLU.
        element_bytes: of tokens and of weights that travel. The paper's equations count elements.
        flops_per_s: P, of the experts' matrix products on one rank.
        net_bytes_per_s: W_net, of one rank.
    """

    model_dim: int
    expert_parameters: int
    element_bytes: int
    flops_per_s: float
    net_bytes_per_s: float

    def compute_s(self, rows: float) -> float:
        """3 * 4 B alpha H^2 / P: one forward and two backward products of every weight with `rows` tokens."""
        return 3 * 2 * self.expert_parameters * rows / self.flops_per_s

    def exchange_s(self, rows: float) -> float:
        """4 B H / W_net: `rows` tokens in the four exchanges of a step."""
        return 4 * rows * self.model_dim * self.element_bytes / self.net_bytes_per_s

    def transfer_s(self, num_experts: int) -> float:
        """r * 2 alpha H^2 / W_net: the weights of `num_experts`, once."""
        return num_experts * self.expert_parameters * self.element_bytes / self.net_bytes_per_s

    def imbalanced_s(self, rows: float) -> float:
        """Equation (7), of the rank with the most rows."""
        return self.compute_s(rows) + self.exchange_s(rows)

    def shadowed_s(self, num_shadowed: int, rows: float) -> float:
        """Equation (8): weights forward, gradients backward; the tokens' exchange is left out, as in the paper."""
        return self.compute_s(rows) + 2 * self.transfer_s(num_shadowed)


def paper_policy(counts_PE: Counts, costs: ShadowCosts) -> list[int]:
    """Algorithm 1 of the paper: shadow the busiest experts for as long as equation (8) goes down.

    Where an expert's rank has been given tokens of earlier shadows, its load is reduced by what others sent to the
    expert, not overwritten by its own tokens.

    Args:
        counts_PE: [P, E], copies that each rank sends to each expert (T_iw), drops left out; P divides E.
        costs: of the layer.

    Returns:
        Global expert ids in the order in which they were chosen; empty for one rank, which has nobody to share with.
    """
    num_ranks, num_experts = counts_PE.shape
    if num_ranks == 1:
        return []
    counts_PE = counts_PE.astype(np.int64)
    load_P = counts_PE.sum(0).reshape(num_ranks, -1).sum(1)  # B_w
    best_s = costs.imbalanced_s(int(load_P.max()))
    shadowed: list[int] = []
    for expert in _busiest_first(counts_PE):
        owner = expert // (num_experts // num_ranks)
        load_P += counts_PE[:, expert]
        load_P[owner] -= counts_PE[:, expert].sum()  # its own tokens were added above: T_ii stays
        cost_s = costs.shadowed_s(len(shadowed) + 1, int(load_P.max()))
        if not cost_s < best_s:
            break
        best_s = cost_s
        shadowed.append(expert)
    return shadowed


def fastmoe_policy(counts_PE: Counts, costs: ShadowCosts) -> list[int]:
    """FastMoE v1.1's policy: the load after i shadows is that of the next expert in order of size.

    Unlike the paper's it looks at experts instead of ranks, adds no local tokens, keeps the tokens' exchange in the
    cost, charges one transfer of the weights and not two, takes elements of four bytes whatever they are, and never
    shadows the last expert.

    Args:
        counts_PE: [P, E], as for `paper_policy`.
        costs: of the layer; `element_bytes` is ignored.

    Returns:
        As `paper_policy`.
    """
    if len(counts_PE) == 1:
        return []
    costs = replace(costs, element_bytes=4)
    order = _busiest_first(counts_PE)
    sizes = [int(counts_PE[:, expert].sum()) for expert in order]
    best_s = costs.imbalanced_s(sizes[0])
    shadowed: list[int] = []
    for expert, next_size in zip(order, sizes[1:], strict=False):
        cost_s = costs.imbalanced_s(next_size) + costs.transfer_s(len(shadowed) + 1)
        if not cost_s < best_s:
            break
        best_s = cost_s
        shadowed.append(expert)
    return shadowed


def no_shadows(counts_PE: Counts, costs: ShadowCosts) -> list[int]:
    """No expert."""
    return []


POLICIES: dict[str, Callable[[Counts, ShadowCosts], list[int]]] = {
    "none": no_shadows,
    "paper": paper_policy,
    "fastmoe": fastmoe_policy,
}


def _busiest_first(counts_PE: Counts) -> list[int]:
    """Expert ids by falling number of copies; of equals the lower id first."""
    return [int(expert) for expert in np.argsort(-counts_PE.sum(0), kind="stable")]
