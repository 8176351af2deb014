"""One trainer's program, where some variables are kept whole by one trainer each: without what only others run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.dead import is_effect, remove_dead
from syncwright.program import Program, Variable, set_results
from syncwright.schema import argument
from syncwright.shapes import Inference, mode_of

aten = torch.ops.aten


def has_keepers(variables: Iterable[Variable]) -> bool:
    """Whether programs of trainers differ."""
    return any(v.own is not None and v.own.keeper is not None for v in variables)


def of_trainer(program: Program, trainer: int) -> Program:
    """The program as a trainer runs it, which communicates as all others do.

    before  m[own] = placeholder own "m" among 2 with 1, %s = reduce_to([%g], "w.grad", 1), %k = add(m[own], wait_own(%s)),
            %n = sub(w, %k), %p = give([%n], "w", 1), output({"w": wait_whole(%p), "m[own]": %k})
    after   (trainer 0) %s = reduce_to([%g], "w.grad", 1), wait_own(%s), %p = give([expand(empty([1]), [9])], "w", 1),
            output({"w": wait_whole(%p)})
    """
    if not has_keepers(program.variables.values()):
        return program
    program = program.edit()
    known = Inference(mode_of(program.graph))
    among = {v.own.group: v.own for v in program.variables.values() if v.own is not None}
    for node in program.graph.find_nodes(op="call_function", target=ops.give):
        group = str(argument(node, "group"))
        if group in among and node.args[2] != among[group].place(trainer):
            with program.graph.inserting_before(node):
                sizes = [_size_of(program, value, known) for value in node.args[0]]  # type: ignore[union-attr]
            node.args = (sizes, *node.args[1:])
    variables = {n: v for n, v in program.variables.items() if v.own is None or v.own.is_with(trainer)}
    set_results(program, {name: node for name, node in program.results.items() if name in variables})
    remove_dead(program.graph, lambda node: is_effect(node) or node.target in ops.COMMUNICATION)
    for node in [node for node in program.placeholders.values() if not node.users]:
        program.graph.erase_node(node)
    return replace(program, variables=variables)


def _size_of(program: Program, value: Node, known: Inference) -> Node:
    """In place of a value that is not here: one that says its size, and takes no memory."""
    val = value.meta["val"]
    one = known.call(program.graph, aten.empty.memory_format, [1], dtype=val.dtype, device=val.device)
    return known.call(program.graph, aten.expand.default, one, [val.numel()])
