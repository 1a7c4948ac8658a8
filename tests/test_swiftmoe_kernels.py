"""Kernels of experts with replicas against the torch path: compiled on a GPU, interpreted on a CPU."""

from __future__ import annotations

import sys
from itertools import product

import pytest
import torch
from torch import Tensor

from methods.swiftmoe_rank_table import RankTable, packed_on_device
from methods.swiftmoe_scheduler import SlotTable, even_table
from methods.swiftmoe_slots import SlotExperts
from moe import ops
from moe.flat_experts import FlatExperts
from moe.replica_gate import take_turns
from moe.system import Activation, LayerSpec
from tests.lone import lone_mesh

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton has builds for Linux only")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("num_rows", [3, 4])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"), [(1, 4, 1), (7, 5, 2), (1500, 16, 2), (40, 300, 3), (2100, 16, 1)]
)
def test_turns_are_those_of_the_torch_path(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int, num_experts: int, top_k: int, num_rows: int, in_order: bool
) -> None:
    """In several blocks, of few copies and of many, with slots in any order, first turns and capacities."""
    rows = generator(num_tokens)
    likely_E = torch.rand(num_experts, generator=rows) ** 4
    ids_TK = (torch.rand(num_tokens, num_experts, generator=rows) * likely_E).topk(top_k).indices
    replicas_E = torch.randint(1, 9, (num_experts,), generator=rows)
    num_slots = int(replicas_E.sum())
    turn_E, kept_E = torch.randint(0, 200, (2, num_experts), generator=rows)
    table_RE = torch.stack([replicas_E.cumsum(0) - replicas_E, replicas_E, turn_E, kept_E])[:num_rows]
    order_J = None if in_order else torch.randperm(num_slots, generator=rows).to(DEVICE)
    given = ids_TK.to(DEVICE), table_RE.to(DEVICE), num_slots, order_J
    monkeypatch.setattr(ops, "is_fast", lambda _tensor: True)
    found = take_turns(*given)
    monkeypatch.setattr(ops, "is_fast", lambda _tensor: False)
    expected = take_turns(*given)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[2], expected[2])
    if num_rows == 3:
        assert found[1] is None and expected[1] is None
    else:
        assert found[1] is not None and expected[1] is not None
        assert torch.equal(found[1], expected[1])
        assert num_tokens < 100 or 0 < int(found[1].sum()) < found[1].numel()


def slots(spec: LayerSpec, table: SlotTable, rank: int, seed: int) -> tuple[SlotExperts, list[Tensor]]:
    """A rank's slots with random gradients, and these again: the slots forget theirs."""
    num_ranks = table.num_slots // table.slots_per_rank
    mesh = lone_mesh(num_ranks, rank)
    here = RankTable(table, rank)
    here.take([tensor.to(DEVICE) for tensor in packed_on_device(here.numbers(), mesh)])
    experts = SlotExperts(spec, mesh, here, FlatExperts(spec, num_ranks)).to(DEVICE)
    gradients = []
    for weight in (experts.w_in, experts.w_out):
        weight.data = weight.data.to(DEVICE)
        weight.grad = torch.randn(weight.shape, generator=generator(seed)).to(DEVICE, spec.dtype)
        gradients.append(weight.grad.clone())
    return experts, gradients


TABLES = [even_table(5, 2, 4), SlotTable((1, 6, 1, 3, 1), 4), SlotTable((1, 1, 7), 3)]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("reduced", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model_dim", "hidden_dim", "activation"), [(16, 24, "gelu"), (7, 5, "swiglu"), (40, 80, "gelu")]
)
def test_replicas_gradients_are_summed_where_they_are_sent_from(
    monkeypatch: pytest.MonkeyPatch,
    table: SlotTable,
    reduced: torch.dtype,
    model_dim: int,
    hidden_dim: int,
    activation: Activation,
) -> None:
    """On every rank, against sums in float64, also where an expert's numbers do not go into its shards."""
    for dtype in (torch.float32, torch.bfloat16):
        spec = LayerSpec(model_dim, hidden_dim, len(table.counts), 1, activation, dtype=dtype)
        for rank in range(table.num_slots // table.slots_per_rank):
            for fast in (True, False):
                monkeypatch.setattr(ops, "is_fast", lambda _tensor, fast=fast: fast)
                experts, gradients = slots(spec, table, rank, seed=rank)
                sums_RF = experts.summed_gradients(reduced)
                assert sums_RF.dtype == reduced
                flat_LP = experts.flat.pack(*(grad.double() for grad in gradients))
                whole_GP = torch.stack(
                    [flat_LP[run.first : run.first + run.num_slots].sum(0) for run in experts.here.runs]
                )
                expected = whole_GP.view(-1, experts.flat.shard_size)[experts.here.order]
                # The interpreter cuts bfloat16 off instead of rounding it.
                tolerance = 2**-7 if reduced == torch.bfloat16 else 1e-5
                torch.testing.assert_close(sums_RF.double(), expected, rtol=tolerance, atol=1e-6)


def test_without_a_backward_pass_sums_are_zero() -> None:
    spec = LayerSpec(7, 5, 5, 1)
    experts, _ = slots(spec, TABLES[1], rank=1, seed=0)
    experts.drop_gradients()
    sums_RF = experts.summed_gradients(torch.float32)
    assert sums_RF.shape == (len(experts.here.order), experts.flat.shard_size)
    assert not sums_RF.any()


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 1023, 2100])
def test_every_slot_gets_its_experts_row(table: SlotTable, dtype: torch.dtype, size: int) -> None:
    source_EF = torch.randint(-99, 99, (len(table.counts), size), generator=generator(size)).float().to(DEVICE)
    runs_E2 = torch.tensor(list(zip(table.first_slots, table.counts, strict=True)), device=DEVICE)
    found = ops.kernels().repeat_rows(source_EF, runs_E2, table.num_slots, dtype)
    assert torch.equal(found, source_EF[table.expert_of_slot].to(dtype)), "small whole numbers are exact in both"


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("per_slot", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model_dim", "hidden_dim", "activation"), [(16, 24, "gelu"), (7, 5, "swiglu"), (40, 80, "gelu")]
)
def test_slots_get_the_weights_of_their_experts(
    monkeypatch: pytest.MonkeyPatch,
    table: SlotTable,
    per_slot: bool,
    dtype: torch.dtype,
    model_dim: int,
    hidden_dim: int,
    activation: Activation,
) -> None:
    """On every rank, from shards that came once a rank or once a slot."""
    spec = LayerSpec(model_dim, hidden_dim, len(table.counts), 1, activation, dtype=dtype)
    num_ranks = table.num_slots // table.slots_per_rank
    for rank, fast in product(range(num_ranks), (True, False)):
        experts, _ = slots(spec, table, rank, seed=rank)
        here = RankTable(table, rank, per_slot)
        here.take([tensor.to(DEVICE) for tensor in packed_on_device(here.numbers(), lone_mesh(num_ranks, rank))])
        experts.use(here)
        shapes = [(len(table.counts), *weight.shape[1:]) for weight in (experts.w_in, experts.w_out)]
        whole = [torch.randint(-99, 99, shape, generator=generator(1)).to(DEVICE, dtype) for shape in shapes]
        mine = table.expert_of_slot[rank * table.slots_per_rank : (rank + 1) * table.slots_per_rank]
        sent = mine if per_slot else sorted(set(mine))
        flat_GP = experts.flat.pack(*(weights[sent] for weights in whole))
        shards_NBF = flat_GP.view(len(sent), num_ranks, -1).transpose(0, 1).contiguous()
        monkeypatch.setattr(ops, "is_fast", lambda _tensor, fast=fast: fast)
        experts.fill(shards_NBF)
        for weight, expected in zip((experts.w_in, experts.w_out), whole, strict=True):
            assert torch.equal(weight.data, expected[mine])
