"""The Lightning strategy of the suite: the process group is there already, experts are sharded, a system's own
gradient reduction runs after backward, checkpoints are distributed ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from experiments.checkpoint import load_checkpoint, save_checkpoint
from experiments.model import GPT
from experiments.worker import RankInfo
from moe.mesh import Mesh
from moe.sync import GradientSync


class RankEnvironment(ClusterEnvironment):
    """Tells Lightning that the ranks are there."""

    def __init__(self, info: RankInfo) -> None:
        self.info = info

    @property
    def creates_processes_externally(self) -> bool:
        """True: Lightning starts nothing."""
        return True

    @property
    def main_address(self) -> str:
        """Unused: the process group is initialised before Lightning comes."""
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        """Unused, likewise."""
        return 0

    @staticmethod
    def detect() -> bool:
        """Never chosen by itself."""
        return False

    def world_size(self) -> int:
        """Ranks of the run."""
        return self.info.world_size

    def set_world_size(self, size: int) -> None:
        """Fixed."""

    def global_rank(self) -> int:
        """This rank."""
        return self.info.rank

    def set_global_rank(self, rank: int) -> None:
        """Fixed."""

    def local_rank(self) -> int:
        """This rank's place in its node."""
        return self.info.local_rank

    def node_rank(self) -> int:
        """This node."""
        return self.info.node_rank


class ExpertParallelStrategy(ParallelStrategy):
    """Dense parameters replicated, experts sharded, gradients reduced by the system's `GradientSync`.

    Args:
        mesh: of the run.
        info: of this rank.
        sync: reduces the gradients of the model that will be trained.
    """

    def __init__(self, mesh: Mesh, info: RankInfo, sync: GradientSync) -> None:
        super().__init__(cluster_environment=RankEnvironment(info))
        self.mesh = mesh
        self.info = info
        self.sync = sync

    @property
    def root_device(self) -> torch.device:
        """Where this rank computes."""
        return self.mesh.device

    @property
    def is_global_zero(self) -> bool:
        """True on rank 0."""
        return self.info.rank == 0

    @property
    def global_rank(self) -> int:
        """This rank."""
        return self.info.rank

    @property
    def local_rank(self) -> int:
        """This rank's place in its node."""
        return self.info.local_rank

    @property
    def node_rank(self) -> int:
        """This node."""
        return self.info.node_rank

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.info.world_size

    def model_to_device(self) -> None:
        """The model was built there."""

    def post_backward(self, closure_loss: Tensor) -> None:
        """Reduce the gradients."""
        super().post_backward(closure_loss)
        self.sync.reduce()

    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Rank `src`'s object, on all ranks."""
        boxed = [obj]
        dist.broadcast_object_list(boxed, src)
        return boxed[0]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Mean (or sum) over ranks."""
        if not isinstance(tensor, Tensor):
            return tensor
        dist.all_reduce(tensor, group=group)
        return tensor / self.world_size if reduce_op in ("mean", None) else tensor

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """True: `load_checkpoint` fills the optimizer, which must be there."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """False, likewise."""
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Empty: the weights are read from the model, in canonical form, by `save_checkpoint`."""
        return {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Empty, likewise."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Model and optimizer as a distributed checkpoint, Lightning's own state beside it. Collective."""
        save_checkpoint(Path(filepath), self._gpt(), self.optimizers[0], checkpoint)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill model and optimizer in place; return Lightning's own state. Collective."""
        return load_checkpoint(Path(checkpoint_path), self._gpt(), self.optimizers[0])

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Done by `load_checkpoint`."""

    def _gpt(self) -> GPT:
        gpt = getattr(self.lightning_module, "gpt", None)
        assert isinstance(gpt, GPT)
        return gpt
