"""An interleaving given as data: which trainer's message reaches its server when. For loopback jobs."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from syncwright.errors import SyncwrightError
from syncwright.near import did_you_mean
from syncwright.runtime.executor import Blocked
from syncwright.runtime.loopback import Loopback, Network, stream
from syncwright.runtime.messages import Address, Kind, Leave, Message, Pull, PullRows, Push, Tick

Act = Literal["pushes", "pulls", "ticks", "leaves"]
Run = Generator[Blocked, None, None]
Following = Callable[[int, int], tuple | None]


class ScheduleError(SyncwrightError):
    """An interleaving that cannot happen: a message that is not the sender's next."""


@dataclass(frozen=True, slots=True)
class Event:
    """A message of a trainer reaches a server.

    act       "pushes" a gradient, "pulls" (asks for) a value, "ticks" (has pushed a step), "leaves"
    variable  which; "" for ticks and leaves
    """

    trainer: int
    act: Act
    variable: str = ""

    def __str__(self) -> str:
        return f"{self.trainer} {self.act} {self.variable}".rstrip()


def events(text: str) -> list[Event]:
    """Events from lines such as `0 pushes w`; what stands behind a # is ignored.

    Raises ScheduleError for a line that is none.
    """
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        match words:
            case [trainer, "pushes" | "pulls" as act, variable] if trainer.isdecimal():
                found.append(Event(int(trainer), act, variable))
            case [trainer, "ticks" | "leaves" as act] if trainer.isdecimal():
                found.append(Event(int(trainer), act))
            case _:
                raise ScheduleError(
                    f"line {number}: found {line.strip()!r}, expected a trainer's number and what it does, such as '0 pushes w', "
                    "'1 pulls w', '0 ticks' or '1 leaves'. Correct it."
                )
    return found


class Replay:
    """Trainers of a loopback job that run by themselves, with messages that arrive when they are told to.

        replay = Replay(job, [[(x0,), (x1,)], [(x2,)]])          # batches by trainer: trainer 0 makes two steps
        replay.play("0 pulls w \\n 1 pulls w \\n 0 pushes w \\n 1 pushes w")
        replay.returned                                          # [[loss], [loss]]: what each trainer's steps returned

    A trainer runs until it waits for an answer. Its messages to a server arrive in the order in which they were sent, each
    when an event says so; answers come at once. Changes with every event.

    following  what a trainer takes for the batch of its next step, by its rank and the number of the step that begins
    """

    def __init__(self, job: Loopback, batches: Sequence[Sequence[tuple]], following: Following | None = None):
        self._following = following
        self.job, self.returned = job, [[] for _ in range(job.trainers)]
        self.waits: list[Blocked | None] = [None] * job.trainers
        first = next(part for mine in batches for part in mine)
        job.open(first)
        self._runs = [self._steps(rank, mine) for rank, mine in enumerate(batches)]
        self._advance()

    def play(self, script: str | Iterable[Event]) -> Replay:
        """Lets messages arrive. Raises ScheduleError for one that is not the trainer's next to that server."""
        for event in events(script) if isinstance(script, str) else script:
            self.deliver(self._index(event))
        return self

    @property
    def next(self) -> list[tuple[Event, int]]:
        """What may arrive next, with its place among the messages under way: one for each trainer and server."""
        seen, found = set(), []
        for index, (sender, to, message) in enumerate(self._network.queue):
            if (sender, to) not in seen:
                seen.add((sender, to))
                found.append((_event(sender, message), index))
        return found

    def deliver(self, index: int) -> None:
        """Lets the message at this place arrive, and what follows from it happen."""
        sender, to, message = self._network.queue[index]
        del self._network.queue[index]
        self.job.hand_over(sender, to, message)
        self._advance()

    def drain(self) -> Replay:
        """Lets everything arrive, in the order in which it was sent."""
        while self._network.queue:
            self.deliver(0)
        return self

    @property
    def _network(self) -> Network:
        return self.job.network

    def _index(self, event: Event) -> int:
        known = self.next
        found = next((index for possible, index in known if possible == event), None)
        if found is None:
            listed = [str(possible) for possible, _ in known]
            raise ScheduleError(
                f"found the event '{event}', expected one of: {', '.join(listed) or 'none, as nothing is under way'}. "
                f"{did_you_mean(str(event), listed, 'Correct the schedule.')}"
            )
        return found

    def _steps(self, rank: int, batches: Sequence[tuple]) -> Run:
        session = self.job.session
        for number, batch in enumerate(batches):
            part = session.part(batch)
            prepared = session.prepared(part)
            following = None if self._following is None else self._following(rank, number)
            self.returned[rank].append((yield from session.replicas[rank].step(prepared, part, following)))

    def _advance(self) -> None:
        """Runs every trainer until it waits for what is not there; collectives complete as the last one joins."""
        sent = -1
        while sent != self._network.sent:
            sent = self._network.sent
            for rank, run in enumerate(self._runs):
                with stream(self.job.streams, rank):
                    self.waits[rank] = next(run, None)


def _event(sender: Address, message: Message) -> Event:
    if sender.kind is not Kind.TRAINER:
        raise ScheduleError(f"{sender} has a message under way; expected answers to arrive at once.")
    match message.header:
        case Push(channel=channel):
            return Event(sender.rank, "pushes", _variable(channel))
        case Pull(channel=channel) | PullRows(channel=channel):
            return Event(sender.rank, "pulls", channel)
        case Tick():
            return Event(sender.rank, "ticks")
        case Leave():
            return Event(sender.rank, "leaves")
        case other:
            return Event(sender.rank, cast(Act, type(other).__name__.lower()))


def _variable(channel: str) -> str:
    """The parameter, or piece of one, whose gradient a channel carries: `w.grad[1]` is of `w[1]`."""
    return re.sub(r"\.grad(?=$|\[)", "", channel)
