"""A server of all that trainers do: of their steps, and of their exchanges where they train alone in between."""

from __future__ import annotations

from collections import Counter

from syncwright.job import Job
from syncwright.runtime.interpreter import Compute
from syncwright.runtime.messages import Address, Message
from syncwright.runtime.records import NO_RECORDS, Records
from syncwright.runtime.server import Outgoing, Server
from syncwright.runtime.ticking import Ticking


class JointServer:
    """One `Server` for each job, behind one address: each numbers its rounds by itself. Changes with every message.

    parts    of the steps' job, then of each exchange's; None where that has no servers
    ticking  the user's schedulers, where servers of the steps tick copies of them
    records  of what was deferred, for the steps' job: exchanges begin with what trainers have
    """

    def __init__(
        self,
        job: Job,
        rank: int,
        compute: Compute | None = None,
        ticking: Ticking | None = None,
        records: Records = NO_RECORDS,
    ):
        self.job, self.rank = job, rank
        exchanges = [Server(each.job, rank, compute) if each.is_served else None for each in job.exchanges]
        self.parts: list[Server | None] = [Server(job, rank, compute, ticking, records), *exchanges]

    @property
    def there(self) -> list[Server]:
        return [part for part in self.parts if part is not None]

    @property
    def done(self) -> bool:
        """Whether every trainer has left every job and has what it asked for."""
        return all(part.done for part in self.there)

    @property
    def live(self) -> list[int]:
        """Trainers that have not left, or not all."""
        return sorted({trainer for part in self.there for trainer in part.live})

    @property
    def lost(self) -> set[int]:
        """Trainers that it goes on without."""
        return self.there[0].lost

    @property
    def refused(self) -> Counter[str]:
        """Messages that make no sense for their job, by what is wrong with them: they change nothing."""
        return sum((part.refused for part in self.there), Counter())

    @property
    def pending(self) -> bool:
        """Whether some trainers have contributed to a merge and others have not."""
        return any(part.pending for part in self.there)

    @property
    def step(self) -> int:
        """The step, or else the exchange, that comes next."""
        return max(part.step for part in self.there)

    def held(self, name: str) -> object:
        """The newest value of a variable that is kept here."""
        part = next(p for p in self.there if any(v.name == name for v in p.job.servers[self.rank].holds))
        return part.held(name)

    def waits_for(self) -> str:
        """Which contributions are missing, for errors."""
        return next((part for part in self.there if part.pending), self.there[0]).waits_for()

    def handle(self, sender: Address, message: Message) -> list[Outgoing]:
        """Takes one message in; returns what is to be sent."""
        part = self.parts[message.job]
        assert part is not None, "what arrives is of a job that has servers"
        return _of(message.job, part.handle(sender, message))

    def lose(self, trainer: int) -> list[Outgoing]:
        """Goes on without a trainer that is lost."""
        found = [(job, part.lose(trainer)) for job, part in enumerate(self.parts) if part is not None]
        return [each for job, sent in found for each in _of(job, sent)]


def _of(job: int, sent: list[Outgoing]) -> list[Outgoing]:
    """Messages that say of which job they are."""
    return [(to, Message(message.header, message.tensor, job)) for to, message in sent] if job else sent
