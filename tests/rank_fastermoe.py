"""What four ranks of two nodes record of FasterMoE's variants; tests/test_fastermoe.py judges it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from baselines.fastermoe import FasterMoE, FasterMoELayer
from baselines.fastermoe_gate import TopologyGate
from baselines.flat import Flat
from experiments.ranks import RankInfo
from moe.mesh import Mesh, create_mesh
from moe.metering import LinkMeter
from moe.system import LayerSpec, System
from moe.topology import cluster_of
from moe.weights import load_layer, seeded_generator
from moe.workload import Workload, expert_ids, gate_for, tokens_for
from tests.comparing import relative_error

NUM_TOKENS, MODEL_DIM, NUM_EXPERTS = 20, 32, 8
SLOW_NET = {"net_bytes_per_s": 1e6, "flops_per_s": 1e9}
"""Computation takes most of the time, so that shadowing pays."""

VARIANTS: dict[str, dict[str, Any]] = {
    "nothing": {"shadowing": "none", "schedule": "none"},
    "pairwise": {"shadowing": "none"},
    "pairwise, one rank a group": {"shadowing": "none", "group_size": 1},
    "paper": {"schedule": "none", **SLOW_NET},
    "paper, pairwise": SLOW_NET,
    "fastmoe, pairwise": {"shadowing": "fastmoe", **SLOW_NET},
    "paper, one rank a group": {"group_size": 1, **SLOW_NET},
}
FRACTION = 0.25

Facts = dict[str, Any]


def measure(payload: dict[str, Any], info: RankInfo) -> dict[str, list[Facts]]:
    """Facts of `variants` and of the `gate`, one entry per rank."""
    torch.set_num_threads(1)
    mesh = create_mesh(cluster_of([2, 2]), info.device)
    gathered = {}
    for name, part in (("variants", variants), ("gate", topology_gate)):
        facts: list[Facts] = [{} for _ in range(info.world_size)]
        dist.all_gather_object(facts, part(mesh))
        gathered[name] = facts
    return gathered


def variants(mesh: Mesh) -> Facts:
    """Errors of every variant against flat, on skewed routing; rank 3 has no tokens."""
    meter = LinkMeter(mesh.cluster, mesh.rank)
    expected = _run(Flat({"dispatcher": "all_to_all"}), mesh, meter)
    facts = {"flat": {"alltoall": expected["alltoall"]}}
    for name, options in VARIANTS.items():
        found = _run(FasterMoE(options), mesh, meter)
        errors = {key: relative_error(found["tensors"][key], value) for key, value in expected["tensors"].items()}
        facts[name] = {"errors": errors, "alltoall": found["alltoall"], "shadowed": found["shadowed"]}
    return facts


def _run(system: System, mesh: Mesh, meter: LinkMeter) -> Facts:
    spec = LayerSpec(MODEL_DIM, 24, NUM_EXPERTS, 2, "swiglu", seed=3)
    layer = system.build_layer(spec, mesh)
    load_layer(layer)
    layer.gate_weight.data.copy_(gate_for(NUM_EXPERTS, MODEL_DIM, mesh.device))
    num_tokens = 0 if mesh.rank == 3 else NUM_TOKENS
    wanted_TK = expert_ids(Workload("zipf", 1.5), num_tokens, NUM_EXPERTS, 2, 0, mesh.rank)
    x_TM = tokens_for(wanted_TK, MODEL_DIM, NUM_EXPERTS, 0, mesh.rank, torch.float32, mesh.device).requires_grad_()
    probe_TM = torch.randn(num_tokens, MODEL_DIM, generator=seeded_generator(("probe", mesh.rank)))
    meter.reset()
    with meter.installed():
        output = layer(x_TM)
        (output.y_TM * probe_TM).sum().backward()
    alltoall = {level: num_bytes for (level, kind), num_bytes in meter.sent.items() if kind == "alltoall"}
    system.gradient_sync(layer, mesh).reduce()
    assert x_TM.grad is not None and layer.gate_weight.grad is not None
    tensors = {"output": output.y_TM, "input": x_TM.grad, "gate": layer.gate_weight.grad}
    for view in layer.expert_views():
        assert view.parameter.grad is not None
        tensors[f"expert {view.expert} {view.name}"] = view.view(view.parameter.grad)
    shadowed = layer.schedule.last_shadowed if isinstance(layer, FasterMoELayer) else []
    return {
        "tensors": tensors,
        "alltoall": sorted((level, num_bytes) for level, num_bytes in alltoall.items() if num_bytes),
        "shadowed": shadowed,
    }


def topology_gate(mesh: Mesh) -> Facts:
    """Tokens that leave the node, and a backward, under the topology gate."""
    system = FasterMoE({"topology_gate": True, "outgoing_fraction": FRACTION, **SLOW_NET})
    layer = system.build_layer(LayerSpec(MODEL_DIM, 24, NUM_EXPERTS, 2, seed=3), mesh)
    load_layer(layer)
    assert isinstance(layer, FasterMoELayer) and isinstance(layer.gate, TopologyGate)
    x_TM = torch.randn(NUM_TOKENS, MODEL_DIM, generator=seeded_generator(("tokens", mesh.rank))).requires_grad_()
    output = layer(x_TM)
    (output.y_TM.sum() + output.aux_loss).backward()
    ids_TK = output.expert_ids_TK
    assert ids_TK is not None and x_TM.grad is not None
    node_TK = ids_TK // (NUM_EXPERTS // 2)
    plain_TK = (x_TM @ layer.gate_weight.t()).topk(2).indices // (NUM_EXPERTS // 2)
    return {
        "limit": layer.gate.limit(NUM_TOKENS),
        "leaving": int((node_TK != mesh.rank // 2).any(1).sum()),
        "leaving under plain top-2": int((plain_TK != mesh.rank // 2).any(1).sum()),
        "distinct": bool((ids_TK[:, 0] != ids_TK[:, 1]).all()),
        "finite": bool(torch.isfinite(x_TM.grad).all()),
    }
