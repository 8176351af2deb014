"""What trainers of each host do together, where all trainers live in one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(slots=True, eq=False)
class Round:
    """One sum of one host. Changes with every part, and when a trainer leaves.

    missing  trainers of the host that have not left and have given nothing
    parts    what the others have given, by their numbers
    """

    missing: set[int]
    parts: dict[int, torch.Tensor] = field(default_factory=dict)

    def strike(self, rank: int) -> bool:
        """Waits for a trainer no more. The last time, the sum is made: in the order of trainers, where the first gave its
        part; then returns True."""
        self.missing.discard(rank)
        if self.missing:
            return False
        first, *others = [self.parts[each] for each in sorted(self.parts)]
        for part in others:
            first += part
        return True


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """One trainer's view of a round (see `transport.HostWork`)."""

    round: Round
    rank: int

    def done(self) -> bool:
        """Whether all who are there have given their parts."""
        return not self.round.missing

    @property
    def is_first(self) -> bool:
        return self.rank == min(self.round.parts)


class Sums:
    """Changes with every part. `hosts`: how many trainers each host has, in the order of their numbers."""

    def __init__(self, hosts: Sequence[int]):
        numbers = [host for host, count in enumerate(hosts) for _ in range(count)]
        self._host = dict(enumerate(numbers))
        self._there = [{rank for rank, its in self._host.items() if its == host} for host, _ in enumerate(hosts)]
        self._turns: dict[tuple[str, int], int] = {}
        self._rounds: dict[tuple[str, int, int], Round] = {}

    def give(self, note: str, rank: int, tensor: torch.Tensor) -> Sum:
        """Trainer `rank`'s n-th part of the sum called `note` meets the n-th of each other trainer of its host."""
        turn, host = self._turns.get((note, rank), 0), self._host[rank]
        self._turns[note, rank] = turn + 1
        meeting = self._rounds.setdefault((note, turn, host), Round(set(self._there[host])))
        meeting.parts[rank] = tensor
        if meeting.strike(rank):
            del self._rounds[note, turn, host]
        return Sum(meeting, rank)

    def leave(self, rank: int) -> None:
        """A trainer gives nothing more: those that wait for it go on."""
        self._there[self._host[rank]].discard(rank)
        done = [key for key, meeting in self._rounds.items() if rank in meeting.missing and meeting.strike(rank)]
        for key in done:
            del self._rounds[key]


class Copies:
    """Values that the first trainer of each host gives to the others, in order. Changes with each.

    hosts  how many trainers each has, in the order of their numbers
    """

    def __init__(self, hosts: Sequence[int]):
        numbers = [host for host, count in enumerate(hosts) for _ in range(count)]
        self._host = dict(enumerate(numbers))
        self._had = dict.fromkeys(self._host, 0)
        self._left: set[int] = set()
        self._values: dict[tuple[int, int], torch.Tensor] = {}

    def is_first(self, rank: int) -> bool:
        """Whether a trainer's next value is its own to give."""
        return self._key(rank) not in self._values and rank == min(self._there(rank))

    def give(self, rank: int, tensor: torch.Tensor) -> None:
        """A trainer's next value, which it gives to the others of its host."""
        self._values[self._key(rank)] = tensor
        self._count(rank)

    def take(self, rank: int) -> torch.Tensor | None:
        """A trainer's next value, None while it has not been given."""
        value = self._values.get(self._key(rank))
        if value is not None:
            self._count(rank)
        return value

    def leave(self, rank: int) -> None:
        """A trainer gives and takes nothing more."""
        self._left.add(rank)
        self._forget(self._host[rank])

    def _key(self, rank: int) -> tuple[int, int]:
        return self._host[rank], self._had[rank]

    def _there(self, rank: int) -> list[int]:
        return [other for other, host in self._host.items() if host == self._host[rank] and other not in self._left]

    def _count(self, rank: int) -> None:
        self._had[rank] += 1
        self._forget(self._host[rank])

    def _forget(self, host: int) -> None:
        """What all who are there have taken."""
        slowest = min(
            (n for rank, n in self._had.items() if self._host[rank] == host and rank not in self._left), default=0
        )
        self._values = {key: value for key, value in self._values.items() if key[0] != host or key[1] >= slowest}
