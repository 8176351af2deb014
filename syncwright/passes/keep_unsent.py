"""What trainers have not sent of a gradient stays as it was in a step that is skipped."""

from __future__ import annotations

import torch
from torch.fx import Node

from syncwright.passes.insert import behind
from syncwright.plan import Plan
from syncwright.program import Program, Role, set_results
from syncwright.shapes import Inference, mode_of
from syncwright.split import own_name
from syncwright.update import skipped_by

aten = torch.ops.aten


def keep_unsent(program: Program, plan: Plan) -> Program:
    """State that compression has added is chosen as the parameter is: an infinite gradient would leave NaN in it for ever.

    before  output({"w": where(%skipped, w, %new), "w.residual": %left})
    after   output({"w": where(%skipped, w, %new), "w.residual": where(%skipped, w.residual, %left)})

    What a skipped step has sent has had no effect, so that what it had not sent is still all that is missing. This also
    holds for the right factor of PowerSGD, with which the next step begins.
    """
    skipped = {v.name: _skipped(program, str(v.of)) for v in program.of_role(Role.STATE) if v.initial is not None}
    wanted = [name for name, node in skipped.items() if node is not None and name in program.writes]
    if not wanted:
        return program
    program = program.edit()
    known, results = Inference(mode_of(program.graph)), program.results
    for name in wanted:
        condition, new = _skipped(program, str(program.variables[name].of)), results[name]
        assert condition is not None, "it was there before the program was copied"
        with behind(max(condition, new)):
            results[name] = known.call(program.graph, aten.where.self, condition, program.placeholders[name], new)
    set_results(program, results)
    return program


def _skipped(program: Program, parameter: str) -> Node | None:
    """The condition on which a parameter, or a trainer's own part of it, stays as it was."""
    return skipped_by(program, own_name(parameter)) or skipped_by(program, parameter)
