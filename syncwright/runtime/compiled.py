"""CompiledExecutor: a program whose segments Inductor compiles; communications and host arithmetic run between them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch.fx import Graph, GraphModule, Node

from syncwright import ops
from syncwright.program import Program, Role
from syncwright.runtime.executor import Port, Run, communicate, places_of_wholes, put_rows_, writes_in_place
from syncwright.runtime.inductor import compile_graphs
from syncwright.runtime.segments import TENSOR_FORMS, Cut, Segment, cut
from syncwright.shapes import fake, is_host, like, new_mode, substitute

FEW_NODES, FEW_ELEMENTS = 12, 4096
"""A segment with fewer nodes on smaller tensors runs as it is: compiling it would gain nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class Compiled:
    """A segment ready to run: a function from the values of `inputs` to the values of `outputs`.

    hosts     which inputs are numbers on the host, each with the 0-d tensor that carries it
    examples  what inputs look like, where the function is a graph that is to be compiled
    """

    function: Callable[..., Sequence[object]]
    inputs: tuple[Node, ...]
    hosts: tuple[tuple[int, torch.Tensor], ...]
    outputs: tuple[Node, ...]
    examples: tuple[torch.Tensor, ...] = ()


class CompiledExecutor:
    """Like `Executor`; updates written in place where nothing reads the old value afterwards.

    own  of the program's variables, those whose old value nobody else has; None: all
    """

    def __init__(self, program: Program, own: Collection[str] | None = None):
        self.program = program
        self._placeholders = program.placeholders
        self._results = program.results
        self._cut = cut(program)
        self._kept = _kept(program, self._cut)
        found = _in_place(program, self._cut)
        self._in_place = {name: node for name, node in found.items() if own is None or name in own}
        self._items = _compiled([self._prepare(item, at) for at, item in enumerate(self._cut.items)])
        self._frees = _frees(program, self._cut, self._items)
        self._parts = _Parts(self._cut.parts)
        self._writing, self._places = writes_in_place(program), places_of_wholes(program)
        self._leads_to = [_leads_to(item) for item in self._items]

    @property
    def overwritten(self) -> Collection[str]:
        """Variables whose new value takes the place of the old one in memory."""
        return self._in_place.keys()

    def run(self, values: Mapping[str, object], port: Port) -> Run:
        """See `Executor.run`."""
        env = _Values(self._cut.views, {node: values[name] for name, node in self._placeholders.items()})
        for item, frees, leads_to in zip(self._items, self._frees, self._leads_to, strict=True):
            if leads_to and port is not None and all(port.ahead(name) is not None for name in leads_to):
                continue
            if isinstance(item, Compiled):
                given = [env[node] if node in env else self._parts.of(node, env) for node in item.inputs]
                for index, carrier in item.hosts:
                    given[index] = carrier.fill_(given[index])  # type: ignore[arg-type]
                env.update(zip(item.outputs, item.function(*given), strict=True))
                del given
            elif item.target in ops.PORTED:
                env[item] = yield from communicate(item, env, port, self._places)
            else:
                args, kwargs = (
                    substitute(each, env.__getitem__) if each else each for each in (item.args, item.kwargs)
                )
                env[item] = (put_rows_ if item in self._writing else item.target)(*args, **kwargs)  # type: ignore[operator]
                del args, kwargs
            for dead in frees:
                env.pop(dead, None)
        return {name: env[self._in_place.get(name, node)] for name, node in self._results.items()}

    def _prepare(self, item: Segment | Node, at: int) -> Compiled | Node:
        if isinstance(item, Node):
            return item
        mine = set(item.nodes)
        written = {
            self._placeholders[name]: self._results[name] for name in self._in_place if self._results[name] in mine
        }
        outputs = [n for n in item.nodes if n in self._kept.get(at, ())]
        return _Builder(self._cut, item, written).build(outputs)


def _leads_to(item: Compiled | Node) -> tuple[str, ...]:
    """The nodes that make ids distinct, where a segment is run for these alone: it is left out where they were computed ahead."""
    if not isinstance(item, Compiled):
        return ()
    users = {user for node in item.outputs for user in node.users}
    return tuple(sorted(user.name for user in users)) if all(user.target is ops.unique for user in users) else ()


class _Values(dict):
    """Values by node; a view is made whenever it is asked for, and not kept."""

    def __init__(self, views: Collection[Node], values: Mapping[Node, object]):
        super().__init__(values)
        self._views = views

    def __missing__(self, node: Node) -> object:
        assert node in self._views, f"{node.name} has been computed"
        args = substitute(node.args, self.__getitem__)
        return node.target(*args, **node.kwargs)  # type: ignore[operator]


class _Parts:
    """Parts of flat variables as tensors of their own, made again only where a variable is another tensor than before."""

    def __init__(self, bases: Mapping[Node, Node]):
        self._bases = bases
        self._made: dict[Node, tuple[object, torch.Tensor]] = {}

    def of(self, node: Node, env: Mapping[Node, object]) -> torch.Tensor:
        base = env[self._bases[node]]
        if node not in self._made or self._made[node][0] is not base:
            self._made[node] = base, cast(torch.Tensor, _Values(self._bases, env)[node])
        return self._made[node][1]


class _Builder:
    """One segment as a graph of its own.

    What it reads of a flat variable comes as a tensor of its own, unless it writes the variable: a kernel that knows where
    in the buffer its layer lies would be another one for every layer.
    """

    def __init__(self, cut: Cut, segment: Segment, written: Mapping[Node, Node]):
        self.written = written
        self.segment = segment
        self.views = {view for view in cut.views if view not in cut.parts or cut.parts[view] in written}
        self.mode = new_mode()
        self.graph = Graph()
        self.made: dict[Node, Node] = {}
        self.inputs: list[Node] = []
        self.hosts: list[tuple[int, torch.Tensor]] = []
        self.examples: list[torch.Tensor] = []

    def build(self, outputs: list[Node]) -> Compiled:
        for node in self._reads():
            self._input(node)
        for node in self.segment.nodes:
            self.made[node] = self._copy(node)
        returned = [n for n in outputs if n not in set(self.written.values())]
        for placeholder, node in self.written.items():
            self.graph.call_function(torch.ops.aten.copy_.default, (self.made[placeholder], self.made[node]))
        self.graph.output([self.made[n] for n in returned])
        module = GraphModule({}, self.graph)
        examples = () if self._is_small() else tuple(self.examples)
        return Compiled(module, tuple(self.inputs), tuple(self.hosts), tuple(returned), examples)

    def _is_small(self) -> bool:
        vals = [n.meta["val"] for n in self.segment.nodes]
        tensors = [v for v in vals if isinstance(v, torch.Tensor)]
        few = len(vals) <= FEW_NODES and len(tensors) == len(vals)
        return few and all(v.numel() <= FEW_ELEMENTS for v in tensors)

    def _reads(self) -> list[Node]:
        """What the segment takes from outside, behind its views, in graph order."""
        mine, found = set(self.segment.nodes), set(self.written)
        stack = list(self.segment.nodes)
        seen: set[Node] = set()
        while stack:
            for source in stack.pop().all_input_nodes:
                if source in mine or source in seen:
                    continue
                seen.add(source)
                if source in self.views:
                    stack.append(source)
                else:
                    found.add(source)
        return sorted(found)

    def _input(self, node: Node) -> None:
        val = node.meta["val"]
        if is_host(val):
            dtype = self._dtype_for(node)
            self.hosts.append((len(self.inputs), torch.zeros((), dtype=dtype)))
            example = fake(self.mode, (), dtype)
        else:
            example = like(self.mode, val)
        self.made[node] = self.graph.placeholder(node.name)
        self.inputs.append(node)
        self.examples.append(example)

    def _dtype_for(self, node: Node) -> torch.dtype:
        """The type in which a number meets tensors: float64 where it meets any, else float32."""
        met = [u.meta["val"] for u in node.users if isinstance(u.meta["val"], torch.Tensor)]
        if all(not v.is_floating_point() for v in met) and met:
            return torch.int64
        return torch.float64 if any(v.dtype is torch.float64 for v in met) else torch.float32

    def _copy(self, node: Node) -> Node:
        for source in node.all_input_nodes:
            self._view(source)
        args, kwargs = substitute((node.args, node.kwargs), self.made.__getitem__)
        if any(is_host(n.meta["val"]) for n in node.all_input_nodes):
            return TENSOR_FORMS[node.target](self.graph, args, kwargs)  # type: ignore[index]
        return self.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]

    def _view(self, node: Node) -> None:
        if node in self.made:
            return
        assert node in self.views, f"{node.name} comes from outside or is a view"
        self.made[node] = self._copy(node)


def _compiled(items: list[Compiled | Node]) -> list[Compiled | Node]:
    """The items with their graphs compiled."""
    drafts = {at: item for at, item in enumerate(items) if isinstance(item, Compiled) and item.examples}
    graphs = [(cast(GraphModule, draft.function), draft.examples) for draft in drafts.values()]
    made = dict(zip(drafts, compile_graphs(graphs), strict=True))
    return [
        replace(drafts[at], function=made[at], examples=()) if at in made else item for at, item in enumerate(items)
    ]


def _kept(program: Program, cut: Cut) -> dict[int, set[Node]]:
    """For every segment, the nodes that something outside of it reads."""
    home = {node: at for at, item in enumerate(cut.items) if isinstance(item, Segment) for node in item.nodes}
    kept: dict[int, set[Node]] = {}

    def read(node: Node, by: int | None) -> None:
        if node in cut.views:
            for source in node.all_input_nodes:
                read(source, by)
        elif node in home and home[node] != by:
            kept.setdefault(home[node], set()).add(node)

    for at, item in enumerate(cut.items):
        for node in item.nodes if isinstance(item, Segment) else [item]:
            for source in node.all_input_nodes:
                read(source, at if isinstance(item, Segment) else None)
    for node in program.results.values():
        read(node, None)
    return kept


def _in_place(program: Program, cut: Cut) -> dict[str, Node]:
    """Variables whose new value may overwrite the old one where it is made, with their placeholders."""
    home = {node: at for at, item in enumerate(cut.items) if isinstance(item, Segment) for node in item.nodes}
    last = _last_reads(program, cut)
    results, found = program.results, {}
    shared = [n for n in results.values() if list(results.values()).count(n) > 1] if len(results) < 64 else []
    for name, placeholder in program.placeholders.items():
        node = results.get(name)
        role = program.variables[name].role
        if node is None or node not in home or role not in (Role.PARAM, Role.STATE, Role.GRAD) or node in shared:
            continue
        outside = [u for u in node.users if u.op != "output" and home.get(u) != home[node]]
        if last.get(placeholder, -1) <= home[node] and not outside:
            found[name] = placeholder
    return found


def _frees(program: Program, cut: Cut, items: Sequence[Compiled | Node]) -> list[tuple[Node, ...]]:
    """Behind each item, the values made before that nothing reads any more: a step holds no more than it needs."""
    last = _last_reads(program, cut)
    frees: list[tuple[Node, ...]] = [() for _ in items]
    for at, item in enumerate(items):
        for node in item.outputs if isinstance(item, Compiled) else [item]:
            end = max(at, last.get(node, at))
            if end < len(items):
                frees[end] += (node,)
    return frees


def _last_reads(program: Program, cut: Cut) -> dict[Node, int]:
    """The last item that reads each value, also through views; the number of items for what the program writes."""
    last: dict[Node, int] = {}

    def read(node: Node, at: int) -> None:
        if node in cut.views:
            for source in node.all_input_nodes:
                read(source, at)
        else:
            last[node] = max(at, last.get(node, -1))

    for at, item in enumerate(cut.items):
        for node in item.nodes if isinstance(item, Segment) else [item]:
            for source in node.all_input_nodes:
                read(source, at)
    for node in program.results.values():
        read(node, len(cut.items))
    return last
