"""Plan: rules resolved, saved, read back, and checked against a program and a cluster."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncwright.cluster import Cluster
from syncwright.errors import ClusterError, PlanError
from syncwright.plan import (
    AllReduce,
    Blocks,
    Even,
    Hash,
    LeastLoaded,
    Local,
    On,
    ParameterServer,
    Piece,
    Plan,
    Rules,
    Sync,
    Uneven,
    Whole,
    check,
    resolve,
)
from syncwright.program import Variable
from tests.planned import EMBED, HEAD, MEAN, MODEL, SCALE, STEPS, parameter, planned

MIXED = Rules.of(
    AllReduce(),
    {"embed.*": ParameterServer(partition=Even(3), place=Hash()), "scale": Local()},
    {"*": "local"},
)

SAVED = """\
# How each variable is shared, complete. Made for the program with this digest; may be edited by hand.
version: 1
digest: d1
trainers: 2
servers: 2
reducer: 0
variables:
  embed.weight:
    sync: {parameter_server: {mode: sync, partition: {even: 3}, place: hash, reduce: mean}}
    axis: 0
    sizes: [34, 33, 33]
    owners: [1, 1, 0]
  head.weight:
    sync: {all_reduce: {bucket_mb: 25.0, reduce: mean}}
    axis: 0
    sizes: [10]
    owners: []
  scale:
    sync: local
    axis: 0
    sizes: [1]
    owners: []
buffers:
  norm.running_mean: local
  norm.num_batches_tracked: local
notes: []
"""


def test_a_plan_is_complete_and_reads_well():
    assert planned(MIXED).to_yaml() == SAVED
    assert Plan.from_yaml(SAVED) == planned(MIXED)


def test_a_plan_file_is_read(tmp_path: Path):
    path = tmp_path / "plan.yaml"
    path.write_text(SAVED)
    assert Plan.from_yaml(path) == planned(MIXED)


def test_pieces_are_rows_with_owners():
    plan = planned(Rules(ParameterServer(partition=Uneven(2))))
    assert plan.pieces("embed.weight") == (
        Piece("embed.weight", 0, 0, 33, 0),
        Piece("embed.weight", 1, 33, 100, 1),
    )
    assert plan.pieces("scale") == (Piece("scale", 0, 0, 1, 0),)
    assert planned(Rules(Local())).pieces("scale") == (Piece("scale", 0, 0, 1, None),)
    assert len(list(plan.all_pieces())) == 5


def test_an_unknown_name_is_told():
    message = "variable 'heed.weight': found nothing of this name in the plan. Did you mean 'head.weight' or "
    with pytest.raises(PlanError, match=f"^{re.escape(message)}"):
        planned(MIXED).sharing("heed.weight")


EDITS = [
    (
        "owners: [1, 1, 0]",
        "owners: [1, 1]",
        "plan, line 9, at variables.embed.weight: variable 'embed.weight': found 3 sizes and 2 owners, "
        "expected one owner for each piece. Give both lists the same length.",
    ),
    (
        "owners: [1, 1, 0]",
        "owners: [1, 1, 2]",
        "plan: variable 'embed.weight': found owner 2, expected one of the plan's 2 servers, which count "
        "from 0. Raise `servers` or name a lower one.",
    ),
    (
        "sizes: [34, 33, 33]",
        "sizes: [34, 66, 0]",
        "plan, line 9, at variables.embed.weight: variable 'embed.weight': found sizes [34, 66, 0], expected "
        "at least one piece and none empty. Correct the sizes.",
    ),
    (
        "sizes: [10]\n    owners: []",
        "sizes: [10]\n    owners: [0]",
        "plan, line 14, at variables.head.weight: variable 'head.weight': found sizes [10] and owners [0], "
        "expected one size and no owner: trainers keep it whole. Take the rest out.",
    ),
    (
        "axis: 0\n    sizes: [1]",
        "axis: 1\n    sizes: [1]",
        "plan, line 20, at variables.scale.axis: found 1, expected 0.",
    ),
    (
        "version: 1",
        "version: 2",
        "plan, line 2, at version: found 2, expected 1. Make the plan anew from its rules.",
    ),
    (
        "trainers: 2",
        "trainers: 0",
        "plan, line 4, at trainers: found 0, expected a whole number of at least 1.",
    ),
    (
        "reducer: 0",
        "reducer: 9",
        "plan: reducer: found server 9, expected one of the plan's 2 servers, which count",
    ),
    (
        "reducer: 0",
        "reducer: null",
        "plan: reducer: found none, expected a server, as servers own variables. Name one.",
    ),
    (
        "    axis: 0\n    sizes: [1]",
        "    sizes: [1]",
        "plan, line 19, at variables.scale: found no `axis`, expected sync",
    ),
    (
        "notes: []",
        "note: []",
        "plan, line 26, at note: found the key 'note', expected one of version, digest, trainers",
    ),
    (
        "digest: d1",
        "default: local",
        "plan: found rules, expected a complete plan. Read them with Rules.from_yaml",
    ),
]


@pytest.mark.parametrize(("old", "new", "message"), EDITS)
def test_a_bad_edit_is_told(old: str, new: str, message: str):
    assert old in SAVED
    with pytest.raises(PlanError, match=f"^{re.escape(message)}"):
        Plan.from_yaml(SAVED.replace(old, new, 1))


def test_a_plan_made_in_python_keeps_the_same_rules():
    plan = planned(MIXED)
    with pytest.raises(PlanError, match="'scale': found 2 times in one plan"):
        replace(plan, sharings=(*plan.sharings, plan.sharing("scale")))
    with pytest.raises(PlanError, match=r"found owner 1, expected one of the plan's 1 servers"):
        replace(plan, servers=1)


def test_a_plan_fits_its_own_program_and_more_servers():
    check(planned(MIXED), MODEL, "d1")
    check(planned(MIXED), MODEL, "d1", Cluster.of(2, 2))
    check(planned(MIXED), MODEL, "d1", Cluster.of(2, 5))


UNFIT = [
    (
        (EMBED, parameter("neck.weight", 3), SCALE, MEAN, STEPS),
        "d2",
        "plan: found a plan for another program, expected one for digest d2. It differs in: variable "
        "'neck.weight' (not in the plan), variable 'head.weight' (not in the program). Make the "
        "plan anew from its rules.",
    ),
    (
        (EMBED, parameter("head.weight", 12, 4), SCALE, MEAN, STEPS),
        "d2",
        "plan: found a plan for another program, expected one for digest d2. It differs in: variable "
        "'head.weight' (the plan's sizes add up to 10, its axis 0 has 12). Make the plan anew from "
        "its rules.",
    ),
    (
        (EMBED, HEAD, SCALE, MEAN),
        "d2",
        "plan: found a plan for another program, expected one for digest d2. It differs in: buffer "
        "'norm.num_batches_tracked' (not in the program). Make the plan anew from its rules.",
    ),
    (
        MODEL,
        "d2",
        "plan: found the digest d1, expected d2. The variables are the same; the step, the optimizer or a "
        "setting of it changed. Make the plan anew from its rules.",
    ),
]


@pytest.mark.parametrize(("variables", "digest", "message"), UNFIT)
def test_a_plan_for_another_program_is_refused(variables: tuple[Variable, ...], digest: str, message: str):
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        check(planned(MIXED), variables, digest)


def test_a_long_list_of_differences_is_cut_short():
    other = [parameter(f"v{index}", 1) for index in range(9)]
    with pytest.raises(PlanError, match=r"\(not in the plan\) and 9 more\. Make"):
        check(planned(MIXED), other, "d2")


def test_sizes_that_were_edited_wrongly_are_refused_under_the_right_digest():
    edited = Plan.from_yaml(SAVED.replace("[34, 33, 33]", "[34, 33, 34]"))
    with pytest.raises(PlanError, match=r"sizes add up to 101, its axis 0 has 100"):
        check(edited, MODEL, "d1")


def test_other_machines_are_refused():
    with pytest.raises(ClusterError, match=r"^trainers: found 3, expected 2 as the plan says\. Start as many, or"):
        check(planned(MIXED), MODEL, "d1", Cluster.of(3, 2))
    with pytest.raises(
        ClusterError, match=r"^servers: found 1, fewer servers than the plan names: expected at least 2"
    ):
        check(planned(MIXED), MODEL, "d1", Cluster.of(2, 1))


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
SYNCS = st.one_of(
    st.sampled_from([Local(), AllReduce(), AllReduce(0.1, "sum")]),
    st.builds(
        ParameterServer,
        partition=st.sampled_from([Whole(), Blocks(3), Even(3), Uneven(4)]),
        place=st.sampled_from([Hash(), LeastLoaded(), On(0)]),
    ),
)
MODELS = st.dictionaries(NAMES, st.lists(st.integers(0, 20), max_size=2).map(tuple), min_size=1, max_size=5)


def model(shapes: dict[str, tuple[int, ...]]) -> tuple[Variable, ...]:
    return tuple(parameter(name, *shape) for name, shape in shapes.items())


@settings(deadline=None)
@given(MODELS, SYNCS, st.integers(1, 4), NAMES)
def test_every_plan_is_whole_and_round_trips(shapes: dict, sync: Sync, servers: int, digest: str):
    variables = model(shapes)
    updates = dict.fromkeys(shapes, "elementwise")
    plan = resolve(Rules(sync), variables, updates, 2, servers, digest)  # pyright: ignore[reportArgumentType]
    check(plan, variables, digest, Cluster.of(2, servers))
    assert Plan.from_yaml(plan.to_yaml()) == plan
    for variable in variables:
        pieces = plan.pieces(variable.name)
        bounds = [(piece.start, piece.stop) for piece in pieces]
        assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
        assert bounds[-1][1] == (variable.shape[0] if variable.shape else 1)
        assert all((piece.owner is not None) == isinstance(sync, ParameterServer) for piece in pieces)
