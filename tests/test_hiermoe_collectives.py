"""methods.hiermoe_model.collectives_of: a cluster's fitted collectives come before what its levels' costs say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from methods.hiermoe_model import collectives_of
from moe.costs import AlphaBeta
from moe.errors import ConfigError
from moe.topology import Cluster, CollectiveCosts, Level

FITTED = CollectiveCosts(
    AlphaBeta(7e-4, 5e-10),
    (AlphaBeta(4e-4, 6e-10), AlphaBeta(3e-4, 2e-10)),
    (AlphaBeta(2e-4, 1.5e-10), AlphaBeta(1e-4, 3e-11)),
)
CLUSTER = Cluster(
    "fitted",
    (
        Level("self", 1),
        Level("node", 2, 1e-6, 1e-9),
        Level("rack", 3, 2e-6, 2e-9),
        Level("row", 1),
        Level("site", 2, 3e-6, 3e-9),
    ),
    collectives=FITTED,
)


def test_fitted_collectives_are_taken_as_they_are() -> None:
    made = collectives_of(CLUSTER)
    assert made == collectives_of(CLUSTER, ep_size=12)
    assert made.groups == (2, 6, 12)
    assert (made.standard, made.inter, made.intra) == (FITTED.standard, FITTED.inter, FITTED.intra)


def test_their_groups_are_those_that_the_levels_make() -> None:
    derived = collectives_of(replace(CLUSTER, collectives=None))
    assert derived.groups == collectives_of(CLUSTER).groups
    assert derived.standard != FITTED.standard


def test_fitted_collectives_need_no_costs_of_levels() -> None:
    bare = replace(CLUSTER, levels=tuple(Level(level.name, level.fanout) for level in CLUSTER.levels))
    assert collectives_of(bare).inter == FITTED.inter
    with pytest.raises(ConfigError, match="needs the costs of the level node of cluster fitted"):
        collectives_of(bare, ep_size=6)


def test_a_part_of_the_ranks_has_costs_by_its_levels() -> None:
    made = collectives_of(CLUSTER, ep_size=6)
    assert made == collectives_of(replace(CLUSTER, collectives=None), ep_size=6)
    assert made.groups == (3, 6)


def test_a_cost_that_is_missing_is_told() -> None:
    with pytest.raises(ConfigError, match="intra=1: 3 levels have 2 such collectives"):
        collectives_of(replace(CLUSTER, collectives=replace(FITTED, intra=FITTED.intra[:1])))
