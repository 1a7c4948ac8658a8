"""What a rank makes of a slot table, and shards that go straight to their places."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given

from methods.swiftmoe import SwiftMoE, SwiftMoELayer, place
from methods.swiftmoe_rank_table import RankTable, packed_on_device
from methods.swiftmoe_scheduler import SlotTable, even_table
from moe.flat_experts import FlatExperts
from moe.mesh import Mesh
from moe.point_to_point import in_turn
from moe.system import LayerSpec
from moe.weights import load_layer
from tests.lone import lone_mesh
from tests.test_swiftmoe_scheduler import popularities


@given(popularities())
def test_every_rank_gets_its_shard_of_every_expert_in_order(drawn: tuple[list[int], int, int]) -> None:
    """Shards sent to a rank, by rising rank of the senders, are its own of experts 0, 1, ...; those of experts that
    several ranks have are summed over just those ranks, and wait for it."""
    popularity, num_ranks, slots = drawn
    table = even_table(len(popularity), num_ranks, slots).after(popularity)
    ranks = [RankTable(table, rank) for rank in range(num_ranks)]
    for rank in ranks:
        shards = [(rank.runs[shard // num_ranks].expert, shard % num_ranks) for shard in rank.order]
        assert rank.num_sent == sum(rank.send_rows)
        tail = shards[rank.num_sent :]
        expected = [expert for expert in table.shared if rank.rank in table.holders[expert]]
        assert tail == [(expert, peer) for expert in expected for peer in range(num_ranks)]
        assert rank.groups == [(table.holders[expert][0], table.holders[expert][-1]) for expert in expected]
        rank.take(packed_on_device(rank.numbers(), lone_mesh(num_ranks, rank.rank)))
        waiting = {row: shards[source] for row, source in rank.late_2.t().tolist()}
        assert waiting == {row: sent for row, sent in enumerate(shards[: rank.num_sent]) if sent[0] in expected}
        whole = [shards[row] for row in rank.rows_of_experts()]
        assert whole == [(run.expert, peer) for run in rank.runs for peer in range(num_ranks)]
    for peer in range(num_ranks):
        arrived = []
        for rank in ranks:
            start = sum(rank.send_rows[:peer])
            sent = rank.order[start : start + rank.send_rows[peer]]
            assert len(sent) == ranks[peer].receive_rows[rank.rank]
            assert all(shard % num_ranks == peer for shard in sent)
            arrived += [rank.runs[shard // num_ranks].expert for shard in sent]
        assert arrived == list(range(len(popularity)))


@given(popularities())
def test_new_weights_come_once_a_rank_or_once_a_slot(drawn: tuple[list[int], int, int]) -> None:
    popularity, num_ranks, slots = drawn
    table = even_table(len(popularity), num_ranks, slots).after(popularity)
    slots_of = [table.expert_of_slot[rank * slots : (rank + 1) * slots] for rank in range(num_ranks)]
    for per_slot in (False, True):
        wanted = slots_of if per_slot else [sorted(set(experts)) for experts in slots_of]
        for rank in range(num_ranks):
            here = RankTable(table, rank, per_slot)
            assert here.weight_rows == [len(experts) for experts in wanted]
            here.take(packed_on_device(here.numbers(), lone_mesh(num_ranks, rank)))
            rows = [expert for expert, (_, count) in enumerate(here.rows_E2.tolist()) for _ in range(count)]
            assert rows == [expert for experts in wanted for expert in experts], "for rank 0 first"
            assert [first for first, _ in here.rows_E2.tolist()] == [rows.index(e) for e in range(len(popularity))]
            filled = [e for e, (_, count) in zip(wanted[rank], here.fills, strict=True) for _ in range(count)]
            assert filled == slots_of[rank] and here.fills_B2.tolist() == [list(fill) for fill in here.fills]


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, 7, 30])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(("model_dim", "hidden_dim"), [(8, 12), (7, 5), (1, 1)])
def test_shards_go_where_the_whole_vectors_would(
    num_shards: int, activation: Any, model_dim: int, hidden_dim: int
) -> None:
    flat = FlatExperts(LayerSpec(model_dim, hidden_dim, 4, 1, activation), num_shards)
    shards_NGF = torch.arange(num_shards * 3 * flat.shard_size).view(num_shards, 3, flat.shard_size).float()
    width = flat.num_in // model_dim
    found, expected = (
        (torch.full((3, width, model_dim), -1.0), torch.full((3, model_dim, hidden_dim), -1.0)) for _ in range(2)
    )
    flat.unpack_shards(shards_NGF, *found)
    flat.unpack(shards_NGF.transpose(0, 1).flatten(1), *expected)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_numbers_go_to_the_device_in_one_transfer() -> None:
    with mock.patch.object(Mesh, "tensor", autospec=True, side_effect=Mesh.tensor) as transfer:
        found = packed_on_device([[1, 2, 3], [], [4], [5, 6]], lone_mesh())
    assert [tensor.tolist() for tensor in found] == [[1, 2, 3], [], [4], [5, 6]]
    assert transfer.call_count == 1
    assert {tensor.data_ptr() % 16 for tensor in found if len(tensor)} == {found[0].data_ptr() % 16}


def started_layers(num_layers: int) -> list[SwiftMoELayer]:
    """Layers of one rank, their slots filled."""
    layers = []
    for index in range(num_layers):
        layer = SwiftMoE({"slots_per_rank": 9}).build_layer(LayerSpec(8, 8, 4, 1, layer_index=index), lone_mesh())
        assert isinstance(layer, SwiftMoELayer)
        load_layer(layer)
        layer.start()
        layers.append(layer)
    return layers


def test_a_step_sends_the_device_all_layers_tables_at_once_and_none_that_stays() -> None:
    layers = started_layers(3)
    tables = [layer.table.after([5, index, 5, 50]) for index, layer in enumerate(layers)]
    with mock.patch.object(Mesh, "tensor", autospec=True, side_effect=Mesh.tensor) as transfer:
        place(layers, tables)
        assert transfer.call_count == 1
        place(layers, tables)
        assert transfer.call_count == 1
    for layer, table in zip(layers, tables, strict=True):
        assert layer.replicas_E == list(table.counts)
        masters_EP = layer.shards.master_EF.detach()
        flat_LP = layer.experts.flat.pack(layer.experts.w_in.detach(), layer.experts.w_out.detach())
        assert torch.equal(flat_LP, masters_EP[table.expert_of_slot])


def test_slots_show_their_gradients_to_who_looks_and_a_step_does_without() -> None:
    (layer,) = started_layers(1)
    place([layer], [SlotTable((1, 4, 1, 3), 9)])
    slots = layer.experts
    grad_in, grad_out = torch.randn(slots.w_in.shape), torch.randn(slots.w_out.shape)
    slots.w_in.grad, slots.w_out.grad = grad_in.clone(), grad_out.clone()
    in_turn([layer.shards.collect(slots, [])])
    assert slots.w_in.grad is None and slots.w_out.grad is None
    first = 0
    for expert, num_slots in enumerate(layer.table.counts):
        here = slice(first, first + num_slots)
        w1, w2 = [view for view in layer.expert_views() if view.expert == expert]
        for view, grads in ((w1, grad_in), (w2, grad_out)):
            assert view.parameter.grad is not None
            torch.testing.assert_close(view.view(view.parameter.grad), grads[here].sum(0).t())
        first += num_slots
    place([layer], [layer.table])
    assert layer.expert_views()[0].parameter.grad is None, "of weights that are no more"
