"""Rows that trainers gather from each other: one table's gradients of a step, on their way and merged."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import torch

from syncwright.runtime.gathers import Pieces
from syncwright.runtime.merging import HALVES
from syncwright.runtime.rows import some, standing_anywhere
from syncwright.runtime.transport import Gathered

Gather = Callable[[int, Pieces, str], Gathered]
"""Starts to give all trainers so many bytes of each, under a name."""
_COUNT_NBYTES = _ID_NBYTES = 8
_REMEMBERED = 16


class Gathering:
    """The gradients of one table among the trainers. Changes with every step.

    A collective gathers as many bytes of each trainer, and trainers look up different numbers of rows. So each sends how many
    it has and the first `room` of them; where some trainer has more, all see it and send the rest in a second collective. The
    room is what the last steps would have needed and an eighth more: the same on all trainers, as all have seen the same.
    """

    def __init__(self, name: str, gather: Gather):
        self._gather = gather
        self._names = name, f"the rest of {name}"
        self._room = 0
        self._needed: deque[int] = deque(maxlen=_REMEMBERED)
        self._own: tuple[torch.Tensor, torch.Tensor] = (torch.empty(0), torch.empty(0))
        self._counts: list[int] = []
        self._works: list[Gathered] = []

    def start(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Gives this trainer's rows, of distinct ids."""
        assert not self._works, "the rows of the step before have been taken"
        self._own, self._counts = (ids.to(torch.int64).contiguous(), rows.detach().contiguous()), []
        self._send(0, self._room)

    def finish(self, merge: str) -> list[torch.Tensor] | None:
        """The distinct ids of all trainers and their merged rows (see `merged`), or None while they are not there."""
        assert self._works, "it was started"
        if not self._works[-1].done():
            return None
        if not self._counts:
            self._counts = [int(part[:_COUNT_NBYTES].view(torch.int64)) for part in self._works[0].parts]
            if max(self._counts) > self._room:
                self._send(self._room, max(self._counts))
                return self.finish(merge)
        given = [self._given(trainer, count) for trainer, count in enumerate(self._counts)]
        found = merged(given, merge)
        for work in self._works:
            work.release()
        self._works = []
        self._make_room(max(self._counts))
        return found

    def _make_room(self, needed: int) -> None:
        """It changes seldom: memory that trainers share is made anew where it does."""
        self._needed.append(needed)
        most = max(self._needed)
        if not most <= self._room <= 2 * most:
            self._room = most + most // 8

    def _send(self, start: int, stop: int) -> None:
        """How many rows there are, and those from `start` to `stop`."""
        ids, rows = self._own
        count = torch.tensor([len(ids)], dtype=torch.int64, device=rows.device)
        places = _COUNT_NBYTES, _COUNT_NBYTES + (stop - start) * _ID_NBYTES
        pieces = [(0, count), (places[0], ids[start:stop]), (places[1], rows[start:stop])]
        name = self._names[len(self._works)]
        self._works.append(self._gather(places[1] + (stop - start) * _nbytes(rows), pieces, name))

    def _given(self, trainer: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What a trainer has given, in one part or two."""
        stretches = [(0, self._room), (self._room, max(self._counts))]
        found = [
            self._stretch(work.parts[trainer], stop - start, min(stop, count) - start)
            for work, (start, stop) in zip(self._works, stretches, strict=False)
            if start < count or not start
        ]
        return found[0] if len(found) == 1 else tuple(map(torch.cat, zip(*found, strict=True)))  # type: ignore[return-value]

    def _stretch(self, part: torch.Tensor, room: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """So many ids and rows of a part that has room for more."""
        rows, first = self._own[1], _COUNT_NBYTES + room * _ID_NBYTES
        ids = part[_COUNT_NBYTES : _COUNT_NBYTES + count * _ID_NBYTES].view(torch.int64)
        found = part[first : first + count * _nbytes(rows)].view(rows.dtype)
        return ids, found.view(count, *rows.shape[1:])


def merged(given: Sequence[tuple[torch.Tensor, torch.Tensor]], merge: str) -> list[torch.Tensor]:
    """The distinct ids of all trainers, in the order in which they first come, and the sum of each one's rows, added in the
    order of trainers. In memory of their own.

    Ids [0, 1] with [2, 4] and ids [1, 2] with [6, 8] give [0, 1, 2] with [2, 10, 8]; "mean_by_touch", over the trainers that
    have an id: [2, 5, 8]. Trainer by trainer, whose ids are distinct, so that the order is the same on every device. Halves
    that nobody has scaled are added in float32.
    """
    dtype = given[0][1].dtype
    wide = torch.float32 if merge == "mean_by_touch" and dtype in HALVES else dtype
    parts = standing_anywhere([ids for ids, _ in given])
    ids = some([(each, part.new) for (each, _), part in zip(given, parts, strict=True)])
    total = some([(rows, part.new) for (_, rows), part in zip(given, parts, strict=True)]).to(wide)
    for (_, rows), part in zip(given, parts, strict=True):
        if len(part.again):
            total.index_add_(0, part.places, rows.index_select(0, part.again).to(wide))
    if merge == "mean_by_touch":
        counts = torch.ones(len(ids), dtype=wide, device=total.device)
        for part in parts:
            counts[part.places] += 1
        total = total / counts.view(-1, *[1] * (total.dim() - 1))
    return [ids, total.to(dtype)]


def _nbytes(tensor: torch.Tensor) -> int:
    """Of one row."""
    return math.prod(tensor.shape[1:]) * tensor.element_size()
