"""What a node's value looks like (shape, dtype), found by running its op on fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import map_arg

from syncwright import ops
from syncwright.program import Program, Role, Variable

_TREES = (tuple, list, dict, slice)
HOST_TYPES = (float, int, bool)


def substitute(value: Any, known: Callable[[Node], Any]) -> Any:
    """A node's arguments with every node replaced, in any tree of lists, tuples and dicts."""
    if type(value) is tuple and not any(
        isinstance(each, _TREES) for each in value
    ):  # as nearly all are: in a third of the time
        return tuple([known(each) if isinstance(each, Node) else each for each in value])
    return map_arg(value, known)


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
    """A fake mode of its own, without the symbols that capture made. Inductor's caches want its `ShapeEnv`."""
    return FakeTensorMode(shape_env=ShapeEnv())


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
    elif node.target is torch.ops.aten._local_scalar_dense.default:
        node.meta.setdefault("val", float)
    elif node.target is torch.ops.aten.sym_size.int:
        node.meta["val"] = int
    elif (node.target in _LIKE_FIRST and not node.kwargs) or _only_scales(node):
        node.meta["val"] = node.all_input_nodes[0].meta["val"]
    else:
        args, kwargs = substitute((node.args, node.kwargs), _stand_in)
        with mode:
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[misc]


_LIKE_FIRST = frozenset(
    {
        *(ops.gradient, ops.all_reduce, ops.wait, ops.wait_own, ops.sum_on_host, ops.wait_on_host),
        *(ops.push_merged, ops.pull_value, ops.send),
    }
)
_SCALE = frozenset({torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor})


def _only_scales(node: Node) -> bool:
    """A contiguous float tensor times or by a number: what comes out looks like what goes in."""
    if node.target not in _SCALE or node.kwargs:
        return False
    first, second = (a.meta["val"] if isinstance(a, Node) else a for a in node.args)
    if not isinstance(first, torch.Tensor) or not first.is_contiguous() or not first.is_floating_point():
        return False
    if isinstance(second, torch.Tensor):
        return first.dim() > 0 and second.dim() == 0 and second.is_floating_point()
    return second in HOST_TYPES or isinstance(second, HOST_TYPES)


def _plain(node: Node) -> object:
    """A Python operator: picks from a tuple, or makes a number from numbers."""
    first = node.args[0]
    val = first.meta["val"] if isinstance(first, Node) else None
    if isinstance(val, tuple | list):
        return val[node.args[1]]  # type: ignore[index, call-overload]
    return float


def _stand_in(node: Node) -> object:
    """A size, by the example; a number where only its type is known: 0.5 is in the domain of what optimizers compute."""
    val = node.meta["val"]
    if val is int and (size := size_of(node)) is not None:
        return size
    return {float: 0.5, int: 1, bool: True}[val] if is_host(val) else val


def size_of(node: Node) -> int | None:
    """What a size, or what is computed from sizes alone, is for the example; None for another number."""
    if node.target is torch.ops.aten.sym_size.int:
        return node.args[0].meta["val"].shape[node.args[1]]  # type: ignore[index, union-attr]
    if node.op != "call_function" or isinstance(node.target, torch._ops.OpOverload):
        return None
    known = [size_of(a) if isinstance(a, Node) else a for a in node.args]
    return None if any(not isinstance(k, int) for k in known) else node.target(*known)  # type: ignore[operator]


class Inference:
    """`call` for many nodes: what each kind of call gives is found once. Changes as it learns."""

    def __init__(self, mode: FakeTensorMode):
        self.mode = mode
        self._known: dict[object, object] = {}

    def call(self, graph: Graph, target, *args, **kwargs) -> Node:
        """Adds `target(*args)` at the graph's insertion point, with its meta."""
        node = graph.call_function(target, args, kwargs)
        self.infer(node)
        return node

    def fake_of(self, variable: Variable) -> object:
        """The `meta["val"]` of a variable's placeholder."""
        key = (variable.role is Role.HYPER, variable.shape, variable.dtype)
        if key not in self._known:
            self._known[key] = fake_of(self.mode, variable)
        return self._known[key]

    def propagate(self, program: Program) -> None:
        """Recomputes every node's meta from the placeholders', in place (of a copy)."""
        for node in program.graph.nodes:
            if node.op == "call_function":
                self.infer(node)

    def infer(self, node: Node) -> None:
        """Sets `meta["val"]` of a call from its arguments' meta."""
        if not isinstance(node.target, torch._ops.OpOverload):
            infer(node, self.mode)
            return
        key = (node.target, _looks(_shaping(node)), _looks(node.kwargs))
        if key not in self._known:
            infer(node, self.mode)
            self._known[key] = node.meta["val"]
        node.meta["val"] = self._known[key]


def _shaping(node: Node) -> object:
    """The arguments on which what a node looks like depends: not on a channel's name, nor on where a slice begins."""
    if node.target in ops.COMMUNICATION or node.target in ops.CROSSINGS:
        return [a for a in node.args if not isinstance(a, str)]
    if node.target is torch.ops.aten.slice.Tensor and len(node.args) == 4:
        source, axis, start, stop = node.args
        size = source.meta["val"].shape[axis]  # type: ignore[index, union-attr]
        if 0 <= start <= stop <= size:  # type: ignore[operator]
            return source, axis, stop - start  # type: ignore[operator]
    return node.args


def _looks(value: object) -> object:
    """All that an op's result can depend on, but for the numbers in tensors."""
    match value:
        case Node():
            return (int, size_of(value)) if value.meta["val"] is int else _looks(value.meta["val"])
        case torch.Tensor():
            return (value.dtype, tuple(value.shape), value.stride(), value.device)
        case dict():
            return tuple((key, _looks(item)) for key, item in value.items())
        case list() | tuple():
            return tuple(_looks(item) for item in value)
        case _:
            return (type(value), value)
