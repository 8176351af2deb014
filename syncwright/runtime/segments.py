"""A program cut at its communications into segments of plain computation, to be compiled one by one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from operator import getitem

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.dead import is_random
from syncwright.program import Program
from syncwright.regions import turn
from syncwright.schema import argument
from syncwright.shapes import is_host, substitute

aten = torch.ops.aten
MOST_SEGMENTS = 8
HEAVY_NBYTES = 1 << 20
LONG_FORWARD = 24
"""So many nodes of forward, and more, are a segment of their own; fewer only where backward computes some of them again, which
Inductor is not to join."""

_VIEWS = frozenset(
    {
        aten.slice.Tensor,
        aten.view.default,
        aten.t.default,
        aten.transpose.int,
        aten.permute.default,
        aten.unsqueeze.default,
        aten.split_with_sizes.default,
        getitem,
    }
)


@dataclass(slots=True)
class Segment:
    """Nodes that run together, in order. Grows while a program is cut, then stays."""

    nodes: list[Node] = field(default_factory=list)


Item = Segment | Node
"""A segment, or one node that the executor runs by itself: a communication, or arithmetic on the host."""


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """A program as a list of items in the order in which they run.

    views  nodes that only look at a value in another shape: each segment makes those that it needs for itself
    parts  those of them that are a stretch of a variable, each with the variable's placeholder
    """

    items: tuple[Item, ...]
    views: frozenset[Node]
    parts: Mapping[Node, Node]


def cut(program: Program) -> Cut:
    """Cuts where something is waited for, where backward begins, and about every eighth of the nodes where something is
    sent.

    before  %a = mm, %b = mm, push(%a), %c = mm, %w = wait(%r), %d = sub(%p, %w)
    after   [%a, %b, %c], push(%a), %w = wait(%r), [%d]

    Sends keep their order, and no wait moves forward: whoever waits has sent all that stands before it. Nor does
    a pull for a whole host: its trainers do what they do together in one order, compiled or not.
    """
    return _Cutter(program).run()


class _Cutter:
    """One walk over a program."""

    def __init__(self, program: Program):
        self.nodes = [n for n in program.graph.nodes if n.op == "call_function"]
        self.views = _views(program)
        self.turn, self.loose = turn(program), _loose(self.nodes)
        self.long = 1 if _computes_again(self.nodes, self.turn) else LONG_FORWARD
        self.enough = max(8, len(self.nodes) // MOST_SEGMENTS)
        self.items: list[Item] = []
        self.open = Segment()
        self.inside: set[Node] = set()
        self.placed: set[Node] = set()
        self.sends: list[Node] = []

    def run(self) -> Cut:
        for node in self.nodes:
            if node is self.turn and len(self.open.nodes) >= self.long:
                self._close()
            if node in self.views or node in self.placed or _is_constant(node):
                continue
            for constant in [each for each in node.all_input_nodes if _is_constant(each) and each not in self.placed]:
                self._place(constant)
            if node.target in ops.SENDS:
                self._send(node)
            elif node.target in ops.COMMUNICATION:
                self._receive(node)
            elif node in self.loose or runs_alone(node):
                self._alone(node)
            else:
                self._place(node)
        for node in [each for each in self.nodes if _is_constant(each) and each not in self.placed]:
            self._place(node)
        self._close()
        return Cut(tuple(self.items), frozenset(self.views), _parts(self.views))

    def _place(self, node: Node) -> None:
        """Into the open segment; what a node gives as a tuple is taken apart at once, so that only tensors cross."""
        picks = node.users if isinstance(node.meta["val"], tuple | list) else ()
        for each in (node, *picks):
            self.open.nodes.append(each)
            self.inside.add(each)
            self.placed.add(each)

    def _send(self, node: Node) -> None:
        self.sends.append(node)
        self.inside.add(node)
        if len(self.open.nodes) >= self.enough or not self.open.nodes or _is_heavy(node):
            self._close()

    def _receive(self, node: Node) -> None:
        fresh = node.target is ops.pull_rows or (node.target is ops.pull and not node.args[0])
        fresh = fresh and not (self.sends and argument(node, "on_host"))
        if not fresh or len(self.open.nodes) >= self.enough:
            self._close()
        self.items.append(node)

    def _alone(self, node: Node) -> None:
        if self._needs_open(node):
            self._close()
        self.items.append(node)

    def _needs_open(self, node: Node) -> bool:
        return any(n in self.inside or (n in self.views and self._needs_open(n)) for n in node.all_input_nodes)

    def _close(self) -> None:
        if self.open.nodes:
            self.items.append(self.open)
        self.items.extend(self.sends)
        self.open, self.sends = Segment(), []
        self.inside = set()


def _is_constant(node: Node) -> bool:
    """Made of nothing, to the same value every time (`arange`): it is made where it is first read."""
    plain = node.op == "call_function" and not node.all_input_nodes and not is_random(node)
    return plain and node.target not in ops.COMMUNICATION and isinstance(node.meta["val"], torch.Tensor)


def _is_heavy(node: Node) -> bool:
    """Whether a server has so much to do with what is sent that it had better begin while the next segment runs."""
    sent = node.args[0]
    return node.target is ops.push and isinstance(sent, Node) and sent.meta["val"].nbytes >= HEAVY_NBYTES


def _loose(nodes: Sequence[Node]) -> set[Node]:
    """Operations on as many rows as there are: a compiled segment would be compiled again for each number of them."""
    found: set[Node] = set()
    given: set[Node] = set()
    for node in nodes:
        if node.target in ops.LOOSE or any(source in given for source in node.all_input_nodes):
            found.add(node)
            if node.target not in ops.SIZED and not _is_number(node):
                given.add(node)
    return found | {node for node in nodes if node.target is ops.take_rows}


def _is_number(node: Node) -> bool:
    val = node.meta["val"]
    return is_host(val) or (isinstance(val, torch.Tensor) and val.dim() == 0)


def runs_alone(node: Node) -> bool:
    """Arithmetic on the host, the 0-d state that it reads, and operations whose numbers no tensor can stand for."""
    given = (node.target, *(n.target for n in node.all_input_nodes))
    if is_host(node.meta["val"]) or ops.unique in given or ops.wait_whole in given:
        return True
    if _is_counter(node):
        return True
    return any(is_host(n.meta["val"]) for n in node.all_input_nodes) and node.target not in TENSOR_FORMS


def _is_counter(node: Node) -> bool:
    """0-d, and made from 0-d state and numbers alone: a step count."""
    val = node.meta["val"]
    if not isinstance(val, torch.Tensor) or val.dim() or not node.all_input_nodes:
        return False
    return all(
        (n.op == "placeholder" and not is_host(n.meta["val"]) and n.meta["val"].dim() == 0) or _is_counter(n)
        for n in node.all_input_nodes
        if not is_host(n.meta["val"])
    ) and not all(is_host(n.meta["val"]) for n in node.all_input_nodes)


def _computes_again(nodes: Sequence[Node], first: Node | None) -> bool:
    """Whether some operation of forward, on the same values, stands behind the first node of backward once more."""
    if first is None:
        return False
    numbers: dict[tuple, int] = {}
    number_of: dict[Node, int] = {}
    early = 0
    for node in nodes:
        if node is first:
            early = len(numbers)
        args = substitute((node.args, node.kwargs), lambda each: ("value", number_of.get(each, each.name)))
        key = (node.target, repr(args))
        known = numbers.get(key)
        if known is not None and known < early and node.all_input_nodes and not getattr(node.target, "is_view", False):
            return True
        number_of[node] = numbers.setdefault(key, len(numbers))
    return False


def _views(program: Program) -> set[Node]:
    """Views of what a program is given: of its variables, and of what a wait or pull brings."""
    found: set[Node] = set()
    given = (ops.wait, ops.wait_own, ops.wait_on_host, ops.pull, ops.pull_rows)
    sources = {n for n in program.graph.nodes if n.op == "placeholder" or n.target in given or _is_whole(n)}
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in _VIEWS and node not in sources:
            first = node.args[0]
            if isinstance(first, Node) and (first in found or (first in sources and not is_host(first.meta["val"]))):
                found.add(node)
    return found


def _is_whole(node: Node) -> bool:
    """One of the values that trainers have put together."""
    return node.target is getitem and node.args[0].target is ops.wait_whole  # type: ignore[union-attr]


def _parts(views: Collection[Node]) -> dict[Node, Node]:
    """The views that are a stretch of a variable laid out flat, in the shape of what lies there."""
    found: dict[Node, Node] = {}
    for node in sorted(views):
        source = node.args[0]
        assert isinstance(source, Node), f"{node.name} looks at a value"
        if node.target is aten.slice.Tensor and source.op == "placeholder":
            found[node] = source
        elif node.target is aten.view.default and source in found:
            found[node] = found[source]
    return found


def _scaled(graph, x, scale):
    return graph.call_function(aten.mul.Tensor, (x, scale))


def _add(graph, args: tuple, kwargs: Mapping) -> Node:
    x, y = args
    alpha = kwargs.get("alpha", 1)
    return graph.call_function(aten.add.Tensor, (x, _scaled(graph, y, alpha) if isinstance(alpha, Node) else y))


def _sub(graph, args: tuple, kwargs: Mapping) -> Node:
    x, y = args
    alpha = kwargs.get("alpha", 1)
    return graph.call_function(aten.sub.Tensor, (x, _scaled(graph, y, alpha) if isinstance(alpha, Node) else y))


def _same(target):
    return lambda graph, args, kwargs: graph.call_function(target, args, dict(kwargs))


def _addcmul(graph, args: tuple, kwargs: Mapping) -> Node:
    x, a, b = args
    return graph.call_function(aten.add.Tensor, (x, _scaled(graph, _scaled(graph, a, kwargs["value"]), b)))


def _addcdiv(graph, args: tuple, kwargs: Mapping) -> Node:
    x, a, b = args
    quotient = graph.call_function(aten.div.Tensor, (_scaled(graph, a, kwargs["value"]), b))
    return graph.call_function(aten.add.Tensor, (x, quotient))


TENSOR_FORMS = {
    aten.mul.Tensor: _same(aten.mul.Tensor),
    aten.div.Tensor: _same(aten.div.Tensor),
    aten.add.Tensor: _add,
    aten.sub.Tensor: _sub,
    aten.lerp.Scalar: _same(aten.lerp.Tensor),
    aten.addcmul.default: _addcmul,
    aten.addcdiv.default: _addcdiv,
    aten.pow.Tensor_Scalar: _same(aten.pow.Tensor_Tensor),
    aten.scalar_tensor.default: lambda graph, args, kwargs: graph.call_function(
        aten._to_copy.default, (args[0],), {"dtype": kwargs.get("dtype")}
    ),
}
"""How to write an operation when a number on the host comes as a 0-d tensor: compiled once for all its values."""
