"""Levels of ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.topology import cluster_of


def test_two_nodes_of_two() -> None:
    cluster = cluster_of([2, 2])
    assert cluster.level_names == ["self", "node", "network"]
    assert cluster.world_size == 4
    assert [cluster.group_size(level) for level in range(3)] == [1, 2, 4]
    assert cluster.pair_levels(range(4)) == [
        [0, 1, 2, 2],
        [1, 0, 2, 2],
        [2, 2, 0, 1],
        [2, 2, 1, 0],
    ]
    assert cluster.groups(0) == [[0], [1], [2], [3]]
    assert cluster.groups(1) == [[0, 1], [2, 3]]
    assert cluster.groups(2) == [[0, 1, 2, 3]]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_level_of_is_the_first_level_whose_groups_hold_both(fanouts: list[int], data: st.DataObject) -> None:
    cluster = cluster_of(fanouts)
    ranks = st.integers(0, cluster.world_size - 1)
    a, b = data.draw(ranks), data.draw(ranks)
    together = [any({a, b} <= set(group) for group in cluster.groups(level)) for level in range(len(cluster.levels))]
    assert cluster.level_of(a, b) == cluster.level_of(b, a) == together.index(True)
    assert (cluster.level_of(a, b) == 0) == (a == b)
    for level in range(len(cluster.levels)):
        assert a in cluster.groups(level)[cluster.group_of(a, level)]
        assert sorted(sum(cluster.groups(level), [])) == list(range(cluster.world_size))


def test_levels_of_one_group_tell_nothing_apart() -> None:
    assert cluster_of([2, 1, 3]).crossed_levels == [1, 3]
    assert cluster_of([1]).crossed_levels == []


def test_a_rank_outside_has_no_level() -> None:
    with pytest.raises(ValueError, match="ranks 0 and 4 are not both in a cluster of 4 ranks"):
        cluster_of([2, 2]).level_of(0, 4)


def test_levels_without_a_name_are_not_dropped() -> None:
    with pytest.raises(AssertionError, match="3 levels, 2 names"):
        cluster_of([2, 2, 2], names=["node", "network"])
