"""Rows that trainers gather from each other: one table's gradients of a step, on their way and merged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from syncwright.runtime.merging import HALVES
from syncwright.runtime.transport import Work

AllGather = Callable[[torch.Tensor, torch.Tensor], Work]
"""Starts the gathering of every trainer's part, all of one size, into a tensor of all."""
_COUNT_NBYTES = _ID_NBYTES = 8


class Gathering:
    """The gradients of one table among the trainers. Changes with every step.

    A collective gathers as many bytes of each trainer, and trainers look up different numbers of rows. So each sends how many
    it has and the first `room` of them; where some trainer has more, all see it and send the rest in a second collective. The
    room is what the last step would have needed and an eighth more: the same on all trainers, as all have seen the same.
    """

    def __init__(self, trainers: int, all_gather: AllGather):
        self._trainers, self._all_gather = trainers, all_gather
        self._room = 0
        self._own: tuple[torch.Tensor, torch.Tensor] = (torch.empty(0), torch.empty(0))
        self._counts: list[int] = []
        self._parts: list[torch.Tensor] = []
        self._work: Work | None = None

    def start(self, ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Gives this trainer's rows, of distinct ids."""
        assert self._work is None, "the rows of the step before have been taken"
        self._own, self._counts = (ids.to(torch.int64), rows.detach()), []
        count = torch.tensor([len(ids)], dtype=torch.int64, device=rows.device)
        self._send([_bytes(count), *self._stretch(0, self._room)])

    def finish(self, merge: str) -> list[torch.Tensor] | None:
        """The distinct ids of all trainers and their merged rows (see `merged`), or None while they are not there."""
        assert self._work is not None, "it was started"
        if not self._work.done():
            return None
        if not self._counts:
            self._counts = self._parts[0][:, :_COUNT_NBYTES].contiguous().view(torch.int64).reshape(-1).tolist()
            if max(self._counts) > self._room:
                self._send(self._stretch(self._room, max(self._counts)))
                return self.finish(merge)
        given = [self._given(trainer, count) for trainer, count in enumerate(self._counts)]
        self._room = max(self._counts) + max(self._counts) // 8
        self._parts, self._work = [], None
        return merged(given, merge)

    def _stretch(self, start: int, stop: int) -> list[torch.Tensor]:
        """The bytes of the ids and rows from `start` to `stop`, with zeros where there are none."""
        found = []
        for each in self._own:
            own = _bytes(each[start:stop])
            missing = (stop - start) * _nbytes(each) - own.numel()
            found += [own, own.new_zeros(missing)]
        return found

    def _send(self, parts: Sequence[torch.Tensor]) -> None:
        own = torch.cat(list(parts))
        whole = own.new_empty([self._trainers, own.numel()])
        self._parts.append(whole)
        self._work = self._all_gather(whole.view(-1), own)

    def _given(self, trainer: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What a trainer has given, from one or two parts."""
        (ids, rows), width = self._own, _nbytes(self._own[1])
        first = self._parts[0][trainer, _COUNT_NBYTES:]
        stretches = [(first, min(count, self._room), self._room)]
        if len(self._parts) > 1:
            rest = max(self._counts) - self._room
            stretches.append((self._parts[1][trainer], max(0, count - self._room), rest))
        own_ids = [part[: there * _ID_NBYTES] for part, there, _ in stretches]
        own_rows = [part[room * _ID_NBYTES :][: there * width] for part, there, room in stretches]
        found = torch.cat(own_rows).view(rows.dtype).view(count, *rows.shape[1:])
        return torch.cat(own_ids).view(ids.dtype), found


def merged(given: Sequence[Sequence[torch.Tensor]], merge: str) -> list[torch.Tensor]:
    """Distinct ids, sorted, and the sum of each one's rows, added in the order of trainers.

    Ids [0, 1] with [2, 4] and ids [1, 2] with [6, 8] give [0, 1, 2] with [2, 10, 8]; "mean_by_touch", over the trainers that
    have an id: [2, 5, 8]. Trainer by trainer, whose ids are distinct, so that the order is the same on every device. Halves
    that nobody has scaled are added in float32.
    """
    ids, places = torch.unique(torch.cat([each for each, _ in given]), return_inverse=True)
    dtype = given[0][1].dtype
    wide = torch.float32 if merge == "mean_by_touch" and dtype in HALVES else dtype
    total = given[0][1].new_zeros([len(ids), *given[0][1].shape[1:]], dtype=wide)
    for (_, rows), mine in zip(given, places.split([len(each) for each, _ in given]), strict=True):
        total.index_add_(0, mine, rows.to(wide))
    if merge == "mean_by_touch":
        counts = torch.bincount(places, minlength=len(ids)).to(wide)
        total = total / counts.view(-1, *[1] * (total.dim() - 1))
    return [ids, total.to(dtype)]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _nbytes(tensor: torch.Tensor) -> int:
    """Of one row."""
    return math.prod(tensor.shape[1:]) * tensor.element_size()
