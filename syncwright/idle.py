"""The program of a trainer whose part of a batch is empty: it takes part in every communication, with nothing."""

from __future__ import annotations

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.dead import is_random, remove_dead
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
    set_results(program, {name: n for name, n in program.results.items() if not _reads_batch(program, n)})
    _drop_random(program)
    remove_dead(program.graph)
    for node in program.placeholders.values():
        if not node.users:
            program.graph.erase_node(node)
    named = {*program.reads, *program.writes}
    return Program(program.graph, {n: v for n, v in program.variables.items() if n in named}, ())


def _reads_batch(program: Program, node: Node) -> bool:
    seen, stack = set(), [node]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder" and program.variables[node.meta["variable"]].role is Role.INPUT:
            return True
        stack.extend(node.all_input_nodes)
    return False


def _drop_random(program: Program) -> None:
    """Random operations of the forward are not run at all; their values are gone with it."""
    remove_dead(program.graph)
    for node in reversed(list(program.graph.nodes)):
        if is_random(node) and not node.users:
            program.graph.erase_node(node)
            remove_dead(program.graph)
