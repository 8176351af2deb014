"""The executor: runs a program node by node, handing communications to a port. Changes nothing but the port."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.program import Program
from syncwright.shapes import substitute

T = TypeVar("T")


class Port(Protocol):
    """Where a running program's communications go."""

    def push(self, channel: str, tensor: torch.Tensor) -> bool:
        """False while it cannot be taken."""
        ...

    def push_rows(self, channel: str, tensor: torch.Tensor, ids: torch.Tensor, skip: int) -> bool:
        """False while it cannot be taken."""
        ...

    def ahead(self, node: str) -> list[torch.Tensor] | None:
        """What a node that makes ids distinct gives, where it was computed ahead."""
        ...

    def pull_rows(self, channel: str, ids: torch.Tensor, when: str) -> torch.Tensor | None:
        """The rows of these ids, zeros for those below 0; None while they are not there."""
        ...

    def pull(self, channel: str, later: bool, when: str) -> torch.Tensor | None:
        """The value, or None while it is not there. `later`: as it is after this step; `when`: see `ops`."""
        ...

    def start(self, channel: str, tensor: torch.Tensor) -> None: ...

    def finish(self, channel: str) -> torch.Tensor | None:
        """The sum, or None while it is not there."""
        ...


NO_PORT = cast(Port, None)
"""For programs that hold no communication."""


@dataclass(frozen=True, slots=True)
class Blocked:
    """What a run waits for."""

    node: str
    channel: str


Run = Generator[Blocked, None, dict[str, object]]


@dataclass(frozen=True, slots=True, eq=False)
class Instruction:
    """One node, ready to run; `frees` are values that no later node reads."""

    node: Node
    frees: tuple[Node, ...]


class Executor:
    """A program prepared for many runs."""

    def __init__(self, program: Program):
        self.program = program
        self._reads = list(program.placeholders.items())
        self._results = program.results
        self._code = _instructions(program)

    def run(self, values: Mapping[str, object], port: Port) -> Run:
        """Runs on `values`; gives `Blocked` while a value from elsewhere is not there; returns what is written."""
        env: dict[Node, object] = {node: values[name] for name, node in self._reads}
        for instruction in self._code:
            node = instruction.node
            if node.target in ops.PORTED:
                env[node] = yield from communicate(node, env, port)
            else:
                args, kwargs = substitute((node.args, node.kwargs), env.__getitem__)
                env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            for dead in instruction.frees:
                del env[dead]
        return {name: env[node] for name, node in self._results.items()}


def _instructions(program: Program) -> list[Instruction]:
    last: dict[Node, Node] = {}
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    for node in calls:
        for used in node.all_input_nodes:
            last[used] = node
    kept = {*program.results.values(), *program.placeholders.values()}
    frees: dict[Node, list[Node]] = {}
    for used, node in last.items():
        if used not in kept:
            frees.setdefault(node, []).append(used)
    return [Instruction(node, tuple(frees.get(node, ()))) for node in calls]


def communicate(node: Node, env: Mapping[Node, object], port: Port) -> Generator[Blocked, None, object]:
    """Runs one communication node."""
    args = substitute(node.args, env.__getitem__)
    match node.target:
        case ops.push:
            yield from _until(node, args[1], lambda: port.push(args[1], args[0]) or None)
            return torch.empty(0)
        case ops.unique:
            found = port.ahead(node.name) if port is not None else None
            return ops.unique(*args) if found is None else found
        case ops.push_rows:
            yield from _until(
                node, args[1], lambda: port.push_rows(args[1], args[0], args[2], *args[3:4] or (0,)) or None
            )
            return torch.empty(0)
        case ops.pull_rows:
            when = args[4] if len(args) > 4 else "step"
            return (yield from _until(node, args[1], lambda: port.pull_rows(args[1], args[0], when)))
        case ops.all_reduce:
            given = args[0] if _is_given_away(node) else args[0].clone()
            port.start(args[1], given.contiguous())
            return args[0]
        case ops.wait:
            return (yield from _until(node, args[1], lambda: port.finish(args[1])))
        case _:
            return (yield from _until(node, args[1], lambda: port.pull(args[1], bool(args[0]), pulled_when(node))))


def pulled_when(pull: Node) -> str:
    """As of when a trainer pulls a value."""
    return str(pull.args[4]) if len(pull.args) > 4 else "step"


def _is_given_away(node: Node) -> bool:
    """Whether the sum may be made in place: the value was made for it and nobody else reads it."""
    (source,) = node.all_input_nodes
    return len(source.users) == 1 and source.target in _FRESH


_FRESH = frozenset({torch.ops.aten.cat.default, torch.ops.aten.mul.Tensor, torch.ops.aten.zeros.default})


def _until(node: Node, channel: str, ask: Callable[[], T | None]) -> Generator[Blocked, None, T]:
    while (value := ask()) is None:
        yield Blocked(node.name, channel)
    return value
