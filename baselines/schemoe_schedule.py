"""ScheMoE's schedule (Shi et al., EuroSys 2024): seven tasks a chunk in the order OptSche, all-to-alls by Pipe-A2A.

    compute: C1^1 ... C1^r | D1^1 E^1 C2^1 ... D1^r E^r C2^r | D2^1 ... D2^r       (theorem 1: the best for any r >= 2)
    links:   A1^1 ... A1^r, then A2^1 ... A2^r

with C compress, A all-to-all, D decompress, E experts. Pipe-A2A sends to the ranks of the own node over the link in the
node, beside the rest over the link between nodes; an all-to-all has ended when both have. Backward runs the same seven.
The degree is PipeMoE's, as the paper leaves it to Tutel and PipeMoE, and so is the rest of a step: dense gradients are
reduced in the end. Without compression and with nothing sent in the node only the order is left, which then is
PipeMoE's: `schemoe_order_only` takes the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from baselines.overlap_schedules import plan_pipemoe
from moe.schedules import BACKWARD_WORK, INTER, INTRA, Builder, LayerPlan, LayerWork, step_tasks
from moe.simulator import Costs, Program, Task


@dataclass(frozen=True)
class Compression:
    """How all-to-alls are compressed.

    Args:
        ratio: bytes before over bytes after, >= 1; 1: no compression, and no tasks for it.
        s_per_byte: seconds of compressing or decompressing a byte of the uncompressed.
    """

    ratio: float = 1.0
    s_per_byte: float = 0.0


@dataclass(frozen=True)
class ScheMoE:
    """The schedule. Cluster and compression are its own; the rest is in the layers and costs.

    Args:
        node_share: of an all-to-all's bytes, what stays in the node, [0, 1): (ranks of a node) / (all ranks) where
            experts are spread over all ranks, 0 where ranks of equal place in each node exchange.
        compression: of all-to-alls.
    """

    node_share: float = 0.0
    compression: Compression = Compression()

    def __call__(self, layers: Sequence[LayerWork], costs: Costs, carried_bytes: float = 0.0) -> list[Task]:
        """Tasks of a step; arguments as of `moe.schedules.Builder`.

        Collectives over expert shards, which ScheMoE does not have, are part of the layer (ours): they follow the first
        and precede the second all-to-all on its link.
        """
        return step_tasks(layers, plan_pipemoe(layers, costs, carried_bytes), carried_bytes, self.pipeline)

    def pipeline(self, program: Program, base: Task, work: LayerWork, plan: LayerPlan) -> tuple[int, ...]:
        """The seven tasks of every chunk; a `moe.schedules.Pipeline`.

        Args:
            program: to add to.
            base: layer, direction and what the first tasks wait for.
            work: of the layer.
            plan: says r.

        Returns:
            The last task of every chunk.
        """
        degree = plan.num_chunks(base.backward)
        codec_s = self.compression.s_per_byte * work.all_to_all_bytes / degree
        times = BACKWARD_WORK if base.backward else 1

        def codec(kind: str, chunk: int, waits_for: tuple[int, ...]) -> tuple[int, ...]:
            if self.compression.ratio == 1:
                return waits_for
            return (program.add(replace(base, kind=kind, chunk=chunk, work=codec_s, after=waits_for)),)

        def on_link(kind: str, operation: str, size: float, link: str, chunk: int, waits_for: tuple[int, ...]) -> int:
            task = replace(base, kind=kind, operation=operation, work=size, resource=link, chunk=chunk, after=waits_for)
            return program.add(task)

        def all_to_all(kind: str, chunk: int, waits_for: tuple[int, ...]) -> tuple[int, ...]:
            size = work.all_to_all_bytes / degree / self.compression.ratio
            far = on_link(kind, "all_to_all", size * (1 - self.node_share), INTER, chunk, waits_for)
            if not self.node_share:
                return (far,)
            return far, on_link(
                f"{kind}_in_node", "all_to_all_in_node", size * self.node_share, INTRA, chunk, waits_for
            )

        def shards(kind: str, operation: str, chunk: int, waits_for: tuple[int, ...]) -> tuple[int, ...]:
            if not work.shard_bytes:
                return waits_for
            return (on_link(kind, operation, work.shard_bytes / degree, INTER, chunk, waits_for),)

        compressed = [codec("compress", chunk, base.after) for chunk in range(degree)]
        arrived = []
        for chunk, ready in enumerate(compressed):
            ready = all_to_all("dispatch", chunk, ready)
            arrived.append(shards("gather", "all_gather", chunk, ready))
        back = []
        for chunk, ready in enumerate(arrived):
            ready = codec("decompress", chunk, ready)
            experts = replace(base, kind="experts", operation="gemm", chunk=chunk, after=ready)
            experts = replace(experts, work=times * work.expert_work / degree, calls=times * work.expert_calls)
            ready = codec("compress", chunk, (program.add(experts),))
            ready = shards("scatter", "reduce_scatter", chunk, ready)
            back.append(all_to_all("combine", chunk, ready))
        last = [codec("decompress", chunk, ready) for chunk, ready in enumerate(back)]
        return tuple(task for tasks in last for task in tasks)


SCHEDULES: dict[str, Builder] = {"schemoe_order_only": ScheMoE()}
