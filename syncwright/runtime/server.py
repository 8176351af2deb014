"""A server as a state machine: messages in, messages out. Knows no network, no clock and no thread.

Holds variables (or pieces), merges what trainers push, runs each program once per step as soon as everything that it
reads is there, answers pulls when the version asked for exists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from syncwright.errors import BatchError, Disagreement, JobError
from syncwright.job import Channel, Job
from syncwright.program import Program
from syncwright.runtime.executor import NO_PORT, Executor
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
    """A program and the step that it runs next. Changes with every step."""

    program: Program
    reads: tuple[str, ...]
    host: frozenset[str]
    step: int = 0


@dataclass(slots=True)
class Merging:
    """The contributions to one channel at one step so far."""

    given: dict[int, tuple[float, torch.Tensor]] = field(default_factory=dict)


class Server:
    """One server of a job. Changes with every message that it handles."""

    def __init__(self, job: Job, rank: int, compute: Compute | None = None):
        part = job.servers[rank]
        self.job, self.rank, self._compute = job, rank, compute or Interpreter()
        self._held = {v.name: v for v in part.holds}
        self._running = [Running(p, p.reads, _host_reads(p)) for p in part.programs]
        self._exports = part.exports
        self._versions: dict[str, dict[int, object]] = {name: {} for name in self._held}
        self._values: dict[tuple[str, int], object] = {}
        self._merging: dict[tuple[str, int], Merging] = {}
        self._left: dict[int, int] = {}
        self._parked: list[tuple[Address, Pull]] = []
        self._readers = {name: [r for r in self._running if name in r.reads] for name in self._held}

    @property
    def done(self) -> bool:
        """Whether every trainer has left."""
        return len(self._left) == self.job.plan.trainers

    @property
    def live(self) -> list[int]:
        """Trainers that have not left."""
        return [k for k in range(self.job.plan.trainers) if k not in self._left]

    @property
    def pending(self) -> bool:
        """Whether some trainers have contributed to a merge and others have not."""
        return bool(self._merging)

    @property
    def step(self) -> int:
        """The step that the slowest program runs next."""
        return min((r.step for r in self._running), default=0)

    def waits_for(self) -> str:
        """Which contributions are missing, for errors."""
        missing = [
            f"'{channel}' of step {step} from trainer {', '.join(map(str, late))}"
            for (channel, step), merging in sorted(self._merging.items(), key=lambda item: item[0][1])
            if (late := [k for k in self._expected(step) if k not in merging.given])
        ]
        return "; ".join(missing) or "the next message of any trainer"

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
                self._left[sender.rank] = step
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
            self._versions[name][version] = _as_held(tensor)
        else:
            self._values[name, version - 1] = tensor

    def _take_push(self, sender: Address, push: Push, tensor: torch.Tensor | None) -> None:
        channel = self.job.channels.get(push.channel)
        if channel is None or channel.server != self.rank or tensor is None:
            raise JobError(f"{sender} pushed '{push.channel}', which server {self.rank} does not merge.")
        merging = self._merging.setdefault((push.channel, push.step), Merging())
        merging.given[sender.rank] = (push.weight, tensor)
        for name, value in push.hypers.items():
            self._values[name, push.step] = value

    def _expected(self, step: int) -> list[int]:
        return [k for k in range(self.job.plan.trainers) if self._left.get(k, step + 1) > step]

    def _advance(self) -> list[Outgoing]:
        sent: list[Outgoing] = []
        self._merge()
        while ready := [r for r in self._running if self._inputs(r) is not None]:
            for running in ready:
                sent += self._run(running)
        sent += self._answer()
        return sent

    def _merge(self) -> None:
        for (name, step), merging in list(self._merging.items()):
            expected = self._expected(step)
            if merging.given and all(k in merging.given for k in expected):
                if not any(weight for weight, _ in merging.given.values()):
                    raise no_examples(step)
                del self._merging[name, step]
                channel = self.job.channels[name]
                self._values[name, step] = merge(channel, merging.given, self.job.plan.trainers)

    def _inputs(self, running: Running) -> dict[str, object] | None:
        found: dict[str, object] = {}
        for name in running.reads:
            value = (
                self._versions[name].get(running.step) if name in self._held else self._values.get((name, running.step))
            )
            if value is None:
                return None
            found[name] = float(value) if name in running.host else value  # type: ignore[arg-type]
        return found

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
        versions = self._versions[pull.channel]
        if pull.version in versions:
            return versions[pull.version]
        if not any(pull.channel in r.program.writes for r in self._running) and versions:
            return versions[max(versions)]
        return None


def merge(channel: Channel, given: Mapping[int, tuple[float, torch.Tensor]], trainers: int) -> torch.Tensor:
    """One value of all contributions, added in the order of trainers: the same whoever came first.

    Contributions are already multiplied by weight / trainers; their sum is divided by the sum of the weights / trainers
    unless that is 1, so that it is a mean over those that are there. g = 1 from three trainers of four gives 1.0.
    """
    ordered = [given[k] for k in sorted(given)]
    if channel.merge == "first":
        return ordered[0][1]
    total = ordered[0][1]
    for _, tensor in ordered[1:]:
        total = total + tensor
    if channel.merge == "mean":
        weight = _sum_of_weights([w for w, _ in ordered], total.dtype) / trainers
        if weight not in (0, 1):
            total = total / weight
    return total


def no_examples(step: int) -> BatchError:
    """The error of a step for which no trainer has an example: its mean is 0 / 0."""
    return BatchError(
        f"step {step}: no trainer has examples; expected at least one, on some trainer. Leave the step out on all "
        "trainers for such a batch."
    )


def _sum_of_weights(weights: list[float], dtype: torch.dtype) -> torch.Tensor:
    """Added as collectives add them, in float64 only for float64 values: so servers and replicas agree to the bit."""
    precision = torch.float64 if dtype is torch.float64 else torch.float32
    total = torch.tensor(weights[0], dtype=precision)
    for weight in weights[1:]:
        total = total + torch.tensor(weight, dtype=precision)
    return total


def _host_reads(program: Program) -> frozenset[str]:
    return frozenset(name for name, node in program.placeholders.items() if is_host(node.meta["val"]))


def _as_held(tensor: torch.Tensor | None) -> torch.Tensor:
    if tensor is None:
        raise JobError("a start value came without its tensor")
    return tensor


def _as_tensor(value: object) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
