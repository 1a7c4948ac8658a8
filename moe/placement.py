"""Which rank holds which expert, where experts can change places (moe/migration.py moves them).

A rank has L slots, a group of P ranks E = P L of them: slot s is on the group's rank s // L. At first expert e is in
slot e. Gates know experts, dispatchers slots.

Dimensions: T tokens, K choices, E experts and slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe.gate import Routing


class Placement:
    """A permutation of a layer's experts over its slots.

    Args:
        num_experts: E.
        device: of the layer.

    Attributes:
        expert_of_slot: E expert ids, on the host.
        slots_TK, kept_TK: what the layer last routed, by slot; see `Routing`. None before its first call.
        loads: [E] copies of each expert, of the last two calls, latest last.
    """

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self.device = device
        self.slots_TK: Tensor | None = None
        self.kept_TK: Tensor | None = None
        self.loads: list[Tensor] = []
        self.expert_of_slot: list[int] = []
        self.set(range(num_experts))

    def set(self, expert_of_slot: Sequence[int]) -> None:
        """Say where experts are, without moving anything.

        Args:
            expert_of_slot: a permutation of 0 to E - 1.
        """
        assert sorted(expert_of_slot) == list(range(len(expert_of_slot))), expert_of_slot
        self.expert_of_slot = list(expert_of_slot)
        self._experts_E = torch.tensor(self.expert_of_slot, device=self.device)
        self._slots_E = torch.argsort(self._experts_E)

    def place(self, routing: Routing, remember: bool) -> Routing:
        """The routing with slots in place of experts.

        Args:
            routing: by expert.
            remember: whether what moves experts is to learn from it.
        """
        ids_TK = routing.expert_ids_TK
        slots_TK = self._slots_E.index_select(0, ids_TK.flatten()).view_as(ids_TK)
        if remember:
            self.slots_TK, self.kept_TK = slots_TK, routing.kept_TK
            self.loads = [*self.loads[-1:], routing.counts_E]
        counts_E = routing.counts_E.index_select(0, self._experts_E)
        return routing._replace(expert_ids_TK=slots_TK, counts_E=counts_E)
