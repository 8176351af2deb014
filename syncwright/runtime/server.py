"""A server as a state machine: messages in, messages out. Knows no network, no clock and no thread.

Holds variables (or pieces), runs each program as often as what it reads has become complete (see `merging`), answers
pulls when the version asked for exists. A version of a variable is how often it has been updated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from syncwright.errors import Disagreement, JobError
from syncwright.job import Job
from syncwright.program import Program
from syncwright.runtime.executor import NO_PORT, Executor
from syncwright.runtime.merging import Attendance, Rounds
from syncwright.runtime.messages import Address, Failure, Hello, Kind, Leave, Message, Pull, Push, Resume, Value
from syncwright.runtime.rendezvous import cannot_go_on
from syncwright.shapes import is_host

Outgoing = tuple[Address, Message]
Compute = Callable[[Program, Mapping[str, object]], Mapping[str, object]]


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


@dataclass(slots=True)
class Running:
    """A program and which of its runs is next. Changes with every run."""

    program: Program
    reads: tuple[str, ...]
    host: frozenset[str]
    step: int = 0


class Server:
    """One server of a job. Changes with every message that it handles."""

    def __init__(self, job: Job, rank: int, compute: Compute | None = None):
        part = job.servers[rank]
        self.job, self.rank, self._compute = job, rank, compute or Interpreter()
        self._held = {v.name: v for v in part.holds}
        self._running = [Running(p, p.reads, _host_reads(p)) for p in part.programs]
        self._exports, self._fixed = part.exports, job.fixed
        self._versions: dict[str, dict[int, object]] = {name: {} for name in self._held}
        self._values: dict[tuple[str, int], object] = {}
        self._attendance = Attendance(job.plan.trainers)
        self._merging = {n: Rounds(c, self._attendance) for n, c in job.channels.items() if c.server == rank}
        self._parked: list[tuple[Address, Pull]] = []
        self._readers = {name: [r for r in self._running if name in r.reads] for name in self._held}

    @property
    def done(self) -> bool:
        """Whether every trainer has left."""
        return not self._attendance.live

    @property
    def live(self) -> list[int]:
        """Trainers that have not left."""
        return self._attendance.live

    @property
    def pending(self) -> bool:
        """Whether some trainers have contributed to a merge and others have not."""
        return any(merging.pending for merging in self._merging.values())

    @property
    def step(self) -> int:
        """The step that the slowest program runs next."""
        return min((r.step for r in self._running), default=0)

    def waits_for(self) -> str:
        """Which contributions are missing, for errors."""
        missing = sorted(late for merging in self._merging.values() for late in merging.missing())
        return "; ".join(said for _, said in missing) or "the next message of any trainer"

    def handle(self, sender: Address, message: Message) -> list[Outgoing]:
        """Takes one message in; returns what is to be sent."""
        match message.header:
            case Hello(digest=digest):
                return self._hello(sender, digest)
            case Value(channel=channel, version=version):
                self._take_value(channel, version, message.tensor)
            case Push() as push:
                self._take_push(sender, push, message.tensor)
            case Pull() as pull:
                self._parked.append((sender, pull))
            case Resume(step=step):
                for running in self._running:
                    running.step = max(running.step, step)
            case Leave(step=step):
                self._attendance.left[sender.rank] = step
                for name in self._merging:
                    self._take_complete(name)
            case Failure(reason=reason):
                raise cannot_go_on(Address(Kind.SERVER, self.rank), reason)
        return self._advance()

    def _hello(self, sender: Address, digest: str) -> list[Outgoing]:
        if digest == self.job.digest:
            return []
        raise Disagreement(
            f"{sender} derived another job than server {self.rank} (digest {digest[:12]}, expected "
            f"{self.job.digest[:12]}). Expected all roles to build the same model, optimizer, step and plan. Start all "
            "of them from the same script with the same arguments, and take care that nothing in it depends on the "
            "rank."
        )

    def _take_value(self, name: str, version: int, tensor: torch.Tensor | None) -> None:
        if name in self._held:
            if name in self._fixed:
                self._versions[name].clear()
            self._versions[name][version] = _as_held(tensor)
        else:
            self._values[name, version - 1] = tensor

    def _take_push(self, sender: Address, push: Push, tensor: torch.Tensor | None) -> None:
        merging = self._merging.get(push.channel)
        if merging is None or tensor is None:
            raise JobError(f"{sender} pushed '{push.channel}', which server {self.rank} does not merge.")
        count = merging.take(sender.rank, push, tensor)
        for name, value in push.hypers.items():
            self._values[name, count] = value
        self._take_complete(push.channel)

    def _take_complete(self, channel: str) -> None:
        self._values |= {(channel, count): value for count, value in self._merging[channel].complete()}

    def _advance(self) -> list[Outgoing]:
        sent: list[Outgoing] = []
        while ready := [r for r in self._running if self._inputs(r) is not None]:
            for running in ready:
                sent += self._run(running)
        sent += self._answer()
        return sent

    def _inputs(self, running: Running) -> dict[str, object] | None:
        found: dict[str, object] = {}
        for name in running.reads:
            value = self._value(name, running.step)
            if value is None:
                return None
            found[name] = float(value) if name in running.host else value  # type: ignore[arg-type]
        return found

    def _value(self, name: str, count: int) -> object | None:
        """What a program reads at its run `count`; None while it is not there."""
        if name in self._fixed:
            versions = self._versions[name]
            return versions[max(versions)] if versions else None
        return self._versions[name].get(count) if name in self._held else self._values.get((name, count))

    def _run(self, running: Running) -> list[Outgoing]:
        inputs = self._inputs(running)
        if inputs is None:
            return []
        step, sent = running.step, []
        results = self._compute(running.program, inputs)
        running.step += 1
        for name, value in results.items():
            if name in self._held:
                self._versions[name][step + 1] = value
                self._forget(name)
            else:
                self._values[name, step] = value
                tensor = _as_tensor(value)
                for other in self._exports.get(name, ()):
                    sent.append((Address(Kind.SERVER, other), Message(Value(name, step + 1), tensor)))
        self._forget_values()
        return sent

    def _forget(self, name: str) -> None:
        newest = max(self._versions[name])
        needed = min([newest, *(r.step for r in self._readers[name])])
        for version in [v for v in self._versions[name] if v < needed]:
            del self._versions[name][version]

    def _forget_values(self) -> None:
        """Values of a step go two steps later: by then every live trainer has pulled them, or it could not push."""
        oldest = min((r.step for r in self._running), default=0)
        for key in [key for key in self._values if key[1] < oldest - 1]:
            del self._values[key]

    def _answer(self) -> list[Outgoing]:
        sent, waiting = [], []
        for sender, pull in self._parked:
            value = self._lookup(pull)
            if value is None:
                waiting.append((sender, pull))
            else:
                sent.append((sender, Message(Value(pull.channel, pull.version), _as_tensor(value))))
        self._parked = waiting
        return sent

    def _lookup(self, pull: Pull) -> object | None:
        if pull.channel not in self._held:
            return self._values.get((pull.channel, pull.version - 1))
        return self._versions[pull.channel].get(pull.version)


def _host_reads(program: Program) -> frozenset[str]:
    return frozenset(name for name, node in program.placeholders.items() if is_host(node.meta["val"]))


def _as_held(tensor: torch.Tensor | None) -> torch.Tensor:
    if tensor is None:
        raise JobError("a start value came without its tensor")
    return tensor


def _as_tensor(value: object) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
