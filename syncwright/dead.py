"""Dead nodes: what nothing uses, but for what acts on more than its users."""

from __future__ import annotations

from collections.abc import Callable, Set

import torch
from torch.fx import Graph, Node

from syncwright import ops
from syncwright.program import Program


def remove_dead(graph: Graph, kept: Callable[[Node], bool] | None = None) -> None:
    """Drops calls that nothing uses, but for those `kept`: random and communicating ones act on more than users."""
    kept = kept or is_effect
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and not kept(node):
            graph.erase_node(node)


def is_effect(node: Node) -> bool:
    return node.target in (ops.push, ops.push_rows, ops.hold_rows, ops.all_reduce_later) or is_random(node)


def is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def trim(program: Program, named: Set[str] = frozenset()) -> Program:
    """Takes out of a (copied) program dead nodes, reads that nothing uses, and variables neither read, written nor
    `named`, with the guards on them."""
    remove_dead(program.graph)
    for node in program.placeholders.values():
        if not node.users:
            program.graph.erase_node(node)
    there = {*program.reads, *program.writes}
    variables = {n: v for n, v in program.variables.items() if n in there or n in named or v.whole in there}
    return Program(program.graph, variables, tuple(g for g in program.guards if set(g.reads) <= there))
