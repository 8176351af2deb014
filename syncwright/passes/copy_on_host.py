"""Values that servers keep are pulled once for all trainers of a host."""

from __future__ import annotations

from syncwright import ops
from syncwright.plan import ParameterServer, Plan
from syncwright.program import Program, Role


def copy_on_host(program: Program, plan: Plan) -> Program:
    """Marks pulls of the variables of which the plan says so.

    before  %p = pull.value(w, "w")
    after   %p = pull.value(w, "w", on_host=True)

    The first trainer of each host pulls, and gives the value to the others there.
    """
    chosen = {s.variable for s in plan.sharings if isinstance(s.sync, ParameterServer) and s.sync.copy_on_host}
    if not chosen or max(plan.hosts) == 1:
        return program
    program = program.edit()
    for pull in program.graph.find_nodes(op="call_function", target=ops.pull_value):
        variable = program.variables[pull.args[1]]
        kept = {part.of for part in variable.kept if variable.role in (Role.PARAM, Role.GLOBAL)}
        if chosen & {variable.name, *kept}:
            pull.kwargs = {**pull.kwargs, "on_host": True}
    return program
