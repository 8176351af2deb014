"""Global values (a clip coefficient) whose parts lie with servers as well as trainers."""

from __future__ import annotations

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.passes.insert import before_first_use, behind
from syncwright.plan import ParameterServer, Plan
from syncwright.program import Program
from syncwright.shapes import Inference, call, mode_of
from syncwright.split import Split, global_variable, split
from syncwright.update import Join, find_updates


def share_globals(program: Program, plan: Plan) -> Program:
    """Trainers push their parts to the reducer and pull the value; servers do the same in their own programs.

    before  %n0 = vector_norm(%g0), %n1 = vector_norm(%g1), %c = clamp(...), %s = mul(%g0, %c)        (w1 on a server)
    after   %n0 = vector_norm(%g0), %t = push(%n0, "global.n0"), %c = pull([%t, %g1], "global.c"), %s = mul(%g0, %c)

    A pull waits for what its value is made of: parts of trainers, and gradients that `serve_parameters` will push.
    """
    if not any(isinstance(s.sync, ParameterServer) for s in plan.sharings):
        return program
    program = program.edit()
    parts = split(program, find_updates(program), plan)
    for join in parts.joins:
        tokens = _push_partials(program, parts, join)
        for value in join.values:
            _pull_value(program, value, tokens, set(join.nodes) | set(join.partials))
    return program


def _push_partials(program: Program, parts: Split, join: Join) -> list[Node]:
    """Pushes the trainers' parts; what a pull of the value has to wait for."""
    tokens, known = [], Inference(mode_of(program.graph))
    for node, parameter in join.partials.items():
        if parameter not in parts.pieces:
            with behind(node):
                tokens.append(known.call(program.graph, ops.push, node, global_variable(node).name))
    marks = [parts.updates.marks.get(p) for p in dict.fromkeys(join.partials.values()) if p in parts.pieces]
    return [*tokens, *(mark for mark in marks if mark is not None)]


def _pull_value(program: Program, value: Node, tokens: list[Node], inside: set[Node]) -> None:
    users = [u for u in value.users if u not in inside]
    if not users:
        return
    variable = global_variable(value)
    with before_first_use(users):
        mode = mode_of(program.graph)
        pulled = call(program.graph, mode, ops.pull, tokens, variable.name, list(variable.shape), variable.dtype)
        if isinstance(value.meta["val"], type):
            pulled = call(program.graph, mode, torch.ops.aten._local_scalar_dense.default, pulled)
    for user in users:
        user.replace_input_with(value, pulled)
