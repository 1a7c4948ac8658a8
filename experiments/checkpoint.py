"""Distributed checkpoints, in canonical form: saved by any system on any world size, loaded by any on any other.

Every expert's matrices, and the optimizer's moments of them, are entries of their own, named by layer and global expert
id; a rank reads the entries of the experts that live on it. Written under a temporary name, checksummed, then renamed.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.model import GPT
from experiments.results import MORE_SPACE, ResultsWriteError, write_error
from moe.errors import ConfigError, Problem

TORCH_WRITER = "inline_container.cc"
"""In the message of a RuntimeError, which is all that torch says of a failed write."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Tensors that Adam keeps for every parameter, beside its scalar `step`."""


class Entry(NamedTuple):
    """One canonical tensor: its key, the parameter that holds it, and how to see it in a tensor of that shape.

    `local` marks what a rank has for itself: it is meant for that rank of clusters of one shape, and where a checkpoint
    is of another, or of another system, it stays as it is. `averaged` marks what such ranks save for everybody else.
    """

    key: str
    parameter: nn.Parameter
    view: Callable[[Tensor], Tensor]
    local: bool = False
    averaged: bool = False


def canonical_entries(gpt: GPT) -> Iterator[Entry]:
    """Every tensor of the model on this rank, under names that depend on neither the system nor the world size (but for
    a rank's own ones)."""
    seen: set[int] = set()
    for layer in gpt.moe_layers:
        prefix = f"layers/{layer.spec.layer_index}"
        own = layer.local_parameters()
        averaged = any(parameter is layer.gate_weight for parameter in own.values())
        yield Entry(f"{prefix}/gate", layer.gate_weight, _itself, averaged=averaged)
        seen.add(id(layer.gate_weight))
        for view in layer.expert_views():
            yield Entry(f"{prefix}/experts/{view.expert}/{view.name}", view.parameter, view.view)
            seen.add(id(view.parameter))
        seen.update(map(id, layer.sharded_parameters()))  # the views may be of whole experts put together from these
        shape = "x".join(str(level.fanout) for level in layer.mesh.cluster.levels[1:])
        for name, parameter in own.items():
            yield Entry(f"{prefix}/ranks/{layer.mesh.rank} of {shape}/{name}", parameter, _itself, local=True)
            seen.add(id(parameter))
    for name, parameter in gpt.named_parameters():
        if id(parameter) not in seen:
            yield Entry(f"model/{name}", parameter, _itself)


def save_checkpoint(path: Path, gpt: GPT, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Write a checkpoint folder; it appears under its name only when it is whole. Collective.

    Args:
        path: of the folder, on a file system that all ranks see.
        gpt: the model.
        optimizer: Adam's kind.
        state: whatever else belongs to the run, plain Python values; rank 0's is kept.

    Raises:
        ResultsWriteError: it could not be written, the disk being full above all; no half of it is left.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    state = state | {"placements": {layer.spec.layer_index: layer.expert_of_slot for layer in gpt.moe_layers}}
    state["planning"] = {layer.spec.layer_index: layer.planning_state() for layer in gpt.moe_layers}
    try:
        with _whole_experts(gpt, optimizer, loading=False):
            tensors = _tensors(canonical_entries(gpt), optimizer, for_saving=True)
        _save(path, temporary, tensors, state)
    except (Exception, dcp.CheckpointException) as error:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        cause = _cause(error)
        if isinstance(cause, OSError):
            raise write_error(path, cause) from error
        if isinstance(cause, RuntimeError) and TORCH_WRITER in str(cause):
            raise ResultsWriteError(path, "torch could not write all of it, as on a full disk", MORE_SPACE) from error
        raise cause from error


@contextmanager
def _whole_experts(gpt: GPT, optimizer: Optimizer, loading: bool) -> Iterator[None]:
    """Inside, every expert is whole on some rank, with its state. Collective."""
    with ExitStack() as stack:
        for layer in gpt.moe_layers:
            stack.enter_context(layer.whole_experts(optimizer, loading))
        yield


def _save(path: Path, temporary: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    rank = dist.get_rank()
    if rank == 0:
        remove_drafts(path.parent)
        temporary.mkdir(parents=True)
    dist.barrier()
    dcp.save(tensors, checkpoint_id=temporary, no_dist=False)
    _write(temporary / f"rng_{rank}.pt", _rng_state())
    if rank == 0:
        _write(temporary / "trainer.pt", state)
    dist.barrier()
    if rank == 0:
        (temporary / "checksums.json").write_text(json.dumps(_checksums(temporary), indent=1))
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    dist.barrier()


def _write(path: Path, value: Any) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(buffer.getbuffer())  # torch's own writer hides what the operating system says


def _cause(error: BaseException) -> BaseException:
    """What went wrong in a rank; torch wraps that in a BaseException."""
    if isinstance(error, dcp.CheckpointException):
        causes = [wrapped[0] for wrapped in error.failures.values()]
        return min(causes, key=lambda cause: not isinstance(cause, OSError))
    return error


def load_checkpoint(path: Path, gpt: GPT, optimizer: Optimizer) -> dict[str, Any]:
    """Fill the model and the optimizer in place from a checkpoint of any world size. Collective.

    Returns:
        The `state` that was saved with it.

    Raises:
        ConfigError: a file is missing or differs from its checksum, or the model has other shapes.
    """
    verdict = [_damage(path) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(verdict, 0)
    if verdict[0]:
        raise _error(path, verdict[0])
    state = torch.load(path / "trainer.pt", weights_only=True)
    placements, planning = state.pop("placements", {}), state.pop("planning", {})
    for layer in gpt.moe_layers:
        layer.restore_placement(placements.get(layer.spec.layer_index))
        if type(planning.get(layer.spec.layer_index)) is dict:
            layer.restore_planning(planning[layer.spec.layer_index])
    with _whole_experts(gpt, optimizer, loading=True):
        _fill(path, gpt, optimizer)
    rng = path / f"rng_{dist.get_rank()}.pt"
    if rng.exists():
        cpu, gpu = torch.load(rng, weights_only=True)
        torch.set_rng_state(cpu)
        if gpu is not None and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(gpu)
    return state


def _fill(path: Path, gpt: GPT, optimizer: Optimizer) -> None:
    """Model and optimizer, from a checkpoint that is whole."""
    try:
        saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        entries = [entry for entry in canonical_entries(gpt) if not entry.local or entry.key in saved]
        if lacking := [entry.key for entry in canonical_entries(gpt) if entry.local and entry.key not in saved]:
            print(f"{path} holds nothing for {lacking[0]} and {len(lacking) - 1} more: they start anew", flush=True)
        fresh = _tensors(entries, optimizer, for_saving=False)
        dcp.load(fresh, checkpoint_id=path)
    except (dcp.CheckpointException, ValueError) as error:
        raise _error(path, f"it does not fit this model ({str(_cause(error)).splitlines()[0]})") from error
    with torch.no_grad():
        for entry in entries:
            entry.view(entry.parameter.data).copy_(fresh[entry.key])
            moments = optimizer.state[entry.parameter]
            for name in MOMENTS:
                if name not in moments:
                    moments[name] = torch.zeros_like(entry.parameter)
                entry.view(moments[name]).copy_(fresh[f"{entry.key}/{name}"])
            moments["step"] = fresh[f"{entry.key}/step"].to(entry.parameter.device, copy=True)  # fused AdamW


def _rng_state() -> tuple[Tensor, Tensor | None]:
    """Of the CPU, and of this rank's GPU where it has one."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint `step_<n>` in a folder, or None."""
    return max(_checkpoints(folder), key=checkpoint_step, default=None)


def named_checkpoint(name: str, max_steps: int) -> Path:
    """The checkpoint that `trainer.resume_from` names: a folder step_<n>, or the newest one of a run's folder.

    Raises:
        ConfigError: there is none, or none of the run's `max_steps` would be left to do.
    """
    path = Path(name).expanduser()
    found = path if _is_checkpoint(path) and path.is_dir() else latest_checkpoint(path / "checkpoints")
    if found is None:
        rule = f"there is no checkpoint: neither is it a folder step_<n>, nor is one in {path / 'checkpoints'}"
        fix = "name the folder of a run, outputs/RUN_ID, or outputs/RUN_ID/checkpoints/step_<n>"
        raise ConfigError(Problem("trainer.resume_from", name, rule, fix))
    if checkpoint_step(found) >= max_steps:
        rule = f"must be above the steps that were done when {found} (trainer.resume_from) was saved"
        fix = f"set trainer.max_steps above {checkpoint_step(found)}, or name an earlier checkpoint"
        raise ConfigError(Problem("trainer.max_steps", max_steps, rule, fix))
    return found


def checkpoint_step(path: Path) -> int:
    """n of a folder called `step_<n>`: the steps that were done when it was saved."""
    return int(path.name.removeprefix("step_"))


def remove_old_checkpoints(folder: Path, keep: int = 2) -> None:
    """Delete all but the newest `keep` checkpoints of a folder."""
    ordered = sorted(_checkpoints(folder), key=checkpoint_step)
    for path in ordered[: max(0, len(ordered) - keep)]:
        shutil.rmtree(path)


def remove_drafts(folder: Path) -> None:
    """Delete what killed runs left half written."""
    for path in folder.glob(".step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step_*") if _is_checkpoint(path)]


def _is_checkpoint(path: Path) -> bool:
    return re.fullmatch(r"step_[0-9]+", path.name) is not None


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _tensors(entries: Iterable[Entry], optimizer: Optimizer, *, for_saving: bool) -> dict[str, Tensor]:
    """Contiguous tensors by key: copies of what is there, or empty ones of the same shapes to be filled."""

    def tensor(entry: Entry, source: Tensor) -> Tensor:
        seen = entry.view(source.detach())
        if for_saving and entry.averaged:
            seen = seen / dist.get_world_size()
            dist.all_reduce(seen)
        return seen.contiguous() if for_saving else torch.empty(seen.shape, dtype=seen.dtype, device=seen.device)

    tensors = {}
    for entry in entries:
        moments = optimizer.state.get(entry.parameter, {})
        tensors[entry.key] = tensor(entry, entry.parameter)
        for name in MOMENTS:
            tensors[f"{entry.key}/{name}"] = tensor(entry, moments.get(name, torch.zeros_like(entry.parameter)))
        tensors[f"{entry.key}/step"] = moments.get("step", torch.zeros(())).clone()
    return tensors


def _checksums(folder: Path) -> dict[str, int]:
    checksums = {}
    for path in sorted(folder.iterdir()):
        checksum = 0
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                checksum = zlib.crc32(block, checksum)
        checksums[path.name] = checksum
    return checksums


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint folder; empty when it is whole."""
    if not path.is_dir():
        return "there is no such folder"
    try:
        expected = dict(json.loads((path / "checksums.json").read_text()))
    except (OSError, ValueError, TypeError):
        return "its file checksums.json is missing or not readable"
    found = _checksums(path)
    for name, checksum in expected.items():
        if name not in found:
            return f"its file {name} is missing"
        if found[name] != checksum:
            return f"its file {name} is corrupt (the checksum differs)"
    return ""


def _error(path: Path, damage: str) -> ConfigError:
    return ConfigError(
        Problem(
            "checkpoint",
            path,
            f"a checkpoint must be whole and fit the model, but {damage}",
            "remove that folder to go on from the one before it, name another one if trainer.resume_from named it, or "
            "start anew with force=true",
        )
    )
