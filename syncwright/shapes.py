"""What a node's value looks like (shape, dtype), found by running its op on fake tensors."""

from __future__ import annotations

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from syncwright.program import Program, Role, Variable

HOST_TYPES = (float, int, bool)


def is_host(val: object) -> bool:
    """Whether `meta["val"]` says that a node is a number on the host."""
    return isinstance(val, type)


def mode_of(graph: Graph) -> FakeTensorMode:
    """The fake mode of the graph's values; a new one for a graph without tensors."""
    for node in graph.nodes:
        if isinstance(val := node.meta.get("val"), FakeTensor):
            return val.fake_mode
    return FakeTensorMode()


def new_mode() -> FakeTensorMode:
    """A fake mode of its own, without the symbols that capture made."""
    return FakeTensorMode()


def like(mode: FakeTensorMode, val: torch.Tensor) -> torch.Tensor:
    """A fake tensor of `mode` that looks like one of another mode."""
    with mode:
        return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=val.device)


def fake(mode: FakeTensorMode, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    with mode:
        return torch.empty(shape, dtype=dtype)


def fake_of(mode: FakeTensorMode, variable: Variable) -> object:
    """The `meta["val"]` of a variable's placeholder."""
    return float if variable.role is Role.HYPER else fake(mode, variable.shape, variable.dtype)


def call(graph: Graph, mode: FakeTensorMode, target, *args, **kwargs) -> Node:
    """Adds `target(*args)` at the graph's insertion point, with its meta."""
    node = graph.call_function(target, args, kwargs)
    infer(node, mode)
    return node


def infer(node: Node, mode: FakeTensorMode) -> None:
    """Sets `meta["val"]` of a call from its arguments' meta. Numbers on the host keep their type, or become floats."""
    if not isinstance(node.target, torch._ops.OpOverload):
        if node.meta.get("val") is None or not is_host(node.meta["val"]):
            node.meta["val"] = _plain(node)
        return
    if node.target is torch.ops.aten._local_scalar_dense.default:
        node.meta.setdefault("val", float)
        return
    args, kwargs = map_arg((node.args, node.kwargs), _stand_in)
    with mode:
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[misc]


def _plain(node: Node) -> object:
    """A Python operator: picks from a tuple, or makes a number from numbers."""
    first = node.args[0]
    val = first.meta["val"] if isinstance(first, Node) else None
    if isinstance(val, tuple | list):
        return val[node.args[1]]  # type: ignore[index, call-overload]
    return float


def _stand_in(node: Node) -> object:
    """A number where only its type is known: 0.5 is in the domain of what optimizers compute."""
    val = node.meta["val"]
    return {float: 0.5, int: 1, bool: True}[val] if is_host(val) else val


def propagate(program: Program) -> None:
    """Recomputes every node's meta from the placeholders', in place (of a copy)."""
    mode = mode_of(program.graph)
    for node in program.graph.nodes:
        if node.op == "call_function":
            infer(node, mode)
