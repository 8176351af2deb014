"""From text to a program."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.node import Argument

from syncwright.errors import TableError
from syncwright.place import EVERYWHERE, TRAINERS, Owners, Place, Server, put
from syncwright.program import Along, Guard, Program, Role, Variable
from syncwright.selection import Along as Cut
from syncwright.selection import Own, Selection
from syncwright.tables.settings import Settings, from_text
from syncwright.text.line import Line
from syncwright.text.words import DTYPES, HOST_DTYPES, HOST_TYPES, TextError, contiguous_strides

_NODE = r"%\w+"
_ROLES = {role.value: role for role in Role}
_ALONG: dict[str, Along] = {"batch": "batch", "unknown": "unknown"}
_PARTS: dict[str, Cut] = {"rows": "rows", "elements": "elements", "shards": "shards", "ids": "ids"}


def parse(text: str) -> Program:
    """The program that `to_text` wrote: same names, variables, guards and ops; fake tensors of one mode.

    Raises TextError with the line's number, what was found and what was expected.
    """
    lines = [Line(number, line) for number, line in enumerate(text.split("\n"), 1)]
    lines = [line for line in lines if line.peek() and not line.peek().startswith("#")]
    if not lines:
        raise TextError("line 1: found no text, expected `program`; print one with to_text")
    lines[0].take("program")
    lines[0].end()
    reader = _Reader()
    for line in lines[1:]:
        reader.read(line)
        line.end()
    reader.graph.output(reader.results)
    return Program(reader.graph, reader.variables, tuple(reader.guards))


class _Reader:
    """What has been read of a program so far; it grows line by line."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.mode = FakeTensorMode()
        self.variables: dict[str, Variable] = {}
        self.guards: list[Guard] = []
        self.nodes: dict[str, Node] = {}
        self.results: dict[str, Node] = {}

    def read(self, line: Line) -> None:
        word = line.peek()
        if word.startswith("%"):
            self._read_node(line)
        elif word in _ROLES:
            variable = _read_variable(line, self.variables)
            self.variables[variable.name] = variable
        elif word == "guard":
            self.guards.append(_read_guard(line))
        elif line.accept("write"):
            name = line.fresh('"', "a variable", self.results)
            line.take("=")
            self.results[name] = self._read_use(line)
        else:
            line.fail("a role (param, state, ...), `guard`, a node (%name) or `write`")

    def _read_node(self, line: Line) -> None:
        name = line.fresh(_NODE, "a node (%name)", self.nodes)
        meta: dict[str, object] = {"val": self._read_type(line)} if line.accept(":") else {}
        line.take("=")
        if line.accept("read"):
            variable = line.string("a variable")
            meta["variable"] = variable
            target = line.string("a placeholder's target") if line.accept("as") else name[1:]
            node = self.graph.create_node("placeholder", target, (), {}, name[1:])
        else:
            op = line.op()
            args, kwargs = self._read_arguments(line)
            node = self.graph.create_node("call_function", op, args, kwargs, name[1:])
        if f"%{node.name}" != name:
            line.at = 0
            line.fail(f"a name that Python leaves free, such as %{node.name}")
        node.meta = meta
        put(node, _read_place(line))
        self.nodes[name] = node

    def _read_arguments(self, line: Line) -> tuple[tuple[Argument, ...], dict[str, Argument]]:
        args: list[Argument] = []
        kwargs: dict[str, Argument] = {}
        line.take("(")
        while not line.accept(")"):
            if line.peek(1) == "=":
                key = line.fresh(r"\w+", "an argument's name", kwargs)
                line.take("=")
                kwargs[key] = self._read_value(line)
            else:
                args.append(self._read_value(line))
            line.separator(")")
        return tuple(args), kwargs

    def _read_value(self, line: Line) -> Argument:
        match line.peek()[:1]:
            case "%":
                return self._read_use(line)
            case '"':
                return line.string("a string")
            case "[" | "(":
                return line.sequence(lambda: self._read_value(line))
        return line.constant()

    def _read_use(self, line: Line) -> Node:
        return line.choose(self.nodes, "a node that stands above")

    def _read_type(self, line: Line) -> object:
        if line.peek() in ("[", "("):
            return line.sequence(lambda: self._read_type(line))
        if line.accept("None"):
            return None
        if line.accept("host"):
            return line.choose(HOST_TYPES, "float, int or bool")
        dtype, sizes = _read_sizes(line)
        strides = line.sizes() if line.accept("strides") else contiguous_strides(sizes)
        device = line.device() if line.accept("on") else torch.device("cpu")
        with self.mode:
            return torch.empty_strided(sizes, strides, dtype=dtype, device=device)


def _read_variable(line: Line, known: dict[str, Variable]) -> Variable:
    role = line.choose(_ROLES, "a role")
    name = line.fresh('"', "a variable", known)
    line.take(":")
    if line.accept("host"):
        dtype, shape = line.choose(HOST_DTYPES, "float, int or bool"), ()
    else:
        dtype, shape = _read_sizes(line)
    of = line.string("a parameter") if line.accept("of") else None
    sparse, lazy = line.accept("sparse"), line.accept("lazy")
    along = line.choose(_ALONG, "batch or unknown") if line.accept("along") else ""
    aliases = tuple(line.sequence(lambda: line.string("an alias"))) if line.accept("aliases") else ()
    selection = _read_selection(line, line.string("a variable")) if line.accept("whole") else None
    kept = tuple(line.sequence(lambda: _read_selection(line, name))) if line.accept("kept") else ()
    dynamic = line.sizes() if line.accept("dynamic") else ()
    initial = line.constant() if line.accept("initial") else None
    unbounded = _read_settings(line) if line.accept("unbounded") else None
    own = _read_own(line) if line.accept("own") else None
    facts = (selection, kept, lazy, along, dynamic, initial, unbounded, own)
    return Variable(name, role, shape, dtype, of, sparse, aliases, *facts)


def _read_settings(line: Line) -> Settings:
    start = line.at
    try:
        return from_text(line.string("the settings of a table"))
    except (ValueError, TypeError, KeyError, TableError):
        line.at = start
        line.fail("the settings of a table, as to_text writes them")


def _read_selection(line: Line, of: str) -> Selection:
    """`rows [0,2] on server 1`, `elements [0,64]`, `shards [0,512] of 1024 on server 0`, `on server 0`"""
    along: Cut = line.choose(_PARTS, "") if line.peek() in _PARTS else "all"
    start, stop = _read_bounds(line) if along != "all" else (0, 0)
    shards = int(line.match(r"\d+", "the number of shards")) if line.accept("of") else 0
    return Selection(of, along, start, stop, _read_rank(line) if line.accept("on") else None, shards)


def _read_own(line: Line) -> Own:
    """`own "fc.weight" [10,4] among 2`, `own "fc.weight" [10,4] among 2 with 1`, `own "fc.weight" [10,4] among 2 in "node"`"""
    of, shape = line.string("a variable"), line.sizes()
    line.take("among")
    trainers = int(line.match(r"\d+", "the number of trainers"))
    group = line.string("a group") if line.accept("in") else ""
    keeper = int(line.match(r"\d+", "the number of a trainer")) if line.accept("with") else None
    return Own(of, shape, trainers, keeper, group)


def _read_rank(line: Line) -> int:
    line.take("server")
    return int(line.match(r"\d+", "the number of a server"))


def _read_place(line: Line) -> Place:
    """`at owners "fc.weight"`, `at server 0`, `at everyone`; nothing for trainers."""
    if not line.accept("at"):
        return TRAINERS
    if line.accept("owners"):
        return Owners(line.string("a variable"))
    if line.accept("everyone"):
        return EVERYWHERE
    if line.peek() != "server":
        line.fail("`owners`, `server` or `everyone`")
    return Server(_read_rank(line))


def _read_sizes(line: Line) -> tuple[torch.dtype, tuple[int, ...]]:
    return line.choose(DTYPES, "a type (f32[3,4], i64[], host float)"), line.sizes()


def _read_bounds(line: Line) -> tuple[int, int]:
    start = line.at
    rows = line.sizes()
    if len(rows) != 2:
        line.at = start
        line.fail("the first and the one behind the last, such as [0,128]")
    return rows[0], rows[1]


def _read_guard(line: Line) -> Guard:
    line.take("guard")
    expression = line.string("a condition")
    symbols: list[str] = []
    reads: list[str] = []
    axes: list[int | None] = []
    while line.peek():
        symbols.append(line.match(r"[^\W\d]\w*", "a symbol of the condition"))
        line.take("=")
        reads.append(line.string("a variable"))
        axes.append(int(line.match(r"\d+", "an axis")) if line.accept("axis") else None)
    found = tuple(axes) if any(axis is not None for axis in axes) else ()
    return Guard(expression, tuple(symbols), tuple(reads), found)
