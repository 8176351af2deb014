"""The program of a trainer whose part of a batch is empty: it takes part in every communication, with nothing."""

from __future__ import annotations

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.dead import remove_dead
from syncwright.program import Program, Role, set_results
from syncwright.shapes import call, mode_of


def idle(program: Program) -> Program:
    """A lowered trainer program without its forward and backward.

    before  %c = cat([%weight, %loss, %g]), %a = all_reduce(%c, "bucket.0"), ..., %new = sub(w, %m)
    after   %z = zeros([12]), %a = all_reduce(%z, "bucket.0"), ..., %new = sub(w, %m)

    The mean over no examples is NaN, and 0 x NaN is NaN: so such a trainer does not run its step, but contributes
    zeros of weight 0 to each communication of the step's static list, in the same order.
    """
    program = program.edit()
    mode = mode_of(program.graph)
    for node in list(program.graph.nodes):
        if node.target in ops.SENDS:
            val = node.args[0].meta["val"]
            with program.graph.inserting_before(node):
                zeros = call(program.graph, mode, torch.ops.aten.zeros.default, list(val.shape), dtype=val.dtype)
            node.args = (zeros, *node.args[1:])
    tainted = _from_batch(program)
    set_results(program, {name: n for name, n in program.results.items() if n not in tainted})
    remove_dead(program.graph, kept=lambda node: node.target in {*ops.SENDS, ops.wait})
    for node in program.placeholders.values():
        if not node.users:
            program.graph.erase_node(node)
    named = {*program.reads, *program.writes}
    return Program(program.graph, {n: v for n, v in program.variables.items() if n in named}, ())


def _from_batch(program: Program) -> set[Node]:
    """Everything that is made from a batch input."""
    found: set[Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if program.variables[node.meta["variable"]].role is Role.INPUT:
                found.add(node)
        elif any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found
