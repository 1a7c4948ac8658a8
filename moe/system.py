"""The contract between the suite and an MoE training system.

A `System` builds a layer from a `LayerSpec` and a `Mesh`; the layer is an `MoELayer`, whose few methods let the suite
load the same weights into every system, find the experts' parameters whatever their layout, and time the stages.

Dimensions: T tokens of this rank, M model, H hidden of an expert, E experts over all ranks, K choices a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from moe.layer_simulation import LayerModel, RoutedLayer
from moe.mesh import Mesh
from moe.sync import GradientSync
from moe.topology import Cluster

Activation = Literal["gelu", "swiglu"]


@dataclass(frozen=True)
class LayerSpec:
    """What every system must compute for one MoE layer.

    Args:
        model_dim: M, width of a token.
        hidden_dim: H, width inside an expert.
        num_experts: E, over all ranks.
        top_k: K, experts a token is sent to.
        activation: `gelu` (two matrices) or `swiglu` (three, Shazeer 2020).
        capacity_factor: None drops nothing; c keeps at most `capacity(T)` copies per source rank and expert.
        dtype: of the tokens and the experts' arithmetic; the gate computes in float32.
        seed, layer_index: weights are a function of (seed, layer_index, global expert id), never of the rank.
    """

    model_dim: int
    hidden_dim: int
    num_experts: int
    top_k: int
    activation: Activation = "gelu"
    capacity_factor: float | None = None
    dtype: torch.dtype = torch.float32
    seed: int = 0
    layer_index: int = 0

    @property
    def expert_shapes(self) -> dict[str, tuple[int, int]]:
        """Canonical matrices of one expert: y = act(x w1) w2, or (silu(x w1) * (x w3)) w2 with `swiglu`."""
        shapes = {"w1": (self.model_dim, self.hidden_dim), "w2": (self.hidden_dim, self.model_dim)}
        return shapes | {"w3": (self.model_dim, self.hidden_dim)} if self.activation == "swiglu" else shapes

    def capacity(self, num_tokens: int) -> int:
        """Most copies that an expert takes from one rank, ceil(c * K * T / E) with c the capacity factor (not None).

        Args:
            num_tokens: T, of that rank.
        """
        assert self.capacity_factor is not None
        # Rounded first, so that 1.1 * 2 * 400 / 8 = 110.00000000000001 is 110.
        return ceil(round(self.capacity_factor * self.top_k * num_tokens / self.num_experts, 6))


class MoEOutput(NamedTuple):
    """What a layer returns.

    Attributes:
        y_TM: [T, M], in the layer's dtype.
        aux_loss: scalar float32, the balance loss of this rank's tokens (see `moe.gate.balance_loss`), unweighted.
        counts_E: [E] int64, copies that this rank's tokens chose, before any drop.
        num_dropped: scalar int64, copies of this rank's tokens that no expert computed.
        expert_ids_TK: [T, K] int64, or None where the system does not tell.
    """

    y_TM: Tensor
    aux_loss: Tensor
    counts_E: Tensor
    num_dropped: Tensor
    expert_ids_TK: Tensor | None


def _itself(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class ExpertView:
    """One canonical matrix of one expert inside a system's own parameter layout.

    Args:
        expert: global expert id.
        name: `w1`, `w2` or `w3`.
        parameter: the parameter that holds it, possibly with other experts'.
        view: from a tensor shaped like `parameter` (the data, the gradient, an optimizer moment) to a view of the
            canonical shape, `LayerSpec.expert_shapes[name]`.
        part: from a tensor of the canonical shape to what `view` shows of it, where a rank has a part of an expert.
    """

    expert: int
    name: str
    parameter: nn.Parameter
    view: Callable[[Tensor], Tensor]
    part: Callable[[Tensor], Tensor] = _itself


class MoELayer(nn.Module, ABC):
    """An MoE layer of some system. Calling it takes x [T, M] and returns an `MoEOutput`.

    Attributes:
        stage_listeners: None where the calls of `stage_modules` bound the stages. A layer whose experts run inside one
            autograd function has a list here, and tells each that is in it (`forward` or `backward`, stage) when the
            stage before its experts ends, and when they do.
        chooses_top_k: False where tokens do not choose K experts each, so that there are no choices to record.
    """

    chooses_top_k: ClassVar[bool] = True

    def __init__(self, spec: LayerSpec, mesh: Mesh) -> None:
        super().__init__()
        self.spec = spec
        self.mesh = mesh
        self.stage_listeners: list[Callable[[str, str], None]] | None = None

    @abstractmethod
    def forward(self, x_TM: Tensor) -> MoEOutput:
        """Route this rank's tokens [T, M] through the experts."""

    @property
    @abstractmethod
    def gate_weight(self) -> nn.Parameter:
        """The gate's matrix, [E, M] float32 (less wide where a gate projects tokens), the same on every rank."""

    def set_gate(self, gate_EM: Tensor) -> None:
        """Take a gate's matrix, [E, M]; no gradient may be asked of this."""
        self.gate_weight.copy_(gate_EM)

    @abstractmethod
    def expert_views(self) -> list[ExpertView]:
        """The matrices of every expert that lives on this rank."""

    @abstractmethod
    def stage_modules(self) -> tuple[nn.Module, ...]:
        """The gate, then the experts in the order of their calls: these calls bound the stages of a layer."""

    @property
    def experts_are_sharded(self) -> bool:
        """True when an expert lives on some ranks only; False when every rank holds all (then they train as dense)."""
        return True

    @property
    def workspace_bytes(self) -> int:
        """Bytes that the layer keeps between steps outside torch's allocator, such as memory that other ranks write to.

        Layers of one shape share them: the benchmarks add them once to the peak memory of a model.
        """
        return 0

    @property
    def path(self) -> str:
        """Which of several implementations runs here, in a phrase for results; empty where there is one."""
        return ""

    @property
    def modelled_dispatch_s(self) -> dict[str, float]:
        """Seconds of one dispatch by the system's own cost model, by the name of each alternative that it weighs."""
        return {}

    @property
    def module_times(self) -> dict[str, list[tuple[float, float]]]:
        """What the layer measured of its modules to plan by: (size, seconds) by operation (`moe.module_profile`)."""
        return {}

    def observations(self) -> dict[str, Tensor]:
        """Facts worth keeping beside a run's routing, by name; the same on all ranks."""
        return {}

    @property
    def replicas_E(self) -> list[int] | None:
        """Slots of each expert in the step that comes, over all ranks and the same on each; None where each has one."""
        return None

    @property
    def expert_of_slot(self) -> list[int] | None:
        """Where experts are that change places (see `moe.placement`); None where they stay."""
        return None

    def restore_placement(self, expert_of_slot: list[int] | None) -> None:
        """Take the places of a checkpoint, before its weights are loaded; None when it has none."""
        return None

    def planning_state(self) -> Any:
        """What the system remembers to decide by where experts go next, for checkpoints: plain values, the same on all
        ranks. Collective."""
        return None

    def restore_planning(self, state: Any) -> None:
        """Take a checkpoint's `planning_state`, after its placement; it may be of another number of ranks."""
        return None

    @contextmanager
    def whole_experts(self, optimizer: torch.optim.Optimizer, loading: bool) -> Iterator[None]:
        """For a checkpoint: inside, `expert_views` are of whole experts, each on one rank at least, and `optimizer` has
        the state of the parameters that hold them. Collective. By default it is always so.

        Args:
            optimizer: Adam's kind, of the model that this layer is in.
            loading: weights and state are written there, and are to be taken over at the end.
        """
        yield

    def sharded_parameters(self) -> list[nn.Parameter]:
        """Parameters whose gradient is not reduced over the whole world."""
        if not self.experts_are_sharded:
            return []
        return list({id(view.parameter): view.parameter for view in self.expert_views()}.values())

    def drop_gradients(self) -> None:
        """Set the gradients of all weights to None, of those too that the run's optimizer does not see."""
        for parameter in self.parameters():
            parameter.grad = None

    def local_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that every rank trains for itself, by name: not reduced, and kept in checkpoints one a rank."""
        return {}


class NoOptions(BaseModel):
    """Options of a system that has none."""

    model_config = ConfigDict(extra="forbid")


class System(ABC):
    """One system under comparison. Subclass it in a file of baselines/ or methods/, and it is in the registry.

    Attributes:
        name: as in conf/system/<name>.yaml and in every result.
        implementation: `upstream` when another project's package computes the layer, `native` when this suite does.
        summary: half a sentence for tables.
        Options: pydantic model of the keys that conf/system/<name>.yaml may carry beside `name`.
        shards_experts: False when every rank holds all experts, for the estimate of its memory.
        own_balance_loss: True when its balance loss is meant to differ from `moe.gate.balance_loss`; its outputs, and
            the gradients without that loss, must still be the oracle's.
    """

    name: ClassVar[str]
    implementation: ClassVar[Literal["upstream", "native"]]
    summary: ClassVar[str]
    Options: ClassVar[type[BaseModel]] = NoOptions
    shards_experts: ClassVar[bool] = True
    own_balance_loss: ClassVar[bool] = False

    def __init__(self, options: BaseModel | dict[str, Any] | None = None) -> None:
        self.options: Any = options if isinstance(options, BaseModel) else self.Options.model_validate(options or {})

    def refusals(self, spec: LayerSpec, cluster: Cluster) -> list[str]:
        """Plain sentences that say why this combination can't run; empty when it can."""
        return []

    @property
    def own_gate(self) -> bool:
        """Whether it is configured to route otherwise than the suite's gate, so that no oracle knows its outputs."""
        return False

    def expert_copies(self, num_experts: int, num_ranks: int) -> float:
        """Copies that are trained of an expert over all ranks, the mean over experts, for the estimate of memory."""
        return 1.0 if self.shards_experts else float(num_ranks)

    def slot_copies(self, num_experts: int, num_ranks: int) -> float:
        """Copies of an expert over all ranks, beside those that are trained, that a step computes with: weights and
        gradients in the dtype of the arithmetic. The mean over experts, for the estimate of memory."""
        return 0.0

    def simulated_layer(self, layer: RoutedLayer) -> LayerModel:
        """What a layer of this system does to a routing, for `moe.simulator`; by default what plain expert parallelism
        does: every copy travels once each way."""
        return layer.model(layer.counts_PE)

    @abstractmethod
    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """A layer on `mesh.device`; the suite loads its weights afterwards (`moe.weights.load_layer`)."""

    def gradient_sync(self, model: nn.Module, mesh: Mesh) -> GradientSync:
        """How gradients are reduced after backward; the default reduces in one bucket once backward has ended."""
        layers = moe_layers(model)
        sharded = [parameter for layer in layers for parameter in layer.sharded_parameters()]
        local = [parameter for layer in layers for parameter in layer.local_parameters().values()]
        return GradientSync(model, sharded, mesh, local)

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps_done: int) -> None:
        """What the system does between two training steps, such as moving experts. Collective; by default nothing.

        Args:
            model: that is trained; `moe_layers` finds its layers.
            optimizer: that has just updated it.
            steps_done: training steps since the run began, this one included.
        """
        return None


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, MoELayer)]
