"""Which expert is in which slot, where an expert may have several: its replicas.

Every rank has L slots, N ranks J = N L of them; slot j is on rank j // L. Dimensions: E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from moe.system import LayerSpec
from moe.topology import Cluster

Drop = Literal["per_source", "global"]

SLOTS_PER_EXPERT = 4
"""On average, of the testbed of SYMI (arXiv 2504.19925): 16 ranks of 4 slots for 16 experts."""


class Table(Protocol):
    """What a layer with replicas knows of them; the same on all ranks."""

    @property
    def expert_of_slot(self) -> list[int]:
        """[J] experts."""

    @property
    def counts(self) -> tuple[int, ...]:
        """[E] slots of each expert, each >= 1; they sum to J."""

    @property
    def num_slots(self) -> int:
        """J."""


@dataclass(frozen=True)
class ReplicaTable:
    """Replicas anywhere, several of an expert on one rank among them.

    Args:
        experts: [J], of each slot; every expert has one at least.
        slots_per_rank: L, which divides J.
        num_experts: E.
    """

    experts: tuple[int, ...]
    slots_per_rank: int
    num_experts: int

    def __post_init__(self) -> None:
        assert len(self.experts) % self.slots_per_rank == 0, (len(self.experts), self.slots_per_rank)
        assert set(self.experts) == set(range(self.num_experts)), f"not each of {self.num_experts}: {self.experts}"

    @cached_property
    def expert_of_slot(self) -> list[int]:
        """[J] experts."""
        return list(self.experts)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """[E] slots of each expert."""
        return tuple(self.experts.count(expert) for expert in range(self.num_experts))

    @property
    def num_slots(self) -> int:
        """J."""
        return len(self.experts)

    def on_rank(self, rank: int) -> list[int]:
        """[L] experts of a rank's slots."""
        return list(self.experts[rank * self.slots_per_rank : (rank + 1) * self.slots_per_rank])

    @cached_property
    def holders(self) -> list[list[int]]:
        """[E], the ranks that have a slot of each expert, in order."""
        held: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(self.experts):
            rank = slot // self.slots_per_rank
            if rank not in held[expert][-1:]:
                held[expert].append(rank)
        return held

    def local_slots(self, rank: int) -> dict[int, list[int]]:
        """{expert: its slots, counted within the rank}, by rising expert."""
        slots: dict[int, list[int]] = {expert: [] for expert in sorted(set(self.on_rank(rank)))}
        for slot, expert in enumerate(self.on_rank(rank)):
            slots[expert].append(slot)
        return slots

    def moved(self, experts: Sequence[int]) -> ReplicaTable:
        """A table of the same sizes."""
        assert len(experts) == self.num_slots, (len(experts), self.num_slots)
        return ReplicaTable(tuple(experts), self.slots_per_rank, self.num_experts)


def cyclic_table(num_experts: int, num_ranks: int, slots_per_rank: int) -> ReplicaTable:
    """Experts in turn over all slots: as even as can be, an expert's replicas on different ranks where they can be.
    Where L divides E it is the placement of expert-data parallelism, E / L consecutive ranks holding each expert once.
    """
    num_slots = num_ranks * slots_per_rank
    return ReplicaTable(tuple(slot % num_experts for slot in range(num_slots)), slots_per_rank, num_experts)


class SlotOptions(BaseModel):
    """Options of every system whose experts have slots on all ranks.

    Args:
        slots_per_rank: experts that a rank can hold, replicas counted; null: so many that an expert has four on
            average, as in SYMI's testbed, or on fewer ranks one for each (ours).
        drop: whether an expert's capacity is each source rank's own (`per_source`, as in the other systems) or of all
            ranks together (`global`), which drops fewer tokens. SYMI does not say; without a capacity factor nothing is
            dropped.
    """

    model_config = ConfigDict(extra="forbid")
    slots_per_rank: int | None = Field(default=None, ge=1, examples=[4])
    drop: Drop = "per_source"

    def slots(self, num_experts: int, num_ranks: int) -> int:
        """Slots of a rank."""
        return self.slots_per_rank or -(-min(SLOTS_PER_EXPERT, num_ranks) * num_experts // num_ranks)

    def refusals(self, title: str, spec: LayerSpec, cluster: Cluster) -> list[str]:
        """Fewer slots than experts.

        Args:
            title: of the system.
            spec: of a layer.
            cluster: of the run.
        """
        num_ranks, num_experts = cluster.world_size, spec.num_experts
        slots = self.slots(num_experts, num_ranks)
        if slots * num_ranks >= num_experts:
            return []
        return [
            f"{title} needs a slot for every expert: {num_ranks} rank{'s' * (num_ranks > 1)} with "
            f"slots_per_rank={slots} {'have' if num_ranks > 1 else 'has'} {slots * num_ranks} for {num_experts} "
            f"experts; set slots_per_rank to at least {-(-num_experts // num_ranks)}, or to null."
        ]
