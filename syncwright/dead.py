"""Dead nodes: what nothing uses, but for what acts on more than its users."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Graph, Node

from syncwright import ops


def remove_dead(graph: Graph, kept: Callable[[Node], bool] | None = None) -> None:
    """Drops calls that nothing uses, but for those `kept`: random and communicating ones act on more than users."""
    kept = kept or is_effect
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and not kept(node):
            graph.erase_node(node)


def is_effect(node: Node) -> bool:
    return node.target is ops.push or is_random(node)


def is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
