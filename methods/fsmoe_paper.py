"""What FSMoE's paper (arXiv 2501.10714) states in numbers: its testbeds, workloads and results.

Nothing here is measured by this suite. "Not verified" marks what the paper does not say, or what was inferred from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from moe.costs import AlphaBeta
from moe.schedules import LayerWork

ELEMENT_BYTES = 4
"""Of activations and gradients: float32, in which communication was profiled; of the model runs not verified."""
TOP_K = 2
"""Stated for the models; for the 1458 layers not verified."""
MILLISECONDS = 1e-3


@dataclass(frozen=True)
class Testbed:
    """A cluster of the paper.

    Args:
        name: A or B.
        gpu: kind.
        num_nodes, node_size: of GPUs; tensor and expert-sharding parallelism are as wide as a node.
        lengths: L of the 1458 layers.
        costs: by operation, as figure 5 fits them. Its caption prints no units: milliseconds, and milliseconds a byte
            or a multiply-add, are not verified. `attention` is that of its matrix multiplications.
        costs_from: where costs are from.
        gate_s: seconds of gate and order, in either direction.
        contention: how many times as long a collective takes while one on the other link runs.
        remarks: what in costs and contention is ours; every row says so.
    """

    name: str
    gpu: str
    num_nodes: int
    node_size: int
    lengths: tuple[int, ...]
    costs: dict[str, AlphaBeta]
    costs_from: str = "figure 5"
    gate_s: float = 0.0
    contention: float = 1.0
    remarks: tuple[str, ...] = ()


GEMM_UNIT = "GEMM's beta per multiply-add is our reading of the unit; exceeds the cards' fp32 peak"
"""45 TFLOP/s on an RTX 2080 Ti, whose peak is about 13, and 87 on an RTX A6000 of about 39. PipeMoE's released solver
counts n_e = 4 k f B L M H, four a multiply-add, with a beta like figure 5's (`fsmoe_calibration.with_gemm_times_4`)."""
MISREAD_BETAS = "A's all-gather/all-reduce betas read as e-7 (ours)"


def _fits(**fits: tuple[float, float]) -> dict[str, AlphaBeta]:
    """From milliseconds to seconds; attention is matrix multiplications."""
    costs = {name: AlphaBeta(alpha * MILLISECONDS, beta * MILLISECONDS) for name, (alpha, beta) in fits.items()}
    return costs | {"attention": costs["gemm"]}


TESTBED_A = Testbed(
    name="A",
    gpu="RTX A6000",
    num_nodes=6,
    node_size=8,
    lengths=(512, 1024, 2048),
    costs=_fits(
        gemm=(4.26e-2, 2.29e-11),
        all_to_all=(2.87e-1, 2.21e-7),
        all_gather=(3.37e-1, 2.32e-7),
        reduce_scatter=(3.95e-1, 2.34e-7),
        all_reduce=(5.11e-1, 4.95e-7),
    ),
    remarks=(GEMM_UNIT, MISREAD_BETAS),
)
"""As printed but for the exponents of the betas of all-gather and all-reduce, printed e-6: a node's links would carry
0.4 GB/s one way (all-gather) and 4.3 GB/s the other (reduce-scatter). Read as misprints of e-7 (ours)."""

TESTBED_B = Testbed(
    name="B",
    gpu="RTX 2080 Ti",
    num_nodes=8,
    node_size=4,
    lengths=(256, 512, 1024),
    costs=_fits(
        gemm=(9.24e-2, 4.42e-11),
        all_to_all=(1.75e-1, 3.06e-7),
        all_gather=(3.20e-2, 1.68e-7),
        reduce_scatter=(3.91e-2, 1.67e-7),
        all_reduce=(8.37e-2, 5.99e-7),
    ),
    remarks=(GEMM_UNIT,),
)
TESTBEDS = {"A": TESTBED_A, "B": TESTBED_B}

FIGURE_5_R2 = {
    "gemm": 0.9987,
    "all_to_all": 0.9999,
    "all_gather": 0.9999653,
    "reduce_scatter": 0.9999599,
    "all_reduce": 0.9999896,
}
"""Stated once, of which testbed is not verified."""
COMMUNICATION_SIZES = tuple(index * 2**18 for index in range(1, 25))
"""Elements at which collectives were profiled."""
GEMM_SIZES = tuple(index * 2**19 for index in range(1, 13))
"""Sizes at which matrix multiplications were profiled; of what is not verified."""

TABLE_5 = {
    "A": {"tutel_overlap": 1.00, "tutel_improved": 1.09, "fsmoe_no_iio": 1.12, "fsmoe": 1.18},
    "B": {"tutel_overlap": 1.00, "tutel_improved": 1.08, "fsmoe_no_iio": 1.16, "fsmoe": 1.22},
}
"""Mean speed-up over Tutel on the 1458 layers."""
OTHER_DEGREE_CASES = {"B": 912}
"""Layers of the 1458 whose best degree differs between forward and backward. The released code takes r = 1 in both
where an unsplit all-to-all takes less than 1 ms, which `fsmoe_solver` leaves out: it bears on this number."""

FIGURE_6_OVER = {"tutel_overlap": 1.19, "tutel_improved": 1.12, "pipemoe_lina": 1.14, "fsmoe_no_iio": 1.07}
"""Mean speed-up of FSMoE over the others, on the models and both testbeds."""
FIGURE_6_RANGES = {"fsmoe": (1.28, 3.01), "tutel_overlap": (1.16, 2.59)}
"""Speed-up over DeepSpeed-MoE, least and most."""
FIGURE_7_LENGTHS = {
    "sequential": {512: 2.17, 1024: 2.72, 2048: 3.14},
    "tutel_overlap": {512: 1.17, 1024: 1.19, 2048: 1.17},
}
"""Speed-up of FSMoE over the others by L, 48 GPUs of testbed A."""
FIGURE_7_GPUS = {"sequential": {16: 2.25, 32: 2.27, 48: 2.72}, "tutel_overlap": {16: 1.20, 32: 1.16, 48: 1.19}}
"""The same by GPUs, L = 1024."""
FIGURE_8_OVER = {
    "sequential": 2.46,
    "tutel_overlap": 1.16,
    "tutel_improved": 1.10,
    "pipemoe_lina": 1.12,
    "fsmoe_no_iio": 1.05,
}
"""Speed-up of FSMoE over the others with two pipeline stages (GPipe), testbed A."""

TABLE_2_OPERATIONS = (
    "all_to_all",
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "experts",
    "routing",
    "order",
    "attention",
)
TABLE_2: dict[tuple[str, str], dict[str, tuple[float, ...]]] = {
    ("A", "GPT2-XL"): {
        "forward": (6.9, 0, 4.6, 5.4, 3.1, 0.1, 0.3, 1.7),
        "backward": (6.9, 5.26, 4.6, 5.4, 6.1, 0.1, 0.4, 3.6),
    },
    ("A", "Mixtral-7B"): {
        "forward": (19.5, 0, 12.3, 13.7, 15.6, 0.1, 0.3, 4.1),
        "backward": (19.6, 26.45, 12.3, 13.7, 31.8, 0.1, 0.5, 7.7),
    },
    ("B", "GPT2-XL"): {
        "forward": (11.2, 0, 15.5, 15.7, 6.7, 0.1, 0.3, 4.5),
        "backward": (11.2, 7.3, 15.5, 15.2, 13, 0.1, 0.3, 8.6),
    },
    ("B", "Mixtral-7B"): {
        "forward": (28.3, 0, 39.6, 40.8, 58.5, 0.1, 0.7, 9.5),
        "backward": (30.8, 32.1, 40.1, 41.8, 119.7, 0.2, 1.2, 18.1),
    },
}
"""Milliseconds of each operation in one layer, by testbed and model."""
TABLE_2_BATCH, TABLE_2_LENGTH = 4, 1024
"""B and L."""


@dataclass(frozen=True)
class Layer:
    """Sizes of a layer.

    Args:
        batch_size, sequence_length: B and L, of a group of tensor parallelism.
        model_dim, hidden_dim: M and H.
        capacity_factor: f; None drops nothing, which under even routing is the work of f = 1 (ours).
        gated: three matrices an expert and grouped-query attention (Mixtral), not two and full attention (GPT).
        num_heads: of attention; changes no cost here.
    """

    batch_size: int
    sequence_length: int
    model_dim: int
    hidden_dim: int
    capacity_factor: float | None
    gated: bool
    num_heads: int = 16

    @property
    def num_tokens(self) -> int:
        """B L."""
        return self.batch_size * self.sequence_length

    @property
    def attention_parameters(self) -> float:
        """Of the four projections over all ranks: 4 M^2, or 2.5 M^2 for Mixtral, both as in the released code."""
        return (2.5 if self.gated else 4) * self.model_dim**2

    def attention_work(self) -> float:
        """Multiply-adds of the forward pass over all ranks: projections, scores and values."""
        scores = 2 * self.num_tokens * self.sequence_length * self.model_dim
        return self.num_tokens * self.attention_parameters + scores


ATTENTION_CALLS = 4
"""Matrix multiplications of attention: queries, keys and values in one, scores, values, output (ours)."""


def layer_work(layer: Layer, testbed: Testbed) -> LayerWork:
    """Volumes of the released solver: n_a2a = k f B L M / N_ESP, n_ag = n_rs = k f B L M, experts k f B L M H / N_ESP
    multiply-adds a matrix; attention by its cost, backward twice as long.

    Args:
        layer: sizes.
        testbed: says N_MP = N_ESP, the cost of attention, and the time of gate and order.
    """
    activations = layer.num_tokens * layer.model_dim
    routed = TOP_K * (layer.capacity_factor or 1.0) * activations
    cost = testbed.costs["attention"]
    attention_s = ATTENTION_CALLS * cost.alpha_s + cost.beta_s_per_byte * layer.attention_work() / testbed.node_size
    num_gemms = 3 if layer.gated else 2
    return LayerWork(
        all_to_all_bytes=ELEMENT_BYTES * routed / testbed.node_size,
        shard_bytes=ELEMENT_BYTES * routed,
        expert_work=num_gemms * routed * layer.hidden_dim / testbed.node_size,
        expert_calls=num_gemms,
        sequence_bytes=ELEMENT_BYTES * activations,
        dense_s=attention_s + testbed.gate_s,
        dense_backward_s=2 * attention_s + testbed.gate_s,
        gradient_bytes=ELEMENT_BYTES * layer.attention_parameters / testbed.node_size,
    )


def configured_layers(testbed: Testbed) -> Iterator[Layer]:
    """Table 4's 1458 layers."""
    grid = product(
        (1, 2, 4), (8, 16, 32), testbed.lengths, (1024, 2048, 4096), (2, 3, 4), (1.2, 2.4, None), (False, True)
    )
    for batch_size, num_heads, length, model_dim, ratio, capacity_factor, gated in grid:
        yield Layer(batch_size, length, model_dim, ratio * model_dim, capacity_factor, gated, num_heads)


@dataclass(frozen=True)
class Model:
    """A model of the paper's evaluation.

    Args:
        name: of it.
        model_dim, hidden_dim: M and H, not stated by the paper (the models' published sizes).
        num_layers: by testbed; stated for Mixtral-7B on B and Mixtral-22B, else the published number.
        gated: Mixtral's experts and attention.
    """

    name: str
    model_dim: int
    hidden_dim: int
    num_layers: dict[str, int]
    gated: bool

    def layer(self, batch_size: int, sequence_length: int) -> Layer:
        """Its layers, f = 1.2."""
        return Layer(batch_size, sequence_length, self.model_dim, self.hidden_dim, 1.2, self.gated)


MODELS = (
    Model("GPT2-XL", 1600, 6400, {"A": 48, "B": 48}, gated=False),
    Model("Mixtral-7B", 4096, 14336, {"A": 32, "B": 7}, gated=True),
    Model("Mixtral-22B", 6144, 16384, {"A": 33}, gated=True),
)
MODEL_LENGTHS = {"A": 1024, "B": 256}
"""L of the model runs; B = 1."""
