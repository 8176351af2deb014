"""What every role will hold, read off its programs: between steps, and at most within one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from syncwright.cut.of_trainer import has_keepers, of_trainer
from syncwright.held import most_at_once, read_nbytes
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
    running = max((most_at_once(p) - read_nbytes(p) for p in part.programs), default=0)
    held = _nbytes(part.holds)
    return Memory(
        _nbytes(v for v in part.holds if v.role is Role.PARAM),
        _nbytes(v for v in part.holds if v.role is Role.STATE),
        _nbytes(v for v in part.holds if v.role not in (Role.PARAM, Role.STATE)),
        held + waiting + running,
    )


def _nbytes(variables: Iterable[Variable]) -> int:
    return sum(v.nbytes for v in variables if v.unbounded is None)
