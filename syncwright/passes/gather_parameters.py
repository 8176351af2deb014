"""Parameters of which trainers keep parts, read by a program that updates nothing: gathered where they are first read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from operator import getitem

import torch

from syncwright import ops
from syncwright.passes.insert import before_first_use, in_group
from syncwright.program import Program, Variable, new_placeholder
from syncwright.shapes import Inference, mode_of

aten = torch.ops.aten


def gather_parameters(program: Program, kept: Iterable[Variable]) -> Program:
    """Reads variables of which each trainer keeps its own part.

    before  w = placeholder f32[3,2], %y = mm(%x, w)
    after   w[own] = placeholder f32[3], %p = gather_parts([w[own]], "w"), %y = mm(%x, view(wait_whole(%p)[0], [3, 2]))

    kept  the parts, of variables that the program may read; of what one trainer keeps whole, that
    """
    placeholders = program.placeholders
    wanted = [part for part in kept if part.own is not None and part.own.of in placeholders]
    if not wanted:
        return program
    program = program.edit()
    known, variables = Inference(mode_of(program.graph)), dict(program.variables)
    for part in wanted:
        own, node = part.own, program.placeholders[part.own.of]  # type: ignore[union-attr]
        assert own is not None, "looked at before"
        with program.graph.inserting_before(node):
            read = new_placeholder(program.graph, part, known.fake_of(part))
        with before_first_use(node.users):
            if own.keeper is None:
                started = known.call(
                    program.graph, ops.gather_parts, [read], own.of, own.trainers, *in_group(own.group)
                )
            else:
                started = known.call(program.graph, ops.give, [read], own.of, own.keeper, *in_group(own.group))
            flat = known.call(
                program.graph, getitem, known.call(program.graph, ops.wait_whole, started, own.of, [own.numel]), 0
            )
            whole = known.call(program.graph, aten.view.default, flat, list(own.shape))
        node.replace_all_uses_with(whole)
        program.graph.erase_node(node)
        variables[part.name] = part
        del variables[own.of]
    return replace(program, variables=variables)
