"""What the four entry points may be told: one pydantic model for every group of conf/ and for every primary config.

Values have no second home: conf/ gives them all, and a default here is only for what most users leave alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from experiments.cluster_config import STRICT, ClusterConfig
from experiments.corpus import DataConfig

Kind = Literal["train", "layer", "comm", "compare"]
Activation = Literal["gelu", "swiglu"]
Precision = Literal["auto", "fp32", "bf16"]


class SystemConfig(BaseModel):
    """conf/system: a name and the options of that system, which its own `Options` validates.

    Two variants of one system stand in one comparison under different labels: what results call each of them.
    """

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    name: str = Field(min_length=1, examples=["flat"])
    label: str = Field(default="", examples=["tutel 2DH"], description="in results; without one, the name")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        given = {"name": value} if isinstance(value, str) else value
        named = isinstance(given, Mapping) and isinstance(given.get("name"), str)
        return {"label": given["name"], **given} if named else given

    @property
    def options(self) -> dict[str, Any]:
        """Every option of the system; `load` has added the defaults of those not given."""
        return dict(self.model_extra or {})


class ModelConfig(BaseModel):
    """conf/model: the GPT and its MoE layers. Parameter counts: `experiments.model_size`."""

    model_config = STRICT
    name: str = Field(min_length=1, examples=["tiny"])
    vocab_size: int = Field(ge=257, examples=[2048], description="tokens; 256 bytes and a separator at least")
    seq_len: int = Field(ge=1, examples=[128], description="tokens of one sequence")
    num_layers: int = Field(ge=1, examples=[4])
    num_heads: int = Field(ge=1, examples=[4])
    num_kv_heads: int | None = Field(default=None, ge=1, examples=[4], description="null: num_heads")
    head_dim: int | None = Field(
        default=None, ge=2, multiple_of=2, examples=[32], description="null: model_dim / num_heads"
    )
    model_dim: int = Field(ge=1, examples=[128])
    dense_hidden_dim: int = Field(ge=1, examples=[512], description="of a block without experts")
    hidden_dim: int = Field(ge=1, examples=[256], description="of one expert")
    num_experts: int = Field(ge=1, examples=[8], description="of one MoE layer, over all ranks")
    top_k: int = Field(ge=1, examples=[2], description="experts that a token is sent to")
    moe_every: int = Field(ge=1, examples=[2], description="block i holds experts when (i + 1) % moe_every == 0")
    norm: Literal["rms", "layer"]
    activation: Activation = Field(description="gelu: two matrices a feed-forward network; swiglu: three")
    capacity_factor: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, examples=[1.25], description="null: no drops"
    )
    aux_loss_weight: float = Field(ge=0, allow_inf_nan=False, examples=[0.01])
    tie_embeddings: bool


class TrainerConfig(BaseModel):
    """conf/trainer: AdamW with a linear warm-up and a cosine, and how often what is done."""

    model_config = STRICT
    max_steps: int = Field(ge=1, examples=[100])
    global_batch_size: int = Field(ge=1, examples=[16], description="sequences over all ranks")
    lr: float = Field(gt=0, allow_inf_nan=False, examples=[0.001])
    min_lr_ratio: float = Field(ge=0, le=1, examples=[0.1], description="the last learning rate over the highest")
    warmup_steps: int = Field(ge=0, examples=[10])
    weight_decay: float = Field(ge=0, allow_inf_nan=False, examples=[0.1])
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(min_length=2, max_length=2, examples=[[0.9, 0.95]])
    grad_clip: float | None = Field(default=None, gt=0, allow_inf_nan=False, examples=[1.0], description="null: none")
    precision: Precision = "auto"
    log_every: int = Field(ge=1, examples=[1])
    val_every: int = Field(ge=1, examples=[50])
    val_batches: int = Field(ge=1, examples=[4])
    checkpoint_every: int | None = Field(ge=1, examples=[50], description="steps; null: none but at a stop")
    deterministic: bool
    resume_from: str | None = Field(
        default=None, min_length=1, examples=["outputs/RUN_ID"], description="run or checkpoint folder to start from"
    )
    target_loss: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        examples=[4.0],
        description="nats per token to reach; null: none stated",
    )
    timeout_s: float = Field(gt=0, allow_inf_nan=False, examples=[600], description="of one collective")
    progress: Literal["auto", "bar", "lines", "none"] = "auto"


class WorkloadConfig(BaseModel):
    """conf/workload: how tokens of the layer benchmark are routed."""

    model_config = STRICT
    kind: Literal["uniform", "zipf", "replay"]
    exponent: float | None = Field(default=None, gt=0, allow_inf_nan=False, examples=[1.0], description="zipf only")
    path: str | None = Field(
        default=None, min_length=1, examples=["outputs/RUN_ID/routing.npz"], description="replay only"
    )


class LayerShape(BaseModel):
    """One MoE layer of the layer benchmark."""

    model_config = STRICT
    name: str = Field(min_length=1, examples=["m256"])
    tokens_per_rank: int = Field(ge=1, examples=[1024])
    model_dim: int = Field(ge=1, examples=[256])
    hidden_dim: int = Field(ge=1, examples=[1024], description="of one expert")
    num_experts: int = Field(ge=1, examples=[16], description="over all ranks")
    top_k: int = Field(ge=1, examples=[2])
    activation: Activation = "gelu"


class TimingConfig(BaseModel):
    """Interleaved timing: in each round every system does one step, or several in a row.

    With `weights=trained` each goes on from the newest checkpoint of its own training run, so that a method whose
    routing changes in training is timed with the routing that it has learned.
    """

    model_config = STRICT
    rounds: int = Field(ge=1, examples=[20])
    warmup: int = Field(ge=0, examples=[3], description="rounds before, not counted")
    weights: Literal["initial", "trained"]
    steps_per_round: int = Field(default=1, ge=1, examples=[10], description="timed together, their mean counts")


class RunConfig(BaseModel):
    """One training run."""

    model_config = STRICT
    system: SystemConfig
    model: ModelConfig
    data: DataConfig
    cluster: ClusterConfig
    trainer: TrainerConfig
    seed: int = Field(ge=0, examples=[0])
    force: bool = False
    output_dir: str = Field(default="outputs", min_length=1)


class LayerRunConfig(BaseModel):
    """The benchmark of one MoE layer."""

    model_config = STRICT
    systems: list[SystemConfig] = Field(min_length=1, examples=[["flat", "deepspeed"]])
    shapes: list[LayerShape] = Field(min_length=1)
    workload: WorkloadConfig
    cluster: ClusterConfig
    capacity_factor: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, examples=[1.25], description="null: no drops"
    )
    dtype: Precision = "auto"
    rounds: int = Field(ge=1, examples=[20])
    steps_per_round: int = Field(ge=1, examples=[1], description="timed together, without a wait in between")
    warmup: int = Field(ge=0, examples=[3])
    check: bool = True
    profile: bool = False
    seed: int = Field(ge=0, examples=[0])
    force: bool = False
    output_dir: str = Field(default="outputs", min_length=1)


class CommRunConfig(BaseModel):
    """The measurement of a cluster's levels."""

    model_config = STRICT
    cluster: ClusterConfig
    sizes_bytes: list[Annotated[int, Field(ge=4)]] = Field(min_length=2, examples=[[1024, 1048576]])
    repeats: int = Field(ge=1, examples=[10])
    warmup: int = Field(ge=0, examples=[3])
    write_to: str | None = Field(default=None, min_length=1, examples=["conf/cluster/mine.yaml"])
    force: bool = False
    output_dir: str = Field(default="outputs", min_length=1)


class CompareConfig(BaseModel):
    """Every system with every seed, and all systems timed in turn."""

    model_config = STRICT
    systems: list[SystemConfig] = Field(min_length=1, examples=[["flat", "deepspeed"]])
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, examples=[[0, 1]])
    model: ModelConfig
    data: DataConfig
    cluster: ClusterConfig
    trainer: TrainerConfig
    timing: TimingConfig
    force: bool = False
    output_dir: str = Field(default="outputs", min_length=1)

    def runs(self) -> list[RunConfig]:
        """The training runs it consists of: for every seed, every system."""
        shared = {key: getattr(self, key) for key in ("model", "data", "cluster", "trainer", "force", "output_dir")}
        return [RunConfig(system=system, seed=seed, **shared) for seed in self.seeds for system in self.systems]


AnyConfig = RunConfig | LayerRunConfig | CommRunConfig | CompareConfig
SCHEMAS: dict[Kind, type[AnyConfig]] = {
    "train": RunConfig,
    "layer": LayerRunConfig,
    "comm": CommRunConfig,
    "compare": CompareConfig,
}
