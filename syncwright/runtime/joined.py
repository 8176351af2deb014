"""A trainer that has met the others: its runs wait for servers, its parts are gathered from all trainers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import torch

from syncwright.errors import DeadlineExceeded
from syncwright.job import Job
from syncwright.runtime.executor import Blocked
from syncwright.runtime.messages import Address, Kind
from syncwright.runtime.pieces import UNTIL_ALL_LEFT
from syncwright.runtime.replica import Replica
from syncwright.runtime.transport import Transport


class Joined:
    """See `session.Peers`. Changes: takes messages in while it waits.

    seconds  how long it waits for a value
    check    raises what has ended a server of this process
    """

    def __init__(self, job: Job, transport: Transport, seconds: float, check: Callable[[], None]) -> None:
        self.job, self.transport = job, transport
        self.trainers = job.plan.trainers
        self.replica: Replica | None = None
        self._seconds, self._check = seconds, check

    def drive(self, runs: Sequence[Generator[Blocked, None, object]]) -> list:
        """Runs each until it is done, taking messages in whenever it waits."""
        return [self._driven(run) for run in runs]

    def gather(self, parts: Sequence[torch.Tensor], note: str) -> list[torch.Tensor]:
        """Every trainer's part, from this trainer's."""
        (part,) = parts
        whole = part.new_empty((self.trainers, *part.shape))
        self.transport.all_gather(_bytes_of(whole), _bytes_of(part), note).done()
        return list(whole)

    def _driven(self, run: Generator[Blocked, None, object]) -> object:
        try:
            while True:
                self._wait(next(run))
        except StopIteration as stop:
            return stop.value

    def _wait(self, blocked: Blocked) -> None:
        """Takes the next message in, whatever it is."""
        assert self.replica is not None, "the session is open"
        step = self.replica.client.step
        owner = Address(Kind.SERVER, self._server_of(blocked.channel))
        others = [Address(Kind.TRAINER, k) for k in range(self.trainers) if k != self.transport.me.rank]
        wait = self.transport.wait([owner, *others], self._seconds)
        while (got := self.transport.receive(1.0)) is None:
            self._check()
            if wait.is_over() and blocked.node == UNTIL_ALL_LEFT and not self.transport.silent([owner]):
                wait = self.transport.wait(
                    [owner, *others], self._seconds
                )  # others may train on for as long as they like
            if wait.is_over():
                late = self.transport.late([owner, *others])
                raise DeadlineExceeded(
                    f"{self.transport.me} has waited {self._seconds:g} s at {blocked.node} of step {step} for "
                    f"'{blocked.channel}' of {owner}: {late}. Expected it in time. See the output of who is late; if it is "
                    "only slow, give a longer Deadlines.wait."
                )
        self.replica.take(*got)

    def _server_of(self, channel: str) -> int:
        """Who answers for a channel; for the trainers' clocks, who keeps them."""
        for job in (self.job, *(each.job for each in self.job.exchanges)):
            if channel in job.channels:
                return job.channels[channel].server
            if channel in job.owners:
                return job.owners[channel]
        return self.job.plan.reducer or 0


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's memory: collectives do not take every dtype."""
    return tensor.view(-1).view(torch.uint8)
