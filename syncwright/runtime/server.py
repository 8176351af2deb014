"""A server as a state machine: messages in, messages out. Knows no network, no clock and no thread.

Holds variables (or pieces), runs each program as often as what it reads has become complete (see `merging`), answers
pulls when what is asked for exists. A version of a variable is how often it has been updated.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from syncwright.errors import Disagreement, JobError
from syncwright.job import Channel, Job
from syncwright.program import Program, Role
from syncwright.runtime.executor import NO_PORT, Executor
from syncwright.runtime.merging import Attendance, Contribution, Counting, counting
from syncwright.runtime.messages import (
    Address,
    Failure,
    Go,
    Hello,
    Kind,
    Leave,
    Message,
    Pull,
    PullRows,
    Push,
    Resume,
    Rows,
    Taken,
    Tick,
    Value,
)
from syncwright.runtime.rendezvous import cannot_go_on
from syncwright.runtime.rows import RowGradient, Settled, bits, update_touched
from syncwright.shapes import is_host

Outgoing = tuple[Address, Message]
Compute = Callable[[Program, Mapping[str, object]], Mapping[str, object]]
FIRST = Address(Kind.TRAINER, 0)

log = logging.getLogger("syncwright")


class Interpreter:
    """Runs a server's programs as they are; each is made ready once. Changes with every new program."""

    def __init__(self) -> None:
        self._ready: dict[Program, Executor] = {}

    @torch.no_grad()
    def __call__(self, program: Program, values: Mapping[str, object]) -> Mapping[str, object]:
        if program not in self._ready:
            self._ready[program] = Executor(program)
        try:
            blocked = next(self._ready[program].run(values, NO_PORT))
        except StopIteration as stop:
            return stop.value
        raise JobError(
            f"a server's program waits at {blocked.node} for '{blocked.channel}'; only trainers' programs do."
        )


@dataclass(slots=True, eq=False)
class Running:
    """A program and which of its runs is next. Changes with every run.

    clock  what numbers its runs: "" the steps, or the channel whose contributions do
    reads  by the name of each value that it reads, where the values are
    """

    program: Program
    clock: str
    host: frozenset[str]
    reads: dict[str, Slot] = field(default_factory=dict)
    step: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """Rows that a trainer has asked for: `ids` within the piece that is kept here.

    missing  which of them it does not have as they will be; None: all
    """

    header: PullRows
    ids: torch.Tensor
    missing: torch.Tensor | None = None


@dataclass(slots=True, eq=False)
class Slot:
    """The values of one name, by number. Changes as they come and go.

    held     the server keeps it between runs: it stays until there is a newer one
    readers  programs that read it
    kept     of values that trainers pull, so many of the newest stay, whoever has read them
    parked   pulls that wait for a value
    """

    held: bool
    readers: list[Running] = field(default_factory=list)
    kept: int = 0
    values: dict[int, object] = field(default_factory=dict)
    parked: list[tuple[Address, Pull | Asked]] = field(default_factory=list)

    @property
    def newest(self) -> int | None:
        return max(self.values, default=None)

    def forget(self) -> None:
        """What nobody asks for any more."""
        if not self.values:
            return
        bound = min((r.step for r in self.readers), default=max(self.values) + 1)
        if self.kept:
            bound = min(bound, max(self.values) - self.kept + 1)
        for number in [n for n in self.values if n < bound]:
            del self.values[number]


class Server:
    """One server of a job. Changes with every message that it handles.

    lost     trainers that it goes on without
    refused  messages that make no sense for the job, by what is wrong with them: they change nothing
    """

    def __init__(self, job: Job, rank: int, compute: Compute | None = None):
        part = job.servers[rank]
        self.job, self.rank, self._compute = job, rank, compute or Interpreter()
        self.refused: Counter[str] = Counter()
        self.lost: set[int] = set()
        self._me = Address(Kind.SERVER, rank)
        self._fixed, self._arriving, self._exports = job.fixed, job.arriving, part.exports
        self._attendance = Attendance(job.plan.trainers)
        self._counting: dict[str, Counting] = {
            name: counting(channel, self._attendance)
            for name, channel in job.channels.items()
            if channel.server == rank
        }
        self._running = [_running(program, self._counting) for program in part.programs]
        self._slots = self._make_slots()
        self._due: deque[Running] = deque()
        self._settings = 0
        self._ticks: list[tuple[Address, Tick]] = []
        self._at_end: list[tuple[Address, Pull]] = []
        self._noted = {
            str(r.program.variables[n].of) for r in self._running for n in r.program.reads if _is_pulled(r, n)
        }
        self._pulled: dict[tuple[str, int], object] = {}
        self._tables = _pieces_here(job, rank)
        self._shapes = {v.name: v.shape for v in part.holds}
        self._in_place = {v for n in self._counting if self._channel(n).rows == "touched" for v in self._written(n)}
        self._asked: dict[tuple[int, str, int], torch.Tensor] = {}
        self._ahead: dict[str, Settled] = {}

    def _channel(self, name: str) -> Channel:
        return self._counting[name].channel

    def _written(self, channel: str) -> list[str]:
        """What the programs write that read a channel."""
        return [name for running in self._slots[channel, ""].readers for name in running.program.writes]

    def _make_slots(self) -> dict[tuple[str, str], Slot]:
        part, staged = self.job.servers[self.rank], self.job.staged
        held = {v.name for v in part.holds}
        slots = {(name, ""): Slot(True, kept=2 if name in staged else 1) for name in held}
        for running in self._running:
            for name in running.program.reads:
                running.reads[name] = slots.setdefault(_key(running, name), Slot(False))
                running.reads[name].readers.append(running)
            for name in running.program.writes:
                slots.setdefault((name, ""), Slot(False))
        for name in self._counting:
            slots.setdefault((name, ""), Slot(False))
        for name, owner in self.job.owners.items():
            if owner == self.rank and name not in held and (name, "") in slots:
                slots[name, ""].kept = 2  # when there is the next one, every trainer has pulled this one
        return slots

    @property
    def done(self) -> bool:
        """Whether every trainer has left and has what it asked for."""
        return not self._attendance.live

    @property
    def live(self) -> list[int]:
        """Trainers that have not left."""
        return self._attendance.live

    @property
    def pending(self) -> bool:
        """Whether some trainers have contributed to a merge and others have not."""
        return any(each.pending for each in self._counting.values())

    @property
    def step(self) -> int:
        """The step that the slowest program runs next."""
        return min((r.step for r in self._running), default=0)

    @property
    def clocks(self) -> Mapping[int, int]:
        """How many steps each trainer has pushed, where trainers say so."""
        return dict(self._attendance.clock)

    def held(self, name: str) -> object:
        """The newest value of a variable that is kept here."""
        slot = self._slots[name, ""]
        return slot.values[max(slot.values)]

    def waits_for(self) -> str:
        """Which contributions are missing, for errors."""
        missing = sorted(late for each in self._counting.values() for late in each.missing())
        return "; ".join(said for _, said in missing) or "the next message of any trainer"

    def handle(self, sender: Address, message: Message) -> list[Outgoing]:
        """Takes one message in; returns what is to be sent. One that makes no sense changes nothing."""
        why = self._refusal(sender, message)
        if why is not None:
            self.refused[why] += 1
            log.warning("server %d refuses a %s of %s: %s", self.rank, type(message.header).__name__, sender, why)
            return []
        match message.header:
            case Hello(digest=digest):
                self._check_digest(sender, digest)
            case Value(channel=channel, version=version):
                return self._take_value(sender, channel, version, message.tensor)
            case Push() as push:
                return self._take_push(sender, push, message.tensor)
            case Pull() as pull:
                return self._take_pull(sender, pull)
            case PullRows() as pull:
                assert message.tensor is not None, "looked at before"
                return self._take_pull_of_rows(sender, pull, message.tensor)
            case Tick(clock=clock) as tick:
                self._attendance.clock[sender.rank] = clock
                self._ticks.append((sender, tick))
                return self._let_go()
            case Resume(step=step):
                return self._resume(step)
            case Leave(step=step):
                return self._leave(sender.rank, step)
            case Failure(reason=reason):
                raise cannot_go_on(self._me, reason)
        return []

    def lose(self, trainer: int) -> list[Outgoing]:
        """Goes on without a trainer that is lost: what it has given to what is not complete is dropped."""
        self.lost.add(trainer)
        if trainer in self._attendance.left:
            return []
        gone = Address(Kind.TRAINER, trainer)
        for each in self._counting.values():
            each.drop(trainer)
        for slot in self._slots.values():
            slot.parked = [parked for parked in slot.parked if parked[0] != gone]
        self._ticks = [tick for tick in self._ticks if tick[0] != gone]
        self._at_end = [pull for pull in self._at_end if pull[0] != gone]
        return self._leave(trainer, 0)

    def _refusal(self, sender: Address, message: Message) -> str | None:
        """Why a message cannot be meant for this server now; None where it can."""
        header, server = message.header, sender.kind is Kind.SERVER
        match header:
            case Taken() | Go() | Rows():
                return "servers take none"
            case Push() | Pull() | PullRows() | Tick() | Leave() | Resume() if server:
                return "servers send none"
            case Push(channel=channel) as push:
                counted = self._counting.get(channel)
                if counted is None or message.tensor is None:
                    return f"this server does not merge '{channel[:80]}'"
                if counted.channel.rows and len(message.tensor) != len(self._ids(sender.rank, push)):
                    return "it has other rows than were asked for"
                return counted.refusal(sender.rank, push)
            case PullRows(channel=channel):
                return self._refusal_of_rows(channel, message.tensor)
            case Value(channel=channel) if message.tensor is None or (channel, "") not in self._slots:
                return f"this server keeps no '{channel[:80]}'"
            case Value(channel=channel) if server is self._slots[channel, ""].held:
                return "the start values come from trainer 0, values on their way from servers"
            case Value() | Resume() if not server and sender != FIRST:
                return "trainer 0 sets values"
            case Value(channel=channel) if not server and message.tensor.shape != self._shapes[channel]:  # type: ignore[union-attr]
                return f"'{channel[:80]}' has another shape"
            case Pull(channel=channel) if (self._source(channel), "") not in self._slots:
                return f"this server has no '{channel[:80]}'"
        return None

    def _refusal_of_rows(self, channel: str, ids: torch.Tensor | None) -> str | None:
        name = self._source(channel)
        if name not in self._tables or ids is None:
            return f"this server keeps no table '{channel[:80]}'"
        start, stop = self._tables[name]
        if ids.dtype is not torch.int64 or ids.dim() != 1:
            return "its ids are no list of 64-bit numbers"
        if len(ids) and not (start <= int(ids.min()) and int(ids.max()) < stop):
            return f"its ids are not all of [{start}, {stop}), which this server keeps of '{name[:80]}'"
        return None

    def _ids(self, trainer: int, push: Push) -> torch.Tensor:
        """The rows that a trainer's contribution is of: those that it has asked for in that step."""
        table = str(self._channel(push.channel).variable.of)
        asked = self._asked.get((trainer, table, push.step))
        return torch.empty(0, dtype=torch.int64) if asked is None else asked[push.skip :]

    def _check_digest(self, sender: Address, digest: str) -> None:
        if digest != self.job.digest:
            raise Disagreement(
                f"{sender} derived another job than server {self.rank} (digest {digest[:12]}, expected "
                f"{self.job.digest[:12]}). Expected all roles to build the same model, optimizer, step and plan. Start all "
                "of them from the same script with the same arguments, and take care that nothing in it depends on the "
                "rank."
            )

    def _take_value(self, sender: Address, name: str, version: int, tensor: torch.Tensor | None) -> list[Outgoing]:
        slot = self._slots[name, ""]
        if sender.kind is Kind.SERVER:
            return self._set(name, version - 1, tensor) + self._advance()
        if name in self._arriving:
            version = max((r.step for r in slot.readers), default=0)
        if name in self._fixed or name in self._arriving:
            slot.values.clear()
        slot.values[version] = tensor
        return self._answer(name, slot)

    def _resume(self, step: int) -> list[Outgoing]:
        """All values have been set: what trainers ask for is there now."""
        self._settings += 1
        sent: list[Outgoing] = []
        for running in self._running:
            if not running.clock:
                running.step = max(running.step, step)
            self._due.append(running)
        for name, slot in [(name, slot) for (name, _), slot in self._slots.items() if slot.held]:
            sent += self._answer(name, slot)
        return sent + self._advance()

    def _take_push(self, sender: Address, push: Push, tensor: torch.Tensor | None) -> list[Outgoing]:
        counted = self._counting[push.channel]
        assert tensor is not None, "looked at before"
        given: Contribution = tensor
        if counted.channel.rows:
            given = RowGradient(self._ids(sender.rank, push), tensor)
            self._asked.pop((sender.rank, str(counted.channel.variable.of), push.step), None)
        count = counted.take(sender.rank, push, given)
        sent = [(sender, Message(Taken(push.channel)))] if counted.channel.up_to > 1 else []
        if count is None:
            return sent
        clock = push.channel if counted.channel.take else ""
        for name, value in push.hypers.items():
            sent += self._set(name, count, value, clock)
        if counted.channel.take:
            self._note_pulled(sender.rank, push.channel, count)
        return sent + self._count(push.channel) + self._advance()

    def _note_pulled(self, trainer: int, channel: str, count: int) -> None:
        """What the trainer of a contribution has pulled last, where the update reads it."""
        for running in self._slots[channel, ""].readers:
            for name in [name for name in running.reads if _is_pulled(running, name)]:
                of = str(running.program.variables[name].of)
                newest = self._slots[of, ""]
                value = self._pulled.get((of, trainer), newest.values.get(newest.newest or 0))
                self._slots[name, ""].values[count] = value

    def _count(self, channel: str) -> list[Outgoing]:
        sent: list[Outgoing] = []
        for number, value in self._counting[channel].complete():
            sent += self._set(channel, number, value)
        return sent

    def _set(self, name: str, number: int, value: object, clock: str = "") -> list[Outgoing]:
        """A value has come: programs that read it may run, pulls that wait for it are answered."""
        slot = self._slots.get((name, clock))
        if slot is None:
            return []  # a hyper-parameter that no program of this server reads
        if slot.readers or slot.kept:
            slot.values[number] = value
        self._due.extend(slot.readers)
        if slot.kept:
            slot.forget()
        return self._answer(name, slot)

    def _advance(self) -> list[Outgoing]:
        """Runs what can run."""
        sent: list[Outgoing] = []
        while self._due:
            running = self._due.popleft()
            inputs = self._inputs(running)
            if inputs is not None:
                sent += self._run(running, inputs)
        return sent

    def _inputs(self, running: Running) -> dict[str, object] | None:
        found: dict[str, object] = {}
        for name, slot in running.reads.items():
            number = slot.newest if name in self._fixed else running.step
            value = slot.values.get(number) if number is not None else None
            if value is None:
                return None
            found[name] = float(value) if name in running.host else value  # type: ignore[arg-type]
        return found

    def _run(self, running: Running, inputs: Mapping[str, object]) -> list[Outgoing]:
        results = self._computed(running, inputs)
        step, sent = running.step, []
        running.step += 1
        self._due.append(running)
        for name, value in results.items():
            held = self._slots[name, ""].held
            sent += self._set(name, step + 1 if held else step, value)
            for other in self._exports.get(name, ()):
                sent.append((Address(Kind.SERVER, other), Message(Value(name, step + 1), _as_tensor(value))))
        for slot in running.reads.values():
            slot.forget()
        return sent

    def _computed(self, running: Running, inputs: Mapping[str, object]) -> Mapping[str, object]:
        """Runs a program; one that reads a gradient of rows on these rows, or on all of its table."""
        name = next((name for name, value in inputs.items() if isinstance(value, RowGradient)), None)
        if name is None:
            return self._compute(running.program, inputs)
        if self._channel(name).rows == "touched":
            return update_touched(self._compute, running.program, inputs)
        gradient, shape = inputs[name], running.program.variables[name].shape
        assert isinstance(gradient, RowGradient), "it was found so"
        return self._compute(running.program, {**inputs, name: gradient.dense(shape[0])})

    def _source(self, channel: str) -> str:
        """The variable that stands behind what trainers pull in another dtype."""
        return self.job.casts[channel][0] if channel in self.job.casts else channel

    def _take_pull(self, sender: Address, pull: Pull) -> list[Outgoing]:
        if pull.when == "end" and self._attendance.live:
            self._at_end.append((sender, pull))
            return []
        name = self._source(pull.channel)
        slot = self._slots[name, ""]
        slot.parked.append((sender, pull))
        return self._answer(name, slot)

    def _take_pull_of_rows(self, sender: Address, pull: PullRows, ids: torch.Tensor) -> list[Outgoing]:
        name = self._source(pull.channel)
        slot, own, sent = self._slots[name, ""], ids - self._tables[name][0], []
        asked = Asked(pull, own)
        if pull.step >= 0:
            self._asked[sender.rank, name, pull.step] = own
        if pull.step >= 0 and pull.when == "step" and name in self._in_place:
            self._unsettle(slot, pull.step, own)
            settled = self._settled(name).ask(sender.rank, own, pull.step, slot.newest, self._attendance.live)
            if settled is not None:
                asked = Asked(pull, own, ~settled)
                rows = self._rows_of(name, slot.values[slot.newest or 0], own[settled], pull)
                sent.append((sender, Message(Rows(pull.channel, pull.turn, bits(settled), last=False), rows)))
        slot.parked.append((sender, asked))
        return sent + self._answer(name, slot)

    def _unsettle(self, slot: Slot, step: int, ids: torch.Tensor) -> None:
        """Rows that a trainer asks for late, for the step that runs, change after all: who has them gets them again."""
        for index, (to, other) in enumerate(slot.parked):
            if isinstance(other, Asked) and other.missing is not None and other.header.step > step:
                missing = other.missing | torch.isin(other.ids, ids)
                slot.parked[index] = to, replace(other, missing=missing)

    def _settled(self, name: str) -> Settled:
        if name not in self._ahead:
            self._ahead[name] = Settled(self._shapes[name][0])
        return self._ahead[name]

    def _rows_of(self, name: str, table: object, ids: torch.Tensor, pull: PullRows) -> torch.Tensor:
        rows, cast = _as_tensor(table).index_select(0, ids), self.job.casts.get(pull.channel)
        return rows if cast is None else rows.to(cast[1])

    def _answer(self, name: str, slot: Slot) -> list[Outgoing]:
        """To those who wait for a value of `name` that is there."""
        sent, waiting = [], []
        for sender, pull in slot.parked:
            header = pull.header if isinstance(pull, Asked) else pull
            number = self._number(slot, header)
            if number is None or number not in slot.values:
                waiting.append((sender, pull))
                continue
            value = slot.values[number]
            if name in self._noted:
                self._pulled[name, sender.rank] = value
            sent.append((sender, self._reply(pull, name, _as_tensor(value))))
        slot.parked = waiting
        return sent

    def _reply(self, pull: Pull | Asked, name: str, value: torch.Tensor) -> Message:
        if isinstance(pull, Asked):
            some = b"" if pull.missing is None else bits(pull.missing)
            ids = pull.ids if pull.missing is None else pull.ids[pull.missing]
            return Message(
                Rows(pull.header.channel, pull.header.turn, some), self._rows_of(name, value, ids, pull.header)
            )
        cast, value = self.job.casts.get(pull.channel), value.clone() if name in self._in_place else value
        return Message(Value(pull.channel, pull.version), value if cast is None else value.to(cast[1]))

    def _number(self, slot: Slot, pull: Pull | PullRows) -> int | None:
        match pull.when:
            case "step":
                return pull.version if slot.held else pull.version - 1
            case "now":
                return slot.newest if self._settings >= pull.version else None
            case "end":
                return slot.newest

    def _leave(self, trainer: int, step: int) -> list[Outgoing]:
        self._attendance.left[trainer] = step
        sent = self._let_go()
        for name in self._counting:
            sent += self._count(name)
        sent += self._advance()
        if not self._attendance.live:
            waiting, self._at_end = self._at_end, []
            for sender, pull in waiting:
                sent += self._take_pull(sender, pull)
        return sent

    def _let_go(self) -> list[Outgoing]:
        """Answers those who are not too far ahead of the slowest any more."""
        slowest = self._attendance.slowest
        free = [(to, t) for to, t in self._ticks if slowest is None or t.clock - slowest <= t.staleness]
        self._ticks = [each for each in self._ticks if each not in free]
        return [(to, Message(Go(tick.clock))) for to, tick in free]


def _pieces_here(job: Job, rank: int) -> dict[str, tuple[int, int]]:
    """The pieces of tables that a server keeps, each with the rows [start, stop) that it has."""
    held = {v.name: v for v in job.servers[rank].holds}
    pulled = [name for table in job.tables.values() for name, _ in table.pieces]
    names = {job.casts[name][0] if name in job.casts else name for name in pulled} & held.keys()
    return {name: held[name].part or (0, held[name].shape[0]) for name in names}


def _running(program: Program, counted: Mapping[str, Counting]) -> Running:
    host = frozenset(name for name, node in program.placeholders.items() if is_host(node.meta["val"]))
    clock = next((name for name in program.reads if name in counted and counted[name].channel.take), "")
    return Running(program, clock, host)


def _key(running: Running, name: str) -> tuple[str, str]:
    """Where a program finds a value. Hyper-parameters travel with contributions, and are numbered as these are."""
    return name, running.clock if running.program.variables[name].role is Role.HYPER else ""


def _is_pulled(running: Running, name: str) -> bool:
    """Whether a program reads under this name what the trainer of a contribution has pulled (see `passes.compensate`)."""
    variable = running.program.variables[name]
    return variable.role is Role.GLOBAL and variable.of is not None


def _as_tensor(value: object) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
