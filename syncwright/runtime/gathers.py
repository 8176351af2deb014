"""Bytes that every trainer gives to all: laid out by who sends them, read where they came."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from syncwright.runtime.shared_memory import HostGroup
from syncwright.runtime.transport import Work

Pieces = Sequence[tuple[int, torch.Tensor]]
"""Tensors, contiguous, each with the place of its first byte."""
ALIGNMENT = 64


def rounded(nbytes: int) -> int:
    """So many bytes that what lies behind them is aligned for any dtype."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def lay_out(own: torch.Tensor, pieces: Pieces) -> None:
    """Writes each piece at its place among the bytes of `own`."""
    for place, piece in pieces:
        flat = piece.reshape(-1).view(torch.uint8)
        own[place : place + flat.numel()].copy_(flat)


class CopiedGathered:
    """By a collective that copies (see `transport.Gathered`).

    gather  starts the gathering of a part of every trainer, all of one size, into a tensor of all
    """

    def __init__(
        self, trainers: int, nbytes: int, pieces: Pieces, gather: Callable[[torch.Tensor, torch.Tensor], Work]
    ):
        own = pieces[0][1].new_zeros(rounded(nbytes), dtype=torch.uint8)
        lay_out(own, pieces)
        self._whole = own.new_empty([trainers, own.numel()])
        self._work = gather(self._whole.view(-1), own)

    @property
    def parts(self) -> Sequence[torch.Tensor]:
        return list(self._whole)

    def done(self) -> bool:
        return self._work.done()


class HostGathered:
    """In the memory that trainers of one host share: nobody but its sender copies a byte."""

    def __init__(self, group: HostGroup, nbytes: int, pieces: Pieces, note: str):
        self._group, self._note = group, note
        self._slot, self._parity, self._begun = group.begin_with(
            rounded(nbytes), torch.uint8, note, lambda own: lay_out(own, pieces)
        )

    @property
    def parts(self) -> Sequence[torch.Tensor]:
        return [self._slot.buffers[rank][self._parity] for rank in self._group.members]

    def done(self) -> bool:
        """Waits until every trainer has laid out its part, then True."""
        self._group.wait(self._begun, self._note)
        return True
