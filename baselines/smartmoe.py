"""SmartMoE's expert placement (Zhai et al., USENIX ATC 2023), after its published artifact: experts move to even out
the ranks' loads.

What the artifact does not do, its optimizer state included, is done here: state moves with its expert, so that training
is the same wherever experts are. The paper's plan of parallelism (its offline part) is not restated.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.optim import Optimizer

from moe.layer import NativeMoE
from moe.load_balance import balance_loads
from moe.mesh import Mesh
from moe.system import LayerSpec, MoELayer, System


class Options(BaseModel):
    """Options of conf/system/smartmoe.yaml.

    Args:
        every: steps between two decisions; each sees the mean loads of the last two steps.
    """

    model_config = ConfigDict(extra="forbid")
    every: int = Field(default=10, ge=1)


class SmartMoE(System):
    """Flat exchange, experts placed by their loads."""

    name = "smartmoe"
    implementation = "native"
    summary = "experts move to even out the ranks' loads, every few steps"
    Options = Options

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """The native layer, whose experts can move."""
        return NativeMoE(spec, mesh, moves_experts=True)

    def after_step(self, model: nn.Module, optimizer: Optimizer, steps_done: int) -> None:
        """Move experts where that lowers the largest load of a rank."""
        balance_loads(model, optimizer, steps_done, self.options.every)
