"""Clusters that are simulated and never started: conf/simulated/<name>.yaml, with what links and kernels cost there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator

from experiments.cluster_config import STRICT, CollectivesConfig, CostConfig, LevelConfig
from experiments.problems import did_you_mean, problems_of
from moe.costs import AlphaBeta
from moe.errors import ConfigError, Problem
from moe.exchange_costs import ring_cost
from moe.simulator import Costs
from moe.topology import Cluster, Level

FOLDER = Path(__file__).resolve().parent.parent / "conf" / "simulated"


class GemmConfig(BaseModel):
    """n multiply-adds cost alpha_s + n * beta_s_per_multiply_add."""

    model_config = STRICT
    alpha_s: float = Field(ge=0, allow_inf_nan=False, examples=[1e-5], description="of one kernel")
    beta_s_per_multiply_add: float = Field(gt=0, allow_inf_nan=False, examples=[2e-15])


class SimulatedCluster(BaseModel):
    """A cluster by its constants."""

    model_config = STRICT
    name: str = Field(min_length=1, examples=["h100_64"])
    gpu: str = Field(min_length=1, examples=["H100 SXM"])
    levels: list[LevelConfig] = Field(min_length=1, description="innermost first, each with its cost")
    collectives: CollectivesConfig | None = Field(description="where they were fitted; null: as the levels say")
    gemm: GemmConfig = Field(description="of matrix products, in the dtype that a model is trained in")
    outside: CostConfig = Field(description="gate and order of a layer, by bytes of a rank's copies")
    outside_backward: CostConfig = Field(description="their backward")
    kind: str = Field(min_length=1, examples=["nominal"], description="where the constants are from; into every row")

    @field_validator("levels")
    @classmethod
    def _all_with_costs(cls, value: list[LevelConfig]) -> list[LevelConfig]:
        for level in value:
            if level.alpha_s is None or not level.beta_s_per_byte:
                raise ValueError(f"the level {level.name} needs alpha_s and beta_s_per_byte: nobody will measure them")
        return value

    @property
    def cluster(self) -> Cluster:
        """As the rest of the suite knows it."""
        above = [Level(level.name, level.fanout, level.alpha_s, level.beta_s_per_byte) for level in self.levels]
        collectives = None if self.collectives is None else self.collectives.costs()
        return Cluster(self.name, (Level("self", 1), *above), f"simulated: {self.kind}", collectives)

    @property
    def costs(self) -> Costs:
        """Of what `moe.layer_simulation.RoutedLayer` asks for, and of an all-reduce over all ranks."""
        half = ring_cost(self.cluster)
        return {
            "outside": _cost(self.outside),
            "outside_backward": _cost(self.outside_backward),
            "gemm": AlphaBeta(self.gemm.alpha_s, self.gemm.beta_s_per_multiply_add),
            "all_reduce": AlphaBeta(2 * half.alpha_s, 2 * half.beta_s_per_byte),
        }


def _cost(config: CostConfig) -> AlphaBeta:
    return AlphaBeta(config.alpha_s, config.beta_s_per_byte)


def cluster_names() -> list[str]:
    """Of conf/simulated."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_simulated(name: str) -> SimulatedCluster:
    """One of them.

    Raises:
        ConfigError: there is none of that name, or its file has mistakes.
    """
    if name not in cluster_names():
        rule = f"there is no conf/simulated/{name}.yaml"
        raise ConfigError(Problem("cluster", name, rule, did_you_mean(name, cluster_names(), "simulated clusters")))
    content: Any = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    try:
        return SimulatedCluster.model_validate(content)
    except ValidationError as error:
        raise ConfigError(*problems_of(error, SimulatedCluster)) from error
