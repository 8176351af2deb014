"""The executor: runs a program node by node, handing communications to a port. Changes nothing but the port."""

from __future__ import annotations

import operator
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, TypeVar, cast

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.items import write_rows
from syncwright.program import Program
from syncwright.schema import argument
from syncwright.shapes import substitute

T = TypeVar("T")
Form = tuple[list[int], torch.dtype]


class Port(Protocol):
    """Where a running program's communications go."""

    def push(self, channel: str, tensor: torch.Tensor, weight: torch.Tensor | None) -> bool:
        """False while it cannot be taken. `weight`: of what a host's trainers push together."""
        ...

    def push_rows(self, channel: str, tensor: torch.Tensor, ids: torch.Tensor, skip: int) -> bool:
        """False while it cannot be taken."""
        ...

    def ahead(self, node: str) -> list[torch.Tensor] | None:
        """What a node that makes ids distinct gives, where it was computed ahead."""
        ...

    def pull_rows(self, channel: str, ids: torch.Tensor, when: str) -> torch.Tensor | None:
        """The rows of these ids (see `kernels.distinct`); None while they are not there."""
        ...

    def pull(self, channel: str, later: bool, when: str, on_host: Form | None) -> torch.Tensor | None:
        """The value, or None while it is not there. `later`: as it is after this step; `when`: see `ops`; `on_host`: its shape
        and dtype, where one trainer of each host pulls it for all."""
        ...

    def start(self, channel: str, tensor: torch.Tensor, group: str = "") -> None: ...

    def start_later(self, channel: str, tensor: torch.Tensor) -> None:
        """Like `start`; the next step waits for it."""
        ...

    def finish_before(self, channel: str, shape: list[int]) -> torch.Tensor | None:
        """The sum that the step before has started, or None while it is not there."""
        ...

    def start_on_host(self, channel: str, tensor: torch.Tensor) -> None:
        """Like `start`, over the trainers of this host."""
        ...

    def finish_on_host(self, channel: str) -> torch.Tensor | None:
        """The sum on the first of them, on the others what they gave; None while it is not there."""
        ...

    def finish(self, channel: str) -> torch.Tensor | None:
        """The sum, or None while it is not there."""
        ...

    def start_parts(self, channel: str, tensors: list[torch.Tensor], group: str = "") -> None: ...

    def finish_own(self, channel: str) -> torch.Tensor | None:
        """This trainer's parts of the sums, or None while they are not there."""
        ...

    def start_whole(self, channel: str, parts: list[torch.Tensor], group: str = "") -> None: ...

    def start_sum(self, channel: str, tensors: list[torch.Tensor], keeper: int, group: str = "") -> None: ...

    def start_given(self, channel: str, values: list[torch.Tensor], keeper: int, group: str = "") -> None: ...

    def finish_whole(
        self, channel: str, sizes: list[int], places: Sequence[torch.Tensor | None] = ()
    ) -> list[torch.Tensor] | None:
        """All trainers' parts put together, or None while they are not there. `places`: memory for some of them."""
        ...

    def start_rows(self, channel: str, ids: torch.Tensor, rows: torch.Tensor) -> None: ...

    def hold_rows(self, channel: str, ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Keeps rows until others of the channel are started."""
        ...

    def finish_rows(self, channel: str, merge: str) -> list[torch.Tensor] | None:
        """All trainers' ids and their merged rows, or None while they are not there."""
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
    """One node, ready to run by `call`; `frees` are values that no later node reads."""

    node: Node
    call: Callable
    frees: tuple[Node, ...]


class Executor:
    """A program prepared for many runs."""

    def __init__(self, program: Program):
        self.program = program
        self._reads = list(program.placeholders.items())
        self._results = program.results
        self._code = _instructions(program)
        self._places = places_of_wholes(program)

    def run(self, values: Mapping[str, object], port: Port) -> Run:
        """Runs on `values`; gives `Blocked` while a value from elsewhere is not there; returns what is written."""
        env: dict[Node, object] = {node: values[name] for name, node in self._reads}
        for instruction in self._code:
            node = instruction.node
            if node.target in ops.PORTED:
                env[node] = yield from communicate(node, env, port, self._places)
            else:
                args, kwargs = substitute((node.args, node.kwargs), env.__getitem__)
                env[node] = instruction.call(*args, **kwargs)
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
    writing = writes_in_place(program)
    return [Instruction(n, put_rows_ if n in writing else n.target, tuple(frees.get(n, ()))) for n in calls]  # type: ignore[arg-type]


def writes_in_place(program: Program) -> set[Node]:
    """Where new rows of a variable may overwrite its old ones: what else reads it takes copies of rows, before."""
    found = set()
    for node in program.graph.find_nodes(op="call_function", target=ops.put_rows):
        table = node.args[0]
        others = [user for user in table.users if user is not node]
        if table.op == "placeholder" and all(user.target is ops.take_rows and user < node for user in others):
            found.add(node)
    return found


def put_rows_(x: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`ops.put_rows`, into x itself."""
    return write_rows(x, ids, rows)


Places = Mapping[Node, Sequence[Node | None]]
"""Of values that are put together, by the node that waits for them: the variables in whose memory they may be."""


def places_of_wholes(program: Program) -> Places:
    """Where the new value of a variable, of which trainers have updated their parts, may overwrite the old one: nothing reads
    that any more."""
    placeholders, found = program.placeholders, {}
    for name, result in program.results.items():
        pick = result.args[0] if result.target is torch.ops.aten.view.default else result
        wait = pick.args[0] if isinstance(pick, Node) and pick.target is operator.getitem else None
        old = placeholders.get(name)
        if not isinstance(wait, Node) or wait.target is not ops.wait_whole or old is None:
            continue
        if _last_read(old) < wait:
            places = found.setdefault(wait, [None] * len(wait.args[2]))  # type: ignore[arg-type]
            places[pick.args[1]] = old  # type: ignore[index, union-attr]
    return found


def _last_read(node: Node) -> Node:
    """The last node that reads a value, or what looks at it."""
    looks = [user for user in node.users if user.op != "output" and getattr(user.target, "is_view", False)]
    readers = [user for user in node.users if user.op != "output"]
    return max([node, *readers, *(_last_read(look) for look in looks)])


def communicate(
    node: Node, env: Mapping[Node, object], port: Port, places: Places = MappingProxyType({})
) -> Generator[Blocked, None, object]:
    """Runs one communication node. What was computed ahead needs no arguments."""
    if node.target is ops.unique and port is not None and (found := port.ahead(node.name)) is not None:
        return found
    args = substitute(node.args, env.__getitem__)
    match node.target:
        case ops.push:
            weight = args[2] if len(args) > 2 else None
            yield from _until(node, args[1], lambda: port.push(args[1], args[0], weight) or None)
            return torch.empty(0)
        case ops.unique:
            return ops.unique(*args)
        case ops.push_rows:
            yield from _until(
                node, args[1], lambda: port.push_rows(args[1], args[0], args[2], *args[3:4] or (0,)) or None
            )
            return torch.empty(0)
        case ops.pull_rows:
            when = args[4] if len(args) > 4 else "step"
            return (yield from _until(node, args[1], lambda: port.pull_rows(args[1], args[0], when)))
        case ops.all_reduce | ops.sum_on_host:
            given = args[0] if _is_given_away(node) else args[0].clone()
            start = port.start if node.target is ops.all_reduce else port.start_on_host
            start(args[1], given.contiguous(), *args[2:])
            return args[0]
        case ops.all_reduce_later:
            given = args[0] if _is_given_away(node) else args[0].clone()
            port.start_later(args[1], given.contiguous())
            return torch.empty(0)
        case ops.wait_before:
            return (yield from _until(node, args[0], lambda: port.finish_before(args[0], args[1])))
        case ops.reduce_scatter:
            port.start_parts(args[1], args[0], *args[3:])
            return torch.empty(0)
        case ops.wait_own:
            return (yield from _until(node, args[1], lambda: port.finish_own(args[1])))
        case ops.reduce_to:
            port.start_sum(args[1], args[0], *args[2:])
            return torch.empty(0)
        case ops.give:
            port.start_given(args[1], args[0], *args[2:])
            return torch.empty(0)
        case ops.gather_parts:
            port.start_whole(args[1], args[0], *args[3:])
            return torch.empty(0)
        case ops.wait_whole:
            given = [None if each is None else env[each] for each in places.get(node, ())]
            return (yield from _until(node, args[1], lambda: port.finish_whole(args[1], args[2], given)))  # type: ignore[arg-type]
        case ops.gather_rows:
            port.start_rows(args[1], *ops.own_rows(args[0], args[2], *args[3:]))
            return args[0]
        case ops.hold_rows:
            port.hold_rows(args[1], *ops.own_rows(args[0], args[2], *args[3:]))
            return torch.empty(0)
        case ops.wait_rows:
            return (yield from _until(node, args[1], lambda: port.finish_rows(args[1], args[2])))
        case ops.wait:
            return (yield from _until(node, args[1], lambda: port.finish(args[1])))
        case ops.wait_on_host:
            return (yield from _until(node, args[1], lambda: port.finish_on_host(args[1])))
        case _:
            form = (args[2], args[3]) if argument(node, "on_host") else None
            return (
                yield from _until(node, args[1], lambda: port.pull(args[1], bool(args[0]), pulled_when(node), form))
            )


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
