"""One trainer's communications: what it pushed, asked for and got. Changes with every message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType

import torch

from syncwright import ops
from syncwright.errors import JobError, SyncwrightError
from syncwright.job import Job
from syncwright.passes.bucket import INSIDE
from syncwright.runtime.messages import Address, Failure, Hello, Kind, Leave, Message, Pull, Push, Resume, Value
from syncwright.runtime.rendezvous import cannot_go_on
from syncwright.runtime.transport import Outlet, Work


class Client:
    """The port of a trainer's running program (see `executor.Port`), over a transport. `step` is the one that runs."""

    def __init__(self, job: Job, transport: Outlet):
        self.job, self.transport = job, transport
        self.step, self._weight, self._hypers = 0, 1.0, {}
        self._asked: set[tuple[str, int]] = set()
        self._got: dict[tuple[str, int], torch.Tensor] = {}
        self._works: dict[str, tuple[Work, torch.Tensor]] = {}
        self._left: dict[tuple[str, int], int] = {}
        self._notes = _notes(job)
        self._fixed, self._base = job.fixed, 0

    def hello(self) -> None:
        for part in self.job.servers:
            self._send(part.rank, Message(Hello(self.job.digest)))

    def begin(
        self,
        step: int,
        weight: float,
        hypers: Mapping[str, float],
        uses: Mapping[tuple[str, bool], int] = MappingProxyType({}),
    ) -> None:
        """What belongs to all pushes of the step that begins.

        uses  how often each channel will be pulled in this step, now or later: after the last time it is forgotten
        """
        self.step, self._weight, self._hypers = step, weight, dict(hypers)
        self._got = {key: value for key, value in self._got.items() if key >= self._key(key[0], step)}
        self._asked = {key for key in self._asked if key >= self._key(key[0], step)}
        self._left = {}
        for (channel, later), count in uses.items():
            key = self._key(channel, step + int(later))
            self._left[key] = self._left.get(key, 0) + count
        self.transport.progress(step, "begin")

    def push(self, channel: str, tensor: torch.Tensor) -> None:
        known = self.job.channels[channel]
        hypers = {name: self._hypers[name] for name in known.hypers}
        self.transport.progress(self.step, f"push {channel}")
        header = Push(channel, self.step, self._weight, hypers)
        self._send(known.server, Message(header, tensor.detach().contiguous()))

    def pull(self, channel: str, later: bool) -> torch.Tensor | None:
        key = self._key(channel, self.step + int(later))
        value = self.fetch(*key)
        if value is not None and key in self._left:
            self._left[key] -= 1
            if self._left[key] == 0:
                self._forget(key)
        return value

    def fetch(self, channel: str, version: int) -> torch.Tensor | None:
        """The value once `version` steps are in it; asks for it the first time, None while it is not there."""
        key = self._key(channel, version)
        if key not in self._got:
            self.transport.progress(self.step, f"pull {channel}")
            self.ask((channel,), version)
        return self._got.get(key)

    def release(self) -> None:
        """Forgets all values that have come: whoever needs one asks again."""
        for key in list(self._got):
            self._forget(key)

    def _forget(self, key: tuple[str, int]) -> None:
        del self._got[key]
        self._asked.discard(key)

    def ask(self, channels: Sequence[str], version: int) -> None:
        """Asks ahead: a server answers as soon as the version is there, while this trainer does something else."""
        for channel in channels:
            key = self._key(channel, version)
            if key not in self._asked:
                self._asked.add(key)
                self._send(self.job.owners[channel], Message(Pull(*key)))

    def _key(self, channel: str, version: int) -> tuple[str, int]:
        """What no update writes is asked for as of when all values were last set: at no later version is it another."""
        return channel, self._base if channel in self._fixed else version

    def give(self, channel: str, version: int, tensor: torch.Tensor) -> None:
        """Sets a value on its server: at the start, or when a checkpoint is loaded."""
        self._send(self.job.owners[channel], Message(Value(channel, version), tensor.detach().contiguous()))

    def start(self, channel: str, tensor: torch.Tensor) -> None:
        self.transport.progress(self.step, f"all-reduce {channel}")
        self._works[channel] = (self.transport.all_reduce(tensor, self._notes.get(channel, channel)), tensor)

    def finish(self, channel: str) -> torch.Tensor | None:
        work, tensor = self._works[channel]
        self.transport.progress(self.step, f"wait {channel}")
        if not work.done():
            return None
        del self._works[channel]
        return tensor

    def resume(self, step: int) -> None:
        """All values have been given: servers go on at `step`."""
        for part in self.job.servers:
            self._send(part.rank, Message(Resume(step)))

    def restart(self, step: int) -> None:
        """All values are being set anew, to be those of `step`: what came before is old."""
        self._base = step
        self._got, self._asked = {}, set()

    def leave(self, step: int) -> None:
        for part in self.job.servers:
            self._send(part.rank, Message(Leave(step)))

    def fail(self, reason: str) -> None:
        """Tells servers that this trainer ends early; best effort, they may be gone too."""
        for part in self.job.servers:
            with suppress(SyncwrightError):
                self._send(part.rank, Message(Failure(reason)))

    def take(self, sender: Address, message: Message) -> None:
        """What a server sent."""
        match message.header:
            case Value(channel=channel, version=version) if message.tensor is not None:
                self._got[channel, version] = message.tensor
            case Failure(reason=reason):
                raise cannot_go_on(self.transport.me, reason)
            case other:
                raise JobError(f"{sender} sent a {type(other).__name__}, which trainers do not take.")

    def _send(self, server: int, message: Message) -> None:
        self.transport.send(Address(Kind.SERVER, server), message)


def _notes(job: Job) -> dict[str, str]:
    """What errors call a collective: "bucket.0 (weight.grad, bias.grad and 3 more)"."""
    programs = [each.trainer["step"] for each in (*(span.job for span in job.spans), job)]
    nodes = [n for program in programs for n in program.graph.find_nodes(op="call_function", target=ops.all_reduce)]
    inside = {str(n.args[1]): n.meta.get(INSIDE, ()) for n in nodes}
    return {name: f"{name} ({_listed(values)})" for name, values in inside.items() if values}


def _listed(names: tuple[str, ...], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
