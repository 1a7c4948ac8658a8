"""The contract that every system keeps: what four ranks record (`measure`), and the rules they judge by (`violations`).

The ranks run each system on each case, and the dense oracle beside it, on the same weights and tokens.
Dimensions: T tokens of a rank, M model, E experts, K choices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from baselines.reference import Reference
from experiments.ranks import RankInfo
from experiments.registry import create, discover
from moe.mesh import Mesh, create_mesh
from moe.stages import STAGES, StageClock
from moe.system import Activation, LayerSpec, MoELayer, MoEOutput, System
from moe.topology import Cluster, Level
from moe.weights import load_layer, seeded_generator
from moe.workload import Workload, expert_ids, gate_for, tokens_for
from tests.comparing import relative_error
from tests.wrong_systems import WRONG

CLUSTER = Cluster("contract", (Level("self", 1), Level("node", 2, 1e-5, 1e-9), Level("network", 2, 1e-4, 8e-9)))
"""With costs, for systems that go by them."""

NUM_TOKENS, MODEL_DIM, HIDDEN_DIM, NUM_EXPERTS, WORLD_SIZE = 24, 32, 48, 8, 4
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
AUX_WEIGHT = 10.0
"""Weight of the balance loss in the loss: such that its part of the gate's gradient can't hide below the tolerance."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "fsmoe, 3 and 2 chunks": ("fsmoe", {"degree": 3, "backward_degree": 2}),
    "fsmoe, 1 and 4 chunks": ("fsmoe", {"schedule": "fsmoe_no_iio", "degree": 1, "backward_degree": 4}),
    "fsmoe, cut experts": ("fsmoe", {"expert_sharding": True, "degree": 2, "backward_degree": 3}),
    "schemoe, 2 chunks": ("pipelined", {"schedule": "schemoe", "degree": 2, "backward_degree": 2}),
}
"""Systems with options that must keep the contract, too: name and options by label."""

DEFAULTS: dict[str, dict[str, Any]] = {"ta_moe": {"mode": "fastmoe"}}
"""Options of systems in whose default others than these capacities are held: TA-MoE's slots by pairs of ranks."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One thing that every system must compute.

    Args:
        name: of the test.
        top_k, activation, capacity_factor, dtype: as in `LayerSpec`.
        routing: `gate` leaves it to the initial gate; otherwise a key of `ROUTINGS`, which says who goes where.
        ep_size: ranks that share a set of experts.
    """

    name: str
    top_k: int
    activation: Activation = "gelu"
    capacity_factor: float | None = None
    dtype: torch.dtype = torch.float32
    routing: str = "gate"
    ep_size: int = WORLD_SIZE

    @property
    def spec(self) -> LayerSpec:
        """The layer to build."""
        return LayerSpec(
            MODEL_DIM, HIDDEN_DIM, NUM_EXPERTS, self.top_k, self.activation, self.capacity_factor, self.dtype, seed=7
        )


ROUTINGS: dict[str, Callable[[int, int], Tensor]] = {
    "zipf": lambda top_k, rank: expert_ids(Workload("zipf", 1.0), NUM_TOKENS, NUM_EXPERTS, top_k, 0, rank),
    "three experts": lambda top_k, rank: 3 * expert_ids(Workload(), NUM_TOKENS, 3, top_k, 0, rank),
    "one expert": lambda top_k, rank: torch.full((NUM_TOKENS, top_k), 5),
}
"""Wanted expert ids [T, K] from (K, rank)."""

ACTIVATIONS: tuple[Activation, ...] = ("gelu", "swiglu")
CASES = [
    *(Case(f"top{k}-{activation}", k, activation) for k in (1, 2, 3) for activation in ACTIVATIONS),
    Case("wanted-routing", 2, routing="zipf"),
    Case("idle-experts", 2, routing="three experts"),
    Case("all-to-one-expert", 1, routing="one expert"),
    Case("replicated-experts", 2, "swiglu", ep_size=2),
    Case("replicated-idle-experts", 2, routing="three experts", ep_size=2),
    Case("bf16", 2, "swiglu", dtype=torch.bfloat16, routing="zipf"),
    Case("top1-drops", 1, capacity_factor=1.5, routing="zipf"),
    Case("top2-drops", 2, capacity_factor=1.0, routing="zipf"),
    Case("top3-drops", 3, capacity_factor=0.5),
]


def measure(payload: dict[str, Any], info: RankInfo) -> dict[str, dict[str, list[Record]]]:
    """What the ranks recorded: {system: {case: [record of each rank]}}.

    Args:
        payload: {"systems": names in the registry, "variants": keys of VARIANTS} to run on all cases; the wrong systems
            run on theirs.
        info: of this rank.
    """
    torch.set_num_threads(1)
    meshes = {size: create_mesh(CLUSTER, info.device, size) for size in sorted({case.ep_size for case in CASES})}
    jobs = [(name, create(name, DEFAULTS.get(name)), case) for name in payload["systems"] for case in CASES]
    jobs += [(label, create(*VARIANTS[label]), case) for label in payload["variants"] for case in CASES]
    jobs += [(wrong.name, wrong(), case) for wrong in WRONG for case in CASES if case.name == wrong.case]
    records: dict[str, dict[str, list[Record]]] = {}
    for name, system, case in jobs:
        gathered: list[Record] = [{} for _ in range(info.world_size)]
        dist.all_gather_object(gathered, _record(system, case, meshes[case.ep_size]))
        records.setdefault(name, {})[case.name] = gathered
    return records


@dataclass
class Run:
    """One forward and backward of a layer, gradients reduced; of cut experts, which parts of them these are of."""

    layer: MoELayer
    output: MoEOutput
    gradients: dict[str, Tensor]
    parts: dict[str, Callable[[Tensor], Tensor]]
    num_rows: int
    stage_times_s: dict[str, float]


def _run(system: System, case: Case, mesh: Mesh, aux_weight: float, dtype: torch.dtype | None = None) -> Run:
    """Run a system on this rank's tokens of the case; in another dtype than the case's if one is given."""
    spec = dataclasses.replace(case.spec, dtype=dtype or case.dtype)
    layer = system.build_layer(spec, mesh)
    load_layer(layer)
    generator = seeded_generator(("contract", mesh.rank))
    x_TM = torch.randn(NUM_TOKENS, MODEL_DIM, generator=generator)
    probe_TM = torch.randn(NUM_TOKENS, MODEL_DIM, generator=generator)
    if case.routing != "gate":
        wanted_TK = ROUTINGS[case.routing](case.top_k, mesh.rank)
        x_TM = tokens_for(wanted_TK, MODEL_DIM, NUM_EXPERTS, 0, mesh.rank, case.dtype, mesh.device)
        layer.gate_weight.data.copy_(gate_for(NUM_EXPERTS, MODEL_DIM, mesh.device))
    x_TM = x_TM.to(spec.dtype).requires_grad_()
    row_counts: list[int] = []

    def count_rows(_module: Any, args: tuple[Tensor, ...]) -> None:  # padding is zeros; a token never is
        row_counts.append(int(args[0].reshape(-1, MODEL_DIM).any(1).sum()))

    handles = [module.register_forward_pre_hook(count_rows) for module in layer.stage_modules()[1:]]
    clock = StageClock([layer])
    with clock.timed():
        output = layer(x_TM)
        ((output.y_TM * probe_TM).sum() + aux_weight * output.aux_loss).backward()
    for handle in handles:
        handle.remove()
    system.gradient_sync(layer, mesh).reduce()
    assert x_TM.grad is not None and layer.gate_weight.grad is not None
    gradients = {"input gradient": x_TM.grad, "gate gradient": layer.gate_weight.grad}
    parts = {}
    for view in layer.expert_views():
        assert view.parameter.grad is not None
        name = f"gradient of expert {view.expert} {view.name}"
        gradients[name], parts[name] = view.view(view.parameter.grad), view.part
    return Run(layer, output, gradients, parts, sum(row_counts), clock.stage_times_s())


def _record(system: System, case: Case, mesh: Mesh) -> Record:
    reasons = system.refusals(case.spec, mesh.cluster)
    if reasons:
        return {"refused": reasons}
    try:
        # A balance loss of its own can't be held against the oracle's; all else can.
        aux_weight = 0.0 if system.own_balance_loss else AUX_WEIGHT
        run, again = _run(system, case, mesh, aux_weight), _run(system, case, mesh, aux_weight)
    except Exception as error:  # becomes a violation of this system; the others are still judged
        return {"failed": f"{type(error).__name__}: {error}"}
    oracle = _run(Reference(), case, mesh, aux_weight, torch.float32)
    output, expected = run.output, oracle.output
    errors = {"output": relative_error(output.y_TM, expected.y_TM)}
    for name, grad in run.gradients.items():
        whole = oracle.gradients[name]
        errors[name] = relative_error(grad, run.parts[name](whole) if name in run.parts else whole)
    told_TK, chosen_TK = output.expert_ids_TK, expected.expert_ids_TK
    assert chosen_TK is not None
    if case.routing != "gate":
        assert torch.equal(chosen_TK, ROUTINGS[case.routing](case.top_k, mesh.rank)), "the oracle goes elsewhere"
    over_capacity = 0
    if case.capacity_factor is not None:
        over_capacity = int((expected.counts_E - case.spec.capacity(NUM_TOKENS)).clamp_min(0).sum())
    return {
        "errors": errors,
        "aux_error": 0.0 if system.own_balance_loss else relative_error(output.aux_loss, expected.aux_loss),
        "dtype": str(output.y_TM.dtype),
        "held": sorted({f"{view.expert} {view.name}" for view in run.layer.expert_views()}),
        "counts": output.counts_E.tolist(),
        "chosen_counts": torch.bincount(chosen_TK.flatten(), minlength=NUM_EXPERTS).tolist(),
        "tells_its_choices": told_TK is None or torch.equal(told_TK, chosen_TK),
        "num_dropped": int(output.num_dropped),
        "over_capacity": over_capacity,
        "zero_rows": int((output.y_TM == 0).all(1).sum()),
        "num_rows": run.num_rows if run.layer.experts_are_sharded else None,
        "repeats": _bit_equal(run, again),
        "stage_times_s": run.stage_times_s,
    }


def _bit_equal(run: Run, again: Run) -> bool:
    same = [torch.equal(grad, again.gradients[name]) for name, grad in run.gradients.items()]
    return all(same) and torch.equal(run.output.y_TM, again.output.y_TM)


def violations(case: Case, records: list[Record]) -> list[str]:
    """Rules of the contract that a system broke on a case; empty when it kept them or refused properly.

    Args:
        case: what it was asked to compute.
        records: of each rank, from `measure`.
    """
    if any("refused" in record for record in records):
        return _refusal_violations([record.get("refused", []) for record in records])
    broken = [f"rank {rank} failed: {item['failed']}" for rank, item in enumerate(records) if "failed" in item]
    if broken:
        return broken
    for rank, record in enumerate(records):
        broken += [f"rank {rank}: {sentence}" for sentence in _rank_violations(case, record)]
    held = {key for record in records for key in record["held"]}
    missing = {f"{expert} {name}" for expert in range(NUM_EXPERTS) for name in case.spec.expert_shapes} - held
    if missing:
        broken.append(f"no rank holds experts {sorted(missing)}")
    if records[0]["num_rows"] is not None:
        num_rows = sum(record["num_rows"] for record in records)
        num_kept = WORLD_SIZE * NUM_TOKENS * case.top_k - sum(record["over_capacity"] for record in records)
        if num_rows != num_kept:
            broken.append(f"the experts computed {num_rows} rows of {num_kept} copies that were kept")
    return broken


def _rank_violations(case: Case, record: Record) -> list[str]:
    broken = []
    tolerance = TOLERANCE[case.dtype]
    if case.capacity_factor is None:  # which copies are dropped is each system's own rule, how many is not
        wrong = {name: error for name, error in record["errors"].items() if not error <= tolerance}
        broken += [f"{name} is off by {error:.1e}" for name, error in wrong.items()]
    if not record["aux_error"] <= 1e-5:
        broken.append(f"balance loss is off by {record['aux_error']:.1e}")
    if record["dtype"] != str(case.dtype):
        broken.append(f"output is {record['dtype']}, not {case.dtype}")
    if record["counts"] != record["chosen_counts"] or sum(record["counts"]) != NUM_TOKENS * case.top_k:
        broken.append(f"counts are {record['counts']}, chosen were {record['chosen_counts']}")
    if not record["tells_its_choices"]:
        broken.append("it tells other expert ids than were chosen")
    if record["num_dropped"] != record["over_capacity"]:
        broken.append(f"{record['num_dropped']} drops are counted, {record['over_capacity']} are over the capacity")
    if case.top_k == 1 and record["zero_rows"] != record["over_capacity"]:
        broken.append(f"{record['zero_rows']} tokens got nothing, {record['over_capacity']} are over the capacity")
    if not record["repeats"]:
        broken.append("a second run differs")
    stages = [f"{direction}/{stage}" for direction in ("forward", "backward") for stage in STAGES]
    times_s = record["stage_times_s"]
    if sorted(times_s) != sorted(stages) or not all(time >= 0 for time in times_s.values()):
        broken.append(f"stage times are {times_s}")
    unseen = [stage for stage in stages if stage.endswith(("gate", "experts")) and not times_s.get(stage, 0) > 0]
    if unseen:
        broken.append(f"no time is seen in {unseen}")
    return broken


def _refusal_violations(refusals: list[list[str]]) -> list[str]:
    if any(reasons != refusals[0] for reasons in refusals):
        return [f"the ranks do not refuse alike: {refusals}"]
    return [f"not a plain sentence: {reason!r}" for reason in refusals[0] if not is_plain_sentence(reason)]


def is_plain_sentence(reason: Any) -> bool:
    """A refusal that a user can read: one line, several words, a full stop."""
    return isinstance(reason, str) and len(reason.split()) >= 4 and reason.endswith(".") and "\n" not in reason


def system_names() -> list[str]:
    """Every system of the registry."""
    return list(discover())
