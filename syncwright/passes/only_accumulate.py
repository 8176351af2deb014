"""A call of a step that only adds up gradients: without what is made of them."""

from __future__ import annotations

from torch.fx import Node

from syncwright import ops
from syncwright.dead import remove_dead
from syncwright.passes.insert import SUMMED
from syncwright.place import TRAINERS, put
from syncwright.plan import Plan
from syncwright.program import Program, Role, set_results
from syncwright.schema import argument
from syncwright.shapes import Inference, mode_of


def only_accumulate(program: Program, plan: Plan) -> Program:
    """Leaves out the update, with what is sent for it.

    before  %s = add(w.accumulated, %g), %a = all_reduce(mul(%s, batch.inverse), "w.grad"), ...,
            %new = sub(w, div(wait(%a), %total)), output({"loss": %loss, "w": %new, "w.accumulated": zeros_like(w.accumulated)})
    after   %s = add(w.accumulated, %g), output({"loss": %loss, "w.accumulated": %s})

    What the step returns, and buffers that it writes, are those of this call; what is made of updates (a norm of gradients) is
    not there. Rows of tables are pushed to servers, who add them up, or kept until they are gathered:

    before  %t = gather_rows(%rows, "w.grad", %ids), %all = wait_rows(%t, "w.grad", "mean", 2), ...
    after   hold_rows(%rows, "w.grad", %ids)
    """
    program = program.edit()
    graph, known = program.graph, Inference(mode_of(program.graph))
    sums = {node.meta[SUMMED]: node for node in graph.nodes if SUMMED in node.meta}
    of_rows = [node for node in graph.nodes if node.target in (ops.gather_rows, ops.push_rows_merged)]
    made = _made_of([*sums.values(), *of_rows])
    kept = {n: node for n, node in program.results.items() if node not in made and _is_of_call(program, n)}
    set_results(program, {**kept, **sums})
    for node in of_rows:
        with graph.inserting_before(node):
            if node.target is ops.gather_rows:
                known.call(graph, ops.hold_rows, *node.args)
            else:
                pushed = known.call(graph, ops.push_rows, *_pushed(node))
                put(pushed, TRAINERS)
    remove_dead(graph)
    return program


def _pushed(node: Node) -> list[object]:
    """What a trainer pushes of rows that servers merge."""
    skip = argument(node, "skip")
    return [node.args[0], node.args[1], argument(node, "ids"), *([skip] if skip else [])]


def _is_of_call(program: Program, name: str) -> bool:
    """Whether every call writes it, where it is not made of gradients."""
    return program.variables[name].role in (Role.OUTPUT, Role.BUFFER)


def _made_of(sources: list[Node]) -> set[Node]:
    """What is made of gradients that are added up."""
    found, stack = set[Node](), [user for node in sources for user in node.users]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.users)
    return found
