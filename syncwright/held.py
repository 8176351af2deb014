"""What an interpreted run of a program holds: which values are there, and how many bytes they have."""

from __future__ import annotations

from collections.abc import Collection
from operator import getitem

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.place import is_served
from syncwright.program import Program


def most_at_once(program: Program) -> int:
    """Bytes of the tensors that an interpreted run holds at its fullest, what it reads and writes among them. A value is there
    from where it is made until nothing reads it, or a look at it, any more. Of a whole program, what trainers hold.

    %a = exp(x), %b = neg(%a), %c = add(%b, 1), output(%c)   3 times x: x, and two at a time
    """
    return Held(program).most


def read_nbytes(program: Program) -> int:
    """Bytes of what a program reads."""
    return sum(map(nbytes_of, program.placeholders.values()))


class Held:
    """What is there while a program runs.

    most   bytes, at the fullest
    there  what is there then, each value by the node in whose memory it lies; what the program reads not among them
    at     the node that runs then; None where nothing does
    """

    def __init__(self, program: Program):
        self._roots: dict[Node, Node] = {}
        for node in program.graph.nodes:
            self._roots[node] = self._roots.get(source, source) if (source := _looked_at(node)) is not None else node
        ends = self._ends(program)
        now = self.most = read_nbytes(program)
        self.at: Node | None = None
        self.there: Collection[Node] = ()
        there: dict[Node, None] = {}
        for node in program.graph.nodes:
            if node.op != "call_function":
                continue
            if self._roots[node] is node:
                now += nbytes_of(node)
                there[node] = None
            if now > self.most:
                self.most, self.at, self.there = now, node, tuple(there)
            for root in ends.get(node, ()):
                now -= nbytes_of(root)
                del there[root]

    def root(self, node: Node) -> Node:
        """The node in whose memory a node's value lies."""
        return self._roots[node]

    def _ends(self, program: Program) -> dict[Node, list[Node]]:
        """Behind which node each value ends."""
        last: dict[Node, Node] = {}
        for node in program.graph.nodes:
            for used in (node, *node.all_input_nodes):
                last[self._roots[used]] = node
        kept = {self._roots[node] for node in program.results.values()}
        ends: dict[Node, list[Node]] = {}
        for root, node in last.items():
            if root.op == "call_function" and root not in kept and node.op != "output":
                ends.setdefault(node, []).append(root)
        return ends


def _looked_at(node: Node) -> Node | None:
    """The value in whose memory a node's lies."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return None
    if node.target in (getitem, ops.gradient, ops.wait) or getattr(node.target, "is_view", False):
        return node.args[0]
    return None


def nbytes_of(node: Node) -> int:
    """Bytes of what a node gives; of the start of a collective, those that are on their way; none on trainers of what a
    server runs."""
    if is_served(node):
        return 0
    match node.target:
        case ops.reduce_scatter | ops.gather_parts:
            trainers, own = node.args[2], node.args[0]
            parts = sum(map(_of_value, (each.meta["val"] for each in own)))  # type: ignore[union-attr]
            return parts if node.target is ops.reduce_scatter else parts * int(trainers)  # type: ignore[arg-type]
        case ops.reduce_to | ops.give:
            return sum(_of_value(each.meta["val"]) for each in node.args[0])  # type: ignore[union-attr]
    return _of_value(node.meta.get("val"))


def _of_value(val: object) -> int:
    if isinstance(val, list | tuple):
        return sum(map(_of_value, val))
    if not isinstance(val, torch.Tensor):
        return 0
    numel = 1
    for size, stride in zip(val.shape, val.stride(), strict=True):
        numel *= int(size) if stride else 1
    return numel * val.element_size()
