"""The structure of a batch, and in words where another batch's differs."""

from __future__ import annotations

from torch.utils import _pytree as pytree


def difference(found: tuple, expected: tuple) -> str | None:
    """Where the skeleton `found` first differs from `expected`, or None.

    ((x, y),) for (x, y)               -> "found 1 argument, expected 2"
    (x, {"ids": y}) for (x, [y, y])    -> "argument 1 is a dict with 'ids', expected a list of 2"
    """
    if len(found) != len(expected):
        return f"found {len(found)} argument{'s' * (len(found) != 1)}, expected {len(expected)}"
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if (said := _difference(ours, theirs, f"argument {index}")) is not None:
            return said
    return None


def _difference(found: object, expected: object, where: str) -> str | None:
    ours, shape = _children(found)
    theirs, expected_shape = _children(expected)
    if shape != expected_shape:
        return f"{where} is {_words(found)}, expected {_words(expected)}"
    keys = list(found) if isinstance(found, dict) else range(len(ours))
    for key, mine, its in zip(keys, ours, theirs, strict=True):
        if (said := _difference(mine, its, f"{where}[{key!r}]")) is not None:
            return said
    return None


def _children(tree: object) -> tuple[list, object]:
    """What a container holds, and what kind of container it is; a leaf holds nothing."""
    if tree is None:
        return [], None
    return pytree.tree_flatten(tree, is_leaf=lambda inside: inside is not tree)


def _words(tree: object) -> str:
    match tree:
        case None:
            return "one value"
        case dict():
            return f"a dict with {', '.join(map(repr, tree))}" if tree else "an empty dict"
        case list() | tuple():
            return f"a {type(tree).__name__} of {len(tree)}"
    return f"a {type(tree).__name__}"
