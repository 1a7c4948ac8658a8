"""What four ranks do for the tests of SwiftMoE: each part records plain facts, the tests judge them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from experiments.model import build_gpt
from experiments.optimizer import build_optimizer, lr_factor
from experiments.ranks import RankInfo
from experiments.registry import create
from methods import swiftmoe_optimizer
from methods.swiftmoe import SwiftMoE, SwiftMoELayer, place
from methods.swiftmoe_groups import consecutive_groups
from methods.swiftmoe_scheduler import SlotTable, even_table
from moe import ops, point_to_point
from moe.mesh import Mesh, create_mesh
from moe.metering import LinkMeter
from moe.point_to_point import Exchange, in_turn
from moe.stages import StageClock
from moe.system import LayerSpec, MoELayer, System
from moe.topology import cluster_of
from moe.weights import load_layer
from tests.comparing import relative_error
from tests.rank_models import MODELS, TRAINER, batch

WORLD_SIZE, NUM_EXPERTS, SLOTS = 4, 8, 3
NUM_STEPS = 5
LAYERS: dict[str, LayerSpec] = {
    "top1": LayerSpec(16, 12, NUM_EXPERTS, 1),
    "top2 swiglu": LayerSpec(16, 8, NUM_EXPERTS, 2, "swiglu"),
    "padded": LayerSpec(7, 5, NUM_EXPERTS, 2),
}
TABLES = [
    SlotTable((1, 1, 1, 1, 1, 1, 1, 5), SLOTS),
    SlotTable((5, 1, 1, 1, 1, 1, 1, 1), SLOTS),
    SlotTable((1, 1, 1, 5, 1, 1, 1, 1), SLOTS),
    SlotTable((2, 1, 2, 1, 2, 1, 2, 1), SLOTS),
    SlotTable((1, 2, 1, 1, 3, 1, 2, 1), SLOTS),
]
"""Placements after each step: experts on one, two and three ranks, with several slots on one, moving every time."""
SYSTEM = {"slots_per_rank": SLOTS}


def measure(payload: dict[str, Any], info: RankInfo) -> list[dict[str, Any]]:
    """Facts by rank."""
    torch.set_num_threads(1)
    mesh = create_mesh(cluster_of([2, 2]), info.device)
    pairs = create_mesh(cluster_of([2, 2]), info.device, ep_size=2)
    facts: dict[str, Any] = {
        "exchange": exchange(mesh),
        "groups": {f"{first} {last}": told(group) for (first, last), group in consecutive_groups(4).items()},
        "placements": {name: placements(spec, mesh) for name, spec in LAYERS.items()},
        "pairs": placements(LAYERS["top1"], pairs, scatter="slot"),
        "bf16": bf16(mesh),
        "reduced": reduced(mesh),
        "offloaded": offloaded(mesh),
        "bytes": [sent(table, mesh) for table in TABLES],
        "bytes per slot": [sent(table, mesh, scatter="slot") for table in TABLES],
        "drops": {drop: drops(drop, mesh) for drop in ("per_source", "global")},
        "on kernels": on_kernels(mesh) if ops.HAS_TRITON else None,
        "few experts": few_experts(mesh),
        "checkpoint": checkpoint(mesh),
        "model": model(mesh),
    }
    gathered: list[dict[str, Any]] = [{} for _ in range(info.world_size)]
    dist.all_gather_object(gathered, facts)
    return gathered


def told(group: dist.ProcessGroup) -> list[int] | None:
    """Ranks of a group; None where this rank is not in it."""
    return None if group == dist.GroupMember.NON_GROUP_MEMBER else dist.get_process_group_ranks(group)


def exchange(mesh: Mesh) -> dict[str, Any]:
    """Rows that say where they come from and go to, some pairs having none; and the order of works in turn."""

    def rows(source: int, target: int) -> int:
        return (source + 2 * target) % 3

    send = [rows(mesh.rank, peer) for peer in range(4)]
    receive = [rows(peer, mesh.rank) for peer in range(4)]
    sent_RF = torch.cat([torch.full((count, 2), 10.0 * mesh.rank + peer) for peer, count in enumerate(send)])
    received = Exchange(sent_RF, send, receive, mesh.rank).received()
    with one_call() as calls:
        in_one_call = Exchange(sent_RF, send, receive, mesh.rank).received()
    expected = torch.cat([torch.full((count, 2), 10.0 * peer + mesh.rank) for peer, count in enumerate(receive)])
    order: list[str] = []

    def work(name: str, parts: int) -> Iterator[None]:
        for part in range(parts):
            order.append(f"{name}{part}")
            yield

    in_turn([work("a", 3), work("b", 3), work("c", 3)])
    equal = [torch.equal(found, expected) for found in (received, in_one_call)]
    return {"equal": equal, "calls": len(calls), "order": order}


@contextmanager
def one_call() -> Iterator[list[None]]:
    """As if messages were NCCL's, which takes those of all pairs in one call; the calls."""
    calls: list[None] = []

    def all_to_all(received: list[Tensor], sent: list[Tensor], async_op: bool) -> Any:
        calls.append(None)
        assert async_op and not len(sent[dist.get_rank()]), "what stays is no message"
        messages = [*((dist.isend, tensor) for tensor in sent), *((dist.irecv, tensor) for tensor in received)]
        operations = [
            dist.P2POp(operation, tensor, index % len(sent))
            for index, (operation, tensor) in enumerate(messages)
            if len(tensor)
        ]
        works = dist.batch_isend_irecv(operations) if operations else []
        return SimpleNamespace(wait=lambda: [work.wait() for work in works])

    with mock.patch.object(point_to_point, "ranks_are_on_cuda", return_value=True):
        with mock.patch.object(dist, "all_to_all", all_to_all):
            yield calls


def on_kernels(mesh: Mesh) -> dict[str, Any]:
    """Training and drops as elsewhere, by the kernels that a GPU would run."""
    with mock.patch.object(ops, "is_fast", return_value=True):
        facts = {"placements": placements(LAYERS["padded"], mesh, TABLES[:2])}
        return facts | {"drops": {drop: drops(drop, mesh) for drop in ("per_source", "global")}}


def swift_layer(spec: LayerSpec, mesh: Mesh, **options: Any) -> tuple[SwiftMoE, SwiftMoELayer]:
    """A system and its layer, with initial weights."""
    system = SwiftMoE(SYSTEM | options)
    layer = system.build_layer(spec, mesh)
    assert isinstance(layer, SwiftMoELayer)
    load_layer(layer)
    return system, layer


class Trainee:
    """A layer that trains on fixed random tokens towards fixed targets, with the suite's kind of optimizer."""

    def __init__(self, system: System, layer: MoELayer, clip: float = 0.05) -> None:
        self.layer, self.clip = layer, clip
        self.sync = system.gradient_sync(layer, layer.mesh)
        self.optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(self, index: int) -> dict[str, Tensor]:
        """Forward, backward and update; what came of it, gradients before the clipping."""
        self.optimizer.zero_grad()
        spec, mesh = self.layer.spec, self.layer.mesh
        generator = torch.Generator().manual_seed(100 * index + mesh.rank)
        drawn = torch.randn(2, 20 + mesh.rank, spec.model_dim, generator=generator)
        x_TM, target_TM = drawn.to(mesh.device, spec.dtype)
        x_TM = x_TM.clone().requires_grad_()
        output = self.layer(x_TM)
        ((output.y_TM - target_TM).square().mean() + 0.01 * output.aux_loss).backward()
        self.sync.reduce()
        assert x_TM.grad is not None and self.layer.gate_weight.grad is not None
        facts = {"output": output.y_TM, "input": x_TM.grad, "gate": self.layer.gate_weight.grad.clone()}
        for view in self.layer.expert_views():
            assert view.parameter.grad is not None
            whole = torch.full(spec.expert_shapes[view.name], torch.nan)  # a rank may have a part of it
            view.part(whole).copy_(view.view(view.parameter.grad))
            facts[f"{view.expert} {view.name}"] = whole
        facts["norm"] = self.sync.clip(self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + index)
        self.optimizer.step()
        return facts


def state(trainee: Trainee) -> dict[str, Tensor]:
    """Weights and moments of this rank's part of the whole experts, and of the gate."""
    facts: dict[str, Tensor] = {"gate": trainee.layer.gate_weight.detach().clone()}
    with trainee.layer.whole_experts(trainee.optimizer, loading=False):
        for view in trainee.layer.expert_views():
            kept = trainee.optimizer.state[view.parameter]
            facts[f"{view.expert} {view.name}"] = view.view(view.parameter.detach()).clone()
            facts[f"{view.expert} {view.name} step"] = kept["step"].clone()
            for moment in ("exp_avg", "exp_avg_sq"):
                facts[f"{view.expert} {view.name} {moment}"] = view.view(kept[moment]).clone()
    return facts


def gathered_gradients(facts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of all ranks' experts, each once; those that several ranks have must be the same bits."""
    mine = {name: value for name, value in facts.items() if name[0].isdigit()}
    ranks: list[dict[str, Tensor]] = [{} for _ in range(WORLD_SIZE)]
    dist.all_gather_object(ranks, mine)
    union: dict[str, Tensor] = {}
    for one in ranks:
        for name, value in one.items():
            there = union.get(name, value)
            both = ~(value.isnan() | there.isnan())
            assert torch.equal(value[both], there[both]), f"{name} differs between ranks"
            union[name] = torch.where(value.isnan(), there, value)
    return union


def placements(spec: LayerSpec, mesh: Mesh, tables: Sequence[SlotTable] = TABLES, **options: Any) -> dict[str, Any]:
    """Errors against flat's layer over steps with another placement after each; whether replicas are the same bits."""
    plain_system = create("flat")
    plain = plain_system.build_layer(spec, mesh)
    load_layer(plain)
    system, layer = swift_layer(spec, mesh, **options)
    trainees = [Trainee(plain_system, plain), Trainee(system, layer)]
    facts: dict[str, Any] = {"errors": {}, "replicas": [], "optimizer's parameters": [], "norms": []}
    for index, table in enumerate(tables):
        expected, found = (trainee.step(index) for trainee in trainees)
        all_expected, all_found = gathered_gradients(expected), gathered_gradients(found)
        assert all_expected.keys() == all_found.keys()
        errors = {f"gradient {name}": relative_error(value, all_expected[name]) for name, value in all_found.items()}
        errors |= {name: relative_error(found[name], expected[name]) for name in ("output", "input", "gate", "norm")}
        facts["errors"][f"step {index}"] = errors
        facts["norms"].append(float(expected["norm"]))
        place([layer], [table])
        facts["replicas"].append(replicas_agree(layer))
        if mesh.ep_size == WORLD_SIZE:
            expected_state, found_state = (state(trainee) for trainee in trainees)
            facts["errors"][f"state {index}"] = {
                name: relative_error(value, expected_state[name]) for name, value in found_state.items()
            }
    facts["left"] = len(trainees[1].optimizer.state)
    return facts


def replicas_agree(layer: SwiftMoELayer) -> bool:
    """Whether all slots of all ranks hold the bits of their expert's master weights, rounded to the slots' dtype."""
    flat_LP = layer.experts.flat.pack(layer.experts.w_in.detach(), layer.experts.w_out.detach())
    slots_NLP = [torch.empty_like(flat_LP) for _ in range(layer.mesh.world_size)]
    dist.all_gather(slots_NLP, flat_LP)
    master_EF = layer.shards.master_EF.detach().to(flat_LP)
    shards_NEF = [torch.empty_like(master_EF) for _ in range(layer.mesh.world_size)]
    dist.all_gather(shards_NEF, master_EF)
    masters_EP = torch.cat(shards_NEF, dim=1)
    return torch.equal(torch.cat(slots_NLP), masters_EP[torch.tensor(layer.table.expert_of_slot)])


def bf16(mesh: Mesh) -> dict[str, Any]:
    """Training with slots in bfloat16: dtypes, replicas' bits, and the distance to flat's weights."""
    spec = dataclasses.replace(LAYERS["top2 swiglu"], dtype=torch.bfloat16)
    plain_system = create("flat")
    plain = plain_system.build_layer(spec, mesh)
    load_layer(plain)
    system, layer = swift_layer(spec, mesh)
    trainees = [Trainee(plain_system, plain), Trainee(system, layer)]
    replicas, errors = [], []
    for index, table in enumerate(TABLES):
        expected, found = (trainee.step(index) for trainee in trainees)
        errors.append(relative_error(found["output"], expected["output"]))
        place([layer], [table])
        replicas.append(replicas_agree(layer))
    return {
        "dtypes": [str(layer.experts.w_in.dtype), str(layer.shards.master_EF.dtype)],
        "replicas": replicas,
        "errors": errors,
    }


def reduced(mesh: Mesh) -> dict[str, Any]:
    """By dtype of the reduction in bfloat16 training: errors of this rank's shards, and bytes of experts' gradients."""
    facts: dict[str, Any] = {}
    for reduce_dtype in ("fp32", "bf16"):
        spec = dataclasses.replace(LAYERS["top1"], dtype=torch.bfloat16)
        system, layer = swift_layer(spec, mesh, reduce_dtype=reduce_dtype)
        sync = system.gradient_sync(layer, mesh)
        layer.start()
        place([layer], [TABLES[1]])
        generator = torch.Generator().manual_seed(mesh.rank)
        x_TM = torch.randn(40, spec.model_dim, generator=generator).to(spec.dtype)
        (layer(x_TM).y_TM.float() * torch.randn(40, spec.model_dim, generator=generator)).sum().backward()
        expected_EP = _summed(layer)
        meter = LinkMeter(mesh.cluster, mesh.rank)
        with meter.installed():
            sync.reduce()
        shard_EF = layer.shards.master_EF.grad
        assert shard_EF is not None and shard_EF.dtype == torch.float32
        mine = slice(mesh.rank * shard_EF.shape[1], (mesh.rank + 1) * shard_EF.shape[1])
        errors = [relative_error(row_F, whole_P[mine]) for row_F, whole_P in zip(shard_EF, expected_EP, strict=True)]
        of_gate_and_counts = 2 * (WORLD_SIZE - 1) / WORLD_SIZE * (layer.gate_weight.nbytes + 8 * spec.num_experts)
        facts[reduce_dtype] = {
            "errors": errors,
            "collected bytes": _sum(meter, "alltoall"),
            "reduced bytes": _sum(meter, "reduction") - of_gate_and_counts,
        }
    return facts


def _summed(layer: SwiftMoELayer) -> Tensor:
    """Of all slots' gradients, [E, N F] float64: the mean over ranks of each expert's sum."""
    experts, num_experts = layer.experts, layer.spec.num_experts
    assert experts.w_in.grad is not None and experts.w_out.grad is not None
    flat_LP = experts.flat.pack(experts.w_in.grad, experts.w_out.grad).double()
    slots_NLP = [torch.empty_like(flat_LP) for _ in range(WORLD_SIZE)]
    dist.all_gather(slots_NLP, flat_LP)
    owner = torch.tensor(layer.table.expert_of_slot)
    return flat_LP.new_zeros(num_experts, flat_LP.shape[1]).index_add(0, owner, torch.cat(slots_NLP)) / WORLD_SIZE


def offloaded(mesh: Mesh) -> dict[str, Any]:
    """Whether training with the optimizer in the host's memory is that without, by the bits."""
    trainees = [Trainee(*swift_layer(LAYERS["top2 swiglu"], mesh, offload=offload)) for offload in (False, True)]
    steps = []
    for index, table in enumerate(TABLES):
        here, offloaded = (trainee.step(index) for trainee in trainees)
        steps.append(same(offloaded, here))
        place([trainee.layer for trainee in trainees if isinstance(trainee.layer, SwiftMoELayer)], [table, table])
    layer = trainees[1].layer
    assert isinstance(layer, SwiftMoELayer)
    states = [state(trainee) for trainee in trainees]
    return {"steps": steps, "state": same(*states), "slots": replicas_agree(layer)}


def sent(table: SlotTable, mesh: Mesh, **options: Any) -> dict[str, float]:
    """Bytes of this rank in the collection of gradients from `table` and in the filling of slots to come to it."""
    spec = LAYERS["top1"]
    system, layer = swift_layer(spec, mesh, **options)
    layer.start()
    meter = LinkMeter(mesh.cluster, mesh.rank)
    with meter.installed():
        place([layer], [table])
    facts = {"fill": _sum(meter, "alltoall"), "fill reduction": _sum(meter, "reduction")}
    sync = system.gradient_sync(layer, mesh)
    layer(torch.randn(12, spec.model_dim, generator=torch.Generator().manual_seed(mesh.rank))).y_TM.sum().backward()
    meter.reset()
    with meter.installed():
        sync.reduce()
    return facts | {"collect": _sum(meter, "alltoall"), "reduction": _sum(meter, "reduction")}


def _sum(meter: LinkMeter, kind: str) -> float:
    return float(sum(count for (_, of), count in meter.sent.items() if of == kind))


def drops(drop: str, mesh: Mesh) -> dict[str, Any]:
    """Copies of skewed tokens before and after the placement has followed them; rows of each slot."""
    spec = LayerSpec(16, 12, NUM_EXPERTS, 1, capacity_factor=1.0)
    system, layer = swift_layer(spec, mesh, drop=drop, slots_per_rank=4)
    with torch.no_grad():
        layer.gate_weight.zero_()
        layer.gate_weight[:, :NUM_EXPERTS] = 20 * torch.eye(NUM_EXPERTS)
    wanted_T = torch.tensor([0] * 20 + [1] * 6 + [2] * 2 + [3] * 4)
    if mesh.rank == 3:  # routes otherwise
        wanted_T = torch.tensor([0] * 4 + [1] * 22 + [6] * 6)
    x_TM = torch.zeros(len(wanted_T), 16)
    x_TM[torch.arange(len(wanted_T)), wanted_T] = 1.0
    rows: list[list[int]] = []
    layer.experts.register_forward_pre_hook(lambda _m, args: rows.append(args[1]))
    facts: dict[str, Any] = {"counts": [], "dropped": [], "tables": [layer.table.counts]}
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.0, weight_decay=0.0)
    sync = system.gradient_sync(layer, mesh)
    for steps_done in (1, 2):
        output = layer(x_TM.clone().requires_grad_())
        output.y_TM.sum().backward()
        facts["counts"].append(output.counts_E.tolist())
        facts["dropped"].append(int(output.num_dropped))
        sync.reduce()
        optimizer.step()
        system.after_step(layer, optimizer, steps_done)
        optimizer.zero_grad()
        facts["tables"].append(layer.table.counts)
    with torch.no_grad():
        layer(x_TM)
    system.after_step(layer, optimizer, 3)  # no pass with gradients came before it
    facts["after evaluation"] = layer.table.counts
    return facts | {"rows": rows}


def few_experts(mesh: Mesh) -> dict[str, Any]:
    """Fewer experts than ranks: rank 0 has no whole one; steps and a checkpoint still go, and agree with one rank's."""
    spec = dataclasses.replace(LAYERS["top1"], num_experts=3)
    system, layer = swift_layer(spec, mesh, slots_per_rank=2)
    trainee = Trainee(system, layer)
    views = [len(layer.expert_views())]
    for index in range(2):
        trainee.step(index)
        place([layer], [SlotTable((1, 6, 1), 2)])
    before = layer.shards.master_EF.detach().clone()
    with layer.whole_experts(trainee.optimizer, loading=False):
        views.append(len(layer.expert_views()))
        kept = [
            [view.view(tensor.detach()).clone() for tensor in (view.parameter, state["exp_avg"], state["exp_avg_sq"])]
            for view in layer.expert_views()
            for state in [trainee.optimizer.state[view.parameter]]
        ]
    other_system, other = swift_layer(dataclasses.replace(spec, seed=1), mesh, slots_per_rank=2)
    loaded = Trainee(other_system, other)
    with torch.no_grad(), other.whole_experts(loaded.optimizer, loading=True):
        for view, (weight, *moments) in zip(other.expert_views(), kept, strict=True):
            view.view(view.parameter).copy_(weight)
            of = loaded.optimizer.state[view.parameter]
            of["step"] = torch.tensor(2.0)
            for name, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                view.view(of.setdefault(name, torch.zeros_like(view.parameter))).copy_(moment)
    state_there = trainee.optimizer.state[layer.shards.master_EF]
    state_here = loaded.optimizer.state[other.shards.master_EF]
    return {
        "views": views,
        "weights": torch.equal(other.shards.master_EF, before),
        "state": same(dict(state_here), dict(state_there)),
        "slots": replicas_agree(other),
    }


def checkpoint(mesh: Mesh) -> dict[str, Any]:
    """A layer's whole experts, with their state and its placement, put into a new layer: both train on alike."""
    spec = LAYERS["padded"]
    system, layer = swift_layer(spec, mesh)
    first = Trainee(system, layer)
    for index, table in enumerate(TABLES[:3]):
        first.step(index)
        place([layer], [table])
    with sent_rows() as rows:
        saved, slots = state(first), layer.expert_of_slot
    facts: dict[str, Any] = {"slots": slots, "messages": len(rows), "most rows": max(rows)}
    for name in ("new", "used"):
        other_system, other = swift_layer(dataclasses.replace(spec, seed=5), mesh)
        second = Trainee(other_system, other)
        if name == "used":
            second.step(7)
            place([other], [TABLES[0]])
        other.restore_placement(slots)
        with torch.no_grad(), other.whole_experts(second.optimizer, loading=True):
            other.gate_weight.copy_(saved["gate"])
            second.optimizer.state[other.gate_weight] = {
                key: value.clone() for key, value in first.optimizer.state[layer.gate_weight].items()
            }
            for view in other.expert_views():
                key, of = f"{view.expert} {view.name}", second.optimizer.state[view.parameter]
                view.view(view.parameter).copy_(saved[key])
                of["step"] = saved[f"{key} step"].clone()
                for moment in ("exp_avg", "exp_avg_sq"):
                    of.setdefault(moment, torch.zeros_like(view.parameter))
                    view.view(of[moment]).copy_(saved[f"{key} {moment}"])
        facts[name] = {"again": same(state(second), saved), "table": other.expert_of_slot == slots}
        facts[name]["parameters with state"] = len(second.optimizer.state)
        continued = second.step(3)
        facts[name]["continued"] = continued
    expected = first.step(3)
    for name in ("new", "used"):
        facts[name]["continued"] = same(facts[name]["continued"], expected)
    layer.restore_placement([0] * 12)
    facts["even"] = layer.table == even_table(NUM_EXPERTS, WORLD_SIZE, SLOTS)
    return facts


@contextmanager
def sent_rows() -> Iterator[list[int]]:
    """Shards in each of the optimizer's exchanges."""
    rows: list[int] = []

    def exchange(rows_RF: Tensor, *more: Any) -> Exchange:
        rows.append(len(rows_RF))
        return Exchange(rows_RF, *more)

    with mock.patch.object(swiftmoe_optimizer, "Exchange", exchange):
        yield rows


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """The same bits under the same names."""
    return found.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in found.items())


def model(mesh: Mesh) -> dict[str, Any]:
    """Whole models in the suite's loop, its optimizer, learning rate and clipping: losses, norms, tables."""
    facts: dict[str, Any] = {}
    trainer = TRAINER.model_copy(update={"warmup_steps": 2, "grad_clip": 0.5})
    for name, system in {"flat": create("flat"), "swiftmoe": create("swiftmoe", SYSTEM)}.items():
        gpt = build_gpt(MODELS["other"], system, mesh, 5, torch.float32)
        sync, optimizer = system.gradient_sync(gpt, mesh), build_optimizer(gpt, trainer)
        losses, norms, tables, predicted = [], [], [], []
        clock = StageClock(gpt.moe_layers)
        for index in range(NUM_STEPS):
            tokens_BS = batch(index, mesh)
            found = gpt(tokens_BS[:, :-1], tokens_BS[:, 1:])
            (found.cross_entropy + 0.01 * found.aux_loss).backward()
            sync.reduce()
            norms.append(float(sync.clip(0.5)))
            for group in optimizer.param_groups:
                group["lr"] = trainer.lr * lr_factor(index, trainer)
            optimizer.step()
            counts_LE = torch.stack([output.counts_E for output in found.moe])
            dist.all_reduce(counts_LE)
            before = [layer.table for layer in gpt.moe_layers if isinstance(layer, SwiftMoELayer)]
            system.after_step(gpt, optimizer, index + 1)
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(found.cross_entropy))
            tables.append([layer.table.counts for layer in gpt.moe_layers if isinstance(layer, SwiftMoELayer)])
            predicted.append(
                [table.after(counts.tolist()).counts for table, counts in zip(before, counts_LE, strict=False)]
            )
        with clock.timed():
            tokens_BS = batch(NUM_STEPS, mesh)
            gpt(tokens_BS[:, :-1], tokens_BS[:, 1:]).cross_entropy.backward()
            sync.reduce()
            system.after_step(gpt, optimizer, NUM_STEPS + 1)
        facts[name] = {"losses": losses, "norms": norms, "tables": tables, "predicted": predicted}
        facts[name]["parts"] = clock.part_times_s()
        facts[name]["parameters"] = parameters_of(gpt)
    return facts


def parameters_of(gpt: nn.Module) -> int:
    """Of this rank."""
    return sum(parameter.numel() for parameter in gpt.parameters())
