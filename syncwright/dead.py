"""Dead nodes: what nothing uses, but for what acts on more than its users."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from syncwright import ops


def remove_dead(graph: Graph) -> None:
    """Drops calls that nothing uses; random and communicating ones act on more than their users and stay."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and not is_effect(node):
            graph.erase_node(node)


def is_effect(node: Node) -> bool:
    return node.target is ops.push or is_random(node)


def is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
