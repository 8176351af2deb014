"""A trainer's orders to the servers' tables of any ids, and their answers. Changes with every message."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from syncwright.job import Job
from syncwright.runtime.messages import Act, Message, Order, Part
from syncwright.runtime.packed import chunks, pack, unpack
from syncwright.runtime.places import AnyIds, places_of
from syncwright.tables.mixing import shard_of

Send = Callable[[int, Message], None]
Given = dict[str, torch.Tensor]


@dataclass(slots=True, eq=False)
class _Answer:
    """What has come. Changes until all has."""

    parts: list[torch.Tensor] = field(default_factory=list)
    whole: bool = False


class TableClient:
    """What one trainer does with tables of any ids, for its `Client`.

    pieces  by table its pieces on servers, with the ids that each keeps
    """

    def __init__(self, job: Job, send: Send):
        self._job, self._send = job, send
        self.pieces: dict[str, dict[str, AnyIds]] = {}
        for name, variable in job.held.items():
            if variable.unbounded is not None:
                places = places_of(variable, 0)
                assert isinstance(places, AnyIds), "any ids"
                self.pieces.setdefault(variable.whole or name, {})[name] = places
        self._turn = 0
        self._answers: dict[int, _Answer] = {}

    def order(self, piece: str, act: Act, version: int, when: str, given: Mapping, number: int = -1) -> int:
        """Has a server do something; the turn by which its answer is found."""
        self._turn += 1
        if act != "set":
            self._answers[self._turn] = _Answer()
        for chunk, last in chunks(pack(given)):
            header = Order(piece, act, version, when, self._turn, number, last)  # type: ignore[arg-type]
            self._send(self._job.owners[piece], Message(header, chunk))
        return self._turn

    def answer(self, turn: int) -> Given | None:
        """What the server has answered; None while it has not. Once."""
        if not self._answers[turn].whole:
            return None
        return unpack(torch.cat(self._answers.pop(turn).parts))

    def take(self, part: Part, tensor: torch.Tensor) -> None:
        """A part of an answer; of what nobody asked for nothing is kept."""
        found = self._answers.get(part.turn)
        if found is not None:
            found.parts.append(tensor)
            found.whole = part.last


def keeps(places: AnyIds) -> Callable[[torch.Tensor], torch.Tensor]:
    """Which of some ids live there."""

    def keep(ids: torch.Tensor) -> torch.Tensor:
        if not places.shards:
            return torch.ones(ids.shape, dtype=torch.bool)
        shard = shard_of(ids, places.shards)
        return (places.start <= shard) & (shard < places.stop)

    return keep
