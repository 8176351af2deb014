"""A traced graph without writes, made from its nodes; a second trace does the same, but costs as much as the first.

What is written is mostly a whole tensor, by an elementwise op (an optimizer's `add_`, `addcdiv_`, `copy_`): the op
without the underscore gives the tensor's new content, and whoever reads the tensor afterwards reads that. Views are made
anew where what they look at was written to. Everything else (writes through views, random fills, batch norm's
statistics) is `NotCovered`, and is traced a second time.
"""

from __future__ import annotations

import functools
import re

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.node import map_arg

aten = torch.ops.aten
_ALIASES = frozenset({aten.detach.default, aten.alias.default, aten.lift_fresh.default})
_VIEWS = frozenset(
    {
        aten.t.default, aten.view.default, aten.transpose.int, aten.permute.default, aten.expand.default,
        aten.slice.Tensor, aten.select.int, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default,
    }
)  # fmt: skip


class NotCovered(Exception):
    """A write that takes a second trace to express."""


def without_writes(graph: Graph) -> Graph:
    """The same computation; at the end a placeholder that the graph writes to gets a `copy_` of its last content.

    before  %m = mul_(%state, 0.9), %a = add_(%m, %g), %p = add_(%w, %a, alpha=-0.1), return (%loss,)
    after   %m = mul(%state, 0.9), %a = add(%m, %g), %p = add(%w, %a, alpha=-0.1), copy_(%state, %a), copy_(%w, %p), ...
    """
    return _Rewriter().run(graph)


class _Rewriter:
    """Walks the graph once. All keys are nodes of the old graph, values of the new.

    content  what each value with memory of its own now holds
    version  how often it was written to
    same     further names of a value: detached, or returned by an op that wrote to it
    source   what a view looks at
    made     what stands for a view, and the version of the memory that it was made from
    """

    def __init__(self) -> None:
        self.graph = Graph()
        self.content: dict[Node, Node] = {}
        self.version: dict[Node, int] = {}
        self.same: dict[Node, Node] = {}
        self.source: dict[Node, Node] = {}
        self.made: dict[Node, tuple[Node, int]] = {}
        self.placeholders: dict[Node, Node] = {}

    def run(self, graph: Graph) -> Graph:
        for node in graph.nodes:
            if node.op == "output":
                self._finish(node)
            elif node.op == "call_function":
                self._call(node)
            else:
                self._keep(node, self._copied(node))
                if node.op == "placeholder":
                    self.placeholders[node] = self.content[node]
        return self.graph

    def now(self, node: Node) -> Node:
        """What stands for `node` where it is read at this point."""
        node = self.same.get(node, node)
        if node not in self.source:
            return self.content[node]
        made, version = self.made[node]
        latest = self.version[self._memory(node)]
        if version != latest:
            if node.target not in _VIEWS:
                raise NotCovered(f"{node.name} looks at what is written to")
            made = self._copied(node)
            self.made[node] = (made, latest)
        return made

    def _call(self, node: Node) -> None:
        op, first = node.target, node.args[0] if node.args else None
        if not isinstance(op, OpOverload):
            several = isinstance(first, Node) and isinstance(first.meta.get("val"), tuple | list)
            self._look(node, first) if several else self._keep(node, self._copied(node))  # type: ignore[arg-type]
        elif op._schema.is_mutable:
            self._write(node, op)
        elif not _returns_view(op):
            self._keep(node, self._copied(node))
        elif not isinstance(first, Node):
            raise NotCovered(f"{node.name} looks at no tensor, or at several")
        elif op in _ALIASES:
            self.same[node] = self.same.get(first, first)
        else:
            self._look(node, first)

    def _keep(self, node: Node, made: Node) -> None:
        self.content[node], self.version[node] = made, 0

    def _look(self, node: Node, source: Node) -> None:
        self.source[node] = self.same.get(source, source)
        self.made[node] = (self._copied(node), self.version[self._memory(node)])

    def _memory(self, node: Node) -> Node:
        while node in self.source:
            node = self.source[node]
        return node

    def _write(self, node: Node, op: OpOverload) -> None:
        pure, written = _pure(op), node.kwargs.get("out", node.args[0])
        written = self.same.get(written, written) if isinstance(written, Node) else None  # type: ignore[arg-type]
        if pure is None or written is None or written in self.source or written.op == "get_attr":
            raise NotCovered(f"{node.name} writes otherwise than elementwise to a whole tensor")
        made = self._copied(node, pure)
        made.kwargs = {key: value for key, value in made.kwargs.items() if key != "out"}
        if not _gives_what_it_writes(node, written):
            raise NotCovered(f"{node.name} casts what it writes")
        self.content[written] = made
        self.version[written] += 1
        self.same[node] = written

    def _copied(self, node: Node, target: OpOverload | None = None) -> Node:
        args, kwargs = map_arg(node.args, self.now), map_arg(node.kwargs, self.now)
        name = target.overloadpacket.__name__ if target else re.sub(r"_\d+$", "", node.name)
        made = self.graph.create_node(node.op, target or node.target, name=name)
        made.args, made.kwargs = args, kwargs
        made.meta = {"val": node.meta.get("val")}
        return made

    def _finish(self, output: Node) -> None:
        for node, placeholder in self.placeholders.items():
            if self.version[node]:
                self.graph.call_function(aten.copy_.default, (placeholder, self.content[node]))
        self.graph.output(map_arg(output.args[0], self.now))


@functools.cache
def _returns_view(op: OpOverload) -> bool:
    return any(returned.alias_info is not None for returned in op._schema.returns)


@functools.cache
def _pure(op: OpOverload) -> OpOverload | None:
    """The elementwise op that gives what `op` writes: `add.Tensor` of `add_.Tensor`, `maximum` of `maximum.out`."""
    name = op._schema.name.split("::")[1]
    packet = getattr(aten, name.removesuffix("_"), None)
    if op.namespace != "aten" or packet is None:
        return None
    for pure in (getattr(packet, overload) for overload in packet.overloads()):
        if not pure._schema.is_mutable and _takes(pure) == _takes(op) and _is_elementwise(pure):
            return pure
    return None


def _takes(op: OpOverload) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in op._schema.arguments if a.name != "out"]


def _is_elementwise(op: OpOverload) -> bool:
    pointwise = torch.Tag.pointwise in op.tags and torch.Tag.nondeterministic_seeded not in op.tags
    return pointwise or op is aten.copy.default


def _gives_what_it_writes(node: Node, written: Node) -> bool:
    """Whether the pure op's result has the dtype, sizes and strides of what `node` writes to."""
    val = written.meta["val"]
    if not isinstance(val, torch.Tensor) or not val.is_contiguous():
        return False
    if node.target is aten.copy_.default:
        return True
    others = [v for n in node.all_input_nodes if isinstance(v := n.meta["val"], torch.Tensor)]
    return not any(isinstance(a, complex) for a in node.args) and all(_fits(other, val) for other in others)


def _fits(other: torch.Tensor, val: torch.Tensor) -> bool:
    """Whether an argument leaves the result's dtype as it is: of the same dtype, or a number beside a tensor."""
    number = other.dim() == 0 and val.dim() > 0 and other.is_floating_point() and val.is_floating_point()
    return number or other.dtype is val.dtype
