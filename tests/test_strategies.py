"""Named strategies: each name to its rules, and the plans that they resolve to."""

from __future__ import annotations

import re

import pytest
import torch

from syncwright.errors import PlanError
from syncwright.plan import (
    AllReduce,
    Blocks,
    Geo,
    LeastLoaded,
    Local,
    LocalSteps,
    Mean,
    On,
    Optimizer,
    Outer,
    ParameterServer,
    Plan,
    RoundRobin,
    Sharing,
    Whole,
    resolve,
)
from syncwright.program import Role, Variable
from syncwright.strategies import STRATEGIES, named

TABLE = Variable("embed.weight", Role.PARAM, (1000, 16), torch.float32, sparse=True)
WEIGHT = Variable("head.weight", Role.PARAM, (10, 4096), torch.float32)
BIAS = Variable("head.bias", Role.PARAM, (10,), torch.float32)
MODEL = (TABLE, WEIGHT, BIAS)


def plan(name: str, servers: int = 4, update: str = "elementwise", **options: object) -> Plan:
    updates = dict.fromkeys((variable.name for variable in MODEL), update)
    return resolve(named(name, MODEL, **options), MODEL, updates, 2, servers, "digest")  # pyright: ignore


def owners(plan: Plan) -> list[tuple[int, ...]]:
    return [sharing.owners for sharing in plan.sharings]


def test_the_registry_lists_the_fixed_strategies():
    assert list(STRATEGIES) == [
        "independent",
        "all_reduce",
        "partitioned_all_reduce",
        "parameter_server",
        "parameter_server_balanced",
        "parameter_server_partitioned",
        "parameter_server_uneven",
        "staged",
        "replicated_served",
        "parallax",
        "zero1",
        "zero2",
        "zero3",
        "hybrid",
        "local_sgd",
        "diloco",
        "geo",
    ]


@pytest.mark.parametrize(
    ("name", "sync"),
    [
        ("independent", Local()),
        ("all_reduce", AllReduce()),
        ("local_sgd", LocalSteps(8)),
        ("diloco", LocalSteps(500, Optimizer.of("SGD", lr=0.7, momentum=0.9, nesterov=True))),
    ],
)
def test_without_servers(name: str, sync: object):
    found = plan(name, servers=0)
    assert {sharing.sync for sharing in found.sharings} == {sync}
    assert found.reducer is None


@pytest.mark.parametrize(
    ("name", "options", "every", "outer"),
    [
        ("local_sgd", {"over": "parameter_server"}, 8, Mean()),
        ("diloco", {"over": "parameter_server"}, 500, Optimizer.of("SGD", lr=0.7, momentum=0.9, nesterov=True)),
        ("geo", {}, 100, Geo()),
    ],
)
def test_exchanges_over_servers(name: str, options: dict[str, object], every: int, outer: Outer):
    """What trainers exchange is kept where there is the least."""
    found = plan(name, servers=2, **options)
    assert {sharing.sync for sharing in found.sharings} == {
        LocalSteps(every, outer, over=ParameterServer(place=LeastLoaded()))
    }
    assert {owner for sharing in found.sharings for owner in sharing.owners} == {0, 1}


def test_parameter_server_keeps_all_on_server_0():
    found = plan("parameter_server")
    assert found.sharing("head.bias") == Sharing("head.bias", ParameterServer(place=On(0)), (10,), (0,))
    assert owners(found) == [(0,), (0,), (0,)]
    assert found.reducer == 0


def test_balanced_goes_by_bytes_and_by_traffic_for_tables():
    found = plan("parameter_server_balanced", servers=2)
    assert found.sharing("head.weight").sync == ParameterServer(place=LeastLoaded())
    assert owners(found) == [(0,), (1,), (0,)]


def test_partitioned_cuts_in_blocks_in_turn():
    found = plan("parameter_server_partitioned")
    blocks = ParameterServer(partition=Blocks(8192), place=RoundRobin())
    assert found.sharing("embed.weight") == Sharing("embed.weight", blocks, (1000,), (0,), rows="all")
    assert found.sharing("head.weight") == Sharing("head.weight", blocks, (3, 3, 3, 1), (1, 2, 3, 0))
    assert found.sharing("head.bias") == Sharing("head.bias", blocks, (10,), (1,))
    assert plan("parameter_server_partitioned", min_elements=1).sharing("head.bias").sizes == (3, 3, 3, 1)


def test_partitioned_keeps_whole_what_cannot_be_cut_and_says_so():
    found = plan("parameter_server_partitioned", update="whole")
    kept = ParameterServer(partition=Whole(), place=RoundRobin())
    assert found.sharing("head.weight") == Sharing("head.weight", kept, (10,), (1,))
    assert found.notes[0] == "head.weight is kept whole: its update needs the whole tensor"
    rows = plan("parameter_server_partitioned", update="row-wise")
    assert rows.notes[0] == "head.weight is kept whole: its update is row-wise, not elementwise"


def test_replicated_served_refreshes_copies_but_of_tables():
    found = plan("replicated_served", servers=2)
    assert found.sharing("head.weight").sync == ParameterServer(place=LeastLoaded(), replicated=True)
    assert found.sharing("embed.weight").sync == ParameterServer(place=LeastLoaded())


def test_parallax_serves_sparse_and_reduces_dense():
    found = plan("parallax")
    assert found.sharing("embed.weight") == Sharing(
        "embed.weight", ParameterServer(place=LeastLoaded()), (1000,), (0,), rows="all"
    )
    assert found.sharing("head.weight") == Sharing("head.weight", AllReduce(), (10,))


def test_parallax_of_a_dense_model_needs_no_server():
    found = resolve(named("parallax", (BIAS,)), (BIAS,), {"head.bias": "elementwise"}, 2, 0, "digest")
    assert found.sharings == (Sharing("head.bias", AllReduce(), (10,)),)


def test_a_table_whose_name_holds_pattern_characters_is_served():
    table = Variable("tables[a*].weight", Role.PARAM, (4, 2), torch.float32, sparse=True)
    found = resolve(named("parallax", (table,)), (table,), {table.name: "elementwise"}, 2, 1, "digest")
    assert found.sharings[0].owners == (0,)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "all-reduce",
            {},
            "strategy: found 'all-reduce', expected one of independent, all_reduce, partitioned_all_reduce, "
            "parameter_server, parameter_server_balanced, parameter_server_partitioned, parameter_server_uneven, "
            "staged, replicated_served, parallax, zero1, zero2, zero3, hybrid, local_sgd, diloco, geo. "
            "Did you mean 'all_reduce'?",
        ),
        (
            "parameter_server_partitioned",
            {"min_element": 1},
            "strategy parameter_server_partitioned: found the option 'min_element', expected one of "
            "min_elements, mode, staleness. "
            "Did you mean 'min_elements'?",
        ),
        (
            "independent",
            {"bucket_mb": 1},
            "strategy independent: found the option 'bucket_mb', expected no option. Take it out.",
        ),
        (
            "diloco",
            {"over": "servers"},
            "strategy: found over: 'servers', expected all_reduce or parameter_server. Write one of these.",
        ),
        (
            "parameter_server_partitioned",
            {"min_elements": 0},
            "Blocks.min_elements: found 0, expected a whole number of at least 1.",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(name: str, options: dict[str, object], message: str):
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        named(name, MODEL, **options)


def test_servers_have_modes():
    served = plan("parameter_server_partitioned", mode="async", staleness=2)
    assert {sharing.sync.staleness for sharing in served.sharings if isinstance(sharing.sync, ParameterServer)} == {2}
    assert {s.sync.mode for s in plan("parallax", mode="async").sharings if isinstance(s.sync, ParameterServer)} == {
        "async"
    }


def test_tables_are_not_staged():
    found = plan("staged")
    assert [sharing.sync.staged for sharing in found.sharings if isinstance(sharing.sync, ParameterServer)] == [
        *(False, True, True)
    ]


def test_uneven_pieces_grow():
    assert plan("parameter_server_uneven", pieces=3).sharing("embed.weight").sizes == (167, 333, 500)
