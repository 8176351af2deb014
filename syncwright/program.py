"""Program: one fx graph whose interface, named variables with roles, lives inside it."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from types import CodeType
from typing import Any, Literal

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from syncwright.selection import Own, Selection
from syncwright.tables.settings import Settings

Along = Literal["", "batch", "unknown"]


class Role(Enum):
    """What a variable is to the training step, recorded at capture and never guessed from a name."""

    INPUT = "input"
    PARAM = "param"
    BUFFER = "buffer"
    STATE = "state"
    GRAD = "grad"
    HYPER = "hyper"
    OUTPUT = "output"
    GLOBAL = "global"


@dataclass(frozen=True, slots=True)
class Variable:
    """A named value that a program reads or writes.

    name       the user's own fully qualified name ("fc.weight"); state and gradients extend it ("fc.weight.exp_avg")
    shape      sizes, whole tensor; () for scalars and for host numbers (HYPER: a Python float)
    of         the parameter that a GRAD or STATE belongs to; also of a BUFFER that a server keeps with a parameter
    sparse     the gradient touches few rows (trainers read the table by lookups alone)
    aliases    further names of the same tensor (tied weights are one variable)
    selection  which part of which whole variable this is, where it is a part of one
    kept       the parts that servers keep, in order; () where trainers keep the variable
    lazy       rows that no trainer touches stay as they are; the gradient's last column counts how often each is touched
    along      "batch": an OUTPUT with a value per example along axis 0; "unknown": it may be one
    dynamic    axes of an INPUT along which a program takes any size; `shape` has the example's there
    initial    what all of a STATE that a pass has added begins with; None where the user's objects hold it
    own        of a part that each trainer keeps of a variable, its own: of which
    unbounded  of a PARAM that is a table of any 64-bit ids, trained, and of its GRAD: what it does with them; its length
               means nothing
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    dtype: torch.dtype
    of: str | None = None
    sparse: bool = False
    aliases: tuple[str, ...] = ()
    selection: Selection | None = None
    kept: tuple[Selection, ...] = ()
    lazy: bool = False
    along: Along = ""
    dynamic: tuple[int, ...] = field(default=(), repr=False)
    initial: float | None = field(default=None, repr=False)
    unbounded: Settings | None = field(default=None, repr=False)
    own: Own | None = field(default=None, repr=False)

    @property
    def whole(self) -> str | None:
        """The variable that this is a part of."""
        return None if self.selection is None else self.selection.of

    @property
    def part(self) -> tuple[int, int] | None:
        """[start, stop) within the whole: rows of a piece, elements of a part of a flat variable."""
        return None if self.selection is None else self.selection.bounds

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Guard:
    """A condition on host numbers, or on sizes of the batch, under which the graph is what the user's step does.

    expression   over `symbols`, in Python ("momentum != 0")
    reads        the HYPER or INPUT variables that the symbols stand for, in the symbols' order
    axes         of each INPUT the axis whose size is meant; None for a HYPER. Empty: all None
    """

    expression: str
    symbols: tuple[str, ...]
    reads: tuple[str, ...]
    axes: tuple[int | None, ...] = ()

    def holds(self, values: Mapping[str, Any]) -> bool:
        """`values` has numbers of HYPER variables and shapes of INPUT variables."""
        axes = self.axes or (None,) * len(self.reads)
        known = [
            values[name] if axis is None else values[name][axis] for name, axis in zip(self.reads, axes, strict=True)
        ]
        return bool(eval(_code(self.expression), {"__builtins__": {}}, dict(zip(self.symbols, known, strict=True))))


@functools.lru_cache(maxsize=4096)
def _code(expression: str) -> CodeType:
    """Compiling takes twenty times as long as what is compiled."""
    return compile(expression, "<guard>", "eval")


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """A functional graph: one placeholder for each variable read, one `output({variable: node})` for what it writes.

    A placeholder says in `meta["variable"]` which variable it is. `meta["val"]` of every node is a fake tensor,
    a tuple of them, or a type (float, int, bool) for a host number. Nodes never write to what they are given.
    `edit()` copies; a pass changes the copy's graph and returns it.
    """

    graph: Graph
    variables: Mapping[str, Variable]
    guards: tuple[Guard, ...] = ()

    @property
    def placeholders(self) -> dict[str, Node]:
        return {n.meta["variable"]: n for n in self.graph.find_nodes(op="placeholder")}

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(self.placeholders)

    @property
    def results(self) -> dict[str, Node]:
        return dict(self.output.args[0])  # type: ignore[arg-type]

    @property
    def writes(self) -> tuple[str, ...]:
        return tuple(self.results)

    @property
    def output(self) -> Node:
        return next(iter(reversed(self.graph.nodes)))

    def of_role(self, *roles: Role) -> list[Variable]:
        return [v for v in self.variables.values() if v.role in roles]

    def edit(self) -> Program:
        """A copy whose graph may be changed."""
        graph, made = Graph(), {}
        for node in self.graph.nodes:
            if node.op != "output":
                made[node] = copy_node(graph, node, made)
        graph.output({name: made[node] for name, node in self.results.items()})
        return replace(self, graph=graph, variables=dict(self.variables))

    def slice(self, results: Mapping[str, Node], stop_at: Mapping[Node, Variable] | None = None) -> Program:
        """The part of the graph that computes `results`, with the nodes of `stop_at` as variables that it reads.

        before  %g = gradient(...), %new = sub(%w, %g)          results {"w": %new}, stop_at {%g: w.grad}
        after   w.grad = placeholder, w = placeholder, %new = sub(w, w.grad), output({"w": %new})
        """
        stops: Mapping[Node, Variable] = stop_at or {}
        wanted = self._ancestors(results.values(), stops)
        kept = sorted(wanted)
        graph, made, read = Graph(), {}, {}
        for node in kept:
            if node in stops or node.op == "placeholder":
                variable = stops.get(node) or self.variables[node.meta["variable"]]
                made[node] = new_placeholder(graph, variable, node.meta["val"])
                read[variable.name] = variable
        for node in kept:
            if node not in made:
                made[node] = copy_node(graph, node, made)
        graph.output({name: made[node] for name, node in results.items()})
        variables = read | {name: self.variables[name] for name in results if name in self.variables}
        guards = tuple(g for g in self.guards if set(g.reads) <= set(read))
        return Program(graph, variables, guards)

    def run(self, values: Mapping[str, object]) -> dict[str, object]:
        """Interprets the program on `values`, one per variable read; returns what it writes."""
        module = GraphModule({}, self.graph)
        results = module(*(values[name] for name in self.reads))
        return dict(results)

    def _ancestors(self, roots: Iterable[Node], stops: Mapping[Node, Variable]) -> set[Node]:
        seen: set[Node] = set()
        stack = list(roots)
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node not in stops:
                stack.extend(node.all_input_nodes)
        return seen


def mangle(name: str) -> str:
    """A Python identifier for a variable's name; the true name stays in the placeholder's meta."""
    return "v_" + re.sub(r"\W", "_", name)


def new_placeholder(graph: Graph, variable: Variable, val: object) -> Node:
    """The placeholder of `variable`, at the graph's insertion point (behind the other placeholders)."""
    node = graph.placeholder(mangle(variable.name))
    node.target = node.name
    node.meta = {"variable": variable.name, "val": val}
    return node


def copy_node(graph: Graph, node: Node, made: Mapping[Node, Node], name: str | None = None) -> Node:
    """`Graph.node_copy` in half the time: every assignment to a node costs, and so does a search for symbolic sizes."""
    copied = graph.create_node(node.op, node.target, name=name or node.name)
    if node.args:
        copied.args = map_arg(node.args, made.__getitem__)
    if node.kwargs:
        copied.kwargs = map_arg(node.kwargs, made.__getitem__)
    copied.meta.update(node.meta)
    return copied


def set_results(program: Program, results: Mapping[str, Node]) -> None:
    """Replaces what the (copied) program writes."""
    program.output.args = (dict(results),)
