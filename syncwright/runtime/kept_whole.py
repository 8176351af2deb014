"""What one trainer keeps for all: sums that it gets, values that it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from syncwright.runtime.gathers import Pieces, lay_out, rounded
from syncwright.runtime.scatters import added_up
from syncwright.runtime.shared_memory import HostGroup, Turn
from syncwright.runtime.transport import Work


class CopiedSum:
    """By a collective that copies (see `transport.Scattered`).

    reduce  starts the sum of a tensor over all trainers, in place with the one that keeps it
    """

    def __init__(self, tensors: Sequence[torch.Tensor], is_keeper: bool, reduce: Callable[[torch.Tensor], Work]):
        self.own = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._is_keeper = is_keeper
        self._work: Work | None = reduce(self.own)

    def done(self) -> bool:
        if self._work is not None and self._work.done():
            self._work = None
            if not self._is_keeper:
                self.own = self.own.new_empty(0)
        return self._work is None


class HostSumToOne:
    """In the memory that trainers of one host share: all write, one adds up."""

    def __init__(self, group: HostGroup, tensors: Sequence[torch.Tensor], keeper: int, note: str):
        self._group, self._is_keeper = group, group.place == keeper
        self._count = sum(each.numel() for each in tensors)
        self._turn: Turn | None = group.begin_with(
            self._count, tensors[0].dtype, note, lambda whole: _write(whole, tensors)
        )
        self.own = tensors[0].new_empty(0)

    def done(self) -> bool:
        """Waits until all have written; the keeper adds up in the order of trainers. Then True."""
        if self._turn is not None:
            self.own = added_up(self._group, self._turn, 0, self._count if self._is_keeper else 0)
            self._turn = None
        return True


class CopiedGift:
    """By a collective that copies (see `transport.Gathered`): one part, the keeper's.

    broadcast  starts to give all trainers a tensor of one of them, in place
    """

    def __init__(self, nbytes: int, pieces: Pieces, is_keeper: bool, broadcast: Callable[[torch.Tensor], Work]):
        given = pieces[0][1].new_zeros(rounded(nbytes), dtype=torch.uint8)
        if is_keeper:
            lay_out(given, pieces)
        self.parts: Sequence[torch.Tensor] = [given]
        self._work = broadcast(given)

    def done(self) -> bool:
        return self._work.done()

    def release(self) -> None:
        self.parts = ()


class HostGift:
    """In the memory that trainers of one host share: the keeper writes, all read."""

    def __init__(self, group: HostGroup, nbytes: int, pieces: Pieces, keeper: int, note: str):
        self._group, self._keeper = group, group.members[keeper]
        is_keeper = group.place == keeper
        self._turn = group.begin_with(
            rounded(nbytes), torch.uint8, note, lambda own: lay_out(own, pieces) if is_keeper else None
        )
        self.parts: Sequence[torch.Tensor] = ()

    def done(self) -> bool:
        """Waits until the keeper has written, then True."""
        self.parts = [part for rank, part in self._group.parts(self._turn) if rank == self._keeper]
        return True

    def release(self) -> None:
        self.parts = ()
        self._group.end(self._turn)


def _write(whole: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    for place, tensor in zip(whole.split([each.numel() for each in tensors]), tensors, strict=True):
        place.copy_(tensor.reshape(-1))
