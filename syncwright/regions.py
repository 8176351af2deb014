"""Where a program turns from forward to backward: from its edges alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import getitem

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.program import Program, Role

aten = torch.ops.aten


def forward(program: Program) -> set[Node]:
    """The nodes that what the step returns is made of."""
    results = program.results
    stack = [results[v.name] for v in program.of_role(Role.OUTPUT) if v.name in results]
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(_made_of(node))
    return seen


def turn(program: Program) -> Node | None:
    """The first node of backward: where the order best parts the nodes of forward from the others.

    before  %h = mm(x, w), %loss = mean(%h), %ones = ones_like(%loss), %g = expand(%ones), %grad = mm(%x, %g)
    after   %g, since the loss is made of none of what follows
    """
    ahead, balance, best, found = forward(program), 0, 0, None
    for node in program.graph.nodes:
        if node.op == "call_function":
            if balance > best:
                best, found = balance, node
            balance += 1 if node in ahead else -1
    return found


def _made_of(node: Node) -> Sequence[Node]:
    """What a value is made of: of what else lies in the same bucket it is not."""
    if node.target is getitem and (parts := _in_bucket(node)) is not None:
        return parts
    return node.all_input_nodes


def _in_bucket(pick: Node) -> list[Node] | None:
    """The parts of a bucket that a stretch of its reduced form covers; None where `pick` is none such."""
    split, index = pick.args
    if not (isinstance(split, Node) and split.target is aten.split_with_sizes.default):
        return None
    waited, sizes = split.args
    joined = _joined(waited)
    if joined is None:
        return None
    start = sum(sizes[:index])  # type: ignore[index]
    parts: Sequence[Node] = joined.args[0]  # type: ignore[assignment]
    stops = list(accumulate(part.meta["val"].numel() for part in parts))
    begins = [0, *stops[:-1]]
    stop = start + sizes[index]  # type: ignore[index]
    return [part for part, a, b in zip(parts, begins, stops, strict=True) if a < stop and b > start]


def _joined(reduced: object) -> Node | None:
    """What a bucket was joined from, by its reduced form, also where that was made in phases; None where it is no such."""
    is_reduced = False
    while isinstance(reduced, Node) and reduced.target in _WAY:
        is_reduced |= reduced.target is ops.all_reduce
        sources = reduced.all_input_nodes
        if len(sources) != 1:
            return None
        reduced = sources[0]
    return reduced if is_reduced and isinstance(reduced, Node) and reduced.target is aten.cat.default else None


_WAY = frozenset(
    {
        *(ops.all_reduce, ops.wait, ops.reduce_scatter, ops.wait_own, ops.gather_parts, ops.give, ops.wait_whole),
        *(getitem, aten.view.default),
    }
)
