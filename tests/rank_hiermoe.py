"""What eight ranks do for the tests of HierMoE: each part records plain facts, the tests judge them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from experiments.ranks import RankInfo
from methods.hiermoe import HierMoE
from methods.hiermoe_dispatch import HierarchicalDispatcher
from moe.dispatch import AllToAllDispatcher, Dispatcher
from moe.errors import Refused
from moe.layer import NativeMoE
from moe.mesh import Mesh, block_group, create_mesh
from moe.metering import LinkMeter
from moe.sync import GradientSync
from moe.system import LayerSpec
from moe.topology import cluster_of
from moe.weights import load_layer
from tests.comparing import relative_error
from tests.rank_parts import round_trips

WORLD_SIZE, NUM_EXPERTS, MODEL_DIM = 8, 16, 16
CLUSTERS: dict[str, tuple[list[int], int]] = {
    "eight ranks on three levels": ([2, 2, 2], 8),
    "eight ranks, two nodes of four": ([4, 2], 8),
    "four ranks on two levels, twice": ([2, 2, 2], 4),
}
"""Fan-outs, innermost first, and ranks that share experts."""

DISPATCHERS: dict[str, tuple[int | None, bool]] = {
    "HD": (None, True),
    "H": (None, False),
    "HD2": (2, True),
    "HD1": (1, True),
    "H1": (1, False),
}
"""Levels and whether copies are deduplicated."""

FIXED: dict[str, Any] = {"placement": "fixed"}
"""Options that need no costs, with `levels`."""

RUNS = {
    cluster: [name for name in DISPATCHERS if (fanouts, ep_size) == ([2, 2, 2], 8) or name in ("HD", "H")]
    for cluster, (fanouts, ep_size) in CLUSTERS.items()
}
"""Dispatchers by cluster."""

LAYERS: dict[str, dict[str, Any]] = {
    "top1": {"top_k": 1},
    "top2 swiglu": {"top_k": 2, "activation": "swiglu"},
    "top6, more than a node has": {"top_k": 6},
    "top3 drops": {"top_k": 3, "capacity_factor": 0.75},
    "bf16, odd rows": {"top_k": 2, "model_dim": 15, "dtype": torch.bfloat16},
}


def num_tokens(rank: int) -> int:
    """Of a rank; one has none."""
    return 0 if rank == 3 else 12 + rank


def measure(payload: dict[str, Any], info: RankInfo) -> dict[str, Any]:
    """Facts of every part: {part: [facts of each rank]}."""
    torch.set_num_threads(1)
    meshes = {
        name: create_mesh(cluster_of(fanouts), info.device, ep_size) for name, (fanouts, ep_size) in CLUSTERS.items()
    }
    trips = {4: meshes["four ranks on two levels, twice"], 2: create_mesh(cluster_of([2, 2, 2]), info.device, 2)}
    parts = {
        "layers": {name: layers(mesh, RUNS[name]) for name, mesh in meshes.items()},
        "round trips": {
            "deduplicated": round_trips(trips, lambda mesh, experts, _top_k: HierarchicalDispatcher(mesh, experts)),
            "copies": round_trips(
                trips, lambda mesh, experts, _top_k: HierarchicalDispatcher(mesh, experts, dedup=False)
            ),
        },
        "groups": groups(meshes["eight ranks on three levels"], trips[2]),
        "system": system(meshes["eight ranks on three levels"], trips[2]),
    }
    gathered: list[Any] = [None] * info.world_size
    dist.all_gather_object(gathered, parts)
    return {part: [facts[part] for facts in gathered] for part in parts}


def four_levels(payload: dict[str, Any], info: RankInfo) -> list[dict[str, Any]]:
    """Sixteen ranks: errors of four exchanges each way against one all-to-all-v, by dispatcher; of all ranks."""
    torch.set_num_threads(1)
    mesh = create_mesh(cluster_of([2, 2, 2, 2]), info.device)
    spec = LayerSpec(model_dim=8, hidden_dim=8, num_experts=NUM_EXPERTS, top_k=3)
    expected, flat = _step(spec, mesh, AllToAllDispatcher(mesh, NUM_EXPERTS))
    facts: dict[str, Any] = {"flat": flat["bytes"]}
    for name in ("HD", "H"):
        got, told = _step(spec, mesh, HierarchicalDispatcher(mesh, NUM_EXPERTS, *DISPATCHERS[name]))
        facts[name] = max(relative_error(value, expected[key]) for key, value in got.items()), told["bytes"]
    gathered: list[Any] = [None] * info.world_size
    dist.all_gather_object(gathered, facts)
    return gathered


def layers(mesh: Mesh, names: list[str]) -> dict[str, Any]:
    """Errors of the named dispatchers against one all-to-all-v, and what both sent, by layer."""
    facts: dict[str, Any] = {}
    for layer_name, kwargs in LAYERS.items():
        sizes: dict[str, Any] = {"model_dim": MODEL_DIM, "hidden_dim": 8, "num_experts": NUM_EXPERTS}
        spec = LayerSpec(**sizes | kwargs)
        expected, flat_facts = _step(spec, mesh, AllToAllDispatcher(mesh, NUM_EXPERTS))
        found: dict[str, Any] = {"flat": flat_facts}
        for name in names:
            num_levels, dedup = DISPATCHERS[name]
            got, told = _step(spec, mesh, HierarchicalDispatcher(mesh, NUM_EXPERTS, num_levels, dedup))
            told["errors"] = {key: relative_error(value, expected[key]) for key, value in got.items()}
            found[name] = told
        facts[layer_name] = found
    return facts


def _step(spec: LayerSpec, mesh: Mesh, dispatcher: Dispatcher) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Outputs and reduced gradients of a step; choices, and bytes that this rank sent [levels] forward and in all."""
    layer = NativeMoE(spec, mesh, dispatcher=dispatcher)
    load_layer(layer)
    generator = torch.Generator().manual_seed(mesh.rank)
    x_TM, probe_TM = torch.randn(2, num_tokens(mesh.rank), spec.model_dim, generator=generator).to(spec.dtype)
    x_TM = x_TM.clone().requires_grad_()
    meter = LinkMeter(mesh.cluster, mesh.rank)
    with meter.installed():
        output = layer(x_TM)
        forward_bytes = meter.as_tensor().sum(1)
        (output.y_TM * probe_TM).sum().backward()
    GradientSync(layer, layer.sharded_parameters(), mesh).reduce()
    assert x_TM.grad is not None and layer.gate_weight.grad is not None
    results = {"output": output.y_TM, "input": x_TM.grad, "gate": layer.gate_weight.grad}
    for view in layer.expert_views():
        assert view.parameter.grad is not None
        results[f"{view.expert} {view.name}"] = view.view(view.parameter.grad)
    routing = layer.gate(x_TM.detach())
    kept = torch.ones_like(routing.expert_ids_TK, dtype=torch.bool) if routing.kept_TK is None else routing.kept_TK
    return results, {
        "ids": [
            [expert for expert, is_kept in zip(*row, strict=True) if is_kept]
            for row in zip(routing.expert_ids_TK.tolist(), kept.tolist(), strict=True)
        ],
        "forward bytes": forward_bytes.tolist(),
        "bytes": meter.as_tensor().sum(1).tolist(),
    }


def groups(mesh: Mesh, pairs: Mesh) -> dict[str, Any]:
    """Ranks of some groups of blocks, and whether they are made once for a mesh."""
    asked = [(8, 4), (8, 2), (4, 2), (4, 1), (8, 1)]
    return {
        "ranks": {
            f"{outer} {inner}": dist.get_process_group_ranks(block_group(mesh, outer, inner)) for outer, inner in asked
        },
        "once": block_group(mesh, 8, 4) is block_group(mesh, 8, 4),
        "whole": block_group(mesh, 8, 1) is mesh.ep_group and block_group(pairs, 2, 1) is pairs.ep_group,
    }


def system(mesh: Mesh, pairs: Mesh) -> dict[str, Any]:
    """How the system's layers say that they send, and what it refuses when it sees the ranks that share experts."""
    spec = LayerSpec(MODEL_DIM, 8, NUM_EXPERTS, 2)
    options: list[dict[str, Any]] = [{"levels": "all"}, {"levels": 2, "dedup": False}, {"levels": 1}]
    uneven = dataclasses.replace(pairs, cluster=cluster_of([1, 8]))
    threes = dataclasses.replace(mesh, cluster=cluster_of([3, 2]), ep_size=2)
    return {
        "paths": [HierMoE(FIXED | chosen).build_layer(spec, mesh).path for chosen in options],
        "paths of a pair": [
            HierMoE(FIXED | {"levels": "all"}).build_layer(spec, item).path for item in (pairs, uneven)
        ],
        "refused": [_refusal({"levels": 2}, spec, pairs), _refusal({"levels": "all"}, spec, threes)],
    }


def _refusal(options: dict[str, Any], spec: LayerSpec, mesh: Mesh) -> str:
    try:
        HierMoE(FIXED | options).build_layer(spec, mesh)
    except Refused as refused:
        return str(refused)
    return ""
