"""experiments.kernel_profile, and the table that analysis.kernels makes of its rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch.autograd import DeviceType

from analysis.kernels import kernel_table
from analysis.load import load_samples
from experiments.kernel_profile import PROFILED_STEPS, WARMUP_STEPS, Kernels, add_kernels, cuda_kernels, short_name
from experiments.samples import SampleWriter
from moe.mesh import Mesh, create_mesh
from moe.topology import cluster_of
from tests.analysis_results import write_samples
from tests.tiny import rank_here


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with rank_here(tmp_path_factory.mktemp("rank")) as info:
        yield create_mesh(cluster_of([1]), info.device)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, "
            "std::array<char*, 3ul> >(int, at::native::CUDAFunctor_add<float>, std::array<char*, 3ul>)",
            "at::native::vectorized_elementwise_kernel",
        ),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "ncclDevKernel_SendRecv"),
        ("void (anonymous namespace)::elementwise_kernel<128, 2>(int)", "elementwise_kernel"),
        ("void at::native::(anonymous namespace)::gather<(bool)1, f(int)>(float*)", "at::native::gather"),
        ("std::enable_if<!(false), void>::type internal::gemvx::kernel<int, 7>(int)", "internal::gemvx::kernel"),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD (Device -> Device)"),
        ("Memset (Device)", "Memset (Device)"),
        ("_gather_rows_kernel", "_gather_rows_kernel"),
        ("sm90_xmma_gemm_" + "x" * 60, "sm90_xmma_gemm_" + "x" * 42 + "..."),
        ("()", "()"),
    ],
)
def test_a_kernels_name_is_readable(name: str, short: str) -> None:
    assert short_name(name) == short
    assert len(short) <= 60


def test_what_a_gpu_did() -> None:
    def event(
        name: str, start: float, end: float, device: DeviceType = DeviceType.CUDA, annotation: bool = False
    ) -> SimpleNamespace:
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation, time_range=span)

    events = [
        event("void mm<1>(int)", 10, 20),
        event("nccl(int)", 15, 32),  # on another stream
        event("inside", 16, 18),
        event("void mm<2>(int)", 40, 45),
        event("nccl:all_to_all", 5, 60, annotation=True),
        event("cudaLaunchKernel", 0, 90, device=DeviceType.CPU),
    ]
    assert cuda_kernels(events) == Kernels({"nccl": 17, "mm": 15, "inside": 2}, {"mm": 2, "nccl": 1, "inside": 1}, 27)


def test_operators_stand_in_on_a_cpu(mesh: Mesh) -> None:
    steps: list[int] = []
    matrix = torch.randn(128, 128)

    def step() -> None:
        steps.append(1)
        _ = matrix @ matrix @ matrix

    writer = SampleWriter("flat", "native", "small", "uniform", 0)
    add_kernels(writer, step, mesh)
    assert len(steps) == WARMUP_STEPS + PROFILED_STEPS
    values = {(row.metric, row.part): row.value for row in writer.rows}
    assert values["kernel_calls", "cpu/aten::mm"] == 2
    assert values["kernel_time", "cpu/aten::mm"] > values["kernel_time", "cpu/aten::matmul"] > 0, "self time"
    assert {metric for metric, _ in values} == {"kernel_time", "kernel_calls"}


def profiled(table: pd.DataFrame) -> pd.DataFrame:
    """Steps of flat of 100 us on a GPU that is busy for 60; of deepspeed, whose two kernels overlap; none of others."""
    table = table[table["seed"] == 0]
    table.loc[table["metric"] == "step_time", "value"] = 100e-6

    def row(system: str, metric: str, part: str, value: float) -> pd.DataFrame:
        like = table[table["system"] == system].iloc[:1]
        return like.assign(round=0, metric=metric, part=part, value=value)

    rows = [table]
    for system, kernels, busy in (
        ("flat", {"cuda/a/b": (1, 15e-6), "cuda/mm": (3, 45e-6)}, 60e-6),
        ("deepspeed", {"cuda/mm": (1, 50e-6), "cuda/nccl": (1, 50e-6)}, 75e-6),
    ):
        for part, (calls, time) in kernels.items():
            rows += [row(system, "kernel_calls", part, calls), row(system, "kernel_time", part, time)]
        rows.append(row(system, "busy_time", "cuda", busy))
    return pd.concat(rows, ignore_index=True)


def test_the_table_of_kernels(tmp_path: Path) -> None:
    table = kernel_table(load_samples(write_samples(tmp_path, ["flat", "deepspeed", "fairscale"], change=profiled)))
    assert set(table["system"]) == {"flat", "deepspeed"}
    assert set(table["device"]) == {"cuda"}
    flat = table[table["system"] == "flat"].set_index("kernel")
    assert list(flat.index) == ["mm", "a/b", "(device time)", "(wall time)", "(idle)"]
    assert flat["us_per_step"].tolist() == pytest.approx([45, 15, 60, 100, 40])
    assert flat["share"].tolist() == pytest.approx([0.75, 0.25, 1, float("nan"), 0.4], nan_ok=True)
    assert flat["calls_per_step"].tolist() == pytest.approx([3, 1, 4, float("nan"), float("nan")], nan_ok=True)
    deepspeed = table[table["system"] == "deepspeed"].set_index("kernel")["us_per_step"]
    assert deepspeed["(device time)"] == pytest.approx(100)
    assert deepspeed["(idle)"] == pytest.approx(25), "the kernels overlap"


def test_without_a_profile_there_is_no_table(tmp_path: Path) -> None:
    assert len(kernel_table(load_samples(write_samples(tmp_path, ["flat"])))) == 0
