"""Golden text for every pass: a program and a plan in, a program out; and both are run and compared.

tests/golden/<pass>/<case>/before.txt and plan.yaml are written by hand (or cut from a captured step); after.txt is
what the pass makes of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden_files import GOLDEN, check_golden

from syncwright import ops, passes
from syncwright.idle import idle
from syncwright.job import ServerPart
from syncwright.lower import lower
from syncwright.passes.flat import flat_parts
from syncwright.passes.insert import peers_of
from syncwright.plan import ParameterServer, Plan
from syncwright.program import Program, Role
from syncwright.runtime.flat_values import laid_flat
from syncwright.runtime.own_parts import own_part
from syncwright.schema import argument
from syncwright.text import parse, to_text
from syncwright.verify import verify, verify_after
from tests.mirrored import known_pulls, run_mirrored, some_values, truth_of
from tests.together import cut_values, real_part, run_together

PASSES: dict[str, Callable[[Program, Plan], Program]] = {each.__name__: each for each in passes.COMPILED}
CASES = sorted(path.parent for name in PASSES for path in (GOLDEN / name).glob("*/before.txt"))
IDLE_CASES = sorted(path.parent for path in (GOLDEN / "idle").glob("*/before.txt"))
CUT_CASES = sorted(path.parent for path in (GOLDEN / "cut").glob("*/before.txt"))


def case_name(case: Path) -> str:
    return f"{case.parent.name}/{case.name}"


def given(case: Path) -> tuple[Program, Plan]:
    program = parse((case / "before.txt").read_text(encoding="utf-8"))
    verify(program)
    return program, Plan.from_yaml(case / "plan.yaml")


def test_every_pass_has_a_golden_case():
    assert {case.parent.name for case in CASES} == set(PASSES)


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_golden_pass(case):
    before, plan = given(case)
    text = to_text(before)
    after = PASSES[case.parent.name](before, plan)
    assert to_text(before) == text, "a pass leaves its input as it is"
    verify_after(case.parent.name, before, after)
    check_golden(f"{case_name(case)}/after", to_text(after))
    check_same_results(before, after, plan)


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_does_nothing_for_one_device(name):
    before, _ = given(GOLDEN / "cut" / "clip")
    alone = Plan("", trainers=1, servers=0, reducer=None, sharings=())
    after = PASSES[name](before, alone)
    if name not in ("tidy", "flatten"):
        assert after is before


def check_same_results(before: Program, after: Program, plan: Plan) -> None:
    """Where all trainers have one batch, a step computes what one device computes, to the bit; so do servers' parts."""
    if any(argument(node, "group") for node in after.graph.nodes if node.target in ops.SENDS):
        check_same_groups(before, after, plan)
        return
    if plan.accumulate > 1:
        check_same_of_one_call(before, after, plan)
        return
    if any(variable.own is not None for variable in after.variables.values()):
        check_same_parts(before, after, plan)
        return
    if compresses(before, after):
        check_nothing_is_lost(before, after, plan)
        return
    values = some_values(before)
    written, run = run_mirrored(before, values, plan.trainers, known_pulls(before))
    truth = truth_of(before, plan, values, written, run)
    values, written = packed(after, values), packed(after, written)
    pulled = [v for v in after.variables.values() if v.role is Role.GLOBAL and v.of is not None]
    values |= {variable.name: values[variable.of] for variable in pulled}
    hosts = len(plan.hosts) or 1
    found, new_run = run_mirrored(after, {**some_values(after), **values}, plan.trainers, truth, hosts=hosts)
    written |= {name: values["batch.0"] for name in set(found) - set(written) if name.startswith("lookups of ")}
    assert set(found) <= set(written)
    for name, value in found.items():
        counted = not value.dtype.is_floating_point and bits(value) == bits(written[name] * plan.trainers)
        assert counted or bits(value) == bits(written[name]), name
    gone = set(written) - set(found)
    owned = {s.variable for s in plan.sharings if s.owners}
    assert {before.variables[name].of or name for name in gone} <= owned, "only what servers own is written elsewhere"
    check_pushed_gradients(before, plan, run.seen, new_run.sent)


def check_same_of_one_call(before: Program, after: Program, plan: Plan) -> None:
    """Where nothing has been added up before and all calls count as one: nothing is added up after."""
    begun = {v.name: 0.0 for v in after.variables.values() if v.initial is not None}
    values = {**some_values(after), **some_values(before), "call.weight": 1.0, "batch.inverse": 1.0}
    values |= {name: torch.zeros(after.variables[name].shape) for name in begun}
    given = [{**values, "trainer.rank": trainer} for trainer in range(plan.trainers)]
    for found, expected in zip(run_together(after, given), run_together(before, given), strict=True):
        assert set(found) == {*expected, *begun}
        assert {name: bits(value) for name, value in expected.items()} == {name: bits(found[name]) for name in expected}
        assert not any(found[name].any() for name in begun)


def compresses(before: Program, after: Program) -> bool:
    """Whether a pass has made gradients into something else, of which some is kept or all is gathered."""
    kept, sent = ([v for v in p.variables.values() if v.initial is not None] for p in (before, after))
    gathered = [p.graph.find_nodes(op="call_function", target=ops.gather_parts) for p in (before, after)]
    return len(kept) < len(sent) or len(gathered[0]) < len(gathered[1])


def check_nothing_is_lost(before: Program, after: Program, plan: Plan) -> None:
    """What one device computes for gradients that trainers apply in part: with what each keeps for later it is all of them.

    Of SGD without momentum: the old value less the new one is lr times what was applied. Nothing was kept before. Where nothing
    is kept, it is off by half a 127th of the largest.
    """
    values = {**some_values(before), **some_values(after)}
    values |= {
        name: torch.zeros_like(values[name]) for name in values if name.endswith((".residual", ".factor", ".velocity"))
    }
    expected, _ = run_mirrored(before, values, plan.trainers, {})
    found, _ = run_mirrored(after, values, plan.trainers, {})
    for name in [name for name in found if name.endswith(".residual")]:
        whole = name.removesuffix(".residual")
        kept = plan.trainers * found[name].view_as(values[whole]) * values["optimizer.0.lr"]
        torch.testing.assert_close(found[whole] - kept, expected[whole])
    assert set(expected) <= set(found)
    for name in [n for n in expected if f"{n}.residual" not in found and before.variables[n].role is Role.PARAM]:
        most = (expected[name] - values[name]).abs().max()
        assert float((found[name] - expected[name]).abs().max()) <= float(most) / 254 + 1e-6, name


def check_same_groups(before: Program, after: Program, plan: Plan) -> None:
    """The same, where trainers reduce in groups."""
    values = {**some_values(after), **some_values(before)}
    given = cut_values(after, values, plan.trainers)
    for name in plan.groups.needed(sharing.sync for sharing in plan.sharings):
        for trainer, each in enumerate(given):
            each[peers_of(name).name] = len(plan.groups.around(name, trainer))
    found, expected = (run_together(program, given, plan.groups) for program in (after, before))
    own = {v.name: v.own for v in after.variables.values() if v.own is not None}
    for trainer, (mine, its) in enumerate(zip(found, expected, strict=True)):
        for name, value in mine.items():
            other = its[name] if name in its else own_part(its[own[name].of], own[name], trainer)
            if name in own:
                value, other = real_part(value, own[name], trainer), real_part(other, own[name], trainer)
            assert bits(value) == bits(other), (name, trainer)


def check_same_parts(before: Program, after: Program, plan: Plan) -> None:
    """The same, where trainers keep parts of their own: each has its part of what one device computes."""
    own = {v.name: v.own for v in after.variables.values() if v.own is not None}
    known = {v.name for v in before.variables.values() if v.own is not None}
    values = {**some_values(after), **some_values(before)}
    if known:
        given = [{**values, "trainer.rank": trainer} for trainer in range(plan.trainers)]
        written = [packed(after, each) for each in run_together(before, given)]
        given = [{**each, **packed(after, each)} for each in given]
    else:
        given = cut_values(after, values, plan.trainers)
        written = [run_mirrored(before, values, plan.trainers, {})[0]] * plan.trainers
    joined = any(str(n.args[1]).startswith("global.") for n in after.graph.nodes if n.target is ops.gather_parts)
    for trainer, (found, expected) in enumerate(zip(run_together(after, given), written, strict=True)):
        assert known or {own[name].of if name in own else name for name in found} == set(expected)
        for name, value in found.items():
            other = expected[name] if name in expected else own_part(expected[own[name].of], own[name], trainer)
            if name in own:
                value, other = real_part(value, own[name], trainer), real_part(other, own[name], trainer)
            if joined:  # a norm of norms is the norm but for rounding
                torch.testing.assert_close(value, other)
            else:
                assert bits(value) == bits(other), name


def packed(program: Program, values: dict) -> dict:
    """Values by the names that `program` uses: parts of a flat variable in their places, and zeros between them."""
    found = dict(values)
    for name, parts in flat_parts(program).items():
        known = [part for part in parts if part.name in values]
        if known:
            flat = program.variables[name]
            found[name] = laid_flat(flat, known, values) if flat.shape else values[known[0].name]
            for part in known:
                del found[part.name]
    return found


def check_pushed_gradients(before: Program, plan: Plan, seen: dict, sent: dict) -> None:
    """Gradients arrive on servers cut and scaled, so that the sum over trainers is theirs."""
    for mark in before.graph.find_nodes(op="call_function", target=ops.gradient):
        name = f"{mark.args[1]}.grad"
        sync = next((s.sync for s in plan.sharings if s.variable == mark.args[1]), None)
        share = plan.trainers
        if isinstance(sync, ParameterServer):
            share = 1 if not sync.in_step else len(plan.hosts) if sync.merge_on_host else plan.trainers
        whole = seen[mark.name]
        for channel, rows in {name: whole, **rows_of_gradient(plan, str(mark.args[1]), whole)}.items():
            if channel in sent:
                assert bits(sent[channel] * share) == bits(rows), channel


def rows_of_gradient(plan: Plan, parameter: str, whole: torch.Tensor) -> dict[str, torch.Tensor]:
    pieces = next((s.pieces for s in plan.sharings if s.variable == parameter), ())
    return {f"{parameter}.grad[{p.index}]": whole[p.start : p.stop] for p in pieces} if len(pieces) > 1 else {}


def bits(value: torch.Tensor) -> tuple:
    return tuple(value.shape), value.dtype, value.contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("case", IDLE_CASES, ids=case_name)
def test_golden_idle(case):
    before, _ = given(case)
    after = idle(before)
    verify(after)
    check_golden(f"{case_name(case)}/after", to_text(after))
    values, pulls = some_values(before), known_pulls(before)
    _, alone = run_mirrored(after, {**values, "batch.weight": 0.0}, 2, pulls)
    written, busy = run_mirrored(before, {**values, "batch.weight": 2.0}, 2, pulls, peers=alone.sent)
    found, run = run_mirrored(after, {**values, "batch.weight": 0.0}, 2, pulls, peers=busy.sent)
    assert [(c, t.shape) for c, t in run.sent.items()] == [(c, t.shape) for c, t in busy.sent.items()]
    assert {name: bits(value) for name, value in found.items()} == {name: bits(written[name]) for name in found}
    sums = [sent for channel, sent in run.sent.items() if not channel.startswith("global.")]
    assert not any(sent.any() for sent in sums), "it adds nothing"
    shared = [channel for channel in run.sent if channel.startswith("global.")]
    assert all(torch.equal(run.sent[channel], busy.sent[channel]) for channel in shared), "it knows what all know"


@pytest.mark.parametrize("case", CUT_CASES, ids=case_name)
def test_golden_cut(case):
    """Servers' programs, run on pieces of what one device has, give pieces of what it writes."""
    before, plan = given(case)
    parts = lower(before, plan).servers
    check_golden(f"{case_name(case)}/after", "\n".join(part_text(part) for part in parts))
    values = some_values(before)
    written, run = run_mirrored(before, values, plan.trainers, {})
    truth = truth_of(before, plan, values, written, run)
    have = {name: value for (name, later), value in truth.items() if later == name.startswith("global.")} | {
        name: value for name, value in values.items() if not isinstance(value, torch.Tensor)
    }
    for mark in before.graph.find_nodes(op="call_function", target=ops.gradient):
        whole = run.seen[mark.name]
        have |= {f"{mark.args[1]}.grad": whole, **rows_of_gradient(plan, str(mark.args[1]), whole)}
    programs = [program for part in parts for program in part.programs]
    while programs:
        ready = [p for p in programs if all(name in have for name in p.reads)]
        assert ready, f"nothing feeds {[p.reads for p in programs]}"
        for program in ready:
            check_server_program(program, have, truth)
        programs = [p for p in programs if p not in ready]


def check_server_program(program: Program, have: dict, truth) -> None:
    """Elementwise updates are equal to the bit; norms of pieces, up to the order in which they are added."""
    for name, value in program.run({name: have[name] for name in program.reads}).items():
        if (name, True) in truth:
            torch.testing.assert_close(torch.as_tensor(value), truth[name, True], rtol=1e-6, atol=1e-7)
        else:
            have[name] = value


def part_text(part: ServerPart) -> str:
    exports = [f"# exports {name} to server {', '.join(map(str, to))}" for name, to in part.exports.items()]
    holds = ", ".join(v.name for v in part.holds)
    return "\n".join([f"# server {part.rank} keeps {holds}", *exports, "", *map(to_text, part.programs)])
