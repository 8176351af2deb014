"""resolve: what rules mean for a program, and the exact sentence where they cannot be meant."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncwright.errors import PlanError
from syncwright.plan import (
    AllReduce,
    Blocks,
    Even,
    Hash,
    LeastLoaded,
    Local,
    On,
    ParameterServer,
    Rules,
    Sharing,
    Sync,
    Uneven,
    Whole,
)
from tests.planned import EMBED, HEAD, SCALE, planned


def test_the_reducer_is_the_lowest_server_that_owns_something():
    assert planned(Rules(ParameterServer(place=On(1)))).reducer == 1
    assert planned(Rules(AllReduce())).reducer is None


def test_an_alias_names_its_variable():
    plan = planned(Rules.of(AllReduce(), {"decoder.*": Local()}))
    assert plan.sharing("embed.weight").sync == Local()


def test_the_last_match_wins_whole():
    served = ParameterServer(partition=Even(2), reduce="sum")
    plan = planned(Rules.of(Local(), {"*": served, "head.*": ParameterServer()}))
    assert plan.sharing("head.weight").sync == ParameterServer()
    assert plan.sharing("embed.weight").sync == served


def test_case_counts():
    with pytest.raises(PlanError, match="matches no variable"):
        planned(Rules.of(Local(), {"HEAD.*": AllReduce()}))


def test_a_frozen_parameter_is_local_and_needs_no_note():
    plan = planned(Rules(ParameterServer(partition=Even(2))), **{"embed.weight": None})
    assert plan.sharings[0] == Sharing("embed.weight", Local(), (100,))
    assert plan.sharing("head.weight").owners == (0, 1)
    assert plan.notes == ()


def test_a_frozen_model_needs_no_server():
    frozen = dict.fromkeys((EMBED.name, HEAD.name, SCALE.name))
    assert planned(Rules(ParameterServer()), servers=0, **frozen).reducer is None


def test_buffers_have_defaults_by_dtype():
    plan = planned(Rules(AllReduce()))
    assert plan.buffers == (("norm.running_mean", "mean"), ("norm.num_batches_tracked", "trainer0"))
    plan = planned(Rules.of(AllReduce(), buffers={"*": "local", "*.running_mean": "trainer0"}))
    assert plan.buffers == (("norm.running_mean", "trainer0"), ("norm.num_batches_tracked", "local"))


def test_what_cannot_be_cut_is_kept_whole_where_rules_allow_it():
    rules = Rules(ParameterServer(partition=Blocks(1)), uncuttable="keep_whole")
    plan = planned(rules, **{"head.weight": "whole"})
    assert plan.sharing("head.weight") == Sharing("head.weight", ParameterServer(partition=Whole()), (10,), (0,))
    assert plan.notes == ("head.weight is kept whole: its update needs the whole tensor",)


def test_a_partition_that_does_not_cut_is_not_refused():
    rules = Rules(ParameterServer(partition=Blocks(8192)))
    assert planned(rules, **{"head.weight": "whole"}).sharing("head.weight").sizes == (10,)


REFUSED = [
    (
        Rules(ParameterServer(partition=Even(2))),
        {"updates": {"head.weight": "whole"}},
        "rules: variable 'head.weight': found a partition into 2 pieces, expected none: its update is whole, "
        "only an elementwise update can be cut. Add a line for 'head.weight' without a partition, or say "
        "`uncuttable: keep_whole`.",
    ),
    (
        Rules(ParameterServer()),
        {"servers": 0},
        "rules: variable 'embed.weight': found parameter_server and no servers, expected at least one "
        "server. Start servers, or share it another way, such as all_reduce.",
    ),
    (
        Rules.of(Local(), {"*": Local(), "embd.weight": AllReduce()}),
        {},
        "rules, at variables[1]: found the pattern 'embd.weight', which matches no variable, expected at "
        "least one match. Did you mean 'embed.weight' or 'head.weight' or 'decoder.weight'?",
    ),
    (
        Rules.of(Local(), {"xyz": AllReduce()}),
        {},
        "rules, at variables[0]: found the pattern 'xyz', which matches no variable, expected at least one "
        "match. Take the line out, or name one of the 4 there are.",
    ),
    (
        Rules.of(Local(), {"norm.*": AllReduce()}),
        {},
        "rules, at variables[0]: found the pattern 'norm.*', which matches no variable, expected at least "
        "one match. It matches 'norm.running_mean': write the line under `buffers`.",
    ),
    (
        Rules.of(Local(), buffers={"embed.weight": "mean"}),
        {},
        "rules, at buffers[0]: found the pattern 'embed.weight', which matches no buffer that the step "
        "writes, expected at least one match. It matches 'embed.weight': write the line under `variables`.",
    ),
    (
        Rules.of(Local(), buffers={"norm.*": "mean"}),
        {},
        "rules: buffer 'norm.num_batches_tracked': found mean for a buffer of torch.int64, expected trainer0 "
        "or local: a mean of whole numbers is not one. Add a line for 'norm.num_batches_tracked' after the "
        "one that says mean.",
    ),
    (
        Rules(ParameterServer(place=On(2))),
        {},
        "variable 'embed.weight': found a place on server 2, expected one of the 2 servers, which count from "
        "0. Name a lower one, or start at least 3 servers.",
    ),
]


@pytest.mark.parametrize(("rules", "setting", "message"), REFUSED)
def test_rules_that_cannot_be_meant_are_refused(rules: Rules, setting: dict, message: str):
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        planned(rules, servers=setting.get("servers", 2), **setting.get("updates", {}))


SYNCS = st.one_of(
    st.sampled_from([Local(), AllReduce(), AllReduce(0.1, "sum")]),
    st.builds(
        ParameterServer,
        partition=st.sampled_from([Whole(), Blocks(3), Even(3), Uneven(4)]),
        place=st.sampled_from([Hash(), LeastLoaded(), On(0)]),
    ),
)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["*", "embed.*", "head.*", "*.weight", "scale"]), SYNCS), max_size=6))
def test_the_last_match_wins(lines: list[tuple[str, Sync]]):
    plan = planned(Rules(Local(), tuple(lines)))
    for variable, patterns in (
        (EMBED, {"*", "embed.*", "*.weight"}),
        (HEAD, {"*", "head.*", "*.weight"}),
        (SCALE, {"*", "scale"}),
    ):
        expected = [Local(), *(sync for pattern, sync in lines if pattern in patterns)][-1]
        assert plan.sharing(variable.name).sync == expected
