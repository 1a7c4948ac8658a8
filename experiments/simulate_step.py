"""A training step of every system on clusters that are not here: `python -m experiments.simulate_step --cluster
h100_512`.

Simulated: durations follow from the constants in conf/simulated/<cluster>.yaml, not from any run. What travels follows
from a routing, drawn or recorded by a run, by each system's own rules (`System.simulated_layer`); the rank with most
rows counts. Beside the layers of experts: attention and dense networks by their multiply-adds, gradients of dense
parameters all-reduced in float32. Prints a table, which also goes to outputs/simulate/step_<cluster>.csv.

Left out: the optimizer, memory, skew between ranks, and collectives that take multiprocessors from the computation.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from numpy.typing import NDArray

from analysis.errors import ResultsError, exit_code
from analysis.files import write_text
from experiments import registry
from experiments.cli import compose
from experiments.config import ModelConfig
from experiments.model_size import count_parameters, num_moe_layers
from experiments.simulated_cluster import SimulatedCluster, cluster_names, load_simulated
from moe.errors import ConfigError, Problem, SuiteError
from moe.exchange_costs import first_ranks
from moe.layer_simulation import Extra, LayerModel, RoutedLayer
from moe.schedules import COMPUTE, LayerWork
from moe.simulator import busy_s, makespan_s
from moe.system import LayerSpec
from moe.workload import recording

SYSTEMS = (
    "flat",
    "deepspeed",
    "deepspeed_static",
    "tutel_2dh",
    "hiermoe",
    "ta_moe",
    "swiftmoe",
    "tutel_overlap",
    "fsmoe",
)
"""That are simulated where none are named."""
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Setting:
    """What is simulated.

    Args:
        cluster: where.
        model: what; its experts' number may be replaced.
        num_tokens: of a rank in a step.
        routing: see `routed_ids`.
    """

    cluster: SimulatedCluster
    model: ModelConfig
    num_tokens: int
    routing: str = "uniform"

    @property
    def num_sharing(self) -> int:
        """Ranks that share a set of experts: all, or as many as there are experts.

        Raises:
            ConfigError: they fill no whole groups of ranks, or have different numbers of experts.
        """
        num_ranks, num_experts = self.cluster.cluster.world_size, self.model.num_experts
        sharing = min(num_ranks, num_experts)
        if num_experts % sharing or num_ranks % sharing:
            rule = f"neither a multiple nor a divisor of the {num_ranks} ranks of {self.cluster.name}"
            raise ConfigError(Problem("experts", num_experts, rule, f"give {num_ranks} or a power of two"))
        return sharing

    @property
    def spec(self) -> LayerSpec:
        """Of an MoE layer, in bfloat16."""
        model = self.model
        sizes = (model.model_dim, model.hidden_dim, model.num_experts, model.top_k)
        return LayerSpec(*sizes, model.activation, model.capacity_factor, torch.bfloat16)

    def layer(self) -> RoutedLayer:
        """One layer with its routing, among the ranks that share its experts."""
        cluster = first_ranks(self.cluster.cluster, self.num_sharing)
        ids = routed_ids(self.routing, self.num_sharing, self.num_tokens, self.model.num_experts, self.model.top_k)
        return RoutedLayer(self.spec, cluster, ids, self.cluster.costs)

    def works(self, model: LayerModel) -> list[LayerWork]:
        """Of every MoE layer, with the dense part before it; the head stands before the last one's experts."""
        config, gemm = self.model, self.cluster.costs["gemm"]
        num_layers, counted = num_moe_layers(config), count_parameters(config)
        dense = counted.attention + counted.dense + counted.gates
        head_dim = config.head_dim or config.model_dim // config.num_heads
        scores = config.num_layers * config.seq_len * head_dim * config.num_heads  # causal: half of queries by keys
        per_layer = self.num_tokens * (dense + scores) / num_layers
        head = self.num_tokens * config.vocab_size * config.model_dim

        def dense_s(multiply_adds: float) -> float:
            kernels = 6 * config.num_layers / num_layers
            return kernels * gemm.alpha_s + multiply_adds * gemm.beta_s_per_byte

        works = []
        for index in range(num_layers):
            multiply_adds = per_layer + (head if index == num_layers - 1 else 0)
            works.append(
                replace(
                    model.work,
                    dense_s=model.work.dense_s + dense_s(multiply_adds),
                    dense_backward_s=model.work.dense_backward_s + 2 * dense_s(multiply_adds),
                    gradient_bytes=FLOAT32_BYTES * (dense + counted.norms) / num_layers,
                )
            )
        return works

    def extras(self, layer: RoutedLayer) -> list[Extra]:
        """The embeddings' gradients; and the experts', where several blocks of ranks have a set each."""
        costs, embedding = self.cluster.costs, count_parameters(self.model).embedding
        found = [Extra("embedding_gradients", costs["all_reduce"], float(FLOAT32_BYTES * embedding))]
        whole = replace(layer, cluster=self.cluster.cluster)
        if whole.num_ranks > self.num_sharing:
            experts = self.model.num_experts / self.num_sharing * num_moe_layers(self.model)
            found.append(whole.replica_gradients(self.num_sharing, experts))
        return found


def routed_ids(
    routing: str, num_ranks: int, num_tokens: int, num_experts: int, top_k: int, seed: int = 0
) -> NDArray[np.integer]:
    """[P, T, K], the experts that each rank's tokens choose.

    Args:
        routing: `uniform`; `zipf <exponent>`, as `moe.workload.Workload`; or the routing.npz of a run, whose tokens are
            repeated when it has fewer.
        num_ranks, num_tokens, num_experts, top_k: P, T, E, K.
        seed: of what is drawn.

    Raises:
        ConfigError: a recording that is missing or doesn't fit, or another word.
    """
    kind, _, exponent = routing.partition(" ")
    if routing.endswith(".npz"):
        recorded_TK = recording(routing, num_experts, top_k)[0, :, :top_k]
        place = np.arange(num_ranks * num_tokens) % len(recorded_TK)
        found: NDArray[np.integer] = recorded_TK[place].reshape(num_ranks, num_tokens, top_k)
        return found
    if kind not in ("uniform", "zipf") or (kind == "zipf") != bool(exponent):
        rule = "must be `uniform`, `zipf 1.0` or the routing.npz of a run"
        raise ConfigError(Problem("routing", routing, rule, "use one of these"))
    random = np.random.default_rng(seed)
    popularity_E = np.empty(num_experts)
    popularity_E[random.permutation(num_experts)] = np.arange(1, num_experts + 1) ** -float(exponent or 0)
    ends_E = (popularity_E / popularity_E.sum()).cumsum()[:-1]

    def draw(number: int) -> NDArray[np.int64]:
        if kind == "uniform":  # many times as fast
            return random.integers(num_experts, size=number)
        return np.searchsorted(ends_E, random.random(number), side="right")

    dtype = np.int16 if num_experts <= np.iinfo(np.int16).max else np.int32
    return np.stack([_distinct(draw, num_tokens, top_k).astype(dtype) for _ in range(num_ranks)])


def _distinct(draw: Callable[[int], NDArray[np.int64]], num_tokens: int, top_k: int) -> NDArray[np.int64]:
    """[T, K] experts as drawn, each among those that the token has not chosen: what it has is drawn again."""
    ids_TK = np.empty((num_tokens, top_k), dtype=np.int64)
    for choice in range(top_k):
        left = np.arange(num_tokens)
        while len(left):
            ids_TK[left, choice] = draw(len(left))
            left = left[(ids_TK[left, :choice] == ids_TK[left, choice, None]).any(1)]
    return ids_TK


def step_rows(setting: Setting, systems: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for every system: seconds of a step and of its parts, and what stands in the way of one that can't be.

    Args:
        setting: what is simulated.
        systems: each its `name`, perhaps a `label`, and options.
    """
    layer = setting.layer()
    extras = setting.extras(layer)
    for system in systems:
        options = {key: value for key, value in system.items() if key not in ("name", "label")}
        row: dict[str, Any] = {"cluster": setting.cluster.name, "system": system.get("label", system["name"])}
        row |= {"kind": "simulated", "costs": setting.cluster.kind, "routing": setting.routing}
        created = registry.create(system["name"], options)
        missing = ("not installed", "works on CUDA only")  # of this machine, where nothing will run
        refusals = [r for r in created.refusals(setting.spec, layer.cluster) if not any(m in r for m in missing)]
        if refusals:
            yield row | {"status": f"refused: {' '.join(refusals)}"}
            continue
        model = created.simulated_layer(layer)
        spans = model.simulated(setting.works(model), extras)
        step_s, busy = makespan_s(spans), busy_s(spans)
        yield row | {
            "step_s": step_s,
            "tokens_per_s": setting.num_tokens * setting.cluster.cluster.world_size / step_s,
            "compute_s": busy.get(COMPUTE, 0.0),
            "exposed_s": step_s - busy.get(COMPUTE, 0.0),
            "status": "ok",
        }


def default_systems(model: ModelConfig) -> list[dict[str, Any]]:
    """SYSTEMS with the options that they need for a model."""
    options = {
        "ta_moe": {"mode": "fastmoe" if model.capacity_factor is None else "deepspeed"},
        "tutel_overlap": {"name": "pipelined", "label": "tutel_overlap", "schedule": "tutel_overlap"},
    }
    return [{"name": name, **options.get(name, {})} for name in SYSTEMS]


def printed(rows: pd.DataFrame) -> str:
    """For a terminal; speed is over the first system."""
    lines = [f"{'system':28}{'step, ms':>10}{'speed':>8}{'tokens/s':>12}{'computing, ms':>15}{'exposed, ms':>13}"]
    for row in rows.itertuples():
        if row.status != "ok":
            lines.append(f"{row.system:28}{row.status}")
            continue
        lines.append(
            f"{row.system:28}{1e3 * row.step_s:10.4g}{rows['step_s'].iloc[0] / row.step_s:8.3f}{row.tokens_per_s:12.4g}"
            f"{1e3 * row.compute_s:15.4g}{1e3 * row.exposed_s:13.4g}"
        )
    return "\n".join(lines)


def _system(text: str) -> dict[str, Any]:
    given = yaml.safe_load(text)
    return {"name": given} if isinstance(given, str) else dict(given)


@exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line, with its exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.simulate_step", description=__doc__)
    parser.add_argument("--cluster", required=True, help=f"of conf/simulated: {', '.join(cluster_names())}")
    parser.add_argument("--model", default="gpt_medium_moe", help="of conf/model")
    parser.add_argument("--experts", type=int, help="of a layer, in place of the model's")
    parser.add_argument("--tokens", type=int, default=8192, help="of a rank in a step")
    parser.add_argument("--routing", default="uniform", help="`zipf 1.0`, or the routing.npz of a run")
    parser.add_argument(
        "--systems",
        type=_system,
        nargs="+",
        metavar="SYSTEM",
        help="a name, or as in configs: '{name: fsmoe, label: cut, expert_sharding: true}'",
    )
    parser.add_argument("--folder", type=Path, default=Path("outputs/simulate"), help="where the CSV goes")
    given = parser.parse_args(arguments)
    started = time.perf_counter()
    try:
        cluster = load_simulated(given.cluster)
        model = ModelConfig.model_validate(compose("train", [f"model={given.model}"])["model"])
        if given.experts is not None:
            model = model.model_copy(update={"num_experts": given.experts})
        setting = Setting(cluster, model, given.tokens, given.routing)
        rows = pd.DataFrame(list(step_rows(setting, given.systems or default_systems(model))))
    except SuiteError as error:
        raise ResultsError(str(error)) from error
    path = given.folder / f"step_{cluster.name}.csv"
    write_text(path, rows.to_csv(index=False))
    print(f"{printed(rows)}\nsimulated on {cluster.name} ({cluster.kind}), nothing ran there")
    print(f"written: {path} ({time.perf_counter() - started:.1f} s)")


if __name__ == "__main__":
    sys.exit(main())
