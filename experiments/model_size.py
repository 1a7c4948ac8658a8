"""How large a model is, counted from its config before anything is allocated, and whether a rank can hold it.

Symbols: M model_dim, V vocabulary, N heads, G key-value heads, D head_dim, F dense hidden, H expert hidden, E experts,
K choices a token, m matrices of a feed-forward network (2 with GELU, 3 with SwiGLU). There are no biases.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from experiments.cluster_config import ClusterConfig, gpus_suffice
from experiments.join import ranks_here
from experiments.provenance import free_gpu_bytes
from experiments.schemas import ModelConfig, TrainerConfig
from moe.errors import ConfigError, Problem
from moe.topology import Cluster

FLOAT32_BYTES, BFLOAT16_BYTES = 4, 2
# (limit, usage) of a control group, version 2 and 1, as a process in a container sees its own.
CONTROL_GROUP_FILES = [
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
]


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model by part, over all layers.

    Args:
        embedding: token embedding, V M, and the head, another V M unless tied.
        attention: M N D + 2 M G D + N D M a block.
        norms: M for each of two norms a block, and M for the last one.
        gates: M E an MoE block.
        dense: m M F a block without experts.
        experts: E m M H an MoE block.
        active_experts: K m M H an MoE block.
    """

    embedding: int
    attention: int
    norms: int
    gates: int
    dense: int
    experts: int
    active_experts: int

    @property
    def shared(self) -> int:
        """All but the experts: what every rank holds."""
        return self.embedding + self.attention + self.norms + self.gates + self.dense

    @property
    def total(self) -> int:
        """All parameters."""
        return self.shared + self.experts

    @property
    def active(self) -> int:
        """Parameters that one token meets, the embedding counted whole (as Mixtral's 12.9 billion are)."""
        return self.shared + self.active_experts

    def per_rank(self, expert_ranks: float) -> int:
        """Parameters of one rank when the experts are spread over `expert_ranks` ranks (ranks by copies of each)."""
        return self.shared + int(self.experts / expert_ranks)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one rank needs for training.

    Args:
        weights: float32 masters, and a bf16 copy where the arithmetic is bf16; slots in the dtype of the arithmetic.
        gradients: float32; of slots in their dtype.
        optimizer: AdamW's two moments, float32.
        activations: what the forward pass keeps for the backward one (`activation_bytes`).
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


def num_moe_layers(model: ModelConfig) -> int:
    """Blocks that hold experts: every `moe_every`-th."""
    return model.num_layers // model.moe_every


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Parameters of the GPT of `experiments.model`."""
    head_dim, kv_heads = _head_dim(model), model.num_kv_heads or model.num_heads
    matrices = _matrices(model)
    num_moe = num_moe_layers(model)
    expert = matrices * model.model_dim * model.hidden_dim
    return ParameterCount(
        embedding=model.vocab_size * model.model_dim * (1 if model.tie_embeddings else 2),
        attention=model.num_layers * 2 * model.model_dim * head_dim * (model.num_heads + kv_heads),
        norms=(2 * model.num_layers + 1) * model.model_dim,
        gates=num_moe * model.model_dim * model.num_experts,
        dense=(model.num_layers - num_moe) * matrices * model.model_dim * model.dense_hidden_dim,
        experts=num_moe * model.num_experts * expert,
        active_experts=num_moe * model.top_k * expert,
    )


def activation_bytes(model: ModelConfig, tokens: int, element_bytes: int) -> int:
    """Estimate of what one rank keeps of `tokens` tokens between forward and backward.

    Elements a token and block: attention keeps both norms' inputs and outputs (4 M), queries, keys and values before
    and after the rotation and the mixed values (3 N D + 4 G D; flash attention keeps no score matrix). A feed-forward
    network keeps a values of its hidden width: before and after GELU (a = 2); gate, its SiLU, up and their product with
    SwiGLU (a = 4). So a dense block keeps a F, an MoE block K copies of (2 M + a H), with the rows into and out of an
    expert, plus its logits and probabilities, 2 E. Once a token: the last norm, 2 M, and float32 logits with their
    log-softmax and its gradient, 3 V. Padding, imbalance of the routing and the allocator's waste are not in it.

    Args:
        model: shapes.
        tokens: of one rank in one step.
        element_bytes: 2 for bf16, 4 for fp32.
    """
    head_dim, kv_heads = _head_dim(model), model.num_kv_heads or model.num_heads
    kept = 4 if model.activation == "swiglu" else 2
    attention = 4 * model.model_dim + head_dim * (3 * model.num_heads + 4 * kv_heads)
    moe = model.top_k * (2 * model.model_dim + kept * model.hidden_dim) + 2 * model.num_experts
    num_moe = num_moe_layers(model)
    dense_blocks = (model.num_layers - num_moe) * kept * model.dense_hidden_dim
    elements = model.num_layers * attention + dense_blocks + num_moe * moe + 2 * model.model_dim
    return tokens * (elements * element_bytes + 3 * model.vocab_size * FLOAT32_BYTES)


def estimate_memory(
    model: ModelConfig,
    trainer: TrainerConfig,
    world_size: int,
    expert_ranks: float | None = None,
    slot_copies: float = 0.0,
) -> MemoryEstimate:
    """Bytes of one rank.

    Args:
        model: shapes.
        trainer: its batch and its precision (`auto` counts as fp32).
        world_size: ranks; the batch is spread over them.
        expert_ranks: ranks that the experts are spread over, by copies that are trained of an expert; None is all, 1
            means that every rank holds as many experts as there are.
        slot_copies: see `System.slot_copies`.
    """
    parameters = count_parameters(model).per_rank(expert_ranks or world_size)
    copies = BFLOAT16_BYTES if trainer.precision == "bf16" else 0
    element_bytes = copies or FLOAT32_BYTES
    tokens = -(-trainer.global_batch_size // world_size) * model.seq_len
    slots_bytes = int(count_parameters(model).experts * slot_copies / world_size) * element_bytes
    return MemoryEstimate(
        weights=parameters * (FLOAT32_BYTES + copies) + slots_bytes,
        gradients=parameters * FLOAT32_BYTES + slots_bytes,
        optimizer=parameters * 2 * FLOAT32_BYTES,
        activations=activation_bytes(model, tokens, element_bytes),
    )


def available_bytes(cluster: ClusterConfig) -> int:
    """Bytes that one rank of a resolved cluster can have here now.

    On CUDA, the free memory of the fullest GPU here. On a CPU, what the machine (or its control group) has left, shared
    by the ranks on it: those that were launched here, or all if the suite spawns them.
    """
    if cluster.device == "cuda" or (cluster.device == "auto" and gpus_suffice(cluster.world_size)):
        return min(free_gpu_bytes(), default=sys.maxsize)  # no nvidia-smi: let the allocator tell
    here = [psutil.virtual_memory().available, *_control_group_bytes()]
    joined = ranks_here(os.environ)
    return min(here) // (cluster.world_size if joined is None else joined.local_world_size)


def check_fits(
    model: ModelConfig,
    trainer: TrainerConfig,
    cluster: ClusterConfig,
    available: int | None = None,
    expert_ranks: float | None = None,
    slot_copies: float = 0.0,
) -> MemoryEstimate:
    """The estimate, if one rank can hold it.

    Args:
        model, trainer, cluster: of the run.
        available: bytes of one rank; None asks `available_bytes`.
        expert_ranks, slot_copies: see `estimate_memory`.

    Raises:
        ConfigError: it can't; the message holds the estimate.
    """
    estimate = estimate_memory(model, trainer, cluster.world_size, expert_ranks, slot_copies)
    available = available_bytes(cluster) if available is None else available
    if estimate.total > available:
        rule = (
            f"needs about {_gib(estimate.total)} a rank ({_breakdown(estimate)}) on {cluster.world_size} ranks of "
            f"cluster {cluster.name}, and a rank has {_gib(available)}"
        )
        fix = "choose a smaller model or batch, or a cluster of more ranks (model=tiny fits a laptop)"
        raise ConfigError(Problem("model", model.name, rule, fix))
    return estimate


def describe(
    model: ModelConfig,
    trainer: TrainerConfig,
    cluster: Cluster | ClusterConfig,
    expert_ranks: float | None = None,
    slot_copies: float = 0.0,
) -> str:
    """Two lines to print before anything is allocated: the parameters, and the memory of one rank."""
    count = count_parameters(model)
    estimate = estimate_memory(model, trainer, cluster.world_size, expert_ranks, slot_copies)
    rank_parameters = count.per_rank(expert_ranks or cluster.world_size)
    return (
        f"model {model.name}: {_number(count.total)} parameters, {_number(count.active)} active for a token "
        f"({num_moe_layers(model)} MoE layers of {model.num_experts} experts, top {model.top_k})\n"
        f"one of {cluster.world_size} ranks: {_number(rank_parameters)} parameters, about {_gib(estimate.total)} "
        f"({_breakdown(estimate)})"
    )


def _head_dim(model: ModelConfig) -> int:
    return model.head_dim or model.model_dim // model.num_heads


def _matrices(model: ModelConfig) -> int:
    return 3 if model.activation == "swiglu" else 2


def _control_group_bytes() -> list[int]:
    """What the control group of this process leaves it, where one limits it."""
    for limit, usage in CONTROL_GROUP_FILES:
        if limit.exists() and usage.exists() and limit.read_text().strip().isdigit():
            return [max(0, int(limit.read_text()) - int(usage.read_text()))]
    return []


def _breakdown(estimate: MemoryEstimate) -> str:
    parts = ("weights", "gradients", "optimizer", "activations")
    return ", ".join(f"{part} {_gib(getattr(estimate, part))}" for part in parts)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**27 else f"{num_bytes / 2**20:.1f} MiB"


def _number(count: int) -> str:
    for size, unit in ((10**9, "billion"), (10**6, "million")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)
