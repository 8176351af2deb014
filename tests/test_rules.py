"""Rules: what a person may write, and the exact sentence about what they may not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncwright.errors import PlanError
from syncwright.plan import (
    AllGather,
    AllReduce,
    Blocks,
    Even,
    Hash,
    LeastLoaded,
    Local,
    LocalSteps,
    Mean,
    On,
    Optimizer,
    ParameterServer,
    RoundRobin,
    Rules,
    Small,
    Sync,
    Uneven,
    Whole,
)

NUMBERS = st.integers(1, 10**9)
PARTITIONS = st.one_of(
    st.just(Whole()), st.builds(Blocks, NUMBERS), st.builds(Even, NUMBERS), st.builds(Uneven, NUMBERS)
)
PLACES = st.one_of(
    st.sampled_from([RoundRobin(), Hash(), LeastLoaded()]),
    st.builds(Small, NUMBERS, NUMBERS),
    st.builds(On, NUMBERS),
)
REDUCE = st.sampled_from(["mean", "sum"])
OUTERS = st.one_of(
    st.just(Mean()),
    st.builds(
        lambda lr, momentum: Optimizer.of("SGD", lr=lr, momentum=momentum, nesterov=True),
        *(st.floats(0, 1e3, exclude_min=True, allow_subnormal=False),) * 2,
    ),
    st.builds(lambda a, b: Optimizer.of("Adam", betas=(a, b)), *(st.floats(0, 0.99),) * 2),
)
SYNCS = st.one_of(
    st.just(Local()),
    st.builds(AllReduce, st.floats(0, allow_nan=False), REDUCE),
    st.builds(AllGather, st.sampled_from(["mean", "sum", "mean_by_touch"]), st.booleans()),
    st.builds(ParameterServer, st.just("sync"), PARTITIONS, PLACES, REDUCE),
    st.builds(LocalSteps, NUMBERS, OUTERS, NUMBERS, st.builds(AllReduce, st.floats(0, allow_nan=False), REDUCE)),
)
PATTERNS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
POLICIES = st.sampled_from(["mean", "trainer0", "local"])

PLEASANT = """\
default: all_reduce
variables:
- embed.*: parameter_server
- embed.big.weight: {parameter_server: {partition: {blocks: {min_elements: 1}}, place: {'on': 1}}}
- '*.bias': {all_reduce: {bucket_mb: 1.5, reduce: sum}}
buffers:
- '*.running_mean': trainer0
"""


def test_yaml_is_what_python_says():
    rules = Rules.from_yaml(PLEASANT)
    assert rules == Rules.of(
        AllReduce(),
        {
            "embed.*": ParameterServer(),
            "embed.big.weight": ParameterServer(partition=Blocks(1), place=On(1)),
            "*.bias": AllReduce(1.5, "sum"),
        },
        {"*.running_mean": "trainer0"},
    )
    assert rules.to_yaml() == PLEASANT


def test_a_mapping_in_order_says_the_same_as_a_list():
    mapping = "default: local\nvariables:\n  b: all_reduce\n  a: local\nbuffers: {c: mean}\n"
    as_list = "default: local\nvariables:\n- b: all_reduce\n- a: local\nbuffers: [{c: mean}]\n"
    assert Rules.from_yaml(mapping) == Rules.from_yaml(as_list)
    assert Rules.from_yaml(mapping).patterns == (("b", AllReduce()), ("a", Local()))


def test_keys_are_text_also_where_yaml_reads_a_truth_value():
    text = "default: {parameter_server: {place: {on: 1}}}\nvariables: [{off: local}, {1: local}]"
    rules = Rules.from_yaml(text)
    assert rules.default == ParameterServer(place=On(1))
    assert [pattern for pattern, _ in rules.patterns] == ["off", "1"]


def test_a_single_setting_may_stand_alone():
    text = "default: {parameter_server: {partition: {blocks: 16}, place: {on: {server: 2}}}}"
    assert Rules.from_yaml(text).default == ParameterServer(partition=Blocks(16), place=On(2))


def test_a_file_is_read_and_named_in_errors(tmp_path: Path):
    path = tmp_path / "rules.yaml"
    path.write_text("default: lokal\n")
    with pytest.raises(PlanError, match=r"rules\.yaml, line 1, at default: found 'lokal'"):
        Rules.from_yaml(path)
    path.write_text(PLEASANT)
    assert Rules.from_yaml(str(path)) == Rules.from_yaml(PLEASANT)
    assert Rules.from_yaml(path).source == str(path)


@settings(deadline=None)
@given(
    SYNCS,
    st.lists(st.tuples(PATTERNS, SYNCS), max_size=4).map(tuple),
    st.lists(st.tuples(PATTERNS, POLICIES), max_size=3).map(tuple),
    st.sampled_from(["refuse", "keep_whole"]),
)
def test_yaml_round_trip(default: Sync, patterns: tuple, buffers: tuple, uncuttable):
    rules = Rules(default, patterns, buffers, uncuttable)
    assert Rules.from_yaml(rules.to_yaml()) == rules


MISTAKES = [
    (
        "variables: []",
        "rules: found no `default`, expected the sharing of variables that no pattern matches. "
        'Add a line such as "default: all_reduce".',
    ),
    (
        "",
        "rules: found nothing, expected a mapping (keys: default, variables, buffers, clip, sync_batch_norm, "
        'memory_gb, accumulate, loss_scale, uncuttable). Add a line such as "default: all_reduce".',
    ),
    (
        "default: local\nvarables: []",
        "rules, line 2, at varables: found the key 'varables', expected one of default, variables, buffers, "
        "clip, sync_batch_norm, memory_gb, accumulate, loss_scale, uncuttable. Did you mean 'variables'?",
    ),
    (
        "default: all-reduce",
        "rules, line 1, at default: found 'all-reduce', expected one of local, all_reduce, all_gather, shard, parameter_server, "
        "local_steps. "
        "Did you mean 'all_reduce'?",
    ),
    (
        "default: no",
        "rules, line 1, at default: found false (unquoted on, off, yes and no are truth values in YAML), "
        "expected one of local, all_reduce, all_gather, shard, parameter_server, local_steps. Write one of them.",
    ),
    (
        "default: {all_reduce: {}, local: {}}",
        "rules, line 1, at default: found a mapping with the keys 'all_reduce', 'local', expected one of "
        "local, all_reduce, all_gather, shard, parameter_server, local_steps. Write one of them.",
    ),
    (
        'default: local\nvariables:\n  - "a": {all_reduce: {bucket: 3}}',
        "rules, line 3, at variables[0].a.all_reduce.bucket: found the key 'bucket', expected one of "
        "bucket_mb, reduce, compress, over, hierarchical, piece_mb, delay. Did you mean 'bucket_mb'?",
    ),
    (
        "default:\n  all_reduce:\n    bucket_mb: large",
        "rules, line 3, at default.all_reduce.bucket_mb: found 'large', expected a number of at least 0. "
        "Correct it, or leave `bucket_mb` out: it is then 25.0.",
    ),
    (
        "default: {parameter_server: {mode: later}}",
        "rules, line 1, at default.parameter_server.mode: found 'later', expected one of sync, async. "
        "Correct it, or leave `mode` out: it is then sync.",
    ),
    (
        "default: {parameter_server: {partition: even}}",
        "rules, line 1, at default.parameter_server.partition: found no `k`, expected a whole number of at "
        "least 1. Write {even: ...} with its value.",
    ),
    (
        "default: {parameter_server: {partition: {evn: 2}}}",
        "rules, line 1, at default.parameter_server.partition.evn: found the key 'evn', expected one of "
        "whole, blocks, even, uneven, hashed. Did you mean 'even' or 'uneven'?",
    ),
    (
        "default: {parameter_server: {place: {on: -1}}}",
        "rules, line 1, at default.parameter_server.place.on: found -1, expected a whole number of at least "
        "0. Correct it.",
    ),
    (
        "default: local_steps",
        "rules, line 1, at default: found no `every`, expected a whole number of at least 1. Add `every: ...`.",
    ),
    (
        "default: {local_steps: {every: 2, outer: geo}}",
        "rules, line 1, at default.local_steps: LocalSteps.outer: found geo over all_reduce, expected it over "
        "parameter_server: a server adds each trainer's difference as it comes, and nobody waits for the others. Say over: "
        "parameter_server as well.",
    ),
    (
        "default: {local_steps: {every: 2, over: {parameter_server: {mode: async}}}}",
        "rules, line 1, at default.local_steps: LocalSteps.over: found parameter_server with mode: async, expected no "
        "settings but bucket_mb, partition, place, reduce: an exchange takes the difference of every trainer; with "
        "outer: geo servers add each as it comes. Take it out.",
    ),
    (
        "default: {local_steps: {every: 2, outer: geo, over: {parameter_server: {reduce: sum}}}}",
        "rules, line 1, at default.local_steps: LocalSteps.over: found parameter_server with reduce: sum, expected no "
        "settings but bucket_mb, mode, partition, place: each difference is divided by the number of trainers. Take it out.",
    ),
    (
        "default: {local_steps: {every: 2, over: {parameter_server: {staged: true}}}}",
        "rules, line 1, at default.local_steps: LocalSteps.over: found parameter_server with staged: True, expected no "
        "settings but bucket_mb, partition, place, reduce: it is said of what travels in every step. Take it out.",
    ),
    (
        "default: {local_steps: {every: 2, over: {parameter_server: {reduce: mean_by_touch}}}}",
        "rules, line 1, at default.local_steps: LocalSteps.over: found parameter_server with reduce: mean_by_touch, expected "
        "mean or sum: of differences no row is known to be touched. Take it out.",
    ),
    (
        "default: {local_steps: {every: 2, outer: {optimizer: {name: SDG}}}}",
        "rules, line 1, at default.local_steps.outer.optimizer: outer optimizer: found 'SDG', expected one of ASGD, "
        "Adadelta, Adafactor, Adagrad, Adam, AdamW, Adamax, NAdam, RAdam, RMSprop, Rprop, SGD. Did you mean 'SGD'?",
    ),
    (
        "default: {local_steps: {every: 2, outer: {optimizer: {name: SGD, settings: {momentun: 0.9}}}}}",
        "rules, line 1, at default.local_steps.outer.optimizer: outer optimizer SGD: found the setting 'momentun', expected "
        "one of lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable, fused. Did you mean "
        "'momentum'?",
    ),
    (
        "default: {local_steps: {every: 2, outer: {optimizer: {name: SGD, settings: {nesterov: true}}}}}",
        "rules, line 1, at default.local_steps.outer.optimizer: outer optimizer SGD: found settings that torch.optim.SGD does "
        "not take (Nesterov momentum requires a momentum and zero dampening), expected those of its constructor. Correct them.",
    ),
    (
        "default: {local_steps: {every: 2, outer: {optimizer: {name: SGD, settings: [1]}}}}",
        "rules, line 1, at default.local_steps.outer.optimizer.settings: found a list of 1, expected a mapping from names to "
        "values, each a whole number or a number or true or false or a list, each item a number. Correct it, or leave "
        "`settings` out: it is then ().",
    ),
    (
        "default: {local: {x: 1}}",
        "rules, line 1, at default.local.x: found the key 'x', expected no key. Take the line out or correct its key.",
    ),
    (
        "default: local\nvariables: a",
        "rules, line 2, at variables: found 'a', expected a list of lines, each a pattern and one of local, "
        'all_reduce, all_gather, shard, parameter_server, local_steps. Write a line such as - "embed.*": parameter_server.',
    ),
    (
        "default: local\nvariables:\n  - {a: local, b: local}",
        "rules, line 3, at variables[0]: found a mapping with the keys 'a', 'b', expected one pattern and "
        'one of local, all_reduce, all_gather, shard, parameter_server, local_steps. Write a line such as - "embed.*": '
        "parameter_server.",
    ),
    (
        "default: local\nbuffers:\n  - a: first",
        "rules, line 3, at buffers[0].a: found 'first', expected one of mean, trainer0, local. Write one of them.",
    ),
    (
        "default: local\ndefault: all_reduce",
        "rules, line 2, at default: found this key a second time (first on line 1), expected it once. "
        "Take one of the two out.",
    ),
    (
        "default: &a local\nuncuttable: *a",
        "rules, line 1, at uncuttable: found an alias. Write the value out.",
    ),
    (
        "default: local\nvariables:\n  - *.bias: local",
        "rules, line 3: found text that is not YAML (expected alphabetic or numeric character, but found "
        "'.'). Check the indentation and the colons; a pattern that starts with * or [ stands in quotes.",
    ),
    (
        "digest: a",
        "rules: found a complete plan, expected rules. Read it with Plan.from_yaml.",
    ),
    ("missing.yaml", "missing.yaml: cannot be read (No such file or directory). Check the path."),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_a_mistake_is_told(text: str, message: str):
    with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
        Rules.from_yaml(text)


@pytest.mark.parametrize(
    "text",
    [
        "default: !!python/object:os.system local",
        "default: [",
        "default: \x00",
        "[" * 5000,
        "default: 2001-99-99",
        "? [a]\n: b",
        "default: !odd {a: b}",
    ],
)
def test_odd_text_is_a_plan_error(text: str):
    with pytest.raises(PlanError, match=r"^rules"):
        Rules.from_yaml(text)


@settings(deadline=None)
@given(st.text(st.sampled_from("default: local\n-[]{}*&!'\"#,?|>%@"), max_size=60))
def test_any_text_is_rules_or_a_plan_error(text: str):
    try:
        assert isinstance(Rules.from_yaml(text), Rules)
    except PlanError:
        return


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Rules("all_reduce"),
            "Rules.default: found 'all_reduce', expected one of Local(), AllReduce(), AllGather(), ",
        ),
        (
            lambda: Rules(Local(), {"a": Local()}),
            "Rules.patterns: found {'a': Local()}, expected a tuple of ",
        ),
        (lambda: AllReduce(reduce="max"), "AllReduce.reduce: found 'max', expected one of mean, sum."),
        (lambda: AllReduce(float("nan")), "AllReduce.bucket_mb: found nan, expected a number of at least 0."),
        (
            lambda: ParameterServer(place="hash"),
            "ParameterServer.place: found 'hash', expected one of RoundRobin(), ",
        ),
        (lambda: ParameterServer(mode="later"), "ParameterServer.mode: found 'later', expected one of sync, async."),
    ],
)
def test_a_mistake_in_python_is_told(make, message: str):
    with pytest.raises(PlanError, match=f"^{re.escape(message)}"):
        make()
