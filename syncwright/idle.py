"""The program of a trainer whose part of a batch is empty: it takes part in every communication, with nothing."""

from __future__ import annotations

from itertools import groupby

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.dead import remove_dead
from syncwright.program import Program, Role, set_results
from syncwright.shapes import Inference, mode_of

aten = torch.ops.aten


def idle(program: Program) -> Program:
    """A lowered trainer program without its forward and backward.

    before  %c = cat([%weight, %loss, %g]), %a = all_reduce(%c, "bucket.0"), ..., %n = norm(%m), %t = push(%n, "global.n")
    after   %z = zeros([11]), %c = cat([%weight, %z]), %a = all_reduce(%c, "bucket.0"), ..., %t = push(%n, "global.n")

    The mean over no examples is NaN, and 0 x NaN is NaN: so such a trainer does not run its step, but contributes
    zeros of weight 0 to each communication of the step's static list, in the same order. What is not made from its
    own batch (a norm of reduced gradients, a counter) it sends as everybody does.
    """
    program = program.edit()
    tainted = _silence(program)
    set_results(program, {name: n for name, n in program.results.items() if n not in tainted})
    remove_dead(program.graph, kept=lambda node: node.target in {*ops.SENDS, ops.wait})
    for node in program.placeholders.values():
        if not node.users:
            program.graph.erase_node(node)
    named = {*program.reads, *program.writes}
    return Program(program.graph, {n: v for n, v in program.variables.items() if n in named}, ())


def _silence(program: Program) -> set[Node]:
    """Sends zeros in place of all that is made from a batch; what else is made from it."""
    tainted: set[Node] = set()
    known = Inference(mode_of(program.graph))
    for node in list(program.graph.nodes):
        if node.target in ops.SENDS:
            source = node.args[0]
            if source in tainted:
                with program.graph.inserting_before(node):
                    node.args = (_without(source, tainted, known), *node.args[1:])  # type: ignore[arg-type]
        elif _is_input(program, node) or any(source in tainted for source in node.all_input_nodes):
            tainted.add(node)
    return tainted


def _is_input(program: Program, node: Node) -> bool:
    return node.op == "placeholder" and program.variables[node.meta["variable"]].role is Role.INPUT


def _without(node: Node, tainted: set[Node], known: Inference) -> Node:
    """Zeros like `node`; of a bucket, only where its members are made from a batch."""
    graph, val = node.graph, node.meta["val"]
    if node.target is not aten.cat.default or val.dim() != 1:
        return known.call(graph, aten.zeros.default, list(val.shape), dtype=val.dtype)
    kept: list[Node] = []
    for silent, members in groupby(node.args[0], key=tainted.__contains__):  # type: ignore[arg-type]
        run = list(members)
        if silent:
            size = sum(member.meta["val"].numel() for member in run)
            run = [known.call(graph, aten.zeros.default, [size], dtype=val.dtype)]
        kept += run
    return kept[0] if len(kept) == 1 else known.call(graph, aten.cat.default, kept)
