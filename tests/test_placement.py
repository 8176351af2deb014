"""Placement: the owners that the semantics fix. No number here may depend on PYTHONHASHSEED."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from syncwright.errors import PlanError
from syncwright.plan import (
    Blocks,
    Hash,
    LeastLoaded,
    On,
    ParameterServer,
    Placement,
    RoundRobin,
    Rules,
    Small,
    place,
    resolve,
)
from syncwright.program import Role, Variable

PLACEMENTS = st.one_of(
    st.sampled_from([RoundRobin(), Hash(), LeastLoaded()]),
    st.builds(Small, st.integers(0, 100), st.just(0)),
    st.just(On(0)),
)


def variable(name: str, *shape: int, sparse: bool = False) -> Variable:
    return Variable(name, Role.PARAM, shape, torch.float32, sparse=sparse)


def owners(sizes: list[int], rule: Placement, servers: int) -> list[int]:
    """The owners of whole 1-d float32 variables with these numbers of elements."""
    cuts = [(variable(f"v{index}", size), (size,), rule) for index, size in enumerate(sizes)]
    return [owner for (owner,) in place(cuts, servers)]


def test_linear_in_blocks_round_robin():
    linear = (variable("weight", 1000, 1000), variable("bias", 1000))
    rules = Rules(ParameterServer(partition=Blocks(), place=RoundRobin()))
    plan = resolve(rules, linear, {"weight": "elementwise", "bias": "elementwise"}, 2, 2, "digest")
    assert [sharing.owners for sharing in plan.sharings] == [(0, 1), (0,)]


def test_round_robin_has_one_counter_for_all():
    cuts = [
        (variable("a", 6), (2, 2, 2), RoundRobin()),
        (variable("b", 1), (1,), On(1)),
        (variable("c", 1), (1,), RoundRobin()),
        (variable("d", 1), (1,), RoundRobin()),
    ]
    assert place(cuts, 2) == [(0, 1, 0), (1,), (1,), (0,)]


def test_least_loaded_is_greedy_by_bytes():
    cuts = [
        (Variable(f"v{index}", Role.PARAM, (nbytes,), torch.uint8), (nbytes,), LeastLoaded())
        for index, nbytes in enumerate([400, 100, 100, 200, 50])
    ]
    assert place(cuts, 2) == [(0,), (1,), (1,), (1,), (0,)]


def test_least_loaded_counts_what_other_rules_placed():
    cuts = [(variable("a", 9), (9,), On(0)), (variable("b", 1), (1,), LeastLoaded())]
    assert place(cuts, 2) == [(0,), (1,)]


def test_least_loaded_counts_a_tables_traffic_and_not_its_size():
    table = variable("table", 1_000_000, 8, sparse=True)
    cuts = [
        (table, (1_000_000,), LeastLoaded()),
        (variable("dense", 100, 100), (100,), LeastLoaded()),
        (variable("other", 100), (100,), LeastLoaded()),
    ]
    assert place(cuts, 2) == [(0,), (1,), (0,)]
    dense = [(variable("table", 1_000_000, 8), (1_000_000,), LeastLoaded()), *cuts[1:]]
    assert place(dense, 2) == [(0,), (1,), (1,)]


@pytest.mark.parametrize("given_server", [0, 1])
def test_small_ones_to_one_place_and_large_ones_by_elements(given_server: int):
    rule = Small(below=65536, place=given_server)
    assert owners([65535, 65536, 100_000, 65536], rule, 2) == [given_server, 0, 1, 0]


def test_hash_is_blake2b_of_name_and_piece():
    names = (variable("fc.weight", 3, 4), variable("fc.bias", 3), variable("embed.weight", 3))
    cuts = [(names[0], (1, 1, 1), Hash()), (names[1], (3,), Hash()), (names[2], (3,), Hash())]
    assert place(cuts, 2) == [(1, 0, 0), (1,), (1,)]
    assert place(cuts, 3) == [(1, 0, 2), (0,), (1,)]
    assert place(cuts, 4) == [(1, 2, 2), (3,), (1,)]
    assert place(cuts, 5) == [(2, 1, 4), (1,), (0,)]


def test_hash_of_a_variable_does_not_depend_on_the_others():
    bias = (variable("fc.bias", 3), (3,), Hash())
    assert place([(variable("first", 9), (9,), Hash()), bias], 5)[1] == place([bias], 5)[0]


def test_a_server_that_does_not_exist_is_refused():
    message = (
        "variable 'v0': found a place on server 2, expected one of the 2 servers, which count from 0. "
        "Name a lower one, or start at least 3 servers."
    )
    for rule in (On(2), Small(place=2)):
        with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
            owners([1], rule, 2)


@given(st.lists(st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=4), PLACEMENTS)), st.integers(1, 5))
def test_every_piece_has_an_owner_in_range(lines: list[tuple[list[int], Placement]], servers: int):
    cuts = [(variable(f"v{index}", sum(sizes)), tuple(sizes), rule) for index, (sizes, rule) in enumerate(lines)]
    found = place(cuts, servers)
    assert [len(each) for each in found] == [len(sizes) for sizes, _ in lines]
    assert all(0 <= owner < servers for each in found for owner in each)
    assert place(cuts, servers) == found


@given(st.lists(st.integers(1, 5), min_size=1), st.integers(1, 5))
def test_round_robin_is_level(counts: list[int], servers: int):
    cuts = [(variable(f"v{index}", count), (1,) * count, RoundRobin()) for index, count in enumerate(counts)]
    flat = [owner for each in place(cuts, servers) for owner in each]
    assert flat == [turn % servers for turn in range(len(flat))]
