"""Parameters on servers: pulled before their first use, gradients pushed as soon as they are complete."""

from __future__ import annotations

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.dead import remove_dead
from syncwright.errors import LoweringError
from syncwright.passes.insert import before_first_use, behind, read_share, read_weight
from syncwright.plan import ParameterServer, Plan
from syncwright.program import Program, set_results
from syncwright.shapes import Inference, mode_of
from syncwright.split import Split, grad_variable, merges, owned, piece_name, split
from syncwright.update import find_updates

aten = torch.ops.aten


def serve_parameters(program: Program, plan: Plan) -> Program:
    """Takes the updates that servers run out of the trainer's program.

    before  w = placeholder, %y = mm(%x, w), %g = gradient(%mm, "w"), %new = sub(w, %g), output({"w": %new})
    after   %w = pull([], "w", ...), %y = mm(%x, %w), %g = gradient(%mm, "w"), push(mul(%g, share), "w.grad")

    Where the step itself reads the new value, it is pulled again behind the push. See ParameterServer in
    `SEMANTICS`: one update per step, when all live trainers have pushed.
    """
    if not any(isinstance(s.sync, ParameterServer) for s in plan.sharings):
        return program
    program, weight = program.edit(), None
    parts, merge = split(program, find_updates(program), plan), merges(plan)
    if plan.trainers > 1 and any(merge[parameter] == "mean" for parameter in parts.pieces):
        program, weight = read_weight(program)
    known, tokens = Inference(mode_of(program.graph)), {}
    for parameter in parts.pieces:
        share = read_share(weight, plan.trainers) if weight is not None and merge[parameter] == "mean" else None
        tokens[parameter] = _push(program, parts, parameter, share, known)
    return _pull(program, parts, tokens, known)


def _push(program: Program, parts: Split, parameter: str, share: Node | None, known: Inference) -> list[Node]:
    """Pushes the pieces of a parameter's gradient, scaled where they are averaged; the tokens of the pushes."""
    mark = parts.updates.marks.get(parameter)
    if mark is None or parameter not in parts.updates.by_parameter:
        return []
    pieces, graph, tokens = parts.pieces[parameter], program.graph, []
    last = mark
    if share is not None:
        with behind(last):
            last = known.call(graph, aten.mul.Tensor, mark, share)
    whole, grad = last, grad_variable(program, parameter).name
    for piece in pieces:
        name = piece_name(grad, piece, len(pieces))
        with behind(last):
            rows = (
                whole if len(pieces) == 1 else known.call(graph, aten.slice.Tensor, whole, 0, piece.start, piece.stop)
            )
        with behind(rows if rows is not whole else last):
            last = known.call(graph, ops.push, rows, name)
        tokens.append(last)
    for pull in [user for user in mark.users if user.target is ops.pull]:
        pull.replace_input_with(mark, last)
    return tokens


def _pull(program: Program, parts: Split, tokens: dict[str, list[Node]], known: Inference) -> Program:
    results, placeholders = program.results, program.placeholders
    served = {name for parameter in parts.pieces for name in owned(parts, parameter)}
    set_results(program, {name: node for name, node in results.items() if name not in served})
    remove_dead(program.graph)
    alive = set(program.graph.nodes)
    for parameter, pieces in parts.pieces.items():
        for name in owned(parts, parameter):
            node = placeholders.get(name)
            if node is not None:
                _replace(program, node, name, parameter, pieces, [], parts, known)
            new = results.get(name)
            if new is not None and new in alive and new.users:
                _replace(program, new, name, parameter, pieces, tokens[parameter], parts, known)
    remove_dead(program.graph)
    return program


def _replace(program, node: Node, name: str, parameter: str, pieces, after: list[Node], parts: Split, known) -> None:
    """All uses of `node` read the server's value instead."""
    users = [u for u in node.users if u not in after]
    if not users:
        return
    variable, graph = program.variables[name], program.graph
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
            pulled.append(known.call(graph, ops.pull, after, channel, shape, variable.dtype))
        whole = pulled[0] if len(pulled) == 1 else known.call(graph, aten.cat.default, pulled)
    for user in users:
        user.replace_input_with(node, whole)
    if node.op == "placeholder" and not node.users:
        program.graph.erase_node(node)
