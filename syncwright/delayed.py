"""The first step and what is behind the last one, where gradients are applied one step late."""

from __future__ import annotations

from torch.fx import Node

from syncwright import ops
from syncwright.dead import is_effect, remove_dead
from syncwright.plan import AllReduce, Plan
from syncwright.program import Program, Role, set_results
from syncwright.schema import argument


def delayed(plan: Plan) -> set[str]:
    """The parameters whose gradients are applied one step late."""
    return {s.variable for s in plan.sharings if isinstance(s.sync, AllReduce) and s.sync.delay}


def of_first_step(program: Program, plan: Plan) -> Program:
    """A trainer's program where no step was before: sums are begun, and nothing is done with any.

    before  all_reduce.later(%g, "w.grad"), %m = wait.before("w.grad"), %new = sub(w, %m), output({"loss": %loss, "w": %new})
    after   all_reduce.later(%g, "w.grad"), output({"loss": %loss})
    """
    program = program.edit()
    late = _made_late(program, plan)
    return _with(program, {name: node for name, node in program.results.items() if name not in late}, _is_common)


def after_last_step(program: Program, plan: Plan) -> Program:
    """What a trainer does with the sums that the last step has begun: it reads no batch and begins nothing.

    before  all_reduce.later(%g, "w.grad"), %m = wait.before("w.grad"), %new = sub(w, %m), output({"loss": %loss, "w": %new})
    after   %m = wait.before("w.grad"), %new = sub(w, %m), output({"w": %new})
    """
    program = program.edit()
    late = _made_late(program, plan)
    results = {name: node for name, node in program.results.items() if name in late}
    kept = {name: node for name, node in results.items() if program.variables[name].role is not Role.OUTPUT}
    return _with(program, kept, lambda node: node.target is ops.wait_before)


def _made_late(program: Program, plan: Plan) -> set[str]:
    """What is made of sums of the step before, and what else belongs to these updates (a count of steps)."""
    names = delayed(plan)
    stack, made = program.graph.find_nodes(op="call_function", target=ops.wait_before), set[Node]()
    while stack:
        node = stack.pop()
        if node not in made:
            made.add(node)
            stack.extend(node.users)
    variables = program.variables
    state = {v.name for v in variables.values() if v.role is Role.STATE and v.of in names and v.initial is None}
    return {name for name, node in program.results.items() if node in made or name in state}


def _with(program: Program, results: dict[str, Node], kept) -> Program:
    set_results(program, results)
    remove_dead(program.graph, kept=kept)
    for node in program.placeholders.values():
        if not node.users:
            program.graph.erase_node(node)
    there = {*program.reads, *program.writes}
    variables = {n: v for n, v in program.variables.items() if n in there or v.whole in there}
    return Program(program.graph, variables, tuple(g for g in program.guards if set(g.reads) <= there))


def _is_common(node: Node) -> bool:
    """Whether it acts on others, or others rely on it."""
    shared = node.target is ops.pull and bool(argument(node, "on_host"))
    return is_effect(node) or shared or node.target in {*ops.SENDS, *ops.WAITS}
