"""Sums over the trainers of each host, where all trainers live in one process."""

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


class HostSums:
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
