"""Global values (a norm) of a variable that is cut are put together from what the owners of its pieces compute."""

from __future__ import annotations

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.place import Owners, place_of, put
from syncwright.plan import Plan
from syncwright.program import Program
from syncwright.shapes import Inference, mode_of

aten = torch.ops.aten
_COMBINE = {
    aten.linalg_vector_norm.default: lambda node: (aten.linalg_vector_norm.default, *node.args[1:2]),
    aten.sum.default: lambda node: (aten.sum.default,),
    aten.amax.default: lambda node: (aten.amax.default,),
    aten.amin.default: lambda node: (aten.amin.default,),
}


def share_globals(program: Program, plan: Plan) -> Program:
    """Reductions are sent piece by piece and combined as their op combines: a norm of norms, a sum of sums.

    before  %n = vector_norm(%g, 2.0) at owners "w", %s = send(%n, "global.n") at server 0                  (w in 2 pieces)
    after   %n = vector_norm(%g, 2.0) at owners "w", %p = gather(%n, "global.n", 2) at server 0,
            %s = vector_norm(%p, 2.0) at server 0

    Numbers that every piece knows (a step count) are sent by the owner of the first.
    """
    if not any(parts_of(node, program) for node in program.graph.find_nodes(op="call_function", target=ops.send)):
        return program
    program = program.edit()
    known = Inference(mode_of(program.graph))
    for node in program.graph.find_nodes(op="call_function", target=ops.send):
        if parts := parts_of(node, program):
            _gather(node, parts, known)
    return program


def parts_of(send: Node, program: Program) -> int:
    """How many owners have a part of what is sent; 0 where one has it whole, or each of them has."""
    source = send.args[0]
    place = place_of(source)  # type: ignore[arg-type]
    pieces = len(program.variables[place.variable].kept) if isinstance(place, Owners) else 1
    return pieces if pieces > 1 and source.target in _COMBINE and _reduces(source) else 0  # type: ignore[arg-type, union-attr]


def _reduces(node: Node) -> bool:
    val = node.all_input_nodes[0].meta["val"]
    return isinstance(val, torch.Tensor) and val.dim() > 0


def _gather(send: Node, parts: int, known: Inference) -> None:
    source, channel = send.args
    graph, place = send.graph, place_of(send)
    with graph.inserting_before(send):
        gathered = known.call(graph, ops.gather, source, channel, parts)
        whole = combined(source, gathered, known)  # type: ignore[arg-type]
    put(gathered, place)
    put(whole, place)
    send.replace_all_uses_with(whole)
    graph.erase_node(send)


def combined(reduction: Node, parts: Node, known: Inference) -> Node:
    """What a reduction gives for all of a value, from what it gives for its parts, at the insertion point."""
    target, *args = _COMBINE[reduction.target](reduction)  # type: ignore[index]
    return known.call(reduction.graph, target, parts, *args)
