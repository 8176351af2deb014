"""Clipping by each trainer's own norm: gradients count as complete behind it, and not in front of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.dead import remove_dead
from syncwright.errors import LoweringError
from syncwright.meaning import Free, Joined, Owned
from syncwright.plan import Plan
from syncwright.program import Program
from syncwright.shapes import Inference, mode_of
from syncwright.update import Updates, find_updates, skipped_by

aten = torch.ops.aten


def clip_per_trainer(program: Program, plan: Plan) -> Program:
    """Moves the marks of gradients behind what several gradients make together, where the plan says `clip: per_trainer`.

    before  %g = gradient(%mm, "w"), %n = norm(%g), %c = clamp(div(1.0, %n)), %h = mul(%g, %c), %new = sub(w, %h)
    after   %n = norm(%mm), %c = clamp(div(1.0, %n)), %h = mul(%mm, %c), %g = gradient(%h, "w"), %new = sub(w, %g)

    All that follows takes what each trainer has clipped as its gradient. Under a loss scale it is looked at for what is not
    finite once it is reduced, so that all trainers skip a step or none.
    Raises LoweringError where an update reads a gradient both clipped and as it was.
    """
    if plan.clip == "global" or not find_updates(program).joins:
        return program
    program = program.edit()
    updates = find_updates(program)
    detecting = _detecting(program, updates)
    made = _made_of_gradients(program, updates, detecting)
    known = Inference(mode_of(program.graph))
    ends = {name: _end(name, mark, made, detecting, updates) for name, mark in updates.marks.items()}
    for name, end in ends.items():
        mark = updates.marks[name]
        if end is not None:
            with program.graph.inserting_after(end):
                moved = known.call(program.graph, ops.gradient, end, name)
            for user in [user for user in end.users if user is not moved and user not in made]:
                user.replace_input_with(end, moved)
            for user in [user for user in mark.users if user in detecting]:
                user.replace_input_with(mark, moved)
            mark.replace_all_uses_with(mark.all_input_nodes[0])
            program.graph.erase_node(mark)
    for node in sorted(detecting):
        if node.all_input_nodes and (latest := max(node.all_input_nodes)) > node:
            latest.append(node)
    remove_dead(program.graph)
    return program


def _detecting(program: Program, updates: Updates) -> set[Node]:
    """What says whether gradients are finite, from the marks to the condition on which parameters stay as they were."""
    found: set[Node] = set()
    stack = [node for name in updates.marks if (node := skipped_by(program, name)) is not None]
    while stack:
        node = stack.pop()
        known = node in found or node in updates.marks.values() or isinstance(updates.meanings[node], Free)
        if not known and node.op == "call_function":
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _made_of_gradients(program: Program, updates: Updates, detecting: set[Node]) -> dict[Node, bool]:
    """What is made from gradients and numbers alone; whether a value that several gradients make has a part in it."""
    numbers = {node for join in updates.joins if not join.partials for node in join.nodes}
    numbers |= {node for node, meaning in updates.meanings.items() if isinstance(meaning, Free)}
    found: dict[Node, bool] = {}
    for node, meaning in updates.meanings.items():
        if node in updates.marks.values():
            found[node] = False
        elif node.op == "call_function" and node not in numbers and node not in detecting:
            sources = [n for n in node.all_input_nodes if n not in numbers]
            if all(source in found for source in sources):
                found[node] = isinstance(meaning, Joined) or any(found[source] for source in sources)
    return found


def _end(name: str, mark: Node, made: Mapping[Node, bool], detecting: set[Node], updates: Updates) -> Node | None:
    """The clipped gradient of a parameter; None where it is not clipped."""
    mine = [n for n in made if isinstance(m := updates.meanings[n], Owned) and m.of == name]
    read = [n for n in mine if any(user not in made and user not in detecting for user in n.users)]
    clipped = [n for n in read if made[n]]
    if not clipped:
        return None
    if len(read) > 1:
        others = [n.name for n in read if n is not clipped[-1]]
        raise LoweringError(
            f"clip: per_trainer, but the update of '{name}' reads its gradient clipped (at {clipped[-1].name}) and otherwise (at "
            f"{others[0]}). Expected an update that reads the clipped gradient alone. Say clip: global."
        )
    hiding = next((n for n in mine if n is not mark and n.target is not aten.mul.Tensor), None)
    if hiding is not None and any(user in detecting for user in mark.users):
        raise LoweringError(
            f"clip: per_trainer, but the step scales its loss, and {hiding.name} may make a gradient of '{name}' finite that is "
            "not. Expected gradients that are only multiplied, as by clip_grad_norm_. Say clip: global."
        )
    return clipped[0]
