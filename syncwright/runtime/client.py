"""One trainer's communications: what it pushed, asked for and got. Changes with every message."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import torch

from syncwright.errors import JobError, SyncwrightError
from syncwright.job import Job
from syncwright.runtime.messages import Address, Failure, Hello, Kind, Leave, Message, Pull, Push, Value
from syncwright.runtime.transport import Transport, Work


class Client:
    """The port of a trainer's running program (see `executor.Port`), over a transport."""

    def __init__(self, job: Job, transport: Transport):
        self.job, self.transport = job, transport
        self._step, self._weight, self._hypers = 0, 1.0, {}
        self._asked: set[tuple[str, int]] = set()
        self._got: dict[tuple[str, int], torch.Tensor] = {}
        self._works: dict[str, tuple[Work, torch.Tensor]] = {}

    def hello(self) -> None:
        for part in self.job.servers:
            self._send(part.rank, Message(Hello(self.job.digest)))

    def begin(self, step: int, weight: float, hypers: Mapping[str, float]) -> None:
        """What belongs to all pushes of the step that begins."""
        self._step, self._weight, self._hypers = step, weight, dict(hypers)
        self._got = {key: value for key, value in self._got.items() if key[1] >= step}
        self._asked = {key for key in self._asked if key[1] >= step}

    def push(self, channel: str, tensor: torch.Tensor) -> None:
        known = self.job.channels[channel]
        hypers = {name: self._hypers[name] for name in known.hypers}
        header = Push(channel, self._step, self._weight, hypers)
        self._send(known.server, Message(header, tensor.detach().contiguous()))

    def pull(self, channel: str, later: bool) -> torch.Tensor | None:
        return self.fetch(channel, self._step + int(later))

    def fetch(self, channel: str, version: int) -> torch.Tensor | None:
        """The value once `version` steps are in it; asks for it the first time, None while it is not there."""
        key = (channel, version)
        if key not in self._asked:
            self._asked.add(key)
            self._send(self.job.owners[channel], Message(Pull(channel, version)))
        return self._got.get(key)

    def give(self, channel: str, version: int, tensor: torch.Tensor) -> None:
        """Sets a value on its server: at the start, or when a checkpoint is loaded."""
        self._send(self.job.owners[channel], Message(Value(channel, version), tensor.detach().contiguous()))

    def start(self, channel: str, tensor: torch.Tensor) -> None:
        self._works[channel] = (self.transport.all_reduce(tensor, channel), tensor)

    def finish(self, channel: str) -> torch.Tensor | None:
        work, tensor = self._works[channel]
        if not work.done():
            return None
        del self._works[channel]
        return tensor

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
                raise JobError(f"{sender} cannot go on: {reason}")
            case other:
                raise JobError(f"{sender} sent a {type(other).__name__}, which trainers do not take.")

    def _send(self, server: int, message: Message) -> None:
        self.transport.send(Address(Kind.SERVER, server), message)
