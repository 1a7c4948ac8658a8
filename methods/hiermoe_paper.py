"""What HierMoE's paper (arXiv 2508.09591) states in numbers, and what its model gives beside it: rows for tables.

Nothing here is measured on a cluster. "Not verified" marks what the paper does not say, or what was inferred from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from torch import Tensor

from methods.hiermoe_model import Collectives, duplication_rate, routed_duplication_rate
from methods.hiermoe_simulation import Setting, dispatch_times
from methods.hiermoe_swap import Peak
from moe.costs import AlphaBeta
from moe.errors import ConfigError, Problem

TABLE_II = {
    32: {2: 2, 4: 4, 6: 7, 8: 9},
    16: {2: 3, 4: 9, 6: 14, 8: 18},
    8: {2: 6, 4: 17, 6: 27, 8: 34},
    4: {2: 12, 4: 32, 6: 46, 8: 55},
}
"""Duplication in whole per cent, by number of groups R and choices K. Of how many experts is not verified."""
TABLE_II_EXPERTS = 256

TABLE_IV: dict[str, dict[str, dict[int, float]]] = {
    "HD2": {
        "K": {6: 0.95, 8: 1.26, 10: 1.30},
        "E": {64: 1.12, 128: 1.26, 256: 1.18},
        "G": {8: 1.24, 16: 1.71, 32: 1.26},
    },
    "HD": {
        "K": {6: 1.37, 8: 1.72, 10: 1.82},
        "E": {64: 1.57, 128: 1.72, 256: 1.61},
        "G": {8: 2.36, 16: 2.50, 32: 1.72},
    },
    "HierMoE": {
        "K": {6: 1.56, 8: 1.99, 10: 2.10},
        "E": {64: 1.83, 128: 1.99, 256: 1.84},
        "G": {8: 2.86, 16: 2.62, 32: 1.99},
    },
}
"""All-to-all speed-up over Megatron-LM, measured, in the setting of Qwen3-30B-A3B: K=8, E=128, G=32 but for one."""
TABLE_IV_DEFAULT = {"K": 8, "E": 128, "G": 32}

PEAK_GAINS: dict[Peak, float] = {"max": 1.13, "smooth": 1.17, "log_sum_exp": 1.16}
"""All-to-all speed-up of HierMoE over HD by how swaps are scored, measured (text of the ablation). Of which model is
not verified, nor the scale of log-sum-exp."""
PERIOD_GAINS = {1: 1.17, 2: 1.17, 4: 1.15, 8: 1.13}
"""The same by iterations between two swaps, measured (text)."""

FIGURE_9 = Collectives(
    groups=(4, 8, 16, 32),
    standard=AlphaBeta(7.22e-4, 5.70e-10, 0.999997),
    inter=(
        AlphaBeta(4.97e-4, 5.29e-10, 0.999991),
        AlphaBeta(3.01e-4, 1.17e-10, 0.998682),
        AlphaBeta(1.49e-4, 2.06e-11, 0.999031),
    ),
    intra=(
        AlphaBeta(5.71e-4, 1.27e-10, 0.998922),
        AlphaBeta(1.14e-4, 2.63e-11, 0.999051),
        AlphaBeta(2.04e-4, 1.64e-11, 0.997245),
    ),
)
"""Fits of 4 nodes of 8 A6000: nodes, sockets, NVLink pairs, GPUs. The paper prints no units; milliseconds, and
milliseconds a byte, are not verified (they give the network 1.9 GB/s and an NVLink pair 61 GB/s)."""
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Model:
    """A model of the paper's evaluation, its MoE layer and what the paper measured of it.

    Args:
        name: of it.
        model_dim, num_experts, top_k: M, E, K; not verified.
        speedups: of all-to-all over Megatron-LM by method, measured (figure 11 and its text).
        inferred: methods whose speed-up the text gives as the end of a range, without the model.
    """

    name: str
    model_dim: int
    num_experts: int
    top_k: int
    speedups: dict[str, float]
    inferred: tuple[str, ...] = ()

    def setting(self, collectives: Collectives) -> Setting:
        """Its dispatch in bfloat16 (not verified)."""
        return Setting(self.num_experts, self.top_k, 2 * self.model_dim, collectives)


DEEPSEEK_V3_HALF = Model("DeepSeek-V3-half", 3584, 256, 8, {"HD2": 1.76, "HD": 2.55, "HierMoE": 2.72}, ("HD2",))
QWEN3_30B_A3B = Model("Qwen3-30B-A3B", 2048, 128, 8, {"HD2": 1.26, "HD": 1.72, "HierMoE": 1.99})
MODELS = (DEEPSEEK_V3_HALF, QWEN3_30B_A3B)

NUM_TOKENS = 1024
"""Of a rank: the paper's micro-batch of 1 x 1024."""
POPULARITY_SPREAD = 0.7
"""Standard deviation of the experts' logits in the skewed routing (ours)."""
ROUTINGS = {"uniform": 0.0, f"popularity N(0, {POPULARITY_SPREAD})": POPULARITY_SPREAD}
NOTE = "modelled with figure 9's fits; their units, layer sizes, bfloat16 and the routing not verified"


class Row(TypedDict):
    """A number beside the paper's.

    Attributes:
        quantity: what of.
        paper: the paper's own number, measured where it is a speed-up; None where it states none.
        ours: the suite's.
        unit: of both.
        kind: how ours came to be.
        source: where the paper's stands, and what of either is not verified.
    """

    quantity: str
    paper: float | None
    ours: float
    unit: str
    kind: Literal["modelled", "measured"]
    source: str


def table_ii_rows() -> list[Row]:
    """Table II from the closed form, for choices at random."""
    return [
        _row(
            f"duplication, {num_groups} groups, K={top_k}",
            float(percent),
            100 * duplication_rate(TABLE_II_EXPERTS, num_groups, top_k),
            "%",
            f"Table II; closed form of uniform choices (ours), E={TABLE_II_EXPERTS} not verified",
        )
        for num_groups, by_k in TABLE_II.items()
        for top_k, percent in by_k.items()
    ]


def routed_table_ii_rows(expert_ids_TK: Tensor, num_experts: int, what: str) -> list[Row]:
    """Table II from recorded choices, for those of its groups that the experts can be cut into.

    Args:
        expert_ids_TK: [..., T, K] int64, at least one token.
        num_experts: E.
        what: whose choices they are.
    """
    top_k = expert_ids_TK.shape[-1]
    return [
        Row(
            quantity=f"duplication, {num_groups} groups, K={top_k}, {what}",
            paper=float(by_k[top_k]) if top_k in by_k else None,
            ours=100 * routed_duplication_rate(expert_ids_TK, num_experts, num_groups),
            unit="%",
            kind="measured",
            source=f"Table II; counted in recorded choices, E={num_experts}, the paper's E not verified",
        )
        for num_groups, by_k in TABLE_II.items()
        if num_experts % num_groups == 0
    ]


def figure_9_of(num_nodes: int) -> Collectives:
    """Figure 9's collectives on 1, 2 or 4 of its nodes.

    One node's are figure 9's own: Intra-1 is all-to-all over its GPUs. Two nodes' all-to-all and Inter-1 are not in it:
    their beta is scaled by the share of bytes that leaves a node, 1/2 in place of 3/4 (ours).

    Raises:
        ConfigError: another number of nodes.
    """
    if num_nodes == 4:
        return FIGURE_9
    if num_nodes not in (1, 2):
        rule = "the fits are of 4 nodes, and stand for 1, 2 or 4"
        raise ConfigError(Problem("num_nodes", num_nodes, rule, "use 1, 2 or 4"))
    groups = tuple(num * num_nodes // 4 for num in FIGURE_9.groups)
    if num_nodes == 1:
        return Collectives(groups[1:], FIGURE_9.intra[0], FIGURE_9.inter[1:], FIGURE_9.intra[1:])

    def scaled(cost: AlphaBeta) -> AlphaBeta:
        return AlphaBeta(cost.alpha_s, cost.beta_s_per_byte * (1 / 2) / (3 / 4))

    inter = (scaled(FIGURE_9.inter[0]), *FIGURE_9.inter[1:])
    return Collectives(groups, scaled(FIGURE_9.standard), inter, FIGURE_9.intra)


def reference_rows(
    num_tokens: int = NUM_TOKENS,
    seeds: Sequence[int] = (0, 1, 2),
    most_swaps: int = 32,
    models: Sequence[Model] = MODELS,
) -> list[Row]:
    """The paper's models on its 32 GPUs: time of a dispatch by every method, the best d, speed-ups beside figure 11's.

    Swaps only where experts differ in popularity: elsewhere there is nothing for them to find.

    Args:
        num_tokens: T, of a rank.
        seeds: of routings that are averaged.
        most_swaps: that HierMoE has made; 0 leaves it out.
        models: which.
    """
    rows: list[Row] = []
    for model in models:
        for routing, spread in ROUTINGS.items():
            swaps = most_swaps if spread else 0
            times = dispatch_times(model.setting(FIGURE_9), num_tokens, spread, seeds, swaps)
            where = f"{model.name}, {routing}"
            by_level = {name: time for name, time in times.items() if name.removeprefix("HD").isdigit()}
            rows += [
                _row(f"dispatch by {name}, {where}", None, 1e3 * seconds, "ms", f"equations 1 to 7, {NOTE}")
                for name, seconds in times.items()
            ]
            best = min(by_level, key=by_level.__getitem__).removeprefix("HD")
            rows.append(_row(f"best d, {where}", None, float(best), "levels", f"algorithm 1, {NOTE}"))
            for method in (name for name in model.speedups if name in times):
                unsure = " of a range, which model's not verified" if method in model.inferred else ""
                source = f"Figure 11{unsure}; {NOTE}{_note(method, FIGURE_9.num_ranks, swaps)}"
                rows.append(_speedup_row(method, where, model.speedups[method], times, source))
    return rows


def table_iv_rows(
    num_tokens: int = NUM_TOKENS,
    seeds: Sequence[int] = (0, 1, 2),
    most_swaps: int = 32,
    variables: Sequence[str] = ("K", "E", "G"),
) -> list[Row]:
    """Table IV's sweep over K, E and G, each number beside the paper's.

    Args:
        num_tokens, seeds, most_swaps: as in `reference_rows`.
        variables: which parts of the sweep.
    """
    known: dict[tuple[Setting, float], dict[str, float]] = {}
    rows: list[Row] = []
    for variable in variables:
        for value in TABLE_IV["HD2"][variable]:
            sizes = TABLE_IV_DEFAULT | {variable: value}
            collectives = figure_9_of(sizes["G"] // GPUS_PER_NODE)
            setting = Setting(sizes["E"], sizes["K"], 2 * QWEN3_30B_A3B.model_dim, collectives)
            for routing, spread in ROUTINGS.items():
                swaps = most_swaps if spread else 0
                if (setting, spread) not in known:  # the default is in every part of the sweep
                    known[setting, spread] = dispatch_times(setting, num_tokens, spread, seeds, swaps)
                times = known[setting, spread]
                for method in TABLE_IV:
                    if method in times:
                        source = f"Table IV; {NOTE}{_note(method, sizes['G'], swaps)}"
                        paper = TABLE_IV[method][variable][value]
                        rows.append(_speedup_row(method, f"{variable}={value}, {routing}", paper, times, source))
    return rows


def peak_rows(
    num_tokens: int = NUM_TOKENS, seeds: Sequence[int] = (0, 1, 2), most_swaps: int = 32, model: Model = QWEN3_30B_A3B
) -> list[Row]:
    """What swaps add to the best d, by how they are scored, beside the paper's ablation; skewed routing.

    Args:
        num_tokens, seeds, most_swaps: as in `reference_rows`.
        model: which.
    """
    rows = []
    for how, gain in PEAK_GAINS.items():
        times = dispatch_times(model.setting(FIGURE_9), num_tokens, POPULARITY_SPREAD, seeds, most_swaps, how)
        source = f"text of the ablation, the model and the scale of log_sum_exp not verified; {NOTE}"
        source += _note("HierMoE", FIGURE_9.num_ranks, most_swaps)
        quantity = f"all-to-all speed-up of HierMoE over HD, {how}, {model.name}"
        rows.append(_row(quantity, gain, times["HD"] / times["HierMoE"], "x", source))
    return rows


def _row(quantity: str, paper: float | None, ours: float, unit: str, source: str) -> Row:
    return Row(quantity=quantity, paper=paper, ours=ours, unit=unit, kind="modelled", source=source)


def _speedup_row(method: str, where: str, paper: float, times: dict[str, float], source: str) -> Row:
    quantity = f"all-to-all speed-up of {method} over Megatron-LM (H1), {where}"
    return _row(quantity, paper, times["H1"] / times[method], "x", source)


def _note(method: str, num_ranks: int, most_swaps: int) -> str:
    """What more of a speed-up is not the paper's."""
    notes = ""
    if num_ranks < FIGURE_9.num_ranks:
        notes += f"; {num_ranks} GPUs as nodes of {GPUS_PER_NODE} not verified"
    if num_ranks == 2 * GPUS_PER_NODE:
        notes += ", costs between two nodes scaled from four (ours)"
    if method == "HierMoE":
        notes += f"; {most_swaps} swaps at most, by statistics over all ranks, not verified"
    return notes
