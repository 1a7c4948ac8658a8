"""What ranks do for the tests of moe/: each part records plain facts, gathered on rank 0; the tests judge them."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.reference import ReferenceLayer
from experiments.ranks import RankInfo
from methods.swiftmoe_scheduler import even_table
from moe.dispatch import AllToAllDispatcher, Dispatcher
from moe.experts import GroupedExperts
from moe.gate import Routing
from moe.layer import NativeMoE
from moe.mesh import Mesh, create_mesh
from moe.metering import LinkMeter
from moe.replica_gate import ReplicaGate
from moe.sync import GradientSync
from moe.system import LayerSpec, MoELayer, MoEOutput
from moe.topology import cluster_of
from moe.weights import load_layer
from tests.comparing import relative_error
from tests.lone import lone_mesh
from tests.shared_memory import FileMemory, cpu_peers

CLUSTER = cluster_of([2, 2])
CPU = torch.device("cpu")
Facts = dict[str, Any]


def measure(payload: dict[str, Any], info: RankInfo) -> dict[str, list[Facts]]:
    """Facts of every part, one entry per rank."""
    torch.set_num_threads(1)
    meshes = {ep_size: create_mesh(CLUSTER, CPU, ep_size) for ep_size in (4, 2)}
    gathered: dict[str, list[Facts]] = {}
    for name, part in PARTS.items():
        facts: list[Facts] = [{} for _ in range(info.world_size)]
        dist.all_gather_object(facts, part(meshes))
        gathered[name] = facts
    return gathered


# Dispatch


def dispatch_cases(rank: int) -> dict[str, tuple[int, int, Tensor, Tensor | None]]:
    """By name: ep_size, num_experts, this rank's expert ids [T, K], and which copies are kept [T, K]."""
    generator = torch.Generator().manual_seed(rank)

    def ids(num_tokens: int, num_experts: int, top_k: int) -> Tensor:
        return torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices

    return {
        "several experts a rank": (4, 8, ids(6, 8, 3), None),
        "one expert a rank": (4, 4, ids(6, 4, 2), None),
        "a rank without tokens": (4, 8, ids(0 if rank == 3 else 5, 8, 2), None),
        "all to one expert": (4, 8, torch.full((7, 1), 5), None),
        "idle experts": (4, 8, ids(6, 3, 2), None),
        "dropped copies": (4, 8, ids(6, 8, 3), torch.rand(6, 3, generator=generator) < 0.5),
        "all dropped": (4, 8, ids(6, 8, 2), torch.zeros(6, 2, dtype=torch.bool)),
        "two groups": (2, 4, ids(6, 4, 2), None),
        "more choices than ranks": (4, 8, ids(5, 8, 6), torch.rand(5, 6, generator=generator) < 0.8),
    }


def dispatch(meshes: dict[int, Mesh]) -> Facts:
    """Round trips by all-to-all-v."""
    return round_trips(meshes, lambda mesh, num_experts, _top_k: AllToAllDispatcher(mesh, num_experts))


def peer_dispatch(meshes: dict[int, Mesh]) -> Facts:
    """Round trips through memory that the ranks share."""
    return round_trips(meshes, lambda mesh, num_experts, top_k: cpu_peers(mesh, LayerSpec(2, 8, num_experts, top_k), 7))


def round_trips(meshes: dict[int, Mesh], build: Callable[[Mesh, int, int], Dispatcher]) -> Facts:
    """Rows that arrived, as (rank, token) of their origin, by expert; and the round trip through doing nothing."""
    rank = meshes[4].rank
    facts: Facts = {}
    for name, (ep_size, num_experts, ids_TK, kept_TK) in dispatch_cases(rank).items():
        mesh = meshes[ep_size]
        weights_TK = torch.rand(ids_TK.shape, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        counts_E = torch.bincount(ids_TK.flatten(), minlength=num_experts)
        routing = Routing(ids_TK, weights_TK, kept_TK, torch.zeros(0), counts_E, torch.zeros(()))
        token_T = torch.arange(len(ids_TK), dtype=torch.float32)
        x_TM = torch.stack([torch.full_like(token_T, rank), token_T], dim=1).requires_grad_()
        dispatcher = build(mesh, num_experts, ids_TK.shape[1])
        rows_RM, plan = dispatcher.dispatch(x_TM, routing)
        weighted_RM = rows_RM if plan.row_weights is None else rows_RM * plan.row_weights.unsqueeze(1)
        y_TM = dispatcher.combine(weighted_RM, plan, weights_TK)
        y_TM.sum().backward()
        assert x_TM.grad is not None and weights_TK.grad is not None
        kept = torch.ones_like(ids_TK, dtype=torch.bool) if kept_TK is None else kept_TK
        total_T1 = (weights_TK * kept).sum(1, keepdim=True)
        arrived = rows_RM.detach().split(plan.expert_rows)
        facts[name] = {
            "ids": ids_TK.tolist(),
            "kept": kept.tolist(),
            "group": rank // ep_size,
            "experts": list(mesh.local_experts(num_experts)),
            "arrived": [rows.int().tolist() for rows in arrived],
            "send_rows": getattr(plan, "send_rows", []),
            "receive_rows": getattr(plan, "receive_rows", []),
            "expert_ends": plan.expert_ends.tolist(),
            "round_trip_error": _largest(y_TM - total_T1 * x_TM),
            "input_grad_error": _largest(x_TM.grad - total_T1.expand_as(x_TM)),
            "weight_grad_error": _largest(weights_TK.grad - kept * x_TM.sum(1, keepdim=True)),
        }
    return facts


PEER_LAYERS: dict[str, dict[str, Any]] = {
    "top1": {"top_k": 1},
    "top3 swiglu": {"top_k": 3, "activation": "swiglu"},
    "top6": {"top_k": 6},
    "top2 drops": {"top_k": 2, "capacity_factor": 0.75},
    "top2 drops, by ends": {"top_k": 2, "capacity_factor": 0.75},
    "top2 with much room, by ends": {"top_k": 2, "capacity_factor": 2.0},
}


class ExpertsByEnds(GroupedExperts):
    """Experts that find their rows by the ends alone, as grouped products do, and leave any result in the others."""

    told: bool = True

    def forward(
        self,
        rows_RM: Tensor,
        expert_rows: list[int] | None,
        expert_ends: Tensor | None = None,
        row_weights_R: Tensor | None = None,
    ) -> Tensor:
        """As `GroupedExperts.forward`; notes whether the host was told of their rows."""
        self.told = expert_rows is not None
        assert expert_ends is not None and row_weights_R is not None
        ends = [0, *expert_ends.tolist()]
        rows = [end - start for start, end in zip(ends, ends[1:], strict=False)]
        y_RM = super().forward(rows_RM[: ends[-1]], rows, expert_ends, row_weights_R[: ends[-1]])
        return torch.cat([y_RM, torch.full_like(rows_RM[ends[-1] :], torch.nan)])


def peer_layers(meshes: dict[int, Mesh]) -> Facts:
    """Errors of the native layer over shared memory against the oracle, twice over the same memory, and its bytes."""
    mesh = meshes[4]
    facts: Facts = {}
    for name, kwargs in PEER_LAYERS.items():
        spec = LayerSpec(16, 8, 8, **kwargs)
        layers: list[MoELayer] = [ReferenceLayer(spec, mesh)]
        native = NativeMoE(spec, mesh, dispatcher=cpu_peers(mesh, spec, 12))
        by_ends = name.endswith("by ends")
        if by_ends:
            native.experts = ExpertsByEnds(spec, mesh.local_experts(8), CPU)
        layers += [native]
        facts[name] = {"errors": [], "sent": []}
        for turn in range(2):
            generator = torch.Generator().manual_seed(2 * mesh.rank + turn)
            x_TM, grad_TM = torch.randn(12, 16, generator=generator), torch.randn(12, 16, generator=generator)
            found: list[dict[str, Tensor]] = []
            for layer in layers:
                load_layer(layer)
                for parameter in layer.parameters():
                    parameter.grad = None
                tokens = x_TM.clone().requires_grad_()
                meter = LinkMeter(CLUSTER, mesh.rank)
                grouped = mock.patch("moe.peer_dispatch.products_are_grouped", return_value=by_ends)
                with meter.installed(), grouped:
                    output = layer(tokens)
                    ((output.y_TM * grad_TM).sum() + output.aux_loss).backward()
                GradientSync(layer, layer.sharded_parameters(), mesh).reduce()
                assert tokens.grad is not None and layer.gate_weight.grad is not None
                found.append({"y": output.y_TM.detach(), "x": tokens.grad, "gate": layer.gate_weight.grad})
                for view in layer.expert_views():
                    assert view.parameter.grad is not None
                    found[-1][f"{view.expert} {view.name}"] = view.view(view.parameter.grad)
            facts[name]["errors"] += [relative_error(value, found[0][key]) for key, value in found[1].items()]
            routing_ids = output.expert_ids_TK
            assert routing_ids is not None
            pairs = [int((routing_ids // 2 == rank).any(1).sum()) for rank in range(4)]
            facts[name]["sent"].append(sum(count for (_, kind), count in meter.sent.items() if kind == "alltoall"))
            facts[name].setdefault("pairs", []).append(pairs)
            copies = [int((routing_ids // 2 == rank).sum()) for rank in range(4)]
            facts[name].setdefault("copies", []).append(copies)
            if isinstance(native.experts, ExpertsByEnds):
                facts[name].setdefault("told", []).append(native.experts.told)
    return facts


def peer_room(meshes: dict[int, Mesh]) -> Facts:
    """Rows that there is room for, and those that copies take: by drop rule, with ranks of 48, 0, 20 and 48 tokens.
    Expert 0 is wanted more often than it has room."""
    mesh = meshes[4]
    num_tokens = [48, 0, 20, 48][mesh.rank]
    ids_TK = torch.tensor(3 * [0, 1, 0, 0, 1, 0, 0, 2, 0, 0, 1, 0, 3, 0, 0, 1])[:num_tokens].view(-1, 1)
    table = even_table(4, 4, 4).after([9, 4, 2, 1])
    facts: Facts = {}
    for drop in ("per_source", "global"):
        spec = LayerSpec(16, 8, 4, 1, capacity_factor=1.0)
        gate = ReplicaGate(spec, mesh, table, drop)
        load = torch.zeros(num_tokens, 4).scatter_(1, ids_TK, 9.0)
        with mock.patch.object(gate, "logits", return_value=load):
            routing = gate(torch.randn(num_tokens, 16))
        peers = cpu_peers(mesh, dataclasses.replace(spec, num_experts=16), 48)
        with mock.patch("moe.peer_dispatch.products_are_grouped", return_value=True):
            rows_RM, plan = peers.dispatch(torch.randn(num_tokens, 16), gate.placed(routing))
        last = int(plan.expert_ends[-1])
        facts[drop] = {
            "room": plan.num_rows,
            "laid out": len(rows_RM),
            "taken": last,
            "places": sorted(place for place in plan.places_PTK.flatten().tolist() if place >= 0) == list(range(last)),
            "kept": int(num_tokens if routing.kept_TK is None else routing.kept_TK.sum()),
            "host knows": plan.expert_rows is not None,
        }
    return facts


def peer_order(meshes: dict[int, Mesh]) -> Facts:
    """Barriers that calls in several orders take, and whether a step leaves nothing to the garbage collector."""
    mesh = meshes[4]
    spec = LayerSpec(16, 8, 8, 2)
    dispatcher = cpu_peers(mesh, spec, 6)
    assert dispatcher.workspace is not None
    memory = dispatcher.workspace.memory
    assert isinstance(memory, FileMemory)
    layer = NativeMoE(spec, mesh, dispatcher=dispatcher)
    load_layer(layer)
    x_TM = torch.randn(6, 16, generator=torch.Generator().manual_seed(mesh.rank))
    barriers: dict[str, int] = {}

    def counted(name: str, action: Callable[[], Any]) -> Any:
        before = memory.barriers
        value = action()
        barriers[name] = memory.barriers - before
        return value

    def both(tokens: Tensor) -> None:
        layer(tokens).y_TM.sum().backward()

    def interleaved() -> None:
        routing = layer.gate(x_TM)
        plans = [dispatcher.dispatch(x_TM, routing) for _ in range(2)]
        for rows_RM, plan in plans:
            dispatcher.combine(rows_RM, plan, routing.weights_TK)

    def frozen() -> None:
        layer.gate.weight.requires_grad_(False)
        both(x_TM)
        layer(x_TM)

    with torch.no_grad():
        counted("forward", lambda: layer(x_TM))
    counted("forward and backward", lambda: both(x_TM.clone().requires_grad_()))
    counted("again", lambda: both(x_TM.clone().requires_grad_()))
    with torch.no_grad():
        counted("two dispatches, then two combines", interleaved)
    counted("no gradient of tokens, then forward", frozen)
    layer.gate.weight.requires_grad_(True)
    gc.collect()
    gc.disable()
    try:
        rows_RM, plan = dispatcher.dispatch(x_TM, layer.gate(x_TM))
        places = weakref.ref(plan.places_PTK)
        dispatcher.combine(rows_RM, plan, torch.zeros(0)).sum().backward()
        del rows_RM, plan
        freed = places() is None
    finally:
        gc.enable()
    return {"barriers": barriers, "plan is freed": freed}


def _largest(difference: Tensor) -> float:
    return float(difference.detach().abs().max()) if difference.numel() else 0.0


# Metering


def metering(meshes: dict[int, Mesh]) -> Facts:
    """Bytes counted for each kind of call, as [level, class, bytes]; and whether the calls still worked."""
    rank = meshes[4].rank
    meter = LinkMeter(CLUSTER, rank)
    facts: Facts = {}

    @contextmanager
    def recorded(name: str) -> Any:
        meter.reset()
        with meter.installed():
            yield
        facts[name] = sorted([level, kind, num_bytes] for (level, kind), num_bytes in meter.sent.items())

    originals = _torch_functions()
    node, pair = meshes[2].ep_group, meshes[2].edp_group
    rows = torch.arange(8 * 3, dtype=torch.float32).view(8, 3)
    with recorded("all_to_all_single even"):
        dist.all_to_all_single(torch.empty_like(rows), rows)
    send = [rank, 0, 1, 2]
    receive = [[0, 1, 2, 3], [0] * 4, [1] * 4, [2] * 4][rank]
    with recorded("all_to_all_single uneven"):
        dist.all_to_all_single(torch.empty(sum(receive), 3), rows[: sum(send)], receive, send)
    with recorded("all_to_all_single empty"):
        dist.all_to_all_single(torch.empty(0, 3), torch.empty(0, 3), [0] * 4, [0] * 4)
    with recorded("all_to_all_single in a node, by keyword, bf16"):
        half = rows.bfloat16()
        dist.all_to_all_single(output=torch.empty_like(half), input=half, group=node)
    with recorded("all_to_all of lists"):
        dist.all_to_all([torch.empty(2, 3) for _ in range(4)], list(rows.split(2)))  # gloo takes equal sizes only
    with recorded("all_reduce"):
        reduced = rows.clone()
        dist.all_reduce(reduced)
    facts["all_reduce still sums"] = torch.equal(reduced, 4 * rows)
    with recorded("all_reduce across nodes"):
        dist.all_reduce(rows.clone(), group=pair)
    with recorded("all_reduce alone"):
        dist.all_reduce(rows.clone(), group=_alone(rank))
    with recorded("reduce_scatter_tensor"):
        dist.reduce_scatter_tensor(torch.empty(2, 3), rows)
    with recorded("all_gather_into_tensor"):
        dist.all_gather_into_tensor(torch.empty(32, 3), rows)
    with recorded("all_gather"):
        dist.all_gather([torch.empty_like(rows) for _ in range(4)], rows)
    with recorded("broadcast"):
        dist.broadcast(rows.clone(), src=1)
    with recorded("reduce"):
        dist.reduce(rows.clone(), dst=1)
    with recorded("send"):
        if rank == 0:
            dist.send(rows, 3)
        elif rank == 3:
            dist.recv(torch.empty_like(rows), 0)
    with recorded("send to a rank of a group"):
        if rank == 1:
            dist.send(rows, group=pair, group_dst=1)
        elif rank == 3:
            dist.recv(torch.empty_like(rows), group=pair, group_src=0)
    with recorded("batch_isend_irecv"):
        got = torch.empty_like(rows)
        operations = [dist.P2POp(dist.isend, rows + rank, (rank + 1) % 4), dist.P2POp(dist.irecv, got, (rank - 1) % 4)]
        for request in dist.batch_isend_irecv(operations):
            request.wait()
    facts["batch_isend_irecv still sends"] = torch.equal(got, rows + (rank - 1) % 4)
    facts["as_tensor"] = meter.as_tensor().tolist()
    facts["restored"] = _torch_functions() == originals
    facts["restored after an error"] = _fails_inside(meter) and _torch_functions() == originals
    meter.reset()
    dist.all_reduce(rows.clone())
    facts["outside"] = sorted(meter.sent)
    facts["flat"] = [_flat_bytes(meshes[ep_size], kwargs) for ep_size, kwargs in FLAT_LAYERS]
    return facts


_ALONE: dict[int, dist.ProcessGroup] = {}


def _alone(rank: int) -> dist.ProcessGroup:
    if not _ALONE:
        _ALONE.update({peer: dist.new_group([peer]) for peer in range(4)})
    return _ALONE[rank]


def _torch_functions() -> list[Any]:
    names = ["all_to_all_single", "all_to_all", "all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor"]
    names += ["all_gather", "broadcast", "reduce", "send", "isend"]
    return [getattr(dist, name) for name in names] + [dist.distributed_c10d.isend]


def _fails_inside(meter: LinkMeter) -> bool:
    try:
        with meter.installed():
            raise ZeroDivisionError
    except ZeroDivisionError:
        return True


FLAT_LAYERS: list[tuple[int, dict[str, Any]]] = [
    (4, {"top_k": 2}),
    (4, {"top_k": 1, "capacity_factor": 0.5}),
    (2, {"top_k": 3, "activation": "swiglu"}),
]


def _flat_bytes(mesh: Mesh, kwargs: dict[str, Any]) -> Facts:
    """What the meter counted for one step of the native layer, and which copies left for which rank."""
    spec = LayerSpec(16, 8, 8, **kwargs)
    layer = NativeMoE(spec, mesh)
    load_layer(layer)
    x_TM = torch.randn(20, 16, generator=torch.Generator().manual_seed(mesh.rank)).requires_grad_()
    meter = LinkMeter(CLUSTER, mesh.rank)
    with meter.installed():
        output = layer(x_TM)
        output.y_TM.sum().backward()
    routing = layer.gate(x_TM.detach())
    kept = torch.ones_like(routing.expert_ids_TK, dtype=torch.bool) if routing.kept_TK is None else routing.kept_TK
    return {
        "sent": sorted([level, kind, num_bytes] for (level, kind), num_bytes in meter.sent.items()),
        "kept_experts": routing.expert_ids_TK[kept].tolist(),
        "num_dropped": int(output.num_dropped),
    }


# Gradient reduction


class TwoLayers(nn.Module):
    """A dense layer in front of an MoE layer, and a parameter that only rank 1 uses."""

    def __init__(self, moe: NativeMoE | ReferenceLayer) -> None:
        super().__init__()
        self.dense = nn.Linear(16, 16)
        self.rare = nn.Parameter(torch.ones(16))
        self.moe = moe
        with torch.no_grad():
            self.dense.weight.normal_(0, 0.25, generator=torch.Generator().manual_seed(1))
            self.dense.bias.zero_()
        load_layer(moe)

    def loss(self, x_BM: Tensor, target_BM: Tensor, rare_B: Tensor) -> Tensor:
        """Mean over the tokens; `rare_B` marks those that use the rare parameter."""
        hidden = self.dense(x_BM)
        if rare_B.any():
            hidden = hidden + rare_B.unsqueeze(1) * self.rare
        output: MoEOutput = self.moe(hidden)
        return F.mse_loss(output.y_TM, target_BM)


def sync(meshes: dict[int, Mesh]) -> Facts:
    """Gradients of ranks that share a batch against one process that has all of it."""
    spec = LayerSpec(16, 24, 8, 2)
    generator = torch.Generator().manual_seed(0)
    x_BM, target_BM = torch.randn(4 * 12, 16, generator=generator), torch.randn(4 * 12, 16, generator=generator)
    rank_B = torch.arange(4).repeat_interleave(12)
    single = TwoLayers(ReferenceLayer(spec, lone_mesh()))
    single.loss(x_BM, target_BM, rank_B == 1).backward()
    expected = _named_gradients(single)
    norm = torch.stack([grad.norm() for grad in expected.values()]).norm()

    facts: Facts = {}
    for ep_size, mesh in meshes.items():
        model = TwoLayers(NativeMoE(spec, mesh))
        mine = rank_B == mesh.rank
        model.loss(x_BM[mine], target_BM[mine], (rank_B == 1)[mine]).backward()
        gradient_sync = GradientSync(model, model.moe.sharded_parameters(), mesh)
        unused_before = model.rare.grad is None
        gradient_sync.reduce()
        got = _named_gradients(model)
        errors = {name: relative_error(got[name], expected[name]) for name in got}
        untouched = gradient_sync.clip(0.0)
        unclipped = all(torch.equal(got[name], grad) for name, grad in _named_gradients(model).items())
        loose = gradient_sync.clip(float(norm) * 2)
        loosely = max(relative_error(grad, expected[name]) for name, grad in _named_gradients(model).items())
        before = gradient_sync.clip(float(norm) / 3)
        tightly = max(relative_error(3 * grad, expected[name]) for name, grad in _named_gradients(model).items())
        facts[str(ep_size)] = {
            "errors": errors,
            "unused_before": unused_before,
            "norm_errors": [abs(float(value / norm) - 1) for value in (untouched, loose, before)],
            "clip 0 leaves": unclipped,
            "loose_error": loosely,
            "tight_error": tightly,
            "norm_after": float(gradient_sync.clip(0.0) / norm),
        }
    return facts


def _named_gradients(model: TwoLayers) -> dict[str, Tensor]:
    grads = {"weight": model.dense.weight.grad, "bias": model.dense.bias.grad, "rare": model.rare.grad}
    grads["gate"] = model.moe.gate_weight.grad
    for view in model.moe.expert_views():
        assert view.parameter.grad is not None
        grads[f"expert {view.expert} {view.name}"] = view.view(view.parameter.grad)
    return {name: grad.clone() for name, grad in grads.items() if grad is not None}


PARTS: dict[str, Callable[[dict[int, Mesh]], Facts]] = {
    "dispatch": dispatch,
    "peer_dispatch": peer_dispatch,
    "peer_layers": peer_layers,
    "peer_room": peer_room,
    "peer_order": peer_order,
    "metering": metering,
    "sync": sync,
}
