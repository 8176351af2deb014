"""Parameters on servers: pulled before their first use, gradients pushed as soon as they are complete."""

from __future__ import annotations

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.dead import remove_dead
from syncwright.errors import LoweringError
from syncwright.passes.insert import before_first_use, behind, read_weight, scaled
from syncwright.plan import Plan
from syncwright.program import Program, set_results
from syncwright.shapes import call, mode_of
from syncwright.split import Split, grad_variable, merge_of, owned, piece_name, split
from syncwright.update import find_updates

aten = torch.ops.aten


def serve_parameters(program: Program, plan: Plan) -> Program:
    """Takes the updates that servers run out of the trainer's program.

    before  w = placeholder, %y = mm(%x, w), %g = gradient(%mm, "w"), %new = sub(w, %g), output({"w": %new})
    after   %w = pull([], "w", ...), %y = mm(%x, %w), %g = gradient(%mm, "w"), push(mul(%g, share), "w.grad")

    Where the step itself reads the new value, it is pulled again behind the push. See ParameterServer in
    `SEMANTICS`: one update per step, when all live trainers have pushed.
    """
    parts = split(program, find_updates(program), plan)
    if not parts.pieces:
        return program
    program = program.edit()
    parts = split(program, find_updates(program), plan)
    tokens = {}
    for parameter in parts.pieces:
        program, tokens[parameter] = _push(program, parts, plan, parameter)
    return _pull(program, parts, tokens)


def _push(program: Program, parts: Split, plan: Plan, parameter: str) -> tuple[Program, list[Node]]:
    mark = parts.updates.marks.get(parameter)
    if mark is None or parameter not in parts.updates.by_parameter:
        return program, []
    pieces, mode, tokens = parts.pieces[parameter], mode_of(program.graph), []
    weighed = plan.trainers > 1 and merge_of(plan, parameter) == "mean"
    weight = None
    if weighed:
        program, weight = read_weight(program)
    last = mark
    if weight is not None:
        with behind(last):
            last = scaled(program, mark, weight, plan.trainers)
    whole = last
    for piece in pieces:
        name = piece_name(grad_variable(program, parameter).name, piece, len(pieces))
        with behind(last):
            rows = (
                whole
                if len(pieces) == 1
                else call(program.graph, mode, aten.slice.Tensor, whole, 0, piece.start, piece.stop)
            )
        with behind(rows if rows is not whole else last):
            last = call(program.graph, mode, ops.push, rows, name)
        tokens.append(last)
    return program, tokens


def _pull(program: Program, parts: Split, tokens: dict[str, list[Node]]) -> Program:
    results = program.results
    kept = {n: r for n, r in results.items() if n not in {o for p in parts.pieces for o in owned(parts, p)}}
    set_results(program, kept)
    remove_dead(program.graph)
    alive = set(program.graph.nodes)
    for parameter, pieces in parts.pieces.items():
        for name in owned(parts, parameter):
            node = program.placeholders.get(name)
            if node is not None:
                _replace(program, node, name, parameter, pieces, [], parts)
            new = results.get(name)
            if new is not None and new in alive and new.users:
                _replace(program, new, name, parameter, pieces, tokens[parameter], parts)
    remove_dead(program.graph)
    return program


def _replace(program, node: Node, name: str, parameter: str, pieces, after: list[Node], parts: Split) -> None:
    """All uses of `node` read the server's value instead."""
    users = [u for u in node.users if u not in after]
    if not users:
        return
    variable, mode = program.variables[name], mode_of(program.graph)
    rows = bool(variable.shape) and variable.shape[:1] == program.variables[parameter].shape[:1]
    taken = pieces if rows else pieces[:1]
    point = min(users)
    if after and point < max(after):
        raise LoweringError(
            f"'{name}' is planned for a server, but {point.name} reads its new value before the gradient is pushed. "
            "Expected reads of the new value behind backward(). Share it by all_reduce."
        )
    with before_first_use(users):
        pulled = []
        for piece in taken:
            shape = (
                [piece.stop - piece.start, *variable.shape[1:]] if len(pieces) > 1 and rows else list(variable.shape)
            )
            channel = piece_name(name, piece, len(pieces))
            pulled.append(call(program.graph, mode, ops.pull, after, channel, shape, variable.dtype))
        whole = pulled[0] if len(pulled) == 1 else call(program.graph, mode, aten.cat.default, pulled)
    for user in users:
        user.replace_input_with(node, whole)
    if node.op == "placeholder" and not node.users:
        program.graph.erase_node(node)
