"""What six ranks do for the tests of Tutel's 2DH: each part records plain facts, the tests judge them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from baselines.flat import Flat
from baselines.replacing import replaced
from baselines.tutel_2dh import TutelTwoDimensional, TwoDimensionalMoE
from baselines.tutel_2dh_exchange import Exchange2D, nodes_of
from experiments.ranks import RankInfo
from moe.errors import Refused
from moe.gate import TopKGate
from moe.mesh import Mesh, create_mesh
from moe.metering import LinkMeter
from moe.system import LayerSpec, System
from moe.topology import cluster_of
from moe.weights import gate_matrix, load_layer
from tests.comparing import relative_error

WORLD_SIZE, NUM_EXPERTS, MODEL_DIM = 6, 12, 16
CLUSTERS: dict[str, tuple[list[int], int]] = {
    "three nodes of two": ([2, 3], 6),
    "two nodes of three": ([3, 2], 6),
    "one level": ([6], 6),
    "one rank a node": ([1, 6], 6),
    "two groups of one node": ([3, 2], 3),
}
"""Fan-outs, innermost first, and ranks that share experts."""

OPTIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "code": {"order": "inter_first"},
    "paper, 2 parts": {"overlap_degree": 2},
    "code, 2 parts": {"order": "inter_first", "overlap_degree": 2},
    "paper, 4 parts": {"overlap_degree": 4},
}
RUNS = dict.fromkeys(CLUSTERS, ["paper"]) | {
    "three nodes of two": list(OPTIONS),
    "two nodes of three": ["paper", "code, 2 parts"],
    "one level": ["code, 2 parts"],
}
"""Options by cluster."""

LAYERS: dict[str, dict[str, Any]] = {
    "top1": {"top_k": 1},
    "top2 swiglu": {"top_k": 2, "activation": "swiglu"},
    "top3 drops": {"top_k": 3, "capacity_factor": 0.75},
    "bf16": {"top_k": 2, "dtype": torch.bfloat16},
}
NUM_TOKENS = 20
CAPACITIES = {"dropless": None, "drops": 0.75}
Facts = dict[str, Any]


def num_tokens(layer: str, rank: int) -> int:
    """Of a rank: as many everywhere where capacities go by them, else uneven, and none on one rank."""
    return NUM_TOKENS if layer.endswith("drops") else 7 * rank


def measure(_payload: dict[str, Any], info: RankInfo) -> dict[str, list[Facts]]:
    """Facts by part and rank."""
    torch.set_num_threads(1)
    meshes = {
        name: create_mesh(cluster_of(fanouts), info.device, ep_size) for name, (fanouts, ep_size) in CLUSTERS.items()
    }
    facts: dict[str, list[Facts]] = {}
    for part, record in PARTS.items():
        gathered: list[Facts] = [{} for _ in range(info.world_size)]
        dist.all_gather_object(gathered, record(meshes))
        facts[part] = gathered
    return facts


def exchanges(meshes: dict[str, Mesh]) -> Facts:
    """Chunks that say where they come from and go to, as [from, to] in the order in which they arrived."""
    facts: Facts = {}
    for name, mesh in meshes.items():
        nodes = nodes_of(mesh)
        for inside_first in (True, False):
            mine = [[float(mesh.ep_rank), float(other)] for other in range(mesh.ep_size)]
            chunks_NGRM = torch.tensor(mine).view(nodes.num_nodes, nodes.node_size, 1, 2).requires_grad_()
            exchange = Exchange2D(nodes, inside_first)
            arrived = exchange.wait(exchange.post(chunks_NGRM))
            # A chunk's gradient says what the chunk does.
            (arrived * arrived.detach()).sum().backward()
            assert chunks_NGRM.grad is not None
            facts[f"{name}, {'inside' if inside_first else 'between'} first"] = {
                "arrived": arrived.detach().view(-1, 2).tolist(),
                "gradient": chunks_NGRM.grad.view(-1, 2).tolist(),
                "sent": mine,
            }
    return facts


def layers(meshes: dict[str, Mesh]) -> Facts:
    """Relative errors to flat's, and what differs in a second run."""
    facts: Facts = {}
    for cluster, mesh in meshes.items():
        for layer, kwargs in LAYERS.items():
            spec = LayerSpec(MODEL_DIM, 24, NUM_EXPERTS, **kwargs)
            x_TM = tokens(spec, num_tokens(layer, mesh.rank), mesh.rank)
            flat = step(Flat({"dispatcher": "all_to_all"}), spec, mesh, x_TM)
            for options in RUNS[cluster]:
                system = TutelTwoDimensional(OPTIONS[options])
                first = step(system, spec, mesh, x_TM)
                again = step(system, spec, mesh, x_TM) if layer == "top2 swiglu" else first
                facts[f"{cluster}, {layer}, {options}"] = {
                    "errors": {name: relative_error(value, flat[name]) for name, value in first.items()},
                    "unequal": [name for name, value in first.items() if not torch.equal(value, again[name])],
                }
    return facts


def tokens(spec: LayerSpec, num: int, rank: int) -> Tensor:
    """Of a rank, [num, M]."""
    return torch.randn(num, spec.model_dim, generator=torch.Generator().manual_seed(rank)).to(spec.dtype)


def step(system: System, spec: LayerSpec, mesh: Mesh, x_TM: Tensor) -> dict[str, Tensor]:
    """Output and gradients of one forward and backward, gradients reduced."""
    layer = system.build_layer(spec, mesh)
    load_layer(layer)
    x_TM = x_TM.clone().requires_grad_()
    output = layer(x_TM)
    ((output.y_TM.float() * torch.linspace(-1, 1, spec.model_dim)).sum() + output.aux_loss.nan_to_num()).backward()
    system.gradient_sync(layer, mesh).reduce()
    assert x_TM.grad is not None and layer.gate_weight.grad is not None
    found = {"output": output.y_TM.detach(), "input": x_TM.grad, "gate": layer.gate_weight.grad}
    for view in layer.expert_views():
        assert view.parameter.grad is not None
        found[f"{view.expert} {view.name}"] = view.view(view.parameter.grad)
    return found | {"counts": output.counts_E.float(), "dropped": output.num_dropped.float()}


def traffic(meshes: dict[str, Mesh]) -> Facts:
    """Token bytes of one step by level, of 2DH and of flat, and the copies of each expert that this rank keeps."""
    facts: Facts = {}
    for cluster, mesh in meshes.items():
        for name, capacity_factor in CAPACITIES.items():
            spec = LayerSpec(MODEL_DIM, 24, NUM_EXPERTS, 2, capacity_factor=capacity_factor)
            x_TM = tokens(spec, NUM_TOKENS, mesh.rank)
            systems = {options: TutelTwoDimensional(OPTIONS[options]) for options in RUNS[cluster]}
            sent = {}
            for label, system in {"flat": Flat({"dispatcher": "all_to_all"}), **systems}.items():
                meter = LinkMeter(mesh.cluster, mesh.rank)
                with meter.installed():
                    step(system, spec, mesh, x_TM)
                sent[label] = [meter.sent[level, "alltoall"] for level in range(len(mesh.cluster.levels))]
            gate = TopKGate(spec, mesh.device)
            gate.weight.data.copy_(gate_matrix(spec, mesh.device))
            routing = gate(x_TM)
            kept_TK = torch.ones_like(routing.expert_ids_TK) if routing.kept_TK is None else routing.kept_TK
            kept_E = torch.bincount(routing.expert_ids_TK[kept_TK.bool()], minlength=NUM_EXPERTS)
            facts[f"{cluster}, {name}"] = {"sent": sent, "kept": kept_E.tolist()}
    return facts


def order(meshes: dict[str, Mesh]) -> Facts:
    """What a layer does one after the other, forward and backward: exchanges between nodes begin (+) and are awaited
    (-), exchanges inside one (i), experts compute (E)."""
    mesh, facts = meshes["three nodes of two"], {}
    for options, chosen in OPTIONS.items():
        layer = TutelTwoDimensional(chosen).build_layer(LayerSpec(MODEL_DIM, 24, NUM_EXPERTS, 2), mesh)
        assert isinstance(layer, TwoDimensionalMoE)
        load_layer(layer)
        events: list[str] = []
        for part in layer.parts:
            part.register_forward_hook(partial(note, events))
            part.register_full_backward_hook(partial(note, events))
        with noted(events):
            y_TM = layer(tokens(layer.spec, NUM_TOKENS, mesh.rank).requires_grad_()).y_TM
            num_forward = len(events)
            y_TM.sum().backward()
        done = "".join(events)
        facts[options] = {"forward": done[:num_forward], "backward": done[num_forward:], "path": layer.path}
    return facts


def note(events: list[str], *_: Any) -> None:
    """Experts have computed."""
    events.append("E")


@contextmanager
def noted(events: list[str]) -> Iterator[None]:
    """Add to `events` what is sent in the block."""
    exchange, batch = dist.all_to_all_single, dist.batch_isend_irecv

    def noted_exchange(*args: Any, **kwargs: Any) -> Any:
        events.append("i")
        return exchange(*args, **kwargs)

    def noted_batch(operations: Any) -> list[Any]:
        events.append("+")
        works = batch(operations)

        def wait() -> None:
            events.append("-")
            for work in works:
                work.wait()

        return [SimpleNamespace(wait=wait)]

    with replaced(dist, "all_to_all_single", noted_exchange), replaced(dist, "batch_isend_irecv", noted_batch):
        yield


def refusal(meshes: dict[str, Mesh]) -> Facts:
    """The paths of layers that are built, and what is said of ranks that are no whole nodes."""
    facts: Facts = {}
    for cluster, mesh in meshes.items():
        facts[cluster] = TutelTwoDimensional().build_layer(LayerSpec(MODEL_DIM, 24, NUM_EXPERTS, 2), mesh).path
    broken = dataclasses.replace(meshes["one level"], cluster=cluster_of([4, 3]))
    try:
        TutelTwoDimensional().build_layer(LayerSpec(MODEL_DIM, 24, NUM_EXPERTS, 2), broken)
    except Refused as refused:
        facts["refused"] = refused.reasons
    return facts


PARTS: dict[str, Callable[[dict[str, Mesh]], Facts]] = {
    "exchanges": exchanges,
    "layers": layers,
    "traffic": traffic,
    "order": order,
    "refusal": refusal,
}
