"""Delay compensation: a gradient that comes late is corrected for how far the value has moved since it was pulled."""

from __future__ import annotations

from dataclasses import replace

import torch

from syncwright import ops
from syncwright.passes.insert import read_variable
from syncwright.place import Owners, put
from syncwright.plan import ParameterServer, Plan
from syncwright.program import Program, Role
from syncwright.shapes import Inference, mode_of

aten = torch.ops.aten


def compensate(program: Program, plan: Plan) -> Program:
    """Corrects merged gradients where the plan says so.

    before  %m = push.merged(%g, "w.grad", "mean", 1) at owners "w", %new = sub(w, %m)
    after   %d = sub(w, w.pulled), %c = add(%m, mul(mul(mul(%m, %m), %d), 0.04)), %new = sub(w, %c)

    `w.pulled` is the value that the trainer of this gradient has pulled last; the server that keeps `w` knows it.
    Source: Zheng et al., Asynchronous Stochastic Gradient Descent with Delay Compensation, ICML 2017, equation 10.
    """
    strength = {
        f"{s.variable}.grad": s.sync.compensate
        for s in plan.sharings
        if isinstance(s.sync, ParameterServer) and s.sync.compensate
    }
    if not strength:
        return program
    program = program.edit()
    known = Inference(mode_of(program.graph))
    for merged in program.graph.find_nodes(op="call_function", target=ops.push_merged):
        if merged.args[1] in strength:
            program = _compensated(program, merged, strength[merged.args[1]], known)
    return program


def _compensated(program: Program, merged: torch.fx.Node, strength: float, known: Inference) -> Program:
    parameter = program.variables[merged.args[1]].of  # type: ignore[index]
    assert parameter is not None, "a gradient is of a parameter"
    kept, graph, users = program.variables[parameter], program.graph, list(merged.users)
    pulled = replace(kept, name=f"{parameter}.pulled", role=Role.GLOBAL, of=parameter, aliases=())
    program, value = read_variable(program, kept, known.fake_of(kept))
    program, before = read_variable(program, pulled, known.fake_of(kept))
    with graph.inserting_after(merged):
        moved = known.call(graph, aten.sub.Tensor, value, before)
    made = [value, before, moved]
    for target, *args in ((aten.mul.Tensor, merged), (aten.mul.Tensor, moved), (aten.mul.Tensor, strength)):
        with graph.inserting_after(made[-1]):
            made.append(known.call(graph, target, merged if made[-1] is moved else made[-1], *args))
    with graph.inserting_after(made[-1]):
        made.append(known.call(graph, aten.add.Tensor, merged, made[-1]))
    for node in made:
        put(node, Owners(parameter))
    for user in users:
        user.replace_input_with(merged, made[-1])
    return program
