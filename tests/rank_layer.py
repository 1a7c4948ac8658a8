"""What ranks do for the tests of experiments.layer: several benchmarks in one start, with systems that fail in them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from experiments import layer_bench, registry, timing
from experiments.config import LayerRunConfig, cluster_from
from experiments.floor import floor_step
from experiments.ranks import RankInfo
from experiments.samples import SampleRow, SampleWriter
from moe.layer import NativeMoE
from moe.mesh import Mesh, create_mesh
from moe.metering import LinkMeter
from moe.system import LayerSpec, MoELayer, System

WORKSPACE_BYTES = 1 << 30


class Broken(System):
    """Can't build its layer."""

    name = "broken"
    implementation = "native"
    summary = "fails"

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """Fail."""
        raise ValueError("no such kernel")


class Hungry(System):
    """Runs out of memory on rank 1, before it communicates."""

    name = "hungry"
    implementation = "native"
    summary = "runs out of memory"

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """Fail on rank 1."""
        if mesh.rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 TiB")
        return NativeMoE(spec, mesh)


class KeepingLayer(NativeMoE):
    """Keeps WORKSPACE_BYTES outside torch's allocator."""

    @property
    def workspace_bytes(self) -> int:
        """As if other ranks wrote there."""
        return WORKSPACE_BYTES


class Keeping(System):
    """Computes what flat computes, and keeps memory."""

    name = "keeping"
    implementation = "native"
    summary = "keeps memory"

    def build_layer(self, spec: LayerSpec, mesh: Mesh) -> MoELayer:
        """The layer."""
        return KeepingLayer(spec, mesh)


SYSTEMS = {**registry.discover(), "broken": Broken, "hungry": Hungry, "keeping": Keeping}


def measure(payload: dict[str, Any], info: RankInfo) -> dict[str, Any]:
    """Sample rows of every config in `payload["configs"]`, by name; `ranks_agree`; `interleaved` seconds."""
    with mock.patch.object(registry, "discover", return_value=SYSTEMS):
        rows = {}
        for name, config in payload["configs"].items():
            folder = info.stop_file.with_name(name)
            folder.mkdir(exist_ok=True)
            rows[name] = layer_bench.measure({"config": config, "folder": str(folder)}, info)
    gathered: list[Any] = [None] * info.world_size
    dist.all_gather_object(gathered, repr(rows))
    agree = all(told == gathered[0] for told in gathered)
    floors = {name: floor_bytes(payload["configs"][name], info) for name in ("uniform", "drops")}
    return {"rows": rows, "ranks_agree": agree, "interleaved": interleaved(info), "floors": floors}


def stop_after_one(payload: dict[str, Any], info: RankInfo) -> list[list[Any]] | None:
    """`experiments.layer_bench.measure`, which is asked to stop as soon as a shape is measured."""
    measure_case = layer_bench.measure_case

    def measured(*arguments: Any) -> list[SampleRow]:
        rows = measure_case(*arguments)
        info.stop_file.touch()
        return rows

    with mock.patch.object(layer_bench, "measure_case", measured):
        return layer_bench.measure(payload, info)


def floor_bytes(config: dict[str, Any], info: RankInfo) -> dict[str, float]:
    """What a step of the floor sends, over all ranks, by `<level>/<class>`."""
    loaded = LayerRunConfig.model_validate(config)
    mesh = create_mesh(cluster_from(loaded.cluster), info.device)
    case = layer_bench.build_case(loaded, loaded.shapes[0], mesh)
    step = floor_step(case.spec, case.ids_TK, mesh)
    meter = LinkMeter(mesh.cluster, mesh.rank)
    with meter.installed():
        step()
    writer = SampleWriter("floor", "native", case.shape, case.workload, case.seed)
    writer.add_bytes(timing.over_ranks(meter.as_tensor(), dist.ReduceOp.SUM, info.device), mesh.cluster)
    return {row.part: row.value for row in writer.rows}


def interleaved(info: RankInfo) -> dict[str, list[float]]:
    """Two candidates, whose steps take as many seconds as the rank's number, and 10 on rank 1 at the second step."""
    clock = {"now": 0.0, "steps": 0}

    def even() -> None:
        clock["now"] += info.rank

    def uneven() -> None:
        clock["steps"] += 1
        clock["now"] += 10.0 if (info.rank, clock["steps"]) == (1, 2) else info.rank

    with mock.patch.object(timing, "time", SimpleNamespace(perf_counter=lambda: clock["now"])):
        return timing.interleave({"even": even, "uneven": uneven}, rounds=3, warmup=0, device=info.device)
