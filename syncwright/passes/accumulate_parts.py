"""Parts of reduced gradients, added up over several calls of a step by the trainer whose own they are."""

from __future__ import annotations

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.passes.accumulate import accumulated, add_to, in_parts
from syncwright.plan import Plan
from syncwright.program import Program
from syncwright.shapes import Inference, mode_of

aten = torch.ops.aten


def accumulate_parts(program: Program, plan: Plan) -> Program:
    """Under `shard`, stages 2 and 3, gradients are reduced in every call, and each trainer adds up its own part alone.

    before  %w = wait_own(%s, "w.grad"), %m = div(%w, %total), %new = sub(w[own], %m)
    after   w.accumulated = placeholder f32[3], %w = wait_own(%s, "w.grad"), %a = add(w.accumulated, %w), %m = div(%a, %total),
            %new = sub(w[own], %m), output({..., "w.accumulated": zeros_like(w.accumulated)})

    So that a trainer never holds a whole gradient between two calls. `%total` is that of all calls.
    """
    if plan.accumulate == 1:
        return program
    wanted = {f"{s.variable}.grad": s.variable for s in plan.sharings if in_parts(s, plan)}
    waits = program.graph.find_nodes(op="call_function", target=ops.wait_own)
    if not any(node.args[1] in wanted for node in waits):
        return program
    program = program.edit()
    known = Inference(mode_of(program.graph))
    for wait in program.graph.find_nodes(op="call_function", target=ops.wait_own):
        if wait.args[1] in wanted:
            came = _as_it_was(wait)
            readers = list(came.users)
            variable = accumulated(wanted[wait.args[1]], came.meta["val"])  # type: ignore[index]
            program, summed = add_to(program, variable, came, came.next, known)
            for reader in readers:
                reader.replace_input_with(came, summed)
    return program


def _as_it_was(wait: Node) -> Node:
    """What came in the gradient's own type, where it has travelled in another."""
    users = list(wait.users)
    return users[0] if len(users) == 1 and users[0].target is aten._to_copy.default else wait
