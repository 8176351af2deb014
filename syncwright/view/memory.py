"""What every role will hold, read off its programs: between steps, and at most within one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import getitem

import torch
from torch.fx import Node

from syncwright import ops
from syncwright.cut.of_trainer import has_keepers, of_trainer
from syncwright.job import Job, ServerPart
from syncwright.program import Program, Role, Variable
from syncwright.view.tables import Table, size_text

_COLUMNS = ("role", "parameters", "optimizer state", "other", "between steps", "in a step", "the script's own")
_KEPT = (Role.PARAM, Role.BUFFER, Role.STATE)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that one role holds.

    parameters  or its parts of them, and what it keeps of tables
    state       of optimizers
    other       buffers, and what is kept of gradients that were not sent
    step        the most that is there at once within a step, all of the above with it, as programs are interpreted; compiled
                ones join operations, and hold less
    script      what the script's own modules hold beside: the values that they had, until `sync` writes to them. What was built
                under `deferred()` is not there
    """

    parameters: int
    state: int
    other: int
    step: int
    script: int = 0

    @property
    def held(self) -> int:
        """Between steps."""
        return self.parameters + self.state + self.other


def memory_table(program: Program, job: Job) -> Table:
    """What each role of a job will hold; `program` as it was captured."""
    found = memory_of(program, job)
    rows = [(role, *map(size_text, _cells(each))) for role, each in found.items()]
    return Table(
        "Memory: the tensors of the job; not what Python, torch and compiled programs take", _COLUMNS, tuple(rows)
    )


def _cells(memory: Memory) -> tuple[int, ...]:
    return memory.parameters, memory.state, memory.other, memory.held, memory.step, memory.script


def memory_of(program: Program, job: Job) -> dict[str, Memory]:
    """By role what it holds: `every trainer`, or `trainer 0`, ... where they differ, then servers."""
    step = job.trainer["step"]
    trainers = range(job.plan.trainers) if has_keepers(step.variables.values()) else (0,)
    found = {f"trainer {k}": _of_trainer(program, job, of_trainer(step, k)) for k in trainers}
    if len(found) == 1 and job.plan.trainers > 1:
        found = {"every trainer": found["trainer 0"]}
    return found | {f"server {part.rank}": _of_server(job, part) for part in job.servers}


def _of_trainer(program: Program, job: Job, step: Program) -> Memory:
    cut = {v.own.of for v in job.trainer["step"].variables.values() if v.own is not None}
    away = {name for name in cut if name not in job.trainer["step"].variables} | job.served
    kept = [v for v in program.variables.values() if v.role in _KEPT]
    whole = [v for v in kept if v.name not in away]
    own = [v for v in step.variables.values() if v.own is not None or v.initial is not None]
    alone = [v for each in job.exchanges for v in _kept_by(each.job.trainer["step"], each.is_served)]
    held = [*whole, *own]
    read = {v.name for v in step.variables.values() if v.whole is None}
    beside = _nbytes(v for v in held if v.name not in read) + _nbytes(alone)
    mine = [v for v in kept if v.role is not Role.STATE and (v.name not in away or v.name in job.served)]
    return Memory(
        _nbytes(v for v in held if v.role is Role.PARAM),
        _nbytes(v for v in held if v.role is Role.STATE and v.initial is None),
        _nbytes(v for v in held if v.role is Role.BUFFER or v.initial is not None) + _nbytes(alone),
        most_at_once(step) + beside,
        _nbytes(mine),
    )


def _kept_by(exchange: Program, is_served: bool) -> list[Variable]:
    """What trainers that train alone keep of their last meeting."""
    return [] if is_served else [v for role in _KEPT for v in exchange.of_role(role)]


def _of_server(job: Job, part: ServerPart) -> Memory:
    names = {v.name for v in part.holds}
    given = [c.variable for c in job.channels.values() if c.server == part.rank]
    waiting = job.plan.trainers * _nbytes(v for v in given if v.name not in names)
    running = max((most_at_once(p) - _read(p) for p in part.programs), default=0)
    held = _nbytes(part.holds)
    return Memory(
        _nbytes(v for v in part.holds if v.role is Role.PARAM),
        _nbytes(v for v in part.holds if v.role is Role.STATE),
        _nbytes(v for v in part.holds if v.role not in (Role.PARAM, Role.STATE)),
        held + waiting + running,
    )


def _nbytes(variables: Iterable[Variable]) -> int:
    return sum(v.nbytes for v in variables if v.unbounded is None)


def _read(program: Program) -> int:
    return sum(map(_size, program.placeholders.values()))


def most_at_once(program: Program) -> int:
    """Bytes of the tensors that an interpreted run holds at its fullest, what it reads and writes among them. A value is there
    from where it is made until nothing reads it, or a look at it, any more.

    %a = exp(x), %b = neg(%a), %c = add(%b, 1), output(%c)   3 times x: x, and two at a time
    """
    memory = _Memory(program)
    now = most = _read(program)
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        now += memory.made(node)
        most = max(most, now)
        now -= memory.freed(node)
    return most


class _Memory:
    """Which node's memory each node's value lies in, and when it ends."""

    def __init__(self, program: Program):
        self._roots: dict[Node, Node] = {}
        for node in program.graph.nodes:
            self._roots[node] = self._roots.get(source, source) if (source := _looked_at(node)) is not None else node
        last: dict[Node, Node] = {}
        for node in program.graph.nodes:
            for used in (node, *node.all_input_nodes):
                last[self._roots[used]] = node
        kept = {self._roots[node] for node in program.results.values()}
        self._ends: Mapping[Node, list[Node]] = {}
        ends: dict[Node, list[Node]] = {}
        for root, node in last.items():
            if root.op == "call_function" and root not in kept and node.op != "output":
                ends.setdefault(node, []).append(root)
        self._ends = ends

    def made(self, node: Node) -> int:
        return _size(node) if self._roots[node] is node else 0

    def freed(self, node: Node) -> int:
        return sum(map(_size, self._ends.get(node, ())))


def _looked_at(node: Node) -> Node | None:
    """The value in whose memory a node's lies."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return None
    if node.target in (getitem, ops.gradient, ops.wait) or getattr(node.target, "is_view", False):
        return node.args[0]
    return None


def _size(node: Node) -> int:
    """Bytes of what a node gives; of the start of a collective, those that are on their way."""
    match node.target:
        case ops.reduce_scatter | ops.gather_parts:
            trainers, own = node.args[2], node.args[0]
            parts = sum(map(_of_value, (each.meta["val"] for each in own)))  # type: ignore[union-attr]
            return parts if node.target is ops.reduce_scatter else parts * int(trainers)  # type: ignore[arg-type]
        case ops.reduce_to | ops.give:
            return sum(_of_value(each.meta["val"]) for each in node.args[0])  # type: ignore[union-attr]
    return _of_value(node.meta.get("val"))


def _of_value(val: object) -> int:
    if isinstance(val, list | tuple):
        return sum(map(_of_value, val))
    if not isinstance(val, torch.Tensor):
        return 0
    numel = 1
    for size, stride in zip(val.shape, val.stride(), strict=True):
        numel *= int(size) if stride else 1
    return numel * val.element_size()
