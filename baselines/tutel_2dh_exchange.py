"""Tutel's two-dimensional hierarchical all-to-all (2DH; Hwang et al., MLSys 2023, appendix A).

An all-to-all of equal chunks between P = N * G ranks, N nodes of G, in two: inside the nodes and between them. Chunks
lie as [N, G], by destination; an exchange inside the nodes runs along G, and one between them, among the ranks that
stand at one place of their nodes, along N; both leave them by source there. So either order gives the linear
all-to-all, with N times, or G times, larger messages. Along G chunks are copied together before and put back behind:
the paper's two strides, [N, G] -> [G, N] -> [N, G].

Every chunk crosses the links between nodes by itself, however many of them hold one token: nothing is deduplicated.

Dimensions: N nodes, G ranks of a node, R rows of a chunk, M model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from baselines.fastermoe_exchange import Exchange
from moe.collectives import all_to_all_v
from moe.errors import Refused
from moe.mesh import Mesh, block_group
from moe.topology import Cluster


def node_size(cluster: Cluster, num_ranks: int) -> int:
    """G: ranks of the innermost groups that hold several of `num_ranks` consecutive ranks, but not all of them.

    Args:
        cluster: whose levels are looked at.
        num_ranks: P, which share experts.

    Returns:
        G; `num_ranks` where no level is such: then all are one node.

    Raises:
        Refused: these groups do not divide the ranks.
    """
    sizes = [cluster.group_size(level) for level in cluster.crossed_levels]
    size = next((size for size in sizes if size < num_ranks), num_ranks)
    if num_ranks % size:
        raise Refused(
            f"Tutel's 2DH needs whole nodes: {num_ranks} ranks that share experts are no multiple of the {size} "
            f"of a node."
        )
    return size


@dataclass(frozen=True)
class Nodes:
    """The ranks of an expert-parallel group as nodes.

    Attributes:
        num_nodes, node_size: N and G.
        between: the ranks at this one's place of their nodes, in the nodes' order.
        inside: the ranks of this node; None where G = 1 and `between` is all there is.
    """

    num_nodes: int
    node_size: int
    between: dist.ProcessGroup
    inside: dist.ProcessGroup | None


def nodes_of(mesh: Mesh) -> Nodes:
    """Of this rank; on one level, P nodes of one rank, so that the exchange is the linear all-to-all. Collective over
    all ranks of the run.

    Raises:
        Refused: as `node_size`.
    """
    size = node_size(mesh.cluster, mesh.ep_size)
    if size == mesh.ep_size:
        return Nodes(mesh.ep_size, 1, mesh.ep_group, None)
    return Nodes(mesh.ep_size // size, size, block_group(mesh, mesh.ep_size, size), inside=block_group(mesh, size, 1))


class Exchange2D:
    """One all-to-all in two, exact under autograd; for one forward.

    Between nodes it is under way from `post` to `wait`; inside them, where links are fast, it blocks. The backward is
    the mirror: gradients take the two exchanges in the other order, and what `wait` ended `post`'s gradient awaits.

    Args:
        nodes: of this rank.
        inside_first: inside the nodes, then between them (the paper's order); or the other way round (what Tutel's
            code does where nothing overlaps).
    """

    def __init__(self, nodes: Nodes, inside_first: bool) -> None:
        self.nodes, self.inside_first = nodes, inside_first
        self._flight: Exchange | None = None

    def post(self, chunks_NGRM: Tensor) -> Tensor:
        """Send chunks [N, G, R, M], by destination; returns a buffer for `wait` alone. Collective over the group."""
        if self.inside_first:
            chunks_NGRM = self._inside(chunks_NGRM)
        num_nodes, size, num_rows, model_dim = chunks_NGRM.shape
        peers = [(node, size * num_rows) for node in range(num_nodes)]
        self._flight = Exchange(self.nodes.between, peers, peers)
        return self._flight.post(chunks_NGRM.reshape(-1, model_dim)).view(chunks_NGRM.shape)

    def wait(self, buffer_NGRM: Tensor) -> Tensor:
        """Chunks [N, G, R, M], by source, from the buffer that `post` gave."""
        assert self._flight is not None, "nothing was posted"
        rows = self._flight.wait(buffer_NGRM.view(-1, buffer_NGRM.shape[3]))
        chunks_NGRM = rows.view(buffer_NGRM.shape)
        return chunks_NGRM if self.inside_first else self._inside(chunks_NGRM)

    def _inside(self, chunks_NGRM: Tensor) -> Tensor:
        if self.nodes.inside is None:
            return chunks_NGRM
        num_nodes, size, num_rows, model_dim = chunks_NGRM.shape
        strided_GNRM = chunks_NGRM.transpose(0, 1)
        splits = [num_nodes * num_rows] * size
        received = all_to_all_v(strided_GNRM.reshape(-1, model_dim), splits, splits, self.nodes.inside)
        return received.view(strided_GNRM.shape).transpose(0, 1).contiguous()
