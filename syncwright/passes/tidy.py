"""Drops what nothing needs once a program is rewritten."""

from __future__ import annotations

from syncwright import ops
from syncwright.dead import trim
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
    channels = {str(n.args[1]) for t in ops.CROSSINGS for n in program.graph.find_nodes(op="call_function", target=t)}
    return trim(program, channels | {name for name, variable in program.variables.items() if variable.kept})
