"""Drops what nothing needs once a program is rewritten."""

from __future__ import annotations

from syncwright import ops
from syncwright.dead import remove_dead
from syncwright.plan import Plan
from syncwright.program import Program


def tidy(program: Program, plan: Plan) -> Program:
    """Removes gradient marks, dead nodes and variables that are neither read nor written.

    before  %g = gradient(%mm, "w"), push(%g, "w.grad"), %dead = mul(%g, 2)
    after   push(%mm, "w.grad")
    """
    program = program.edit()
    for node in list(program.graph.nodes):
        if node.target is ops.gradient:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    remove_dead(program.graph)
    for node in program.placeholders.values():
        if not node.users:
            program.graph.erase_node(node)
    named = {*program.reads, *program.writes}
    variables = {name: v for name, v in program.variables.items() if name in named or v.whole in named}
    return Program(program.graph, variables, tuple(g for g in program.guards if set(g.reads) <= named))
