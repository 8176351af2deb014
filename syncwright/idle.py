"""The program of a trainer whose part of a batch is empty: it takes part in every communication, with nothing."""

from __future__ import annotations

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.dead import is_random, remove_dead
from syncwright.passes.insert import KEPT, read_first, read_variable
from syncwright.program import Program, Role, set_results
from syncwright.shapes import call, mode_of

aten = torch.ops.aten


def idle(program: Program) -> Program:
    """A lowered trainer program without its forward and backward.

    before  %c = cat([%weight, %loss, %g]), %a = all_reduce(%c, "bucket.0"), ..., %new = sub(w, %m)
    after   %z = zeros([12]), %a = all_reduce(%z, "bucket.0"), ..., %new = sub(w, %m)

    The mean over no examples is NaN, and 0 x NaN is NaN: so such a trainer does not run its step, but contributes
    zeros of weight 0 to each communication of the step's static list, in the same order. A buffer that is trainer 0's
    stays as it was where trainer 0 has nothing: its contribution is the old value.
    """
    program = program.edit()
    for node in list(program.graph.nodes):
        if node.target in ops.SENDS:
            with program.graph.inserting_before(node):
                program, nothing = _nothing(program, node.args[0])
            node.args = (nothing, *node.args[1:])
    set_results(program, {name: n for name, n in program.results.items() if not _reads_batch(program, n)})
    _drop_random(program)
    remove_dead(program.graph)
    for node in program.placeholders.values():
        if not node.users:
            program.graph.erase_node(node)
    named = {*program.reads, *program.writes}
    return Program(program.graph, {n: v for n, v in program.variables.items() if n in named}, ())


def _nothing(program: Program, sent: Node) -> tuple[Program, Node]:
    """What stands for `sent`, at the graph's insertion point; bucket members that are kept buffers keep their value."""
    graph, mode, val = program.graph, mode_of(program.graph), sent.meta["val"]
    if KEPT in sent.meta:
        name = sent.meta[KEPT]
        program, old = read_variable(program, program.variables[name], val)
        program, first = read_first(program)
        return program, call(graph, mode, aten.mul.Tensor, old, first)
    if sent.target is aten.cat.default and _holds_kept(sent):
        parts = []
        for member in sent.args[0]:  # type: ignore[union-attr]
            program, part = _nothing(program, member)  # type: ignore[arg-type]
            parts.append(part)
        return program, call(graph, mode, aten.cat.default, parts)
    if sent.target is aten.reshape.default and _holds_kept(sent):
        program, part = _nothing(program, sent.args[0])  # type: ignore[arg-type]
        return program, call(graph, mode, aten.reshape.default, part, *sent.args[1:])
    return program, call(graph, mode, aten.zeros.default, list(val.shape), dtype=val.dtype)


def _holds_kept(sent: Node) -> bool:
    joined = sent.target in (aten.cat.default, aten.reshape.default)
    return KEPT in sent.meta or (joined and any(_holds_kept(n) for n in sent.all_input_nodes))


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
