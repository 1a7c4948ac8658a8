"""Systems with one mistake each, to show that the contract catches it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from moe.gate import Routing, TopKGate
from moe.layer import NativeMoE
from moe.mesh import Mesh
from moe.sync import GradientSync
from moe.system import ExpertView, LayerSpec, MoELayer, MoEOutput, System
from moe.topology import Cluster


class Wrong(System):
    """A native layer with a mistake.

    Attributes:
        case: name of the case that it runs on.
        caught_by: what a violation must say.
    """

    implementation = "native"
    summary = "wrong on purpose"
    case: ClassVar[str] = "top2-gelu"
    caught_by: ClassVar[str]

    def spoil_routing(self, routing: Routing) -> Routing:
        """The mistake, if it is the gate's."""
        return routing

    def spoil_output(self, output: MoEOutput) -> MoEOutput:
        """The mistake, if it is in what the layer returns."""
        return output

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        return WrongLayer(self, spec, mesh)


class WrongGate(TopKGate):
    """A gate whose routing the system spoils."""

    def __init__(self, system: Wrong, spec: LayerSpec, device: torch.device) -> None:
        super().__init__(spec, device)
        self.system = system

    def forward(self, x_TM: Tensor) -> Routing:
        return self.system.spoil_routing(super().forward(x_TM))


class WrongLayer(NativeMoE):
    """A layer whose gate and output the system spoils."""

    def __init__(self, system: Wrong, spec: LayerSpec, mesh: Mesh) -> None:
        super().__init__(spec, mesh, WrongGate(system, spec, mesh.device))
        self.system = system

    def forward(self, x_TM: Tensor) -> MoEOutput:
        return self.system.spoil_output(super().forward(x_TM))


def _sharded(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    assert isinstance(model, MoELayer)
    return model.sharded_parameters()


class HeavyWeights(Wrong):
    """Combine weights 0.01 % too large."""

    name = "wrong: heavy weights"
    caught_by = "output is off by 1.0e-04"

    def spoil_routing(self, routing: Routing) -> Routing:
        return routing._replace(weights_TK=routing.weights_TK * 1.0001)


class NotANumber(Wrong):
    """One number of the output is NaN."""

    name = "wrong: not a number"
    caught_by = "output is off by inf"

    def spoil_output(self, output: MoEOutput) -> MoEOutput:
        hole = torch.zeros_like(output.y_TM)
        hole[0, 0] = torch.nan
        return output._replace(y_TM=output.y_TM + hole)


class DetachedWeights(Wrong):
    """The gate learns nothing from the output."""

    name = "wrong: detached weights"
    caught_by = "gate gradient is off by"

    def spoil_routing(self, routing: Routing) -> Routing:
        return routing._replace(weights_TK=routing.weights_TK.detach())


class HeavyBalanceLoss(Wrong):
    """The gradient of the balance loss is twice too large, its value is right."""

    name = "wrong: gradient of the balance loss"
    caught_by = "gate gradient is off by"

    def spoil_output(self, output: MoEOutput) -> MoEOutput:
        return output._replace(aux_loss=2 * output.aux_loss - output.aux_loss.detach())


class OtherBalanceLoss(Wrong):
    """The balance loss lacks a constant."""

    name = "wrong: balance loss"
    caught_by = "balance loss is off by"

    def spoil_output(self, output: MoEOutput) -> MoEOutput:
        return output._replace(aux_loss=output.aux_loss - 1)


class SummedExperts(Wrong):
    """Expert gradients are summed over ranks where the others are averaged."""

    name = "wrong: summed expert gradients"
    caught_by = "w1 is off by 3.0e+00"

    def gradient_sync(self, model: torch.nn.Module, mesh: Mesh) -> GradientSync:
        class Summing(GradientSync):
            def reduce(self) -> None:
                super().reduce()
                for parameter in self.sharded:
                    assert parameter.grad is not None
                    parameter.grad *= self.mesh.world_size

        return Summing(model, _sharded(model), mesh)


class LocalReplicas(Wrong):
    """Replicas of an expert do not share their gradients."""

    name = "wrong: local replicas"
    case = "replicated-experts"
    caught_by = "gradient of expert"

    def gradient_sync(self, model: torch.nn.Module, mesh: Mesh) -> GradientSync:
        class Local(GradientSync):
            def reduce(self) -> None:
                sharded, self.sharded = self.sharded, []
                super().reduce()
                self.sharded = sharded

        return Local(model, _sharded(model), mesh)


class SwappedExperts(Wrong):
    """A rank's experts carry each other's ids."""

    name = "wrong: swapped experts"
    caught_by = "output is off by"

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        class Swapped(NativeMoE):
            def expert_views(self) -> list[ExpertView]:
                views = super().expert_views()
                ids = [view.expert for view in views][::-1]
                return [ExpertView(i, v.name, v.parameter, v.view) for i, v in zip(ids, views, strict=True)]

        return Swapped(spec, mesh)


class LostCopy(Wrong):
    """One copy a rank is not computed, and nobody is told."""

    name = "wrong: lost copy"
    caught_by = "the experts computed 188 rows of 192 copies that were kept"

    def spoil_routing(self, routing: Routing) -> Routing:
        kept_TK = torch.ones_like(routing.expert_ids_TK, dtype=torch.bool)
        kept_TK[3, 1] = False
        return routing._replace(kept_TK=kept_TK)

    def spoil_output(self, output: MoEOutput) -> MoEOutput:
        return output._replace(num_dropped=torch.zeros_like(output.num_dropped))


class UntoldDrops(Wrong):
    """Drops what the capacity asks for and says that it dropped nothing."""

    name = "wrong: untold drops"
    case = "top2-drops"
    caught_by = "0 drops are counted"

    def spoil_output(self, output: MoEOutput) -> MoEOutput:
        return output._replace(num_dropped=torch.zeros_like(output.num_dropped))


class NoDrops(Wrong):
    """Ignores the capacity."""

    name = "wrong: no drops"
    case = "top1-drops"
    caught_by = "0 tokens got nothing"

    def spoil_routing(self, routing: Routing) -> Routing:
        return routing._replace(kept_TK=None, weights_TK=routing.probs_TE.gather(1, routing.expert_ids_TK))


class OtherCounts(Wrong):
    """Counts a choice for the wrong expert."""

    name = "wrong: counts"
    caught_by = "counts are"

    def spoil_output(self, output: MoEOutput) -> MoEOutput:
        return output._replace(counts_E=output.counts_E.roll(1))


class OtherIds(Wrong):
    """Tells the choices of another token."""

    name = "wrong: expert ids"
    caught_by = "it tells other expert ids"

    def spoil_output(self, output: MoEOutput) -> MoEOutput:
        assert output.expert_ids_TK is not None
        return output._replace(expert_ids_TK=output.expert_ids_TK.roll(1, 0))


class Restless(Wrong):
    """Adds noise far below the tolerance."""

    name = "wrong: restless"
    caught_by = "a second run differs"

    def spoil_output(self, output: MoEOutput) -> MoEOutput:
        return output._replace(y_TM=output.y_TM * (1 + 1e-6 * torch.rand_like(output.y_TM)))


class OtherDtype(Wrong):
    """Answers in float32 when asked in bfloat16."""

    name = "wrong: dtype"
    case = "bf16"
    caught_by = "output is torch.float32, not torch.bfloat16"

    def spoil_output(self, output: MoEOutput) -> MoEOutput:
        return output._replace(y_TM=output.y_TM.float())


class Crash(Wrong):
    """Fails on every rank."""

    name = "wrong: crash"
    caught_by = "rank 0 failed: ZeroDivisionError"

    def spoil_routing(self, routing: Routing) -> Routing:
        raise ZeroDivisionError("no experts")


class CurtRefusal(Wrong):
    """Refuses with a word."""

    name = "wrong: curt refusal"
    caught_by = "not a plain sentence: 'unsupported'"

    def refusals(self, spec: LayerSpec, cluster: Cluster) -> list[str]:
        return ["unsupported"]


WRONG: list[type[Wrong]] = Wrong.__subclasses__()
