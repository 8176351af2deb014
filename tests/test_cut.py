"""The cut: passes can change what servers do, pieces are cut as the update uses them, digests are of ops alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import syncwright
from syncwright import ParameterServer, Rules, ops
from syncwright.errors import LoweringError
from syncwright.lower import Pass, _lines, lower
from syncwright.passes import PIPELINE, average_gradients, share_globals
from syncwright.place import place_of, put
from syncwright.plan import Even
from syncwright.planning import make_plan
from syncwright.program import Program, Role, Variable, new_placeholder, set_results
from syncwright.runtime import programs
from syncwright.shapes import call, fake, mode_of
from syncwright.text import to_text
from syncwright.update import find_updates

aten = torch.ops.aten
HALVES = Rules(ParameterServer(partition=Even(2)))


class Weight(nn.Module):
    """A square matrix: as many rows as columns."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.arange(16.0).reshape(4, 4) / 8 - 1)


def step(model, optimizer, x):
    optimizer.zero_grad()
    loss = (model.w * x).pow(2).mean()
    loss.backward()
    optimizer.step()
    return loss


class Update(torch.optim.Optimizer):
    """w -= rule(w, gradient, state)."""

    def __init__(self, parameters, rule):
        super().__init__(parameters, {})
        self.rule = rule

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.rule(p, p.grad, self.state[p]))


def trust_ratio(p, g, state):
    return g * (0.5 * torch.linalg.vector_norm(p) / torch.linalg.vector_norm(g))


def half_of_all(p, g, state):
    return g * torch.full([4, 4], 0.5) / torch.ones([4, 4]).sum()


def one_constant_twice(p, g, state):
    ones = torch.ones([4, 4])
    return g * ones / ones.sum()


def by_columns(p, g, state):
    if not state:
        state["seen"] = torch.zeros(4)
    state["seen"].add_(1.0)
    return g * state["seen"]


def by_rows(p, g, state):
    if not state:
        state["seen"] = torch.zeros(4, 1)
    state["seen"].add_(g.abs().sum(1, keepdim=True))
    return g * state["seen"]


def captured(rule) -> Program:
    model = Weight()
    return syncwright.capture(step, model, Update(model.parameters(), rule), torch.ones(2, 1, 1))


def trained(rule, plan: Rules | None, steps: int = 3) -> torch.Tensor:
    """w behind three steps, on two servers or, without a plan, on one device."""
    model = Weight()
    optimizer = Update(model.parameters(), rule)
    batches = [torch.full((2, 1, 1), 1.0 + n / 4) for n in range(steps)]
    if plan is None:
        for x in batches:
            step(model, optimizer, x)
    else:
        job = syncwright.loopback(step, model, optimizer, plan=plan, trainers=2, servers=2)
        for x in batches:
            job.step([(x[:1],), (x[1:],)])
        job.sync()
    return model.w.detach()


def test_constants_are_cut_only_where_they_meet_pieces():
    assert torch.equal(trained(half_of_all, HALVES), trained(half_of_all, None))


def test_a_norm_that_an_update_reads_for_itself_is_the_whole_variables():
    torch.testing.assert_close(trained(trust_ratio, HALVES), trained(trust_ratio, None), rtol=1e-6, atol=1e-7)


def test_a_constant_that_is_used_in_two_ways_is_refused():
    with pytest.raises(
        LoweringError, match=r"^ones has the sizes of a parameter that is cut, and is used with it and also"
    ):
        trained(one_constant_twice, HALVES)


@pytest.mark.parametrize(("rule", "kind"), [(by_rows, "row-wise"), (by_columns, "whole"), (trust_ratio, "elementwise")])
def test_state_is_aligned_as_the_update_uses_it(rule, kind):
    assert find_updates(captured(rule)).kinds() == {"w": kind}


def behind(known: Pass, new: Pass) -> tuple[Pass, ...]:
    """The pipeline with a pass behind one of its own."""
    place = PIPELINE.index(known) + 1
    return (*PIPELINE[:place], new, *PIPELINE[place:])


def test_a_pass_can_change_what_servers_do(monkeypatch):
    """Merged gradients are halved where they are kept: one node in the whole program, one in each server's."""

    def halve(program, plan):
        program = program.edit()
        for node in program.graph.find_nodes(op="call_function", target=ops.push_merged):
            users = [user for user in node.users if user.target is not ops.pull_value]
            if users:
                with program.graph.inserting_after(node):
                    half = call(program.graph, mode_of(program.graph), aten.mul.Tensor, node, 0.5)
                put(half, place_of(node))
                for user in users:
                    user.replace_input_with(node, half)
        return program

    changed = behind(share_globals, halve)
    program = captured(lambda p, g, state: g)
    job = lower(program, make_plan(HALVES, program, 2, 2), passes=changed)
    for part in job.servers:
        (update,) = part.programs
        assert "aten.mul.Tensor(%v_w_grad, 0.5)" in to_text(update)
    monkeypatch.setattr(programs, "PIPELINE", changed)
    assert torch.equal(trained(lambda p, g, state: g, HALVES), trained(lambda p, g, state: g * 0.5, None))


def delayed(p, g, state):
    before = state.get("before", torch.zeros_like(p))
    state["before"] = g.clone()
    return before


@pytest.mark.parametrize("plan", ["all_reduce", "parameter_server", HALVES])
def test_a_pass_can_add_state_wherever_a_variable_is_kept(monkeypatch, plan):
    """Every update uses the gradient of the step before: state that the user's optimizer does not have."""

    def delay(program, plan):
        program = program.edit()
        w, results = program.variables["w"], program.results
        reduced = next(n for n in program.graph.nodes if n.target in (ops.wait, ops.push_merged) and "w" in n.args[1])
        kept = tuple(replace(part, of="w.delayed") for part in w.kept)
        mine = Variable("w.delayed", Role.STATE, w.shape, w.dtype, of="w", initial=0.0, kept=kept)
        with program.graph.inserting_before(next(n for n in program.graph.nodes if n.op != "placeholder")):
            before = new_placeholder(program.graph, mine, fake(mode_of(program.graph), w.shape, w.dtype))
        for user in list(reduced.users):
            user.replace_input_with(reduced, before)
        if w.kept:
            put(before, place_of(reduced))
        set_results(program, {**results, "w.delayed": reduced})
        return replace(program, variables={**program.variables, "w.delayed": mine})

    monkeypatch.setattr(programs, "PIPELINE", behind(average_gradients, delay))
    assert torch.equal(trained(lambda p, g, state: g, plan), trained(delayed, None))


def test_a_digest_holds_no_addresses():
    """All roles compare it, and each is a process of its own."""
    model = Weight()
    program = syncwright.capture(step, model, torch.optim.Adafactor(model.parameters()), torch.ones(2, 1, 1))
    job = lower(program, make_plan("parameter_server", program, 2, 1))
    lines = [line for part in job.servers for each in part.programs for line in _lines(each)]
    assert any("torch.sym_min" in line for line in lines)
    assert not any(" at 0x" in line for line in lines)


def test_without_the_pass_that_puts_norms_together():
    program = captured(trust_ratio)
    plan = make_plan(HALVES, program, 2, 2)
    with pytest.raises(
        LoweringError, match=r"^the pass 'share_globals' is left out, but the plan keeps 'w' on a server"
    ):
        lower(program, plan, without=["share_globals"])
    whole = make_plan("parameter_server", program, 2, 1)
    assert lower(program, whole, without=["share_globals"]).digest == lower(program, whole).digest
