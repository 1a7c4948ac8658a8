"""FSMoE (Pan et al., ASPLOS 2025, arXiv 2501.10714): a layer's copies travel and are computed in chunks, as many for
each layer and direction as measured costs say is best (methods/fsmoe_solver.py), and dense gradients are all-reduced in
slices where the link between nodes would idle in backward (methods/fsmoe_partition.py).

The layer and its streams stand in moe/pipelined_layer.py and moe/streams.py, the plan in methods/fsmoe_schedule.py, the
gates that can take the place of the suite's in methods/fsmoe_gates.py and methods/fsmoe_mixing.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from methods.fsmoe_gates import GShardGate, SigmoidGate, XMoEGate
from methods.fsmoe_mixing import ExpertChoiceGate, ExpertChoiceMoE, SoftGate, SoftMoE, tokens_taken
from methods.fsmoe_schedule import plan_fsmoe
from moe.exchange_costs import Counts
from moe.layer_simulation import RoutedLayer
from moe.mesh import Mesh
from moe.pipelined_layer import PipelinedMoE
from moe.pipelined_parts import Choices, Gate, Schedule
from moe.pipelined_system import PipelinedOptions, PipelinedSystem
from moe.schedules import INTER, INTRA, fsmoe_pipeline
from moe.system import LayerSpec, MoELayer
from moe.topology import Cluster

LAYERS: dict[str, type[PipelinedMoE]] = {"expert_choice": ExpertChoiceMoE, "soft": SoftMoE}
"""By gate, where it is no plain pipelined layer."""


class Options(PipelinedOptions):
    """Options of conf/system/fsmoe.yaml, beside those of `PipelinedOptions`.

    Args:
        schedule: `fsmoe`; or `fsmoe_no_iio`, the paper's ablation, in which collectives in a node wait for those
            between nodes.
        slices: all-reduce dense gradients in slices during backward; false: in the end.
        gate: `softmax`, the suite's, which all systems are compared with; or another function of the paper's.
        gate_dim: D of `xmoe`; null: half as many as experts (ours).
        gate_temperature: of `xmoe`.
        gate_slots: of `soft`, slots of each expert for a rank's tokens.
        order: how tokens become copies: rows are moved (`sparse`, Tutel's), or multiplied by a matrix of zeros and ones
            (`dense`, GShard's einsum).
    """

    schedule: Literal["fsmoe", "fsmoe_no_iio"] = "fsmoe"
    slices: bool = True
    gate: Literal["softmax", "gshard", "sigmoid", "xmoe", "expert_choice", "soft"] = "softmax"
    gate_dim: int | None = Field(default=None, ge=1)
    gate_temperature: float = Field(default=1.0, gt=0)
    gate_slots: int = Field(default=1, ge=1)
    order: Literal["sparse", "dense"] = "sparse"

    @model_validator(mode="after")
    def _of_that_gate(self) -> Self:
        owners = {"gate_dim": "xmoe", "gate_temperature": "xmoe", "gate_slots": "soft"}
        for key, gate in owners.items():
            if getattr(self, key) != type(self).model_fields[key].default and self.gate != gate:
                raise ValueError(f"{key} belongs to gate={gate}, and gate is {self.gate}; leave {key} out")
        return self

    def choices(self) -> Choices:
        """For the layers."""
        return replace(super().choices(), dense_order=self.order == "dense")

    def build_gate(self, spec: LayerSpec, device: torch.device) -> Gate | None:
        """The gate that takes the place of the suite's; None for the suite's."""
        plain = {"gshard": GShardGate, "sigmoid": SigmoidGate, "expert_choice": ExpertChoiceGate}
        if self.gate in plain:
            return plain[self.gate](spec, device)
        if self.gate == "xmoe":
            return XMoEGate(spec, device, self.gate_dim or max(1, spec.num_experts // 2), self.gate_temperature)
        return SoftGate(spec, device, self.gate_slots) if self.gate == "soft" else None


class FSMoE(PipelinedSystem):
    """FSMoE."""

    name = "fsmoe"
    summary = "exchange and experts in chunks, as many as measured costs say; dense gradients in slices beside them"
    Options = Options

    @property
    def schedule(self) -> Schedule:
        """The paper's, or its ablation's."""
        name, one_link = self.options.schedule, self.options.schedule == "fsmoe_no_iio"
        planner = partial(plan_fsmoe, one_link=one_link, whole_step=True)
        pipeline = partial(fsmoe_pipeline, in_node=INTER if one_link else INTRA)
        return Schedule(name, planner, pipeline, self.options.slices)

    @property
    def own_gate(self) -> bool:
        """With any gate but the suite's."""
        return bool(self.options.gate != "softmax")

    def refusals(self, spec: LayerSpec, cluster: Cluster) -> list[str]:
        """SoftMoE with a capacity factor."""
        reasons = super().refusals(spec, cluster)
        if self.options.gate == "soft" and spec.capacity_factor is not None:
            reasons.append(
                f"SoftMoE has slots, not copies that could be dropped (capacity_factor={spec.capacity_factor}): set "
                "capacity_factor=null and say the slots of an expert by gate_slots."
            )
        return reasons

    def simulated_counts(self, layer: RoutedLayer) -> Counts:
        """As many for every expert where tokens do not choose."""
        if self.options.gate not in LAYERS:
            return super().simulated_counts(layer)
        taken = tokens_taken(layer.spec, layer.num_tokens)
        return np.full_like(layer.counts_PE, self.options.gate_slots if self.options.gate == "soft" else taken)

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """The pipelined layer behind its gate."""
        layer = LAYERS.get(self.options.gate, PipelinedMoE)
        return layer(spec, mesh, self.schedule, self.choices, self.options.build_gate(spec, mesh.device))
