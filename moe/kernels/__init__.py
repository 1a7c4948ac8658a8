"""Triton kernels of the native layer on a GPU: what `moe.ops`, the gates, the experts, their replicas and
`moe.peer_dispatch` do there.

Each program has a token, a row or a block of its own, computes in float32, and no two write one element: no atomics, so
two runs agree bit for bit. They run under TRITON_INTERPRET=1 on a CPU too, where tests hold them
against the torch path.
"""

from moe.kernels.activate import activate, activate_backward_
from moe.kernels.peers import LocalRows, count_crossings, pull_rows, push_sums, stage_tokens, sum_partials
from moe.kernels.pieces import lay_pieces
from moe.kernels.replicas import fill_replicas, repeat_rows, sum_replicas, take_turns
from moe.kernels.route import route, route_backward
from moe.kernels.rows import gather_rows, sum_copies, weighted_sum_backward
from moe.kernels.sort import count_choices, sort_by_expert
from moe.kernels.sums import sum_terms

__all__ = [
    "LocalRows",
    "activate",
    "activate_backward_",
    "count_choices",
    "count_crossings",
    "fill_replicas",
    "gather_rows",
    "lay_pieces",
    "pull_rows",
    "push_sums",
    "repeat_rows",
    "route",
    "route_backward",
    "sort_by_expert",
    "stage_tokens",
    "sum_copies",
    "sum_partials",
    "sum_replicas",
    "sum_terms",
    "take_turns",
    "weighted_sum_backward",
]
