"""Clipping by each trainer's own norm: gradients count as complete behind it, and not in front of it."""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Node

from syncwright import ops
from syncwright.dead import remove_dead
from syncwright.errors import LoweringError
from syncwright.meaning import Free, Joined, Owned
from syncwright.plan import Plan
from syncwright.program import Program
from syncwright.shapes import Inference, mode_of
from syncwright.update import Updates, find_updates


def clip_per_trainer(program: Program, plan: Plan) -> Program:
    """Moves the marks of gradients behind what several gradients make together, where the plan says `clip: per_trainer`.

    before  %g = gradient(%mm, "w"), %n = norm(%g), %c = clamp(div(1.0, %n)), %h = mul(%g, %c), %new = sub(w, %h)
    after   %n = norm(%mm), %c = clamp(div(1.0, %n)), %h = mul(%mm, %c), %g = gradient(%h, "w"), %new = sub(w, %g)

    All that follows takes what each trainer has clipped as its gradient.
    Raises LoweringError where an update reads a gradient both clipped and as it was.
    """
    if plan.clip == "global" or not find_updates(program).joins:
        return program
    program = program.edit()
    updates = find_updates(program)
    made = _made_of_gradients(program, updates)
    known = Inference(mode_of(program.graph))
    ends = {name: _end(name, mark, made, updates) for name, mark in updates.marks.items()}
    for name, end in ends.items():
        mark = updates.marks[name]
        if end is not None:
            with program.graph.inserting_after(end):
                moved = known.call(program.graph, ops.gradient, end, name)
            for user in [user for user in end.users if user is not moved and user not in made]:
                user.replace_input_with(end, moved)
            mark.replace_all_uses_with(mark.all_input_nodes[0])
            program.graph.erase_node(mark)
    remove_dead(program.graph)
    return program


def _made_of_gradients(program: Program, updates: Updates) -> dict[Node, bool]:
    """What is made from gradients and numbers alone; whether a value that several gradients make has a part in it."""
    found: dict[Node, bool] = {}
    for node, meaning in updates.meanings.items():
        if node in updates.marks.values():
            found[node] = False
        elif node.op == "call_function" and not isinstance(meaning, Free):
            sources = [n for n in node.all_input_nodes if not isinstance(updates.meanings.get(n), Free)]
            if all(source in found for source in sources):
                found[node] = isinstance(meaning, Joined) or any(found[source] for source in sources)
    return found


def _end(name: str, mark: Node, made: Mapping[Node, bool], updates: Updates) -> Node | None:
    """The clipped gradient of a parameter; None where it is not clipped."""
    mine = [n for n in made if isinstance(m := updates.meanings[n], Owned) and m.of == name]
    read = [n for n in mine if any(user not in made for user in n.users)]
    clipped = [n for n in read if made[n]]
    if not clipped:
        return None
    if len(read) > 1:
        others = [n.name for n in read if n is not clipped[-1]]
        raise LoweringError(
            f"clip: per_trainer, but the update of '{name}' reads its gradient clipped (at {clipped[-1].name}) and otherwise (at "
            f"{others[0]}). Expected an update that reads the clipped gradient alone. Say clip: global."
        )
    return clipped[0]
