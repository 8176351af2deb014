"""Arguments of a node by their names in its op's schema."""

from __future__ import annotations

from torch.fx import Node


def argument(node: Node, name: str) -> object:
    """What a node gives under a name; the default where it gives nothing, None where its op has no such argument."""
    for index, declared in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if declared.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            return node.args[index] if index < len(node.args) else declared.default_value
    return None


def put_argument(node: Node, name: str, value: object) -> None:
    """Gives a node another argument under a name."""
    names = [declared.name for declared in node.target._schema.arguments]  # type: ignore[union-attr]
    if name in node.kwargs:
        node.update_kwarg(name, value)  # type: ignore[arg-type]
    else:
        node.update_arg(names.index(name), value)  # type: ignore[arg-type]
