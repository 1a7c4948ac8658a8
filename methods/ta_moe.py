"""TA-MoE: topology-aware MoE training (Chen et al., NeurIPS 2022, arXiv 2302.09915).

Each rank's balance loss is weighted by what the way to an expert costs, so that training learns to send most copies
where they are cheap. What this follows is the paper's abstract and released code; choices of ours say so.

Locality needs gate state of a rank's own: with one gate and like data on all ranks, the ranks' penalties average out in
the reduction of the gradients. `gate` says which state that is.

Dimensions: T tokens of a rank, K choices, M model, E experts, P ranks of the expert-parallel group, L experts a rank.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from methods.ta_moe_target import Matrix, balanced, closed_form, penalties, smooth, tree_levels
from moe.costs import pair_costs
from moe.dispatch import Dispatcher
from moe.gate import TopKGate, queue_positions
from moe.layer import NativeMoE, default_dispatcher
from moe.layer_simulation import LayerModel, RoutedLayer
from moe.mesh import Mesh
from moe.static_dispatch import StaticDispatcher
from moe.system import LayerSpec, MoELayer, System, moe_layers
from moe.topology import Cluster

MEASURE = "measure them with `python -m experiments.comm cluster=<this one> write_to=conf/cluster/mine.yaml`"
EVEN = 1e-9
"""Shares that differ by less are even: the cluster is one level, and TA-MoE is plain MoE."""


class Options(BaseModel):
    """Options of conf/system/ta_moe.yaml.

    Args:
        mode: how it is built in: `fastmoe` drops nothing and exchanges counts; `deepspeed` gives every pair of a rank
            and an expert a static capacity in proportion to the target, known to all; `auto` is `deepspeed` where the
            model has a capacity factor.
        gate: what a rank has of its own: a `bias` on the gate's logits; its whole gate (`local`; the released code); or
            nothing (`synchronised`), the negative control.
        average_every: steps after which local gates are averaged over ranks (released code: 1000); null: never.
        bias_scale: the bias is this times a parameter, so that it learns so many times as fast (ours).
        self_cost: of copies that stay on their rank: as inside the `node`, or the device's `own` (ours).
        norm: of the penalty, see `methods.ta_moe_target.penalties`; `sum` is ours, the released code takes `softmax`.
        topology: P x P matrix of inverse bandwidths, in any unit, in place of the cluster's costs; or the text file
            that holds it, whose content then stands here.
        tree: with a topology, the switches of a cluster whose branches are not alike, as nested fan-outs:
            [[2, 2], [2]]; links of one level get their mean cost. null: the cluster's own levels.
    """

    model_config = ConfigDict(extra="forbid")
    mode: Literal["auto", "fastmoe", "deepspeed"] = "auto"
    gate: Literal["bias", "local", "synchronised"] = "bias"
    average_every: int | None = Field(default=None, ge=1, examples=[1000])
    bias_scale: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    self_cost: Literal["node", "own"] = "node"
    norm: Literal["sum", "softmax"] = "sum"
    topology: list[list[float]] | None = Field(default=None, examples=["topology.txt"])
    tree: list[Any] | None = Field(default=None, min_length=1, examples=[[[2, 2], [2]]])

    @field_validator("topology", mode="before")
    @classmethod
    def _from_file(cls, value: Any) -> Any:
        return read_topology(value) if isinstance(value, str) else value

    @field_validator("topology")
    @classmethod
    def _square(cls, value: list[list[float]] | None) -> list[list[float]] | None:
        if value is None:
            return None
        lengths = {len(row) for row in value}
        if lengths != {len(value)}:
            size = f"{len(value)} x {' or '.join(map(str, sorted(lengths)))}"
            raise ValueError(f"must be square, a row and a column for every rank, and is {size}")
        if not all(math.isfinite(beta) and beta > 0 for row in value for beta in row):
            raise ValueError("must hold positive, finite numbers only: inverse bandwidths")
        return value

    @field_validator("tree")
    @classmethod
    def _nested(cls, value: list[Any] | None) -> list[Any] | None:
        if value is not None and not _is_tree(value):
            raise ValueError("must be nested lists of fan-outs, whole numbers from 1 on, such as [[2, 2], [2]]")
        return value


def _is_tree(node: Any) -> bool:
    if isinstance(node, list):
        return bool(node) and all(map(_is_tree, node))
    return isinstance(node, int) and not isinstance(node, bool) and node >= 1


def read_topology(path: str) -> list[list[float]]:
    """The matrix of a topology file, a rank's row a line.

    Raises:
        ValueError: the file is missing, or not a matrix of numbers.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"there is no such file (looked at {file.absolute()})")
    try:
        return np.loadtxt(file, ndmin=2).tolist()
    except ValueError as error:
        raise ValueError(f"must be a matrix of numbers, a rank's row a line ({error})") from None


class StaticCapacities:
    """Slots of every rank for every expert: ceil(c * K * T * share / L), 1 to T, with c the capacity factor.

    Args:
        spec: of the layer; its capacity factor is c.
        shares_PP: target.
    """

    def __init__(self, spec: LayerSpec, shares_PP: Matrix) -> None:
        assert spec.capacity_factor is not None
        num_local = spec.num_experts // len(shares_PP)
        per_token_PE = spec.capacity_factor * spec.top_k / num_local * shares_PP.repeat(num_local, axis=1)
        self.per_token_PE = torch.from_numpy(per_token_PE)

    def __call__(self, num_tokens: int) -> Tensor:
        """[P, E] int64 for T tokens a rank."""
        return (num_tokens * self.per_token_PE).round(decimals=6).ceil().clamp(1, max(1, num_tokens)).long()


class TopologyGate(TopKGate):
    """The top-k gate whose balance loss is weighted by this rank's penalties: E * sum_e p_e * f_e * m_e with penalties
    p, shares of choices f, mean probabilities m.

    Choices are counted as in `moe.gate.balance_loss`, which this is when all is equally dear (the released code counts
    all K choices). The minimum under f = m and p proportional to 1 / c_hat is m proportional to c_hat.

    Args:
        spec: of the layer.
        mesh: of the run.
        penalty_E: [E] float32, mean 1; None for ones.
        capacities: slots of every rank for every expert; None for the suite's drop rule.
        own_bias: whether this rank's logits have a bias of their own.
        bias_scale: see `Options`.
    """

    def __init__(
        self,
        spec: LayerSpec,
        mesh: Mesh,
        penalty_E: Tensor | None,
        capacities: StaticCapacities | None,
        own_bias: bool,
        bias_scale: float,
    ) -> None:
        super().__init__(spec, mesh.device, penalty_E)
        self.mesh, self.capacities, self.bias_scale = mesh, capacities, bias_scale
        self._slots_E: dict[int, Tensor] = {}  # by number of tokens, of which a run has few
        self.bias_E = nn.Parameter(torch.zeros(spec.num_experts, device=mesh.device)) if own_bias else None

    def bias(self) -> Tensor | None:
        """[E] float32, this rank's own."""
        return None if self.bias_E is None else self.bias_scale * self.bias_E.float()

    def keep(self, expert_ids_TK: Tensor) -> Tensor | None:
        """In DeepSpeed mode as many copies as this rank has slots for the expert, else as `TopKGate.keep`."""
        if self.capacities is None:
            return super().keep(expert_ids_TK)
        num_tokens = len(expert_ids_TK)
        if num_tokens not in self._slots_E:
            self._slots_E[num_tokens] = self.capacities(num_tokens)[self.mesh.ep_rank].to(expert_ids_TK.device)
        return queue_positions(expert_ids_TK, self.spec.num_experts) < self._slots_E[num_tokens][expert_ids_TK]


class TopologyAwareMoE(NativeMoE):
    """The native layer with the topology-aware gate and, in DeepSpeed mode, static capacities."""

    gate: TopologyGate

    def __init__(self, spec: LayerSpec, mesh: Mesh, options: Options) -> None:
        self.options = options
        self.shares_PP = target_shares(options, mesh.cluster, mesh.ep_ranks)
        is_even = bool(np.abs(self.shares_PP * mesh.ep_size - 1).max() < EVEN)
        penalty_E = None
        if not is_even:
            penalty_P = penalties(self.shares_PP, options.norm)[mesh.ep_rank]
            penalty_E = torch.from_numpy(penalty_P.repeat(spec.num_experts // mesh.ep_size)).float().to(mesh.device)
        has_slots = options.mode != "fastmoe" and spec.capacity_factor is not None
        capacities = StaticCapacities(spec, self.shares_PP) if has_slots else None
        own_bias = options.gate == "bias" and not is_even
        gate = TopologyGate(spec, mesh, penalty_E, capacities, own_bias, options.bias_scale)
        dispatcher: Dispatcher = (
            default_dispatcher(spec, mesh)
            if capacities is None
            else StaticDispatcher(mesh, spec.num_experts, capacities)
        )
        super().__init__(spec, mesh, gate, dispatcher)
        self.has_own_gate = options.gate == "local" and not is_even

    def local_parameters(self) -> dict[str, nn.Parameter]:
        """The rank's own bias or gate."""
        if self.gate.bias_E is not None:
            return {"gate_bias": self.gate.bias_E}
        return {"gate": self.gate.weight} if self.has_own_gate else {}

    def observations(self) -> dict[str, Tensor]:
        """target_shares [W, E] float64: of each rank's copies, how many should go to each expert."""
        num_local = self.spec.num_experts // self.mesh.ep_size
        shares_PE = torch.from_numpy(self.shares_PP.repeat(num_local, axis=1) / num_local)
        return {"target_shares": shares_PE} if self.mesh.ep_size == self.mesh.world_size else {}


def target_shares(options: Options, cluster: Cluster, ranks: list[int]) -> Matrix:
    """c_hat as shares of each rank's copies, [P, P]; rows and columns sum to 1.

    Args:
        options: of the system.
        cluster: the ranks' levels, and their costs where no topology stands in for them; nothing `missing_costs`.
        ranks: of the expert-parallel group, in order.
    """
    if options.tree is None:
        levels_PP = np.array(cluster.pair_levels(ranks))
    else:
        levels_PP = tree_levels(options.tree)[np.ix_(ranks, ranks)]
    apart = levels_PP[levels_PP > 0]
    if len(np.unique(apart)) <= 1 and options.self_cost == "node":
        return np.full(levels_PP.shape, 1 / len(ranks))
    if options.topology is None:
        beta_PP = pair_costs(cluster, ranks)[1]
    else:
        beta_PP = smooth(np.array(options.topology)[np.ix_(ranks, ranks)], levels_PP)
    if options.self_cost == "node":
        np.fill_diagonal(beta_PP, beta_PP[levels_PP == apart.min()].mean())
    return balanced(closed_form(beta_PP))


def simulated_shares(options: Options, cluster: Cluster) -> Matrix:
    """`target_shares` of all ranks. Where levels alone tell pairs apart all rows are alike, so that one is computed,
    which does for thousands of ranks."""
    num_ranks = cluster.world_size
    if options.topology is not None or missing_costs(options, cluster) or not cluster.crossed_levels:
        return target_shares(options, cluster, list(range(num_ranks)))
    betas = [level.beta_s_per_byte or 0.0 for level in cluster.levels]
    innermost = cluster.crossed_levels[0]
    if options.self_cost == "node":
        betas[0] = betas[innermost]
    if options.self_cost == "node" and len(cluster.crossed_levels) == 1:
        return np.full((num_ranks, num_ranks), 1 / num_ranks)
    shares_PP = np.empty((num_ranks, num_ranks))
    for level in reversed([0, *cluster.crossed_levels]):
        for group in cluster.groups(level):
            shares_PP[group[0] : group[-1] + 1, group[0] : group[-1] + 1] = 1 / betas[level]
    return shares_PP / shares_PP[0].sum()


def missing_costs(options: Options, cluster: Cluster) -> list[str]:
    """Names of the levels whose cost the target needs and nobody measured."""
    apart = [level for level in cluster.levels[1:] if level.fanout > 1]
    if options.topology is not None or (len(apart) <= 1 and options.self_cost == "node"):
        return []
    needed = apart if options.self_cost == "node" else [cluster.levels[0], *apart]
    return [level.name for level in needed if not level.beta_s_per_byte]


class TAMoE(System):
    """TA-MoE in both of its integrations."""

    name = "ta_moe"
    implementation = "native"
    summary = "topology-aware balance loss: most copies go where they are cheap"
    Options = Options
    own_balance_loss = True

    def refusals(self, spec: LayerSpec, cluster: Cluster) -> list[str]:
        """Costs that nobody measured, a topology of another size, a mode without its capacity factor or with one."""
        options, reasons = self.options, []
        if missing := missing_costs(options, cluster):
            reasons.append(
                f"TA-MoE needs the cost of the level{'s' * (len(missing) > 1)} {' and '.join(missing)} of cluster "
                f"{cluster.name}: {MEASURE}, or give topology."
            )
        if options.topology is not None and len(options.topology) != cluster.world_size:
            size = len(options.topology)
            reasons.append(f"The topology is of {size} ranks, cluster {cluster.name} has {cluster.world_size}.")
        if options.tree is not None:
            leaves = len(tree_levels(options.tree))
            if leaves != cluster.world_size:
                reasons.append(
                    f"The tree {options.tree} has {leaves} ranks, cluster {cluster.name} {cluster.world_size}."
                )
            if options.topology is None:
                reasons.append("TA-MoE's tree needs a topology: a cluster has costs for its own levels only.")
        if options.mode == "deepspeed" and spec.capacity_factor is None:
            reasons.append("TA-MoE's mode=deepspeed needs a capacity factor: set capacity_factor, or mode=fastmoe.")
        if options.mode == "fastmoe" and spec.capacity_factor is not None:
            reasons.append("TA-MoE's mode=fastmoe drops nothing: set capacity_factor=null, or mode=deepspeed.")
        if options.average_every is not None and options.gate != "local":
            reasons.append("TA-MoE averages local gates only: leave average_every out, or set gate=local.")
        return reasons

    def simulated_layer(self, layer: RoutedLayer) -> LayerModel:
        """Copies go where the target says, as if training had reached it, evenly to the experts of each rank."""
        shares_PP = simulated_shares(self.options, layer.cluster)
        rows_PP = np.rint(shares_PP * layer.num_tokens * layer.spec.top_k).astype(np.int64)
        return layer.model(layer.counts_PE, rows_PP)

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """The layer."""
        return TopologyAwareMoE(spec, mesh, self.options)

    def after_step(self, model: nn.Module, optimizer: Optimizer, steps_done: int) -> None:
        """Average local gates every so many steps: a reset of the locality that they have learned."""
        every = self.options.average_every
        if every is None or steps_done % every:
            return
        for layer in moe_layers(model):
            if layer.local_parameters():
                dist.all_reduce(layer.gate_weight.data)
                layer.gate_weight.data /= layer.mesh.world_size
