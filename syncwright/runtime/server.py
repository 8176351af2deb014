"""A server as a state machine: messages in, messages out. Knows no network, no clock and no thread.

Holds variables (or pieces), runs each program as often as what it reads has become complete (see `merging`), answers
pulls when what is asked for exists. A version of a variable is how often it has been updated.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Mapping

import torch

from syncwright.errors import Disagreement
from syncwright.job import Channel, Job
from syncwright.program import Program, Role, Variable
from syncwright.runtime.below import Below
from syncwright.runtime.devices import HOST, device_for, devices_of, moved, taken_to
from syncwright.runtime.interpreter import Compute, Interpreter
from syncwright.runtime.merging import Attendance, Contribution, Counting, counting
from syncwright.runtime.messages import (
    Address,
    Failure,
    Go,
    Hello,
    Kind,
    Leave,
    Message,
    Order,
    Part,
    Pull,
    PullRows,
    Push,
    Resume,
    Rows,
    Start,
    Taken,
    Tick,
    Value,
)
from syncwright.runtime.records import NO_RECORDS, Records
from syncwright.runtime.rendezvous import cannot_go_on
from syncwright.runtime.row_server import RowServer
from syncwright.runtime.rows import RowGradient, update_touched
from syncwright.runtime.served_table import Column, update_by_id
from syncwright.runtime.slots import Asked, Running, Slot, as_tensor, is_pulled, key_of, running_of
from syncwright.runtime.table_server import TableServer
from syncwright.runtime.ticking import Ticking

Outgoing = tuple[Address, Message]
FIRST = Address(Kind.TRAINER, 0)

log = logging.getLogger("syncwright")


class Server:
    """One server of a job. Changes with every message that it handles.

    ticking  the user's schedulers, where it ticks copies of them
    lost     trainers that it goes on without
    records  of what was deferred, from which it makes its own part
    refused  messages that make no sense for the job, by what is wrong with them: they change nothing
    overwritten  state whose newer value takes the place of the older in memory
    """

    def __init__(
        self,
        job: Job,
        rank: int,
        compute: Compute | None = None,
        ticking: Ticking | None = None,
        records: Records = NO_RECORDS,
    ):
        part, self._records = job.servers[rank], records
        self.job, self.rank, self._compute = job, rank, compute or Interpreter()
        self.refused: Counter[str] = Counter()
        self.lost: set[int] = set()
        self._me = Address(Kind.SERVER, rank)
        self._fixed, self._arriving, self._exports = job.fixed, job.arriving, part.exports
        self._attendance = Attendance(job.plan.trainers, hosts=job.plan.hosts)
        self._counting: dict[str, Counting] = {
            name: counting(channel, self._attendance)
            for name, channel in job.channels.items()
            if channel.server == rank
        }
        ticked = [name for name, counted in self._counting.items() if counted.channel.ticks]
        self._ticking = {name: ticking.copied() for name in ticked} if ticking is not None else {}
        self._devices = devices_of(job, part)
        self._running = [running_of(self._placed(program), self._counting) for program in part.programs]
        self._steps = Counter(running.step for running in self._running)
        self._slots = self._make_slots()
        self._due: deque[Running] = deque()
        self._settings = 0
        self._ticks: list[tuple[Address, Tick]] = []
        self._at_end: list[tuple[Address, Pull | Order]] = []
        self._noted = {
            str(r.program.variables[n].of) for r in self._running for n in r.program.reads if is_pulled(r, n)
        }
        self._pulled: dict[tuple[str, int], object] = {}
        self._holds = {v.name: v for v in part.holds}
        self._below = Below(job, rank, records)
        self.overwritten = self._prepared()
        in_place = {v for n in self._counting if self._channel(n).rows == "touched" for v in self._written(n)}
        self._rows, self._tables = RowServer(job, rank, in_place | self.overwritten), TableServer(job, rank)

    def _placed(self, program: Program) -> Program:
        return moved(program, device_for(program, self._devices))

    def _prepared(self) -> set[str]:
        """Makes programs ready to run; returns the state that they overwrite: trainers pull copies of it."""
        found: set[str] = set()
        for program in [running.program for running in self._running]:
            of_rows = any(name in self._counting and self._channel(name).rows for name in program.reads)
            if not of_rows and device_for(program, self._devices) == HOST:
                found |= set(self._compute.prepare(program, {n for n in program.writes if self._is_own(program, n)}))
        return found

    def _is_own(self, program: Program, name: str) -> bool:
        """Whether nobody keeps a value of a variable that the program replaces by a newer one."""
        slot = self._slots[name, ""]
        single = slot.held and slot.kept == 1 and len(slot.readers) == 1
        return single and program.variables[name].role is Role.STATE and name not in self._exports

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
                running.reads[name] = slots.setdefault(key_of(running, name), Slot(False))
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
        return min(self._steps, default=0)

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
            case Value(channel=channel, version=version) | Start(channel=channel, version=version) if (
                channel in self._below
            ):
                given = self._below.give(message)
                return [] if given is None else self._take_value(sender, self._below.whole(channel), version, given)
            case Value(channel=channel, version=version):
                return self._take_value(sender, channel, version, message.tensor)
            case Start(channel=channel, version=version) as start:
                made = self._records.start(self._holds[channel], start)
                return self._take_value(sender, channel, version, made)
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
            case Order() as order:
                return self._take_order(sender, order) if order.last else []
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
        self._tables.lose(trainer)
        for slot in self._slots.values():
            slot.parked = [parked for parked in slot.parked if parked[0] != gone]
        self._ticks = [tick for tick in self._ticks if tick[0] != gone]
        self._at_end = [pull for pull in self._at_end if pull[0] != gone]
        return self._leave(trainer, 0)

    def _refusal(self, sender: Address, message: Message) -> str | None:
        """Why a message cannot be meant for this server now; None where it can."""
        header, server = message.header, sender.kind is Kind.SERVER
        match header:
            case Taken() | Go() | Rows() | Part():
                return "servers take none"
            case Push() | Pull() | PullRows() | Order() | Tick() | Leave() | Resume() if server:
                return "servers send none"
            case Push(channel=channel) as push:
                counted = self._counting.get(channel)
                if counted is None or message.tensor is None:
                    return f"this server does not merge '{channel[:80]}'"
                if counted.channel.rows and len(message.tensor) != len(
                    self._rows.ids(sender.rank, counted.channel, push)
                ):
                    return "it has other rows than were asked for"
                return counted.refusal(sender.rank, push)
            case PullRows(channel=channel, step=step) if channel in self._below and step >= 0:
                return (
                    f"in steps, rows of '{channel[:80]}' are asked for as those of '{self._below.whole(channel)[:80]}'"
                )
            case PullRows(channel=channel):
                return self._rows.refusal(self._uncast(channel), message.tensor)
            case Start(channel=channel) if sender != FIRST or self._form(channel) is None:
                return (
                    f"trainer 0 says what this server begins with, of what it keeps, which '{channel[:80]}' may not be"
                )
            case Order() as order:
                return self._tables.refusal(sender, order, message.tensor)
            case Value(channel=channel) | Start(channel=channel) | Pull(channel=channel) if (
                self._source(channel) in self._tables.columns
            ):
                return f"of '{channel[:80]}' rows travel, by their ids"
            case Value(channel=channel) if message.tensor is None or (self._source(channel), "") not in self._slots:
                return f"this server keeps no '{channel[:80]}'"
            case Value(channel=channel) if server is self._slots[self._source(channel), ""].held:
                return "the start values come from trainer 0, values on their way from servers"
            case Value() | Resume() if not server and sender != FIRST:
                return "trainer 0 sets values"
            case Value(channel=channel) if not server and message.tensor.shape != self._form(channel).shape:  # type: ignore[union-attr]
                return f"'{channel[:80]}' has another shape"
            case Pull(channel=channel) if (self._source(channel), "") not in self._slots:
                return f"this server has no '{channel[:80]}'"
        return None

    def _check_digest(self, sender: Address, digest: str) -> None:
        if digest != self.job.digest:
            raise Disagreement(
                f"{sender} derived another job than server {self.rank} (digest {digest[:12]}, expected "
                f"{self.job.digest[:12]}). Expected all roles to build the same model, optimizer, step and plan. Start all "
                "of them from the same script with the same arguments, and take care that nothing in it depends on the "
                "rank."
            )

    def _take_value(self, sender: Address, name: str, version: int, value: object) -> list[Outgoing]:
        slot = self._slots[name, ""]
        if sender.kind is Kind.SERVER:
            return self._set(name, version - 1, value) + self._advance()
        if name in self._arriving:
            version = max((r.step for r in slot.readers), default=0)
        if name in self._fixed or name in self._arriving:
            slot.values.clear()
        if not isinstance(value, Column) and value is not None:
            there = as_tensor(value).clone() if name in self.overwritten else as_tensor(value)
            value = taken_to(self._devices.get(name, HOST), there)
        slot.values[version] = value
        return self._answer(name, slot)

    def _resume(self, step: int) -> list[Outgoing]:
        """All values have been set: what trainers ask for is there now."""
        self._settings += 1
        sent: list[Outgoing] = []
        for running in self._running:
            if not running.clock:
                running.step = max(running.step, step)
            self._due.append(running)
        self._steps = Counter(running.step for running in self._running)
        for name, slot in [(name, slot) for (name, _), slot in self._slots.items() if slot.held]:
            sent += self._answer(name, slot)
        return sent + self._advance()

    def _take_push(self, sender: Address, push: Push, tensor: torch.Tensor | None) -> list[Outgoing]:
        counted = self._counting[push.channel]
        assert tensor is not None, "looked at before"
        given: Contribution = tensor
        if counted.channel.rows:
            given = self._rows.take(sender.rank, counted.channel, push, tensor)
        count = counted.take(sender.rank, push, given)
        sent = [(sender, Message(Taken(push.channel)))] if counted.channel.up_to > 1 else []
        if count is None:
            return sent
        clock = push.channel if counted.channel.take else ""
        ticking = self._ticking.get(push.channel)
        for name, value in (push.hypers if ticking is None else ticking.values()).items():
            sent += self._set(name, count, value, clock)
        if counted.channel.take:
            self._note_pulled(sender.rank, push.channel, count)
        return sent + self._count(push.channel) + self._advance()

    def _note_pulled(self, trainer: int, channel: str, count: int) -> None:
        """What the trainer of a contribution has pulled last, where the update reads it."""
        for running in self._slots[channel, ""].readers:
            for name in [name for name in running.reads if is_pulled(running, name)]:
                of = str(running.program.variables[name].of)
                newest = self._slots[of, ""]
                value = self._pulled.get((of, trainer), newest.values.get(newest.newest or 0))
                self._slots[name, ""].values[count] = value

    def _count(self, channel: str) -> list[Outgoing]:
        sent: list[Outgoing] = []
        for number, value in self._counting[channel].complete():
            sent += self._set(channel, number, value)
            if channel in self._ticking:
                givers = self._attendance.givers(self._attendance.live, self._channel(channel))
                self._ticking[channel].applied(self._channel(channel).take, len(givers))
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
        self._count_step(step)
        self._due.append(running)
        for name, value in results.items():
            held = self._slots[name, ""].held
            sent += self._set(name, step + 1 if held else step, value)
            for other in self._exports.get(name, ()):
                sent.append((Address(Kind.SERVER, other), Message(Value(name, step + 1), as_tensor(value))))
        for slot in running.reads.values():
            slot.forget()
        for name in [name for name in results if name in self._tables]:
            sent += self._answer(name, self._slots[name, ""])
        return sent

    def _count_step(self, done: int) -> None:
        self._steps[done + 1] += 1
        self._steps[done] -= 1
        if not self._steps[done]:
            del self._steps[done]

    def _computed(self, running: Running, inputs: Mapping[str, object]) -> Mapping[str, object]:
        """Runs a program; one that reads a gradient of rows on these rows, or on all of its table."""
        name = next((name for name, value in inputs.items() if isinstance(value, RowGradient)), None)
        if self._devices:
            device = device_for(running.program, self._devices)
            inputs = {each: taken_to(device, value) for each, value in inputs.items()}
        if name is None:
            return self._compute(running.program, inputs)
        if any(isinstance(value, Column) for value in inputs.values()):
            return update_by_id(self._compute, running.program, inputs)
        if self._channel(name).rows == "touched":
            return update_touched(self._compute, running.program, inputs)
        gradient, shape = inputs[name], running.program.variables[name].shape
        assert isinstance(gradient, RowGradient), "it was found so"
        return self._compute(running.program, {**inputs, name: gradient.dense(shape[0])})

    def _form(self, channel: str) -> Variable | None:
        """What is kept here under this name, or as a part of something else."""
        return self._below.form(channel) if channel in self._below else self._holds.get(channel)

    def _uncast(self, channel: str) -> str:
        """The variable that stands behind what trainers pull in another dtype."""
        return self.job.casts[channel][0] if channel in self.job.casts else channel

    def _source(self, channel: str) -> str:
        """The variable that is kept here of which trainers pull something: it, a part of it, or it in another dtype."""
        return self._below.whole(channel) if channel in self._below else self._uncast(channel)

    def _take_pull(self, sender: Address, pull: Pull | Order) -> list[Outgoing]:
        if pull.when == "end" and self._attendance.live:
            self._at_end.append((sender, pull))
            return []
        name = self._source(pull.channel)
        slot = self._slots[name, ""]
        slot.parked.append((sender, pull))
        return self._answer(name, slot)

    def _take_pull_of_rows(self, sender: Address, pull: PullRows, ids: torch.Tensor) -> list[Outgoing]:
        name = self._source(pull.channel)
        asked, early = self._rows.ask(sender.rank, pull, ids, self._slots[name, ""], self._attendance.live)
        self._slots[name, ""].parked.append((sender, asked))
        sent = [] if early is None else [(sender, early)]
        return sent + self._answer(name, self._slots[name, ""])

    def _take_order(self, sender: Address, order: Order) -> list[Outgoing]:
        """What a trainer has a table of any ids do: see `table_server`."""
        name, sent = order.channel, []
        if order.act == "read":
            return self._take_pull(sender, order)
        if order.act != "set":
            self._tables.ask(sender, order)
            return self._do_together(name)
        columns, numbers = self._tables.set(sender, order)
        for each, value in (*columns.items(), *numbers.items()):
            sent += self._take_value(sender, each, order.version, value)
        return sent

    def _do_together(self, name: str) -> list[Outgoing]:
        """What all trainers have asked of a table, once it is due."""
        due = self._tables.due(name, self._slots[name, ""].newest, self._attendance.live)
        if not (due and self._is_whole(name)):
            return []
        sent, numbers = self._tables.done(name, self._numbers_of(name))
        for each, value in numbers.items():
            slot = self._slots[each, ""]
            slot.values[slot.newest or 0] = value
        return sent

    def _is_whole(self, name: str) -> bool:
        """Whether all that the update of a table writes is there, once some is."""
        newest = self._slots[name, ""].newest
        return all(self._slots[each, ""].newest == newest for each in self._tables.numbers(name))

    def _numbers_of(self, name: str) -> dict[str, torch.Tensor]:
        return {each: as_tensor(self.held(each)) for each in self._tables.numbers(name)}

    def _answer(self, name: str, slot: Slot) -> list[Outgoing]:
        """To those who wait for a value of `name` that is there."""
        sent, waiting = [], []
        for sender, pull in slot.parked:
            header = pull.header if isinstance(pull, Asked) else pull
            number = self._number(slot, header)
            late = isinstance(pull, Order) and not self._is_whole(name)
            if number is None or number not in slot.values or late:
                waiting.append((sender, pull))
                continue
            value = slot.values[number]
            if name in self._noted:
                self._pulled[name, sender.rank] = value
            if isinstance(pull, Order):
                sent += [(sender, message) for message in self._tables.read(pull, self._numbers_of(name))]
            else:
                sent.append((sender, self._reply(sender.rank, pull, name, value)))
        slot.parked = waiting
        return sent + (self._do_together(name) if name in self._tables else [])

    def _reply(self, trainer: int, pull: Pull | Asked, name: str, value: object) -> Message:
        if isinstance(pull, Asked):
            return self._rows.reply(trainer, pull, value if isinstance(value, Column) else as_tensor(value))
        value = as_tensor(value)
        value = self._below.rows(pull.channel, value) if pull.channel in self._below else value
        cast, value = self.job.casts.get(pull.channel), value.clone() if name in self._rows.in_place else value
        return Message(Value(pull.channel, pull.version), value if cast is None else value.to(cast[1]))

    def _number(self, slot: Slot, pull: Pull | PullRows | Order) -> int | None:
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
        for name in self._tables:
            sent += self._do_together(name)
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
