"""Sums over all trainers of which each gets its own parts: laid out by who gets them, added in the order of trainers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from syncwright.runtime.shared_memory import HostGroup, Turn
from syncwright.runtime.transport import Work
from syncwright.selection import Own


def parts_of(tensors: Sequence[torch.Tensor], trainers: int) -> list[Own]:
    """How tensors are cut into parts of one size, zeros behind their ends."""
    return [Own("", tuple(tensor.shape), trainers) for tensor in tensors]


def lay_out(whole: torch.Tensor, tensors: Sequence[torch.Tensor], trainers: int) -> None:
    """Writes tensors into `whole`: first all parts of trainer 0, one behind another, then those of trainer 1.

    [0, 1, 2] and [3, 4] for two trainers are 0 1 3 2 z 4, z being a zero.
    """
    rows, at = whole.view(trainers, -1), 0
    for tensor, own in zip(tensors, parts_of(tensors, trainers), strict=True):
        place, flat = rows[:, at : at + own.count], tensor.reshape(-1)
        at += own.count
        if not own.is_padded:
            place.copy_(flat.view(trainers, own.count))
            continue
        for trainer in range(trainers):
            start, stop = own.bounds(trainer)
            place[trainer, : stop - start].copy_(flat[start:stop])
            place[trainer, stop - start :].zero_()


def laid_out(tensors: Sequence[torch.Tensor], trainers: int) -> torch.Tensor:
    """Tensors so, in memory of their own."""
    whole = tensors[0].new_empty(trainers * sum(own.count for own in parts_of(tensors, trainers)))
    lay_out(whole, tensors, trainers)
    return whole


class CopiedScattered:
    """By a collective that copies (see `transport.Scattered`).

    scatter  starts the reduction of a tensor that is laid out so to this trainer's part of it
    """

    def __init__(
        self, trainers: int, tensors: Sequence[torch.Tensor], scatter: Callable[[torch.Tensor, torch.Tensor], Work]
    ):
        whole = laid_out(tensors, trainers)
        self.own = whole.new_empty(whole.numel() // trainers)
        self._work: Work | None = scatter(self.own, whole)

    def done(self) -> bool:
        if self._work is not None and self._work.done():
            self._work = None
        return self._work is None


class ExchangedScattered:
    """By an exchange, after which each trainer has what all have of its own parts, and adds it up.

    Gloo's reduce-scatter sends as much as an all-reduce: this sends half of that, which is the least.

    exchange  starts to send row k of a tensor to trainer k of the group, and to receive a row from each
    """

    def __init__(
        self, trainers: int, tensors: Sequence[torch.Tensor], exchange: Callable[[torch.Tensor, torch.Tensor], Work]
    ):
        self._sent = laid_out(tensors, trainers).view(trainers, -1)
        self._received = torch.empty_like(self._sent)
        self._work: Work | None = exchange(self._received, self._sent)
        self.own = self._sent.new_empty(0)

    def done(self) -> bool:
        """Waits for the others' parts, adds them in the order of trainers, then True."""
        if self._work is not None and self._work.done():
            self._work = None
            self.own = sum_of(list(self._received))
            self._sent = self._received = self.own
        return self._work is None


class HostScattered:
    """In the memory that trainers of one host share: each adds up its own part of what all have written there."""

    def __init__(self, group: HostGroup, tensors: Sequence[torch.Tensor], note: str):
        self._group, trainers = group, len(group.members)
        self._count = sum(own.count for own in parts_of(tensors, trainers))
        self._turn: Turn | None = group.begin_with(
            trainers * self._count, tensors[0].dtype, note, lambda whole: lay_out(whole, tensors, trainers)
        )
        self.own = tensors[0].new_empty(0)

    def done(self) -> bool:
        """Waits for the others' parts, adds them in the order of trainers, then True."""
        if self._turn is not None:
            start = self._group.place * self._count
            self.own = added_up(self._group, self._turn, start, start + self._count)
            self._turn = None
        return True


def added_up(group: HostGroup, turn: Turn, start: int, stop: int) -> torch.Tensor:
    """Waits until all have written; the sum of their elements [start, stop), in the order of trainers. Ends the turn."""
    total = sum_of([part[start:stop] for _, part in group.parts(turn)])
    group.end(turn)
    return total


def sum_of(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of two or more, added in their order."""
    first, second, *others = parts
    total = torch.add(first, second)
    for part in others:
        total.add_(part)
    return total
