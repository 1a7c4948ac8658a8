"""What four ranks do for the tests of FSMoE's gates: layers with them, and their formulas written out token by token.

Dimensions: T tokens of a rank, M model, E experts, K choices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from experiments.ranks import RankInfo
from methods.fsmoe import FSMoE
from moe.mesh import Mesh, create_mesh
from moe.pipelined_layer import PipelinedMoE
from moe.system import LayerSpec
from moe.topology import cluster_of
from moe.weights import expert_matrix, load_layer, seeded_normal
from tests.comparing import relative_error

NUM_TOKENS, MODEL_DIM, NUM_EXPERTS, AUX_WEIGHT = 12, 16, 8, 10.0
Facts = dict[str, Any]
Rows = list[list[Tensor]]
"""By token and expert: what the expert's output is multiplied by, a scalar."""


@dataclass(frozen=True)
class Case:
    """A gate, in the options of fsmoe, on a layer."""

    gate: str
    top_k: int = 2
    capacity_factor: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> LayerSpec:
        """Of the layer."""
        return LayerSpec(MODEL_DIM, 20, NUM_EXPERTS, self.top_k, capacity_factor=self.capacity_factor, seed=5)


CASES = {
    "softmax, dense order": Case("softmax", options={"order": "dense"}),
    "softmax, dense order, drops": Case("softmax", 2, 0.75, {"order": "dense"}),
    "gshard": Case("gshard"),
    "gshard, one choice": Case("gshard", 1),
    "gshard, drops": Case("gshard", 3, 0.75),
    "sigmoid": Case("sigmoid", 3),
    "sigmoid, drops, dense order": Case("sigmoid", 2, 0.75, {"order": "dense"}),
    "xmoe": Case("xmoe"),
    "xmoe, five dimensions": Case("xmoe", 2, None, {"gate_dim": 5, "gate_temperature": 0.3}),
    "expert choice": Case("expert_choice"),
    "expert choice, capacity": Case("expert_choice", 2, 0.5),
    "expert choice, dense order": Case("expert_choice", 1, 2.0, {"order": "dense"}),
    "soft": Case("soft"),
    "soft, three slots": Case("soft", 2, None, {"gate_slots": 3, "order": "dense"}),
}


def measure(_payload: dict[str, Any], info: RankInfo) -> dict[str, list[Facts]]:
    """Facts by case and rank; on GPUs of one node."""
    torch.set_num_threads(1)
    mesh = create_mesh(cluster_of([2, 2] if info.device.type == "cpu" else [info.world_size]), info.device)
    facts: dict[str, list[Facts]] = {}
    for name, case in CASES.items():
        gathered: list[Facts] = [{} for _ in range(info.world_size)]
        dist.all_gather_object(gathered, compared(case, mesh))
        facts[name] = gathered
    return facts


def compared(case: Case, mesh: Mesh) -> Facts:
    """A layer's outputs and gradients beside those of the formula."""
    system = FSMoE({"gate": case.gate, "degree": 3, "backward_degree": 2, **case.options})
    layer = system.build_layer(case.spec, mesh)
    assert isinstance(layer, PipelinedMoE)
    load_layer(layer)
    if case.gate == "gshard":
        layer.gate.noise_weight.data.copy_(seeded_normal(("noise",), (NUM_EXPERTS, MODEL_DIM), 0.2, mesh.device))
    x_TM = torch.randn(NUM_TOKENS, MODEL_DIM, generator=torch.Generator().manual_seed(mesh.rank))
    x_TM = x_TM.to(mesh.device)
    plain = Plain(case, dict(layer.gate.named_parameters()))
    torch.manual_seed(mesh.rank)
    output = layer(own := x_TM.clone().requires_grad_())
    torch.manual_seed(mesh.rank)
    expected = plain.forward(other := x_TM.clone().requires_grad_())
    for y_TM, aux_loss in ((output.y_TM, output.aux_loss), (expected.y_TM, expected.aux_loss)):
        (y_TM.square().sum() + AUX_WEIGHT * aux_loss).backward()
    path = layer.path
    system.gradient_sync(layer, mesh).reduce()
    assert own.grad is not None and other.grad is not None
    errors = {
        "output": relative_error(output.y_TM, expected.y_TM),
        "balance loss": relative_error(output.aux_loss, expected.aux_loss),
        "input gradient": relative_error(own.grad, other.grad),
    }
    for name, parameter in layer.gate.named_parameters():
        assert parameter.grad is not None
        errors[f"gradient of {name}"] = relative_error(parameter.grad, mean_gradient(plain.gate[name]))
    wanted = {(e, w): mean_gradient(plain.experts[e][w]) for e in range(NUM_EXPERTS) for w in ("w1", "w2")}
    for view in layer.expert_views():
        assert view.parameter.grad is not None
        found, expected_grad = view.view(view.parameter.grad), wanted[view.expert, view.name]
        errors[f"gradient of expert {view.expert} {view.name}"] = relative_error(found, expected_grad)
    again = system.build_layer(case.spec, mesh)
    load_layer(again)
    again.eval()
    return {
        "errors": errors,
        "counts": output.counts_E.tolist(),
        "expected_counts": expected.counts,
        "dropped": int(output.num_dropped),
        "expected_dropped": expected.num_dropped,
        "tells": output.expert_ids_TK is not None,
        "path": path,
        "rows": layer.shapes(NUM_TOKENS).rows,
        "repeats": torch.equal(again(x_TM).y_TM, again(x_TM).y_TM),
    }


def mean_gradient(parameter: Tensor) -> Tensor:
    """Over ranks; a parameter of no use on a rank has zeros there."""
    grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
    dist.all_reduce(grad)
    return grad / dist.get_world_size()


def largest(values: list[Tensor]) -> list[int]:
    """Places by value, the largest one's first."""
    return sorted(range(len(values)), key=lambda place: -float(values[place]))


@dataclass
class Expected:
    """What a layer should return."""

    y_TM: Tensor
    aux_loss: Tensor
    counts: list[int]
    num_dropped: int


class Plain:
    """The layer by its formula, with all experts.

    Args:
        case: which.
        gate: parameters of the gate, by name; copied.
    """

    def __init__(self, case: Case, gate: dict[str, nn.Parameter]) -> None:
        self.case, self.spec = case, case.spec
        self.gate = {name: parameter.detach().clone().requires_grad_() for name, parameter in gate.items()}
        device = self.gate["weight"].device
        self.experts = [
            {
                name: expert_matrix(self.spec, expert, name, device).requires_grad_(True)
                for name in self.spec.expert_shapes
            }
            for expert in range(NUM_EXPERTS)
        ]
        self.dropped, self.counts = 0, [0] * NUM_EXPERTS
        self.aux_loss = torch.zeros(())

    def forward(self, x_TM: Tensor) -> Expected:
        """Outputs [T, M]."""
        if self.case.gate == "soft":
            outputs = self.soft(x_TM)
        else:
            rows = self.expert_choice(x_TM) if self.case.gate == "expert_choice" else self.top_k(x_TM)
            outputs = [
                torch.stack([weight * self.expert(e, x_M) for e, weight in enumerate(weights)]).sum(0)
                for x_M, weights in zip(x_TM, rows, strict=True)
            ]
        return Expected(torch.stack(outputs), self.aux_loss, self.counts, self.dropped)

    def expert(self, index: int, x_M: Tensor) -> Tensor:
        """One expert of one row."""
        hidden = x_M @ self.experts[index]["w1"]
        gelu = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        return gelu @ self.experts[index]["w2"]

    def logits(self, x_TM: Tensor) -> list[list[Tensor]]:
        """By token and expert."""
        weight = self.gate["weight"]
        if self.case.gate == "xmoe":
            temperature = self.case.options.get("gate_temperature", 1.0)

            def cosine(x_M: Tensor, w_D: Tensor) -> Tensor:
                projected = self.gate["projection"] @ x_M
                return projected @ w_D / (projected.square().sum() * w_D.square().sum()).sqrt() / temperature

            return [[cosine(x_M, w_D) for w_D in weight] for x_M in x_TM]
        logits = [[x_M @ w_M for w_M in weight] for x_M in x_TM]
        if self.case.gate != "gshard":
            return logits
        normal_TE = torch.randn(len(x_TM), NUM_EXPERTS, device=x_TM.device)
        widths = [[(1 + (x_M @ w_M).exp()).log() for w_M in self.gate["noise_weight"]] for x_M in x_TM]
        return [[logits[t][e] + normal_TE[t, e] * widths[t][e] for e in range(NUM_EXPERTS)] for t in range(len(x_TM))]

    def top_k(self, x_TM: Tensor) -> Rows:
        """Gates in which a token chooses."""
        spec, logits = self.spec, self.logits(x_TM)
        chosen = [largest(row)[: spec.top_k] for row in logits]
        kept = [set(experts) for experts in chosen]
        taken = [0] * NUM_EXPERTS
        for choice in range(spec.top_k):
            for token, experts in enumerate(chosen):
                expert = experts[choice]
                self.counts[expert] += 1
                taken[expert] += 1
                if spec.capacity_factor is not None and taken[expert] > spec.capacity(len(x_TM)):
                    kept[token].discard(expert)
                    self.dropped += 1
        probs = [[logit.exp() / sum(other.exp() for other in row) for logit in row] for row in logits]
        self.aux_loss = self.balance(probs, chosen)
        rows = []
        for row, left, probabilities in zip(logits, kept, probs, strict=True):
            over = sum(row[e].exp() for e in left) if spec.top_k > 1 else None

            def weight(e: int, row: Any = row, over: Any = over, probabilities: Any = probabilities) -> Tensor:
                if self.case.gate == "sigmoid":
                    return 1 / (1 + (-row[e]).exp())
                value: Tensor = probabilities[e] if over is None else row[e].exp() / over
                return value

            rows.append([weight(e) if e in left else torch.zeros(()) for e in range(NUM_EXPERTS)])
        return rows

    def balance(self, probs: Rows, chosen: list[list[int]]) -> Tensor:
        """E times the sum of shares of choices and mean probabilities; shares of first choices for K <= 2."""
        counted = [experts[: 1 if self.spec.top_k <= 2 else None] for experts in chosen]
        flat = [expert for experts in counted for expert in experts]
        total = torch.zeros(())
        for expert in range(NUM_EXPERTS):
            mean_probability = torch.stack([row[expert] for row in probs]).mean()
            total = total + NUM_EXPERTS * flat.count(expert) / len(flat) * mean_probability
        return total

    def expert_choice(self, x_TM: Tensor) -> Rows:
        """Every expert takes the tokens that like it best."""
        num_tokens, logits = len(x_TM), self.logits(x_TM)
        factor = self.spec.capacity_factor or 1.0
        quota = math.ceil(factor * self.spec.top_k * num_tokens / NUM_EXPERTS)
        self.counts = [quota] * NUM_EXPERTS
        takers: list[set[int]] = [set() for _ in range(num_tokens)]
        for expert in range(NUM_EXPERTS):
            for token in largest([row[expert] for row in logits])[:quota]:
                takers[token].add(expert)
        self.dropped = self.spec.top_k * sum(not experts for experts in takers)
        return [
            [row[e].exp() / sum(row[o].exp() for o in experts) if e in experts else torch.zeros(()) for e in range(8)]
            for row, experts in zip(logits, takers, strict=True)
        ]

    def soft(self, x_TM: Tensor) -> list[Tensor]:
        """Slots that are means of tokens."""
        num_slots = self.case.options.get("gate_slots", 1)
        self.counts = [num_slots] * NUM_EXPERTS
        phi = [
            [self.gate["weight"][e], *(self.gate["others"][e, s] for s in range(num_slots - 1))]
            for e in range(NUM_EXPERTS)
        ]
        keys = [(e, s) for e in range(NUM_EXPERTS) for s in range(num_slots)]
        exps = {(t, e, s): (x_M @ phi[e][s]).exp() for t, x_M in enumerate(x_TM) for e, s in keys}
        tokens = range(len(x_TM))
        outputs = {}
        for e, s in keys:
            total = sum(exps[t, e, s] for t in tokens)
            slot = torch.stack([exps[t, e, s] / total * x_TM[t] for t in tokens]).sum(0)
            outputs[e, s] = self.expert(e, slot)
        return [
            torch.stack([exps[t, *k] / sum(exps[t, *o] for o in keys) * outputs[k] for k in keys]).sum(0)
            for t in tokens
        ]
